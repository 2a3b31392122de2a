"""Other connectors for vLLM, made comparable; in the repository only."""
