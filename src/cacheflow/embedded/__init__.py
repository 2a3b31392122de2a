"""The engine, the stores and the policies put together for library users: sessions whose prefixes come back.

>>> from cacheflow.embedded import Engine, EngineOptions           # doctest: +SKIP
>>> engine = Engine.open("smollm2-135m", store=MemoryStore(capacity_bytes=1 << 30), costs=table, link=link)
>>> session = engine.session()
>>> reply = session.generate(tokens, max_new_tokens=64)
>>> session.evict()
>>> reply = session.generate(more_tokens, max_new_tokens=64)       # restored, not recomputed from scratch
>>> reply.report.as_dict()
"""

from cacheflow.embedded.engine import Engine, EngineOptions
from cacheflow.embedded.restorer import Restored, Restorer, RestoreRequest
from cacheflow.embedded.session import Reply, Session

__all__ = ["Engine", "EngineOptions", "Reply", "RestoreRequest", "Restored", "Restorer", "Session"]
