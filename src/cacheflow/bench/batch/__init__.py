"""Many prefixes restored at once."""
