"""Stores read as fast as they go, beside other ways to the same bytes."""
