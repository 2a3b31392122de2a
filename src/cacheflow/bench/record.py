"""Every record of every suite, one line of a ``.jsonl`` file each; tables and charts read nothing else.

A line's ``suite`` says which record it is (``SUITES``). Several suites share a record, which tagged unions of msgspec
cannot say, so the tag is looked up here. A record cannot hold a time unless its run was checked for exactness, and
nothing shows a time whose check failed (``RestoreRecord.timed``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
from msgspec import Meta
from msgspec.structs import force_setattr

from cacheflow.bench.results_file import append_line, read_lines
from cacheflow.errors import ConfigError
from cacheflow.sim.policies import EMBEDDED, PLUGIN, SYSTEMS

Environment = Mapping[str, str | int | float | None]
Name = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]
Above0 = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]

NEIGHBOUR = {"neighbour": 1.0}
"""The perturbation of runs beside a decoding request, so that they are never mixed with runs alone."""
ITL_SLO_MS = "itl_slo_ms"
"""Stands in the perturbation too where our connector was asked to keep the neighbour's latency within it."""
PROBABILITIES = (0.01, 0.05, *(step / 10 for step in range(1, 10)), 0.95, 0.99)
"""At which a figure's distribution is kept."""
ROUNDING = 1e-6
"""Relative; sums of the same costs in another order may differ by less."""


class BenchRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all records share: a suite, limits that are part of the types, and their lines."""

    suite: Name

    def __post_init__(self) -> None:
        """Refuse numbers outside the limits of their types."""
        for name, meta in _limits(type(self)):
            value = getattr(self, name)
            if value is not None and not _is_within(value, meta):
                raise ConfigError(f"record field {name} is {value!r}, must be {_in_words(meta)}")

    @property
    def is_good(self) -> bool:
        """Whether the run was checked and right, where runs are checked."""
        return True

    def to_json(self) -> str:
        """One line, without the newline."""
        return msgspec.json.format(msgspec.json.encode(self), indent=0).decode()

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Read one line back.

        Raises:
            ConfigError: It is no JSON object, lacks a field, has an unknown one, or holds an impossible value.
        """
        return _decode(line, cls)


class RunRecord(BenchRecord, frozen=True, kw_only=True):
    """A run on a real model.

    Attributes:
        device: ``"cpu"``, or the name of the accelerator.
        suffix_tokens: New tokens after the prefix; 0 for a restoration alone.
        link_bytes_per_s: Bandwidth of the link as configured; None when it was not throttled (``inf`` becomes None).
        load_compute_ratio: Time to load everything over the time to recompute it, as the study set it.
        repeat: Which alternation of the policies this run belongs to; runs with equal ``repeat`` ran side by side.
        correct: Whether KV, logits and tokens equalled the reference; None when nothing was checked.
        fingerprint: Of the model's weights; two of one name are told apart by it. Empty in records that do not know it.
    """

    policy: Name
    model: Name
    device: Name
    dtype: Name
    suffix_tokens: Count
    chunk_tokens: Positive
    num_layers: Positive
    link_bytes_per_s: Above0 | None
    load_compute_ratio: Seconds
    repeat: Count
    correct: bool | None
    environment: Environment
    fingerprint: str = ""

    def __post_init__(self) -> None:
        """Check the limits; an infinite bandwidth becomes None, because JSON has no infinity."""
        if self.link_bytes_per_s == math.inf:
            force_setattr(self, "link_bytes_per_s", None)
        super().__post_init__()

    @property
    def is_good(self) -> bool:
        """Whether the run was checked and equal to the reference."""
        return self.correct is True


class GuardRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the never-slower guard chose for this run, and why."""

    choice: str
    reason: str


class RestoreRecord(RunRecord, frozen=True, kw_only=True):
    """One restoration under one policy.

    Attributes:
        restore_s: From the start of the restoration to the last prefix cell; None when the run was not timed.
        ttft_s: From the start of the restoration to the first token; None without a suffix or when not timed.
        bound_restore_s: The least possible ``restore_s``, from costs measured in the same process.
        compute_busy: Share of ``restore_s`` in which compute worked on the prefix.
        io_busy: Share of ``restore_s`` in which the link moved bytes.
        wasted_bytes: Bytes moved for cells that were recomputed all the same.
        failed_loads: Reads that were missing, corrupt, late or failing.
        planning_s: Time to make the plan; part of ``restore_s``.
        overhead_s: Executor time that was neither compute nor waiting for the link.
        perturbation: What was made wrong on purpose, such as ``{"cost_error": 2.0}``; empty for a clean run.
        objective: What the plan minimised, ``"ttft"`` or ``"restore"``.
        layers_per_block: Layers of one block, which is one object of the store per chunk.
    """

    num_tokens: Count
    restore_s: Seconds | None
    ttft_s: Seconds | None
    bound_restore_s: Seconds | None
    bound_ttft_s: Seconds | None
    compute_busy: Share | None
    io_busy: Share | None
    recomputed_cells: Count
    loaded_cells: Count
    wasted_bytes: Count
    loaded_bytes: Count = 0
    failed_loads: Count = 0
    planning_s: Seconds | None = None
    overhead_s: Seconds | None = None
    perturbation: Mapping[str, float] = msgspec.field(default_factory=dict)
    guard: GuardRecord | None = None
    objective: Name = "ttft"
    layers_per_block: Positive = 1
    store: Name = "memory"

    def __post_init__(self) -> None:
        """Refuse a time without a check.

        Raises:
            ConfigError: ``restore_s`` or ``ttft_s`` is set but ``correct`` is no outcome of a check.
        """
        super().__post_init__()
        if (self.restore_s is not None or self.ttft_s is not None) and not isinstance(self.correct, bool):
            raise ConfigError(f"a record cannot hold a time without a check: correct is {self.correct!r}")

    @property
    def timed(self) -> bool:
        """Whether the times of this record may be shown."""
        return self.correct is True and self.restore_s is not None


class VllmRecord(RestoreRecord, frozen=True, kw_only=True):
    """One request inside vLLM whose prefix was saved and evicted before, as a client of the server sees it.

    ``restore_s`` is what the engine counted, None where it does not: a client cannot see when restoration ends. Busy
    shares are None. Cells follow from the engine's counters where it has them, else from the prompt tokens it cached.

    Attributes:
        cached_tokens: Prompt tokens vLLM says it did not compute itself in the usual way.
        equal_tokens: Generated tokens that equal stock vLLM's, counted from the first.
        first_logprob_distance: Largest difference of the log-probabilities of the first token's top candidates; None
            without candidates in common.
        note: Why tokens may differ; empty when they do not.
        itl_mean_s: Mean inter-token latency of the neighbour from request to first token; None without neighbour.
    """

    cached_tokens: Count
    equal_tokens: Count
    compared_tokens: Count
    first_logprob_distance: Seconds | None = None
    note: str = ""
    itl_mean_s: Seconds | None = None
    itl_p99_s: Seconds | None = None
    itl_max_s: Seconds | None = None

    def __post_init__(self) -> None:
        """Check the tokens.

        Raises:
            ConfigError: More are equal than compared, or the run is correct although some differ without a note.
        """
        super().__post_init__()
        if self.equal_tokens > self.compared_tokens:
            raise ConfigError(f"record: {self.equal_tokens} of {self.compared_tokens} tokens equal")
        if self.correct and self.equal_tokens < self.compared_tokens and not self.note:
            raise ConfigError("a correct record whose tokens differ needs a note that explains them")

    @property
    def itl_slo_s(self) -> float | None:
        """What our connector was asked to keep ``itl_p99_s`` within; None where it was asked nothing."""
        slo_ms = self.perturbation.get(ITL_SLO_MS)
        return None if slo_ms is None else slo_ms * 1e-3

    @property
    def timed(self) -> bool:
        """Whether the times of this record may be shown."""
        return self.correct is True and self.ttft_s is not None


class RanksRecord(RestoreRecord, frozen=True, kw_only=True):
    """One request on an engine of several ranks, whose prefix was saved and evicted before.

    ``link_bytes_per_s`` is of each rank's own link; ``load_compute_ratio`` is that of one rank with such a link.
    ``restore_s`` and ``bound_restore_s`` are the engine's, the latter from costs it measured at its start.

    Attributes:
        gpu_axis: Whether stages start from stored boundary states, each for itself; False: activations are handed over
            from stage to stage. Always True with one stage.
        recompute_s: Time to first token of vLLM's own prefill of the same prompt, on the same engine.
        equal_tokens: Generated tokens that equal vLLM's own answer, counted from the first.
        note: Why the prefix was not restored; empty when it was.
    """

    pipeline_parallel_size: Positive
    tensor_parallel_size: Positive
    gpu_axis: bool
    recompute_s: Seconds
    equal_tokens: Count
    compared_tokens: Count
    note: str = ""

    def __post_init__(self) -> None:
        """Check what belongs together.

        Raises:
            ConfigError: One stage has no axis, or the run counts as correct although tokens differ.
        """
        super().__post_init__()
        if not self.gpu_axis and self.pipeline_parallel_size == 1:
            raise ConfigError("record: with one pipeline stage there is no GPU axis to switch off")
        if self.correct and self.equal_tokens < self.compared_tokens:
            raise ConfigError(
                f"record: correct, but only {self.equal_tokens} of {self.compared_tokens} tokens are equal"
            )

    @property
    def split(self) -> str:
        """The split for people: ``PP 2``, ``PP 2 in order``, ``TP 2``, ``PP 2, TP 2``, ``1 rank``."""
        parts = []
        if self.pipeline_parallel_size > 1:
            parts.append(f"PP {self.pipeline_parallel_size}" + ("" if self.gpu_axis else " in order"))
        if self.tensor_parallel_size > 1:
            parts.append(f"TP {self.tensor_parallel_size}")
        return ", ".join(parts) or "1 rank"

    @property
    def over_bound(self) -> float | None:
        """``restore_s`` over its bound; None where either is unknown or the run was wrong."""
        if not self.timed or self.restore_s is None or not self.bound_restore_s:
            return None
        return self.restore_s / self.bound_restore_s


class BatchRequestRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request of a batch; seconds count from its arrival, and ``arrival_s`` from the batch's first."""

    num_tokens: int
    suffix_tokens: int
    arrival_s: float
    ttft_s: float
    restore_s: float
    deadline_s: float
    recomputed_cells: int
    loaded_cells: int

    @property
    def in_time(self) -> bool:
        """Whether the first token came by its deadline."""
        return self.ttft_s <= self.deadline_s


