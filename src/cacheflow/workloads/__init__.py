"""Prompts and sessions made of real text, for the demo, the benchmarks and the simulator."""
