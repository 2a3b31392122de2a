"""What an operator runs: plan, calibrate, serve, simulate, demo."""
