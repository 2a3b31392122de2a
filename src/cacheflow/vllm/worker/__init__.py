"""What runs in vLLM's workers at each step: recomputes, reads, places and saves."""
