"""Several restorations in one engine: who comes first follows the objective, and nobody is passed for ever."""

from __future__ import annotations

import pytest

from cacheflow.errors import ConfigError
from cacheflow.vllm.options import ConnectorOptions
from support.scheduler_cases import CHUNK, Case, Worker


def case_of(**changes) -> Case:
    defaults = {"chunk_tokens": CHUNK, "lookup_timeout_s": 20.0, "recompute_budget_ms": 20.0, "explain": True}
    return Case(options=ConnectorOptions(**{**defaults, **changes}))


def ended(case: Case, lengths: dict[str, int]) -> list[str]:
    """Restore prefixes of so many chunks beside decoding requests; who ended when, by name."""
    names: dict[int, str] = {}
    worker = Worker(case)
    for seed, (name, num_chunks) in enumerate(lengths.items()):
        case.arrive(name, case.saved_prompt(num_chunks * CHUNK + 5, num_chunks, seed=seed))
        case.begin(name)
        orders = case.step(busy=1)
        names |= {target.restore_id: name for target in orders.targets}
        worker.carry_out(orders)
    for _ in range(3000):
        if not case.side.has_work:
            return [names[restore_id] for restore_id in worker.finished]
        worker.carry_out(case.step(busy=1))
    raise AssertionError("never ended")


def test_the_shortest_comes_first_unless_told_otherwise():
    assert ended(case_of(), {"long": 40, "middle": 12, "short": 3}) == ["short", "middle", "long"]
    assert ended(case_of(objective="fcfs"), {"long": 40, "middle": 12, "short": 3}) == ["long", "middle", "short"]


def test_a_restoration_that_has_waited_long_is_passed_no_more():
    lengths = {"long": 60} | {f"short{index}": 8 for index in range(8)}
    assert ended(case_of(), lengths)[-1] == "long"
    assert ended(case_of(starvation_s=0.1), lengths).index("long") <= 3


def test_what_cannot_be_in_time_gives_way():
    # 40 chunks take 800 ms at best (half recomputed at 40 ms a chunk), the others a tenth and a fifth of it.
    lengths = {"hopeless": 40, "b": 4, "c": 8}
    assert ended(case_of(objective="slo", ttft_slo_ms=500.0), lengths)[-1] == "hopeless"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": "quickest"}, "objective is 'quickest', must be one of fcfs"),
        ({"objective": "slo"}, "needs a ttft_slo_ms"),
        ({"ttft_slo_ms": 100.0}, "the others take none"),
        ({"starvation_s": 0.0}, "starvation_s is 0.0, must be above 0"),
    ],
)
def test_contradictions_are_refused_at_start(changes, said):
    with pytest.raises(ConfigError, match=said):
        ConnectorOptions(**changes)
