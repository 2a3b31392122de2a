"""What runs in vLLM's scheduler: looks prefixes up, decides, and makes each step's work."""
