"""Who is compared: a batch policy over a restore policy, by name."""

from __future__ import annotations

from dataclasses import dataclass

from cacheflow.plan.batch import BatchPolicy
from cacheflow.policies.batch_registry import make_batch_policy
from cacheflow.policies.registry import make_policy
from cacheflow.sim.device import READS_IN_FLIGHT


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """How one system serves requests.

    Attributes:
        crossover_tokens: For ``cacheflow_v1``; None predicts the better way.
        prefills: Restores nothing: the engine prefills the whole prompt.
        reads_in_flight: Reads it asks of a simulated link at once; one where cells are so large that several would
            settle where compute and the link meet.
    """

    name: str
    restore: str
    batch: str = "fcfs"
    crossover_tokens: int | None = None
    prefills: bool = False
    reads_in_flight: int = READS_IN_FLIGHT

    def make(self) -> BatchPolicy:
        """The batch policy."""
        return make_batch_policy(self.batch, make_policy(self.restore, crossover_tokens=self.crossover_tokens))
