"""Which rows of a step's batch are whose, for both generations of vLLM's model runner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cacheflow.errors import ConfigError
from cacheflow.vllm.compat import RunnerKind

Rows = Mapping[str, tuple[int, int]]
"""Rows ``[first, last)`` of the batch, by request."""


class BatchRows(Protocol):
    """Knows the batch of the forward that is about to run."""

    def of_batch(self) -> Rows:
        """Rows of each of its requests."""
        ...

    def close(self) -> None:
        """Leave the runner as it was."""
        ...


class _KeptBatch:
    """The first generation keeps its batch."""

    def __init__(self, runner: Any) -> None:  # noqa: ANN401 -- vLLM's runner
        self._runner = runner

    def of_batch(self) -> Rows:
        return _rows(self._runner.input_batch.req_ids, self._runner.query_start_loc.np)

    def close(self) -> None:
        pass


class _PreparedBatch:
    """The second generation makes a batch for each forward and hands it on: noted as it is made, and answered once."""

    def __init__(self, runner: Any) -> None:  # noqa: ANN401
        self._runner, self._prepare = runner, runner.prepare_inputs
        self._batch: Any = None
        runner.prepare_inputs = self._prepare_and_note

    def _prepare_and_note(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        self._batch = self._prepare(*args, **kwargs)
        return self._batch

    def of_batch(self) -> Rows:
        batch, self._batch = self._batch, None
        return {} if batch is None else _rows(batch.req_ids, batch.query_start_loc_np)

    def close(self) -> None:
        vars(self._runner).pop("prepare_inputs", None)  # what is left is the class's own


def batch_rows(runner: Any, kind: RunnerKind) -> BatchRows:  # noqa: ANN401 -- vLLM's runner
    """How to learn this runner's rows.

    Raises:
        ConfigError: It lacks what tells them; the message says how to go on without.
    """
    names = ("prepare_inputs",) if kind is RunnerKind.V2 else ("input_batch", "query_start_loc")
    missing = [name for name in names if not hasattr(runner, name)]
    if missing:
        raise ConfigError(
            f"vLLM's {type(runner).__name__} lacks {', '.join(missing)}, which tell whose "
            "boundary states are whose; restore without them: boundary_states=false"
        )
    return _PreparedBatch(runner) if kind is RunnerKind.V2 else _KeptBatch(runner)


def _rows(request_ids: Sequence[str], starts: Any) -> Rows:  # noqa: ANN401 -- an array of integers
    return {name: (int(starts[index]), int(starts[index + 1])) for index, name in enumerate(request_ids)}
