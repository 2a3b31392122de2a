"""Hand-overs between pipeline stages, and carrying out a compute order on one worker.

A stage that was ordered to receive waits for the stage below. So whatever goes wrong, an order that sends is answered:
with the activations, or with word that there are none.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from cacheflow.restore.ports import ComputePort, HandOverPort
from cacheflow.restore.work import ComputeWork

logger = logging.getLogger(__name__)


def receive(port: object, chunks: Sequence[int]) -> None:
    """Take what the stage below was ordered to send, all of it; raises what the port raises."""
    for index, chunk in enumerate(chunks):
        try:
            _hands_over(port).receive(chunk)
        except Exception:  # whatever it was: what was sent behind it must be taken too; raised again
            take_unwanted(port, chunks[index + 1 :])
            raise


def take_unwanted(port: object, chunks: Sequence[int]) -> None:
    """Take what the stage below was ordered to send, for a restoration that is over."""
    for chunk in chunks:
        try:
            _hands_over(port).receive(chunk)
        except Exception:  # what is not needed need not come
            logger.debug("chunk %d is not needed, and was not received", chunk, exc_info=True)


def recompute(port: ComputePort, order: ComputeWork) -> None:
    """Carry out one order; raises what the port raises, once the stage above was told."""
    chunk = order.tile.chunk_lo
    try:
        if order.restart:
            port.restart(chunk)
        port.recompute(order.tile, kv_only_top=order.kv_only_top)
        if order.sends:
            _hands_over(port).send(chunk, failed=False)
    except Exception:  # whatever it was: the stage above waits for an answer; raised again
        forfeit(port, [order])
        raise


def forfeit(port: object, orders: Sequence[ComputeWork]) -> None:
    """Answer the hand-overs of orders that will not be carried out, because an earlier one failed."""
    for order in orders:
        if not order.sends:
            continue
        try:
            _hands_over(port).send(order.tile.chunk_lo, failed=True)
        except Exception:  # the others wait too; who is not answered gives up by itself
            logger.warning("chunk %d could not be answered for", order.tile.chunk_lo, exc_info=True)


def _hands_over(port: object) -> HandOverPort:
    if not isinstance(port, HandOverPort):
        raise TypeError(f"{type(port).__name__} hands no activations over, and was ordered to")
    return port
