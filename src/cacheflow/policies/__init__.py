"""Restore policies: each turns a problem into a plan; ``registry.make_policy`` makes one by name."""
