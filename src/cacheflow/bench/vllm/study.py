"""The rounds of ``bench vllm``: policies take turns on the same prompts, each answer checked against stock vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import msgspec
import numpy as np

from cacheflow.bench.records.base import Environment
from cacheflow.bench.records.restore import GuardRecord
from cacheflow.bench.records.vllm import ITL_SLO_MS, NEIGHBOUR, VllmRecord
from cacheflow.bench.suite import rotated
from cacheflow.bench.vllm.ask import NEIGHBOUR_TOKENS, Asked, Neighbour, ask, compare, save_prefix
from cacheflow.bench.vllm.client import Completion, VllmClient
from cacheflow.bench.vllm.costs import PrefixSize, VllmCosts, least_times, measure_costs, prefix_bytes, to_cache
from cacheflow.bench.vllm.counts import EngineCounts, counts_between
from cacheflow.bench.vllm.fleet import Fleet, wait_until_at_rest
from cacheflow.bench.vllm.policies import OWN_POLICIES, STOCK, link_note
from cacheflow.bench.vllm.workload import PROMPT_STRIDE, BenchModel, prompt

GUARDED = "cacheflow"
"""The only policy with the guard."""
ANSWER_TOKENS = 32
"""Greedy tokens compared with stock vLLM's."""
NEIGHBOUR_PROMPT = 40
"""Index of the neighbour's prompt: far after those of the repeats."""
WARM_UP_PROMPT = 41
"""Index of the prompt of the untimed restorations."""
NEIGHBOUR_ANSWER = 4000
"""Most tokens the neighbour decodes: more than any restoration takes."""
ALTERNATION = "policies take turns in each repeat; servers not in turn are stopped (SIGSTOP), except LMCache's"
ONE_SERVER = "policies take turns in each repeat on one server with our connector, which requests ask for them"


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmStudyOptions:
    """What a study runs.

    Attributes:
        store: Where our connector keeps prefixes: ``file``, or ``memory``, which is lost with its server.
    """

    size: PrefixSize
    repeats: int
    neighbour: bool
    dtype: str
    device: str
    environment: Environment
    store: str = "file"
    itl_slo_ms: float | None = None

    @property
    def perturbation(self) -> dict[str, float]:
        """Of the records: what sets them apart from runs alone."""
        if not self.neighbour:
            return {}
        return NEIGHBOUR if self.itl_slo_ms is None else {**NEIGHBOUR, ITL_SLO_MS: self.itl_slo_ms}


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmLink:
    """The link of some rounds.

    Attributes:
        ratio: Load time of the prefix over vLLM's own prefill time of it.
    """

    ratio: float
    bytes_per_s: float


