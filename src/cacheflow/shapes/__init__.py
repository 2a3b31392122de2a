"""What models and GPUs cost without measuring here: their shapes, rooflines, and costs that others published."""
