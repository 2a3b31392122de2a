"""Restoring on several ranks of vLLM at once."""