@dataclass(slots=True)
class VllmStudy:
    """One model and its prompts; ``prepare`` measures the ground, ``rounds`` runs.

    Attributes:
        costs: Stock vLLM's; None before ``prepare``.
        references: Its answers by repeat.
    """

    model: BenchModel
    tokens: Sequence[int]
    options: VllmStudyOptions
    costs: VllmCosts | None = None
    references: list[Completion] = field(default_factory=list)
    _idle_cores: float | None = None
    _reasons: dict[float, str] = field(default_factory=dict)
    _saved: set[tuple[str, int]] = field(default_factory=set)

    def prepare(self, client: VllmClient, *, on_step: Callable[[], None]) -> None:
        """Measure stock vLLM and ask it for the reference answers; ``repeats + 2`` steps."""
        self.costs = measure_costs(client, self.prompt(0), self.options.size, repeats=2, on_step=on_step)
        for repeat in range(self.options.repeats):
            asked = ask(client, self.prompt(repeat), num_tokens=ANSWER_TOKENS)
            self.references.append(asked.answer)
            on_step()

    def link_at(self, ratio: float) -> VllmLink:
        """The link at which loading the prefix takes ``ratio`` times as long as vLLM's own prefill of it."""
        return VllmLink(ratio=ratio, bytes_per_s=self._prefix_bytes / (ratio * self._costs().recompute_s))

    def link_of(self, bytes_per_s: float, records: Sequence[VllmRecord]) -> VllmLink:
        """The link of a bandwidth: with the ratio under which ``records`` have it, else the one by the costs."""
        on_record = (each.load_compute_ratio for each in records if each.link_bytes_per_s == bytes_per_s)
        measured = self._prefix_bytes / (bytes_per_s * self._costs().recompute_s)
        return VllmLink(ratio=next(on_record, float(f"{measured:.2g}")), bytes_per_s=bytes_per_s)

    def round_s(self, link: VllmLink) -> float:
        """What a round of vLLM's own prefill, of loading and of our policy should take, and the guard's reason."""
        load_s, recompute_s = self._prefix_bytes / link.bytes_per_s, self._costs().recompute_s
        return recompute_s + load_s + 2 * min(load_s, recompute_s)

    def is_of(self, record: VllmRecord, bytes_per_s: float) -> bool:
        """Whether a record is of this study's model, prefix and setting over a link of this bandwidth."""
        options, size = self.options, self.options.size
        wanted = {
            "model": self.model.shape.name, "device": options.device, "dtype": options.dtype, "store": options.store,
            "num_tokens": size.num_tokens, "suffix_tokens": size.suffix_tokens, "chunk_tokens": size.chunk_tokens,
            "perturbation": options.perturbation, "link_bytes_per_s": bytes_per_s,
        }  # fmt: skip
        eager = record.environment.get("eager") == options.environment.get("eager")
        return eager and all(getattr(record, key) == value for key, value in wanted.items())

    def warm_up(self, fleet: Fleet) -> None:
        """Save and restore a short prefix with each new server, untimed: a process's first restoration costs extra.

        (Measured: up to 2 s more to the first token, of a restoration that itself took 0.4 s.)
        """
        num_tokens = 2 * self.options.size.chunk_tokens
        text = prompt(self.tokens, WARM_UP_PROMPT, num_tokens + self.options.size.suffix_tokens)
        for policy in fleet.servers:
            if policy != STOCK:
                client = fleet.client(policy)
                with fleet.turn(policy) as server:
                    save_prefix(client, text[: num_tokens + 1])
                    wait_until_at_rest(server)
                    ask(client, text, num_tokens=2)

    def save(self, fleet: Fleet, *, on_step: Callable[[str], None], repeats: Sequence[int] | None = None) -> None:
        """Save the prompts of repeats (None: of all) on every server; file stores outlive their servers."""
        for policy in fleet.savers():
            for repeat in range(self.options.repeats) if repeats is None else repeats:
                if (policy, repeat) in self._saved:
                    continue
                on_step(policy)
                with fleet.turn(policy) as server:
                    save_prefix(fleet.client(policy), to_cache(self.prompt(repeat), self.options.size))
                    wait_until_at_rest(server)
                if policy in OWN_POLICIES and self.options.store == "file":
                    self._saved.add((policy, repeat))

    def note_idle_cores(self, fleet: Fleet) -> None:
        """Measure what the waiting servers use; it goes on record."""
        self._idle_cores = fleet.idle_cores()

    def rounds(self, fleet: Fleet, *, link: VllmLink, on_step: Callable[[str], None]) -> Iterator[VllmRecord]:
        """Every repeat over one link; see ``round``."""
        for repeat in range(self.options.repeats):
            yield from self.round(fleet, link=link, repeat=repeat, on_step=on_step)

    def round(self, fleet: Fleet, *, link: VllmLink, repeat: int, on_step: Callable[[str], None]) -> list[VllmRecord]:
        """One repeat, in which each policy has its turn, a different one first than in the one before."""
        stock_s: float | None = None
        records = []
        for policy in rotated(list(fleet.servers), repeat):
            on_step(policy)
            record = self._run(fleet, policy, repeat=repeat, link=link)
            records.append(record)
            if policy == STOCK and not self.options.neighbour:
                stock_s = record.ttft_s
        return [self._bounded(record, link, stock_s) for record in records]

    def _run(self, fleet: Fleet, policy: str, *, repeat: int, link: VllmLink) -> VllmRecord:
        with fleet.turn(policy):
            client = fleet.client(policy)
            text = prompt(self.tokens, NEIGHBOUR_PROMPT, NEIGHBOUR_TOKENS)
            beside = Neighbour(client, text, max_tokens=NEIGHBOUR_ANSWER) if self.options.neighbour else None
            before = client.metrics()
            side_bytes = fleet.side_bytes(policy)
            asked = ask(client, self.prompt(repeat), num_tokens=ANSWER_TOKENS, neighbour=beside)
            counts = counts_between(before, client.metrics())
            if side_bytes is not None:
                counts = replace(counts, loaded_bytes=(fleet.side_bytes(policy) or 0) - side_bytes)
            guard = self._guard(client, counts, self.prompt(repeat), link) if policy == GUARDED else None
        record = self._record(policy, asked, counts, repeat=repeat, link=link)
        alternation = ONE_SERVER if fleet.modes else ALTERNATION
        return msgspec.structs.replace(
            record, guard=guard, environment={**record.environment, "alternation": alternation}
        )

    def _guard(
        self, client: VllmClient, counts: EngineCounts, prompt: Sequence[int], link: VllmLink
    ) -> GuardRecord | None:
        """What the guard chose, and its reason at its first decision over this link: asked for once, untimed."""
        if not counts.guard_choice:
            return None
        if link.bytes_per_s not in self._reasons:
            client.evict()
            said = client.explain(prompt)
            restored = (record["reason"] for record in said.get("cacheflow") or ())
            self._reasons[link.bytes_per_s] = next(restored, said.get("cacheflow_reason", ""))
        return GuardRecord(choice=counts.guard_choice, reason=self._reasons[link.bytes_per_s])

    def _record(self, policy: str, asked: Asked, counts: EngineCounts, *, repeat: int, link: VllmLink) -> VllmRecord:
        options, shape = self.options, self.model.shape
        answer = asked.answer
        compared = compare(answer, self.references[repeat], beside_neighbour=options.neighbour)
        note = "; ".join(filter(None, (compared.note, _not_restored(policy, answer, options.size))))
        recomputed, loaded, wasted = _cells(policy, answer, counts, options.size, shape.num_rows)
        return VllmRecord(
            suite="vllm",
            policy=policy,
            device=options.device,
            dtype=options.dtype,
            **self.model.on_record(options.size, bytes_per_s=link.bytes_per_s, ratio=link.ratio),
            store=options.store,
            repeat=repeat,
            restore_s=counts.restore_s or None,
            ttft_s=answer.ttft_s,
            bound_restore_s=None,
            bound_ttft_s=None,
            recomputed_cells=recomputed,
            loaded_cells=loaded,
            wasted_bytes=wasted * options.size.chunk_tokens * shape.kv_bytes_per_token_layer,
            correct=compared.correct,
            environment={
                **options.environment,
                "link": link_note(policy),
                "idle_cores": self._idle_cores,
                "bound_fit_error": self._costs().fit_error,
            },
            loaded_bytes=round(counts.loaded_bytes),
            perturbation=options.perturbation,
            cached_tokens=answer.cached_tokens,
            equal_tokens=compared.equal_tokens,
            compared_tokens=answer.num_tokens,
            first_logprob_distance=compared.logprob_distance,
            note=note,
            **_neighbour_times(asked.neighbour_itls_s),
        )

    def _bounded(self, record: VllmRecord, link: VllmLink, stock_s: float | None) -> VllmRecord:
        """The record with its bound, from costs corrected for the machine's speed in this repeat."""
        costs = self._costs()
        drift = 1.0 if stock_s is None else stock_s / costs.full_s
        least = least_times(costs, self.model.shape, self.options.size, bytes_per_s=link.bytes_per_s, drift=drift)
        where = {**record.environment, "drift": round(drift, 4)}
        return msgspec.structs.replace(
            record, bound_ttft_s=least.ttft_s, bound_restore_s=least.restore_s, environment=where
        )

    def _costs(self) -> VllmCosts:
        assert self.costs is not None  # prepare comes first
        return self.costs

    @property
    def _prefix_bytes(self) -> int:
        return prefix_bytes(self.model.shape, self.options.size)

    def prompt(self, repeat: int) -> list[int]:
        """The prefix and the new tokens of a repeat."""
        return prompt(self.tokens, repeat, self.options.size.num_tokens + self.options.size.suffix_tokens)


