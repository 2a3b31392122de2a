"""Carrying out compute work, and the hand-overs between pipeline stages that go with it.

A stage that is to receive waits for the stage below. So whatever goes wrong, work that sends is answered: with the
activations, or with word that there are none.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from cacheflow.restore.ports import ComputePort, HandOverPort
from cacheflow.restore.work import ComputeWork

logger = logging.getLogger(__name__)


def receive(port: object, chunks: Sequence[int]) -> None:
    """Take all that the stage below sends; raises what the port raises."""
    for index, chunk in enumerate(chunks):
        try:
            _hands_over(port).receive(chunk)
        except Exception:  # whatever it was: what was sent after it must be taken too; raised again
            take_unwanted(port, chunks[index + 1 :])
            raise


def take_unwanted(port: object, chunks: Sequence[int]) -> None:
    """Take what the stage below sends, for a restoration that is over."""
    for chunk in chunks:
        try:
            _hands_over(port).receive(chunk)
        except Exception:  # what is not needed need not come
            logger.debug("chunk %d is not needed, and was not received", chunk, exc_info=True)


def recompute(port: ComputePort, work: ComputeWork) -> None:
    """Carry out one piece of work; raises what the port raises, once the stage above has an answer."""
    chunk = work.tile.chunk_lo
    try:
        if work.restart:
            port.restart(chunk)
        port.recompute(work.tile, kv_only_top=work.kv_only_top)
        if work.sends:
            _hands_over(port).send(chunk, failed=False)
    except Exception:  # whatever it was: the stage above waits for an answer; raised again
        forfeit(port, [work])
        raise


def forfeit(port: object, works: Sequence[ComputeWork]) -> None:
    """Answer the hand-overs of work that will not be carried out, because something before it failed."""
    for work in works:
        if not work.sends:
            continue
        try:
            _hands_over(port).send(work.tile.chunk_lo, failed=True)
        except Exception:  # the others wait too; who is not answered gives up by itself
            logger.warning("chunk %d could not be answered for", work.tile.chunk_lo, exc_info=True)


def _hands_over(port: object) -> HandOverPort:
    if not isinstance(port, HandOverPort):
        raise TypeError(f"{type(port).__name__} hands no activations over, and was to")
    return port
