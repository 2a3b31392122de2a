"""CacheFlow restores evicted KV caches by recomputing and loading at once.

The package is layered; import from the layer you need, such as ``cacheflow.plan`` or ``cacheflow.embedded``. Importing
``cacheflow`` itself pulls in nothing heavier than the standard library.
"""

from cacheflow.errors import CacheFlowError

__version__ = "0.1.0"

__all__ = ["CacheFlowError", "__version__"]
