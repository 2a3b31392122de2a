"""The engine, the stores and the policies put together for library users: sessions whose prefixes come back.

>>> from cacheflow.embedded import Engine, EngineOptions           # doctest: +SKIP
>>> engine = Engine.open("smollm2-135m", store="memory", capacity_bytes=1 << 30, costs=table, link=link)
>>> session = engine.session()
>>> reply = session.generate(tokens, max_new_tokens=64)
>>> session.evict()
>>> reply = session.generate(more_tokens, max_new_tokens=64)       # restored, not recomputed from scratch
>>> reply.report.as_dict()

Many sessions at once, from any thread, their prefixes restored and their answers decoded side by side:

>>> with engine.concurrent(objective="mean_ttft", itl_slo_ms=80) as batch:
...     pending = [batch.submit(session, tokens, max_new_tokens=64) for session in sessions]
...     replies = [each.result() for each in pending]
"""

from cacheflow.embedded.batch_options import BatchOptions
from cacheflow.embedded.concurrent import ConcurrentBatch, PendingReply
from cacheflow.embedded.engine import Engine, EngineOptions
from cacheflow.embedded.reply import Reply
from cacheflow.embedded.restorer import Restored, Restorer, RestoreRequest
from cacheflow.embedded.session import Session

__all__ = [
    "BatchOptions",
    "ConcurrentBatch",
    "Engine",
    "EngineOptions",
    "PendingReply",
    "Reply",
    "RestoreRequest",
    "Restored",
    "Restorer",
    "Session",
]
