"""Figures 3 to 10 of the CacheFlow paper redrawn, and ours, by simulation in virtual time."""
