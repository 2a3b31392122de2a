"""Carrying out compute orders on one worker, hand-overs between pipeline stages included.

A stage that was ordered to receive waits for the stage below. So whatever goes wrong, an order that sends is answered:
with the activations, or with word that there are none.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from cacheflow.restore.orders import ComputeOrder
from cacheflow.restore.ports import ComputePort, HandOverPort

logger = logging.getLogger(__name__)


def recompute(port: ComputePort, order: ComputeOrder) -> None:
    """Carry out one order; raises what the port raises, once the stage above was told."""
    chunk = order.tile.chunk_lo
    try:
        if order.receives:
            _hands_over(port).receive(chunk)
        if order.restart:
            port.restart(chunk)
        port.recompute(order.tile, kv_only_top=order.kv_only_top)
    except Exception:  # whatever it was: the stage above waits for an answer; raised again
        if order.sends:
            _hands_over(port).send(chunk, failed=True)
        raise
    if order.sends:
        _hands_over(port).send(chunk, failed=False)


def forfeit(port: ComputePort, orders: Sequence[ComputeOrder]) -> None:
    """Answer the hand-overs of orders that will not be carried out, because an earlier one failed."""
    for order in orders:
        chunk = order.tile.chunk_lo
        try:
            if order.receives:
                _hands_over(port).receive(chunk)
        except Exception:  # what is not needed need not come, but the stage above must still be told
            logger.debug("chunk %d is not needed, and was not received", chunk, exc_info=True)
        if order.sends:
            _hands_over(port).send(chunk, failed=True)


def _hands_over(port: ComputePort) -> HandOverPort:
    if not isinstance(port, HandOverPort):
        raise TypeError(f"{type(port).__name__} hands no activations over, and was ordered to")
    return port
