"""Gives each child of vLLM's ``MultiConnector`` its own handshake.

vLLM 0.32 and 0.33 ask the children in order, keep the first answer, and hand that to all of them: the others are never
asked, and are given what they cannot read. CacheFlow's workers hand over what they found out at start, and a sibling
may need a handshake as well. So, in memory and only in processes that have CacheFlow's connector, ``MultiConnector``
asks all of its children and hands to each what its own workers answered, as vLLM does with a connector that is alone.
"""

# ruff: noqa: ANN401 -- vLLM's objects: its types are not seen where CacheFlow is checked

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

from cacheflow.errors import ConfigError

Rank = TypeVar("Rank", int, tuple[int, int])

_MARK = "_cacheflow_by_child"


@dataclass
class ChildHandshakes(KVConnectorHandshakeMetadata):
    """What the children of one worker's ``MultiConnector`` hand over, in their order; None where one has nothing."""

    by_child: tuple[KVConnectorHandshakeMetadata | None, ...]


def keep_handshakes_apart() -> None:
    """Change ``MultiConnector``; calling it again does nothing.

    Raises:
        ConfigError: This vLLM's ``MultiConnector`` does not show its children.
    """
    if hasattr(MultiConnector.get_handshake_metadata, _MARK):
        return
    if not hasattr(MultiConnector, "sub_connectors"):
        raise ConfigError("this vLLM's MultiConnector lacks sub_connectors; CacheFlow supports 0.32 and 0.33")

    def get_handshake_metadata(multi: Any) -> ChildHandshakes | None:
        by_child = tuple(child.get_handshake_metadata() for child in multi.sub_connectors)
        return None if all(each is None for each in by_child) else ChildHandshakes(by_child)

    def set_xfer_handshake_metadata(multi: Any, metadata: Mapping[int, Any]) -> None:
        for number, child in enumerate(multi.sub_connectors):
            child.set_xfer_handshake_metadata(_of_child(metadata, number))

    def set_xfer_handshake_metadata_pp_aware(multi: Any, metadata: Mapping[tuple[int, int], Any]) -> None:
        for number, child in enumerate(multi.sub_connectors):
            child.set_xfer_handshake_metadata_pp_aware(_of_child(metadata, number))

    setattr(get_handshake_metadata, _MARK, True)
    for method in (get_handshake_metadata, set_xfer_handshake_metadata, set_xfer_handshake_metadata_pp_aware):
        setattr(MultiConnector, method.__name__, method)


def _of_child(metadata: Mapping[Rank, Any], number: int) -> dict[Rank, Any]:
    """What one child's workers handed over, by rank; empty when it hands nothing over."""
    own = {rank: each.by_child[number] for rank, each in metadata.items()}
    return {rank: each for rank, each in own.items() if each is not None}