class BatchTimes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A batch in numbers.

    Attributes:
        p99_ttft_s: Its 99th percentile, as an observed value; the greatest of fewer than 100 requests.
        makespan_s: From the first arrival to the last first token.
        ttft_s: Of each request, in the order of the record's requests.
    """

    mean_ttft_s: float
    p99_ttft_s: float
    makespan_s: float
    ttft_s: tuple[float, ...]

    @classmethod
    def of(cls, arrivals_s: Sequence[float], ttft_s: Sequence[float]) -> BatchTimes:
        """From each request's arrival and time to first token."""
        ends_s = [arrival + ttft for arrival, ttft in zip(arrivals_s, ttft_s, strict=True)]
        return cls(
            mean_ttft_s=sum(ttft_s) / len(ttft_s),
            p99_ttft_s=float(np.quantile(np.array(ttft_s), 0.99, method="inverted_cdf")),
            makespan_s=max(ends_s) - min(arrivals_s),
            ttft_s=tuple(ttft_s),
        )


class BatchRecord(RunRecord, frozen=True, kw_only=True):
    """One batch of concurrent restorations under one policy.

    Attributes:
        order: Indices into ``lengths`` in the order of arrival.
        starvation_s: Bound on waiting that the scheduler was given; None for none.
        slo_factor: Deadlines, in times of what a request needs alone; None in records that do not know it.
        compute_busy: Share of the time until all prefixes were restored in which compute worked.
        io_busy: Share of it in which the link moved bytes.
        bound_makespan_s: The least possible ``makespan_s`` by the costs of this run; see ``batch_bound``.
        bound_mean_ttft_s: The least possible ``mean_ttft_s``, likewise: a relaxation to one machine that serves the
            shortest remaining request first.
        starvation_kept: Whether nobody waited longer than ``starvation_s`` and then for those that came before it; None
            without a bound.
        compute_drift: Seconds that a calibrated compute second took in this run; simulation and bounds count with it.
    """

    suite: Name = "batch"
    lengths: tuple[int, ...]
    load_compute_ratio: Above0
    link_bytes_per_s: Above0
    order: tuple[int, ...]
    arrival_gap_s: float
    seed: int
    starvation_s: float | None
    mean_ttft_s: Above0
    p99_ttft_s: Above0
    makespan_s: Above0
    compute_busy: Share
    io_busy: Share
    bound_makespan_s: Above0
    bound_mean_ttft_s: Above0
    starvation_kept: bool | None
    compute_drift: Above0
    requests: tuple[BatchRequestRecord, ...]
    simulated: BatchTimes
    slo_factor: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no run can have.

        Raises:
            ConfigError: The run was not checked, the requests do not fit the lengths; or see ``BenchRecord``.
        """
        super().__post_init__()
        if not isinstance(self.correct, bool):
            raise ConfigError(f"a record cannot hold a time without a check: correct is {self.correct!r}")
        if sorted(self.order) != list(range(len(self.lengths))):
            raise ConfigError(
                f"record field order is {self.order}, must name each of {len(self.lengths)} requests once"
            )
        arrived = [self.lengths[index] for index in self.order]
        if [each.num_tokens for each in self.requests] != arrived:
            raise ConfigError(f"record field requests does not hold requests of {arrived} tokens, in this order")
        if len(self.simulated.ttft_s) != len(self.requests):
            raise ConfigError(f"record: {len(self.simulated.ttft_s)} requests were simulated, {len(self.requests)} ran")

    @property
    def num_late(self) -> int:
        """Requests whose first token came after its deadline."""
        return sum(not each.in_time for each in self.requests)


class LoadRecord(BenchRecord, frozen=True, kw_only=True):
    """What vLLM's own client measured for one policy under load; answers are not compared.

    ``restored_tokens`` is how many prompt tokens the server says came from outside its own cache.
    """

    suite: Name = "vllm-load"
    policy: Name
    model: Name
    rate: Above0
    link_bytes_per_s: Above0
    num_requests: Count
    num_failed: Count
    prompt_tokens: Count
    restored_tokens: Count
    ttft_mean_s: Seconds
    ttft_p50_s: Seconds
    ttft_p99_s: Seconds
    itl_mean_s: Seconds
    itl_p99_s: Seconds
    requests_per_s: Seconds
    tokens_per_s: Seconds

    @property
    def is_good(self) -> bool:
        """Whether every request succeeded."""
        return self.num_failed == 0


class FigureRecord(BenchRecord, frozen=True, kw_only=True):
    """One point of a figure: what came of one policy at one setting, in virtual time.

    Attributes:
        series: The line or bar it belongs to.
        num_layers: Layers of the model, each a block of its own: no layers were merged.
        num_tokens: Tokens of the prefix; the mean over requests.
        suffix_tokens: New tokens after it; the mean over requests.
        rate_per_s: Arrivals a second; 0 where all requests come at once.
        ttft_s: Time to first token from arrival; the mean over requests. Of a restoration alone, its time.
        restore_s: Time to the last prefix cell from arrival; the mean over requests.
        bound_p99_ttft_s: That of what each request could have had alone, below any 99th percentile.
        compute_busy: Share of the time with a request in the system in which compute worked.
        io_busy: Share of it in which the link moved bytes.
        slo_s: Limit for the time to first token; 0 where requests have limits of their own, or none.
        in_time: Share of requests with a first token by their deadline; None without deadlines.
        goodput_per_s: Such requests a second; None without deadlines.
        bound_goodput_per_s: The greatest possible; None without deadlines.
        ttft_quantiles_s: At ``PROBABILITIES``; empty for one request.
        bound_quantiles_s: The same of what each request could have had alone.
    """

    series: str
    policy: str
    model: str
    gpu: str
    cost_source: str
    link_bytes_per_s: float
    chunk_tokens: int
    num_layers: int
    num_tokens: float
    suffix_tokens: float
    load_compute_ratio: float
    workload: str
    batch_policy: str = "fcfs"
    num_requests: int = 1
    num_stages: int = 1
    rate_per_s: float = 0.0
    ttft_s: Seconds
    restore_s: Seconds
    bound_ttft_s: Seconds
    bound_restore_s: Seconds
    p99_ttft_s: Seconds | None = None
    bound_p99_ttft_s: Seconds | None = None
    compute_busy: Share | None = None
    io_busy: Share | None = None
    slo_s: float = 0.0
    in_time: Share | None = None
    goodput_per_s: float | None = None
    bound_goodput_per_s: float | None = None
    ttft_quantiles_s: tuple[float, ...] = ()
    bound_quantiles_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no run can give.

        Raises:
            ConfigError: A time is below its bound by more than rounding, or a distribution has another length than
                ``PROBABILITIES``; or see ``BenchRecord``.
        """
        super().__post_init__()
        for key in ("ttft_s", "restore_s", "p99_ttft_s"):
            time_s, bound_s = getattr(self, key), getattr(self, f"bound_{key}")
            if time_s is not None and bound_s is not None and time_s < bound_s * (1 - ROUNDING):
                raise ConfigError(f"{self.suite} {self.series}: {key} {time_s} is below its bound {bound_s}")
        for key in ("ttft_quantiles_s", "bound_quantiles_s"):
            values = getattr(self, key)
            if values and len(values) != len(PROBABILITIES):
                raise ConfigError(f"{self.suite} {self.series}: {key} has {len(values)} values")

    @property
    def link_gbps(self) -> float:
        """The link in Gbit/s."""
        return self.link_bytes_per_s * 8 / 1e9

    @property
    def ttft_over_bound(self) -> float:
        """How many times the least possible time to first token it took."""
        return self.ttft_s / self.bound_ttft_s

    @property
    def restore_over_bound(self) -> float:
        """How many times the least possible restoration time it took."""
        return self.restore_s / self.bound_restore_s

    @property
    def case(self) -> tuple[Any, ...]:
        """What must be equal for two policies to be compared; how finely they cut the prefix is their own affair."""
        return (
            self.suite, self.model, self.gpu, round(self.link_bytes_per_s), self.num_tokens, self.suffix_tokens,
            self.workload, self.num_requests, self.num_stages, self.rate_per_s, self.slo_s,
        )  # fmt: skip

    def to_json(self) -> str:
        """One line; what is as by default is left out, numbers are kept to seven digits."""
        defaults = {field.name: field.default for field in msgspec.structs.fields(self)}
        given = {name: value for name, value in msgspec.structs.asdict(self).items() if value != defaults[name]}
        values = {name: _short(value) for name, value in given.items()}
        return msgspec.json.format(msgspec.json.encode(values), indent=0).decode()


