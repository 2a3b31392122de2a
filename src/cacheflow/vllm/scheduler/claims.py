"""The chunks that a step begins to save or restore, by the tenant whose quota they count for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from cacheflow.stores.keys import chain_root
from cacheflow.vllm.scheduler.request import TrackedRequest
from cacheflow.vllm.step import StepWork


def claims_of(work: StepWork, requests: Mapping[str, TrackedRequest]) -> dict[str, tuple[str, ...]]:
    """Chain hashes (hex) by tenant: the root of its chains, also in hex, which no two salts share.

    Args:
        work: Of the step.
        requests: Those that have not ended, by id; what is restored for one that has ended counts for nobody.
    """
    claims: defaultdict[str, list[str]] = defaultdict(list)
    for save in work.saves:
        claims[_tenant(requests[save.request_id])].append(save.chain_hash)
    for target in work.targets:
        if target.request_id in requests:
            claims[_tenant(requests[target.request_id])] += target.chain_hashes
    return {tenant: tuple(chain_hashes) for tenant, chain_hashes in claims.items()}


def _tenant(request: TrackedRequest) -> str:
    return chain_root(request.view.salt).hex()
