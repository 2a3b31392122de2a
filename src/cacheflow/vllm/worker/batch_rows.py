"""Which rows of a step's batch are whose, for both generations of vLLM's model runner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cacheflow.errors import ConfigError
from cacheflow.vllm.compat import RunnerKind


class BatchRows:
    """Knows the batch of the forward that is about to run.

    The first generation keeps its batch. The second makes one for each forward and hands it on: noted as it is made.
    """

    def __init__(self, runner: Any, kind: RunnerKind) -> None:  # noqa: ANN401 -- vLLM's runner
        """Learn this runner's rows from now on, until ``close``.

        Raises:
            ConfigError: It lacks what says whose they are; the message says how to go on without.
        """
        names = ("prepare_inputs",) if kind is RunnerKind.V2 else ("input_batch", "query_start_loc")
        if missing := [name for name in names if not hasattr(runner, name)]:
            raise ConfigError(
                f"vLLM's {type(runner).__name__} lacks {', '.join(missing)}, which tell whose "
                "boundary states are whose; restore without them: boundary_states=false"
            )
        self._runner, self._kind = runner, kind
        self._batch: Any = None
        if kind is RunnerKind.V2:
            self._prepare, runner.prepare_inputs = runner.prepare_inputs, self._prepare_and_note

    def _prepare_and_note(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        self._batch = self._prepare(*args, **kwargs)
        return self._batch

    def of_batch(self) -> Mapping[str, tuple[int, int]]:
        """Rows ``[first, last)`` of each of its requests, by id; of the second generation's batch once."""
        if self._kind is RunnerKind.V1:
            request_ids, starts = self._runner.input_batch.req_ids, self._runner.query_start_loc.np
        else:
            batch, self._batch = self._batch, None
            if batch is None:
                return {}
            request_ids, starts = batch.req_ids, batch.query_start_loc_np
        return {name: (int(starts[index]), int(starts[index + 1])) for index, name in enumerate(request_ids)}

    def close(self) -> None:
        """Leave the runner as it was: what is left of the method is its class's own."""
        if self._kind is RunnerKind.V2:
            vars(self._runner).pop("prepare_inputs", None)