class SimulationRecord(BenchRecord, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """One system over one workload on a simulated cluster.

    Only what is drawn is in every record that was ever written; None stands for what an old one does not say. Results
    are the fields of ``sim.results.RunResult``, the options those of ``cacheflow simulate``.

    Attributes:
        order: Whom the system serves first. Records that do not say are of the time when ``cacheflow`` was the embedded
            engine's: they are named so.
        inputs_fingerprint: Tells apart models, GPUs and costs of the same names.
        requests_fingerprint: Tells apart traces of the same name, and whatever else makes other requests of them.
        reusable_tokens: Prompt tokens that an earlier prompt began with too.
        cluster: The cluster's configuration; None stands for infinity.
        ttft_percentiles_s: Time to first token by percentile, for the picture.
    """

    suite: Name = "simulate"
    policy: Name
    order: str = ""
    workload: str
    model: str
    gpu: str = ""
    costs: str
    objective: str | None = None
    seed: int | None = None
    max_cells: int | None = None
    rate_scale: float | None = None
    format: str | None = None
    limit: int | None = None
    duration_s: float | None = None
    repeat: int | None = None
    max_tokens: int | None = None
    num_sessions: int | None = None
    session_rate_per_s: float | None = None
    inputs_fingerprint: str | None = None
    requests_fingerprint: str | None = None
    reusable_tokens: int | None = None
    cluster: Mapping[str, Any] | None = None
    num_requests: int | None = None
    simulated_s: float | None = None
    ttft_mean_s: float | None = None
    ttft_p50_s: float | None = None
    ttft_p90_s: float | None = None
    ttft_p99_s: float | None = None
    ttft_max_s: float | None = None
    ttlt_mean_s: float | None = None
    ttlt_p50_s: float | None = None
    ttlt_p99_s: float | None = None
    goodput_per_s: float | None = None
    in_time_share: float | None = None
    compute_busy: float | None = None
    restore_prefill_busy: float | None = None
    link_busy: float | None = None
    store_bytes: float | None = None
    host_bytes: float | None = None
    wasted_bytes: float | None = None
    hit_tokens: float | None = None
    loaded_tokens: float | None = None
    recomputed_tokens: float | None = None
    new_tokens: float | None = None
    output_tokens: float | None = None
    ttft_percentiles_s: dict[str, float]
    wall_s: float | None = None

    def __post_init__(self) -> None:
        """Name the embedded engine's old records as its new ones are named."""
        super().__post_init__()
        if self.policy == PLUGIN and not self.order:
            force_setattr(self, "policy", EMBEDDED)
            force_setattr(self, "order", SYSTEMS[EMBEDDED].order)


class GpuRecord(BenchRecord, frozen=True, kw_only=True):
    """One finding of the study on a GPU that is no restoration.

    Attributes:
        part: Of the study.
        name: What was measured; ``done`` of a part that is through.
        device: ``"cuda"``; ``"cpu"`` for a rehearsal.
        values: What was found, by name with its unit.
        correct: Whether bits were right, where they were compared.
    """

    part: Count
    name: Name
    device: Name
    values: Environment
    correct: bool | None = None
    environment: Environment

    @property
    def is_good(self) -> bool:
        """Whether nothing was compared and found wrong."""
        return self.correct is not False


SUITES: Mapping[str, type[BenchRecord]] = {
    **dict.fromkeys(("restore", "perturbed", "demo"), RestoreRecord),
    "vllm": VllmRecord,
    "vllm-load": LoadRecord,
    "ranks": RanksRecord,
    "batch": BatchRecord,
    "gpu": GpuRecord,
    "simulate": SimulationRecord,
    **dict.fromkeys((f"figure-{number}" for number in range(3, 16)), FigureRecord),
}
"""The record of each suite."""

R = TypeVar("R", bound=BenchRecord)
T = TypeVar("T")


def append_record(path: Path, record: BenchRecord) -> None:
    """Append one record in one write, so that runs may share the file and a crash leaves whole lines.

    Raises:
        ConfigError: The folder does not exist or the file cannot be written.
    """
    append_line(path, record.to_json())


def read_records(path: Path, kind: type[R]) -> list[R]:
    """Every record of a kind in a results file, in the order they were written.

    Args:
        path: The file; blank lines and lines of suites with another record are skipped.
        kind: The class in ``SUITES``; ``BenchRecord`` for all.

    Raises:
        ConfigError: The file cannot be read, or a line is malformed; names the line, the field and what is allowed.
    """
    found = read_lines(path, lambda line: _parse(line, kind))
    return [record for record in found if record is not None]


class _Head(msgspec.Struct):
    """What must be known of a line before it can be read."""

    suite: str


def _parse(line: str, kind: type[R]) -> R | None:
    suite = _decode(line, _Head).suite
    if suite not in SUITES:
        raise ConfigError(f"record field suite is {suite!r}, must be one of {', '.join(SUITES)}")
    found = SUITES[suite]
    return _decode(line, found) if kind in (BenchRecord, found) else None  # type: ignore[return-value]


def _decode(line: str, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(line, type=kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"malformed record: {error}") from error
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise ConfigError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise ConfigError("not readable as JSON: nested too deeply") from error


@cache
def _limits(kind: type[BenchRecord]) -> tuple[tuple[str, Meta], ...]:
    """The fields of a record whose types have limits."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple(
        (name, part.__metadata__[0])
        for name, hint in hints.items()
        for part in (hint, *get_args(hint))
        if get_origin(part) is Annotated
    )


def _is_within(value: Any, meta: Meta) -> bool:  # noqa: ANN401 -- the type of a field
    if meta.min_length is not None:
        return len(value) >= meta.min_length
    above = meta.gt is None or value > meta.gt
    return math.isfinite(value) and above and (meta.ge is None or value >= meta.ge) and not value > (meta.le or value)


def _in_words(meta: Meta) -> str:
    if meta.min_length is not None:
        return "a name"
    if meta.le is not None:
        return f"between {meta.ge:g} and {meta.le:g}"
    return f"finite and {'above 0' if meta.gt is not None else f'{meta.ge:g} or more'}"


def _short(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_short(each) for each in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value
