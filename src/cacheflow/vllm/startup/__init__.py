"""Before the first request: what can be checked before vLLM starts, and what each worker tests and measures."""
