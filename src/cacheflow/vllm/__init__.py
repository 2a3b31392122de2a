"""CacheFlow inside vLLM: a KV connector and the plugin that finds the model. The only package that imports vLLM."""
