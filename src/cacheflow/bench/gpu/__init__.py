"""``cacheflow bench gpu``: the first study on a GPU, in parts that each watch the clock; rehearsed on the CPU."""
