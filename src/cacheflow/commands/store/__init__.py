"""``cacheflow store``: what an operator does to a store."""