def longest_sequence(size: PrefixSize) -> int:
    """Tokens of the longest request of a study."""
    return max(size.num_tokens + size.suffix_tokens, NEIGHBOUR_TOKENS + NEIGHBOUR_ANSWER) + ANSWER_TOKENS


def tokens_needed(size: PrefixSize, repeats: int) -> int:
    """How long the text of a study must be."""
    whole = size.num_tokens + size.suffix_tokens
    warm = 2 * size.chunk_tokens + size.suffix_tokens
    return max(repeats * PROMPT_STRIDE + whole, WARM_UP_PROMPT * PROMPT_STRIDE + max(warm, NEIGHBOUR_TOKENS))


def _not_restored(policy: str, answer: Completion, size: PrefixSize) -> str:
    """Says so when a policy that should restore the prefix did not; its time is then that of a prefill."""
    if policy == STOCK or answer.cached_tokens >= size.num_tokens:
        return ""
    return f"only {answer.cached_tokens} of {size.num_tokens} prefix tokens were restored, the rest prefilled"


def _cells(
    policy: str, answer: Completion, counts: EngineCounts, size: PrefixSize, num_rows: int
) -> tuple[int, int, int]:
    """Cells recomputed, loaded and read for nothing; tokens that nothing restored count as recomputed."""
    per_token = num_rows / size.chunk_tokens
    if policy in OWN_POLICIES:
        counted = (counts.recomputed_tokens, counts.loaded_tokens, counts.wasted_tokens)
    else:
        loaded_tokens = min(answer.cached_tokens, size.num_tokens)
        counted = (size.num_tokens - loaded_tokens, loaded_tokens, 0)
    recomputed, loaded, wasted = (round(tokens * per_token) for tokens in counted)
    return recomputed, loaded, wasted


def _neighbour_times(itls_s: Sequence[float]) -> dict[str, Any]:
    if not itls_s:
        return {}
    return {
        "itl_mean_s": fmean(itls_s),
        "itl_p99_s": float(np.percentile(itls_s, 99)),
        "itl_max_s": max(itls_s),
    }
