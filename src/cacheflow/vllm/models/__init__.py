"""vLLM's models as recomputation needs them: which are supported, how a worker's is found, partial forwards."""
