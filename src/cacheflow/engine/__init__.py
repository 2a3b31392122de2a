"""The embedded engine: Hugging Face decoder layers over our own KV buffer, on the CPU or one CUDA device."""
