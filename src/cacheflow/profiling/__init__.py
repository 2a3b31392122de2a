"""Measures what a model and a link cost on this machine and keeps it in profiles."""
