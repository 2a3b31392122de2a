"""Engines whose weights and adapters change while they serve: the real scheduler side, worker state and store.

What stands for vLLM here is its part of the contract: a prefix cache of its own, which nobody but a reset empties, and
requests that are prefilled a chunk a step. Instead of numbers, KV says what it was computed with: the weights, the
adapter's content, and whether everything before it was computed with the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from cacheflow.restore.work import ComputeReport, LoadReport, RankReport, StepReport
from cacheflow.stores.base import GetRequest, PutRequest
from cacheflow.stores.keys import RankKeys
from cacheflow.stores.memory import MemoryStore
from cacheflow.types import LoadOutcome
from cacheflow.vllm.adapters import Adapter, LoadedAdapters
from cacheflow.vllm.options import ConnectorOptions
from cacheflow.vllm.scheduler.side import SchedulerSide
from cacheflow.vllm.scheduler.view import RequestView, ScheduledRequest
from cacheflow.vllm.worker.model_state import ModelState
from cacheflow.vllm.worker.weights_watch import WeightsWatch
from support.scheduler_cases import BLOCK, CHUNK, LAYERS, SHAPE, facts

PAYLOAD_BYTES = 128
Made = tuple[float, str, bool]
"""What KV was computed with: the weights, the adapter's content, and whether all before it was too."""


def encode(made: Made) -> np.ndarray:
    return np.frombuffer(json.dumps(made).ljust(PAYLOAD_BYTES).encode(), np.uint8).copy()


def decode(payload: np.ndarray) -> Made:
    return tuple(json.loads(payload.tobytes()))


def write_adapter(folder: Path, content: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_text(content)


@dataclass
class Running:
    """One of vLLM's requests: the KV it holds, chunk by chunk and layer by layer."""

    view: RequestView
    blocks: range
    kv: dict[tuple[int, int], Made] = field(default_factory=dict)
    num_computed: int = 0
    parked: bool = False
    scheduled: bool = False


class ListedStore(MemoryStore):
    """A memory store that says what it holds."""

    def names(self) -> list[str]:
        with self._lock:
            return list(self._records)


class ChangingEngine:
    """One process: a scheduler side, one worker, and what vLLM does between them."""

    def __init__(self, store: ListedStore, adapter_folder: Path, *, policy: str = "load") -> None:
        self.store, self.adapter_folder = store, adapter_folder
        self.model = torch.nn.Linear(3, 3)
        torch.nn.init.ones_(self.model.weight)
        torch.nn.init.zeros_(self.model.bias)
        self.loaded = ""
        manager = SimpleNamespace(_load_adapter=self._read_adapter)
        self.watch = WeightsWatch(self.model)
        self.manager = manager
        self.state = ModelState(
            rank=0, block_size=BLOCK, weights=self.watch, adapters=LoadedAdapters(SimpleNamespace(lora_manager=manager))
        )
        self.now_s = 0.0
        options = ConnectorOptions(chunk_tokens=CHUNK, lookup_timeout_s=20.0, policy=policy)
        self.side = SchedulerSide(options, store, [facts()], clock=lambda: self.now_s)
        self.local: dict[tuple[str, bytes], Made] = {}
        self.running: dict[str, Running] = {}
        self.targets: dict[int, tuple[str, object]] = {}
        self.num_computes: dict[int, int] = {}
        self.num_requests = self.num_restored = 0
        self.forgotten: set[str] = set()
        self.load_adapter()

    def close(self) -> None:
        self.side.close()

    # What a user does

    def _read_adapter(self, request: object) -> str:
        self.loaded = (self.adapter_folder / "adapter_model.safetensors").read_text()
        return self.loaded

    def load_adapter(self) -> None:
        """``load_inplace``: vLLM reads the files again."""
        request = SimpleNamespace(lora_name="ad", lora_int_id=1, lora_path=str(self.adapter_folder))
        self.manager._load_adapter(request)  # noqa: SLF001 -- vLLM has no other way

    def edit(self, weights: float, *, announced: bool) -> None:
        with torch.no_grad():
            self.model.weight.fill_(weights)
        if announced:
            self.watch.announce("test")

    def reset_connector(self) -> None:
        """Nothing that anybody has saved so far may come back."""
        self.forgotten |= {name.split("_")[0] for name in self.store.names()}
        self.side.reset()

    def reset_local(self) -> bool:
        if self.running:
            return False
        self.local.clear()
        self.side.local_cache_was_reset()
        return True

    def ask(self, tokens: list[int], *, adapter: bool) -> None:
        self.num_requests += 1
        view = RequestView(
            request_id=f"r{self.num_requests}",
            tokens=tokens,
            num_prompt_tokens=len(tokens),
            adapter=Adapter(name="ad", number=1, path=str(self.adapter_folder)) if adapter else None,
        )
        blocks = range(1000 * self.num_requests, 1000 * self.num_requests + len(tokens) // BLOCK)
        self.running[view.request_id] = Running(view, blocks)
        self.side.new_request(view)

    # What vLLM does

    def now(self, request: Running) -> tuple[float, str]:
        return float(self.model.weight.detach()[0, 0]), self.loaded if request.view.adapter else ""

    def _hashes(self, request: Running) -> list[bytes]:
        from cacheflow.vllm.scheduler.request_prefix import RequestPrefix

        prefix = RequestPrefix(chunk_tokens=CHUNK)
        prefix.extend(request.view.tokens)
        return prefix.hashes

    def _cached(self, request: Running) -> list[Made]:
        """What vLLM's own cache has of its leading chunks; the last token is always computed."""
        name, found = "ad" if request.view.adapter else "", []
        for chunk, value in enumerate(self._hashes(request)):
            made = self.local.get((name, value))
            if made is None or (chunk + 1) * CHUNK >= len(request.view.tokens):
                break
            found.append(made)
        return found

    def _schedule(self, request: Running) -> None:
        cached = self._cached(request)
        matched = None
        while matched is None:
            matched = self.side.num_matched(request.view.request_id, len(cached) * CHUNK)
            if matched is None and self.side.has_work:
                return  # it waits for another restoration
        request.kv = {(chunk, layer): made for chunk, made in enumerate(cached) for layer in range(LAYERS)}
        request.num_computed, request.scheduled = len(cached) * CHUNK, True
        if matched:
            self.side.allocated(request.view.request_id, request.blocks, matched)
            request.parked = True

    def step(self) -> None:
        """One engine step: admit, order, compute, carry out, report."""
        for request in self.running.values():
            if not request.scheduled:
                self._schedule(request)
        scheduled = []
        for request in self.running.values():
            if request.scheduled and not request.parked:
                count = min(CHUNK, len(request.view.tokens) - request.num_computed)
                scheduled.append((request, count))
        orders = self.side.step(
            [ScheduledRequest(each.view.request_id, each.num_computed + n, n) for each, n in scheduled],
            lambda request_id: self.running[request_id].blocks,
            num_scheduled_tokens=sum(n for _, n in scheduled),
        )
        self.state.begin_step(orders)
        for request, count in scheduled:
            self._compute(request, request.num_computed // CHUNK, range(LAYERS))
            request.num_computed += count
        report, failed = self._carry_out(orders)
        self._save(orders)
        news = self.state.take_news()
        self._take_finished(report.finished, failed)
        self.side.take_news({} if news.idle else {0: news})
        self.side.take_report(StepReport({0: report}))
        self.now_s += 0.02
        for request in [each for each, _ in scheduled if each.num_computed >= len(each.view.tokens)]:
            self.side.finished(request.view.request_id)
            del self.running[request.view.request_id]

    def run(self) -> None:
        """Step until every request has its first token."""
        for _ in range(2000):
            if not self.running:
                return
            self.step()
        raise AssertionError("requests never ended")

    def _compute(self, request: Running, chunk: int, layers: range) -> None:
        now = self.now(request)
        pure = all(made == (*now, True) for (earlier, _), made in request.kv.items() if earlier < chunk)
        for layer in layers:
            request.kv[chunk, layer] = (*now, pure)
        if len({request.kv.get((chunk, layer)) for layer in range(LAYERS)}) == 1 and not request.parked:
            self._cache(request, chunk)

    def _cache(self, request: Running, chunk: int) -> None:
        hashes = self._hashes(request)
        if chunk < len(hashes):
            made = request.kv[chunk, 0]
            same = all(request.kv[chunk, layer] == made for layer in range(LAYERS))
            self.local.setdefault(
                ("ad" if request.view.adapter else "", hashes[chunk]), made if same else (-1.0, "", False)
            )

    def _carry_out(self, orders) -> tuple[RankReport, set[int]]:
        loads, computes, finished = [], [], []
        for target in orders.targets:
            self.targets[target.restore_id] = (target.request_id, target)
            self.num_computes[target.restore_id] = 0
            self._copy(target)
            self.state.begin(target, orders)
        failed = {block for ids in orders.failed_blocks.values() for block in ids}
        for each in orders.of_stage(0):
            request_id, target = self.targets[each.restore_id]
            request, first = self.running[request_id], target.object_start // CHUNK
            for read in each.reads:
                outcome = self._read(request, target, *read.piece)
                loads.append(
                    LoadReport(
                        restore_id=each.restore_id, piece=read.piece, outcome=outcome,
                        num_bytes=CHUNK * SHAPE.kv_bytes_per_token_layer, busy_s=0.01,
                    )
                )  # fmt: skip
            for order in each.compute:
                for chunk in range(order.tile.chunk_lo, order.tile.chunk_hi):
                    self._compute(request, first + chunk, range(order.tile.block_lo, order.tile.block_hi))
            if each.compute:
                computes.append(
                    ComputeReport(
                        restore_id=each.restore_id, first=self.num_computes[each.restore_id],
                        seconds=(0.01,) * len(each.compute),
                    )
                )  # fmt: skip
                self.num_computes[each.restore_id] += len(each.compute)
            if each.finish or each.cancel:
                finished.append(each.restore_id)
        failed.update(*self.state.end(finished).values())
        return RankReport(loads=tuple(loads), computes=tuple(computes), finished=tuple(finished)), failed

    def _copy(self, target) -> None:
        if target.copied_from:
            request = self.running[target.request_id]
            source = next(each for each in self.running.values() if target.copied_from[0] in each.blocks)
            first, last = (
                (each - source.blocks[0]) * BLOCK for each in (target.copied_from[0], target.copied_from[-1])
            )
            for chunk in range(first // CHUNK, last // CHUNK + 1):
                for layer in range(LAYERS):
                    request.kv[chunk, layer] = source.kv[chunk, layer]

    def _read(self, request: Running, target, chunk: int, layer: int) -> LoadOutcome:
        key = RankKeys().kv(target.namespace, target.chain_hashes[chunk], (layer, layer + 1))
        payload = np.empty(PAYLOAD_BYTES, np.uint8)
        (outcome,) = self.store.submit_get([GetRequest(key, payload)]).wait(20)
        if outcome is LoadOutcome.OK:
            request.kv[target.object_start // CHUNK + chunk, layer] = decode(payload)
        return outcome

    def _take_finished(self, finished: tuple[int, ...], failed: set[int]) -> None:
        for restore_id in finished:
            request_id, target = self.targets.pop(restore_id)
            request = self.running[request_id]
            request.parked = False
            bad = [index for index, block in enumerate(request.blocks) if block in failed]
            end = target.chunk_ends[-1] if not bad else bad[0] * BLOCK // CHUNK * CHUNK
            assert target.namespace not in self.forgotten or end <= target.start, "restored after a reset"
            for chunk in range(end // CHUNK, len(request.view.tokens) // CHUNK + 1):
                for layer in range(LAYERS):
                    request.kv.pop((chunk, layer), None)
            request.num_computed = end
            request.scheduled = end > 0  # of one of which nothing was restored vLLM asks again
            self._check(request, target, end)

    def _check(self, request: Running, target, end: int) -> None:
        """What was restored is KV of the weights and the adapter that are loaded now."""
        local = self._cached(request)[: target.start // CHUNK]
        stale_below = any(made != (*self.now(request), True) for made in local)
        for chunk in range(target.object_start // CHUNK, end // CHUNK):
            for layer in range(LAYERS):
                *made, pure = request.kv[chunk, layer]
                assert tuple(made) == self.now(request), f"restored KV of {made}, loaded are {self.now(request)}"
                assert pure or stale_below
            self._cache(request, chunk)
        self.num_restored += max(0, end - target.start)

    def _save(self, orders) -> None:
        requests = []
        for order in self.state.may_save(orders):
            request = self.running[order.request_id]
            for layer in range(LAYERS):
                key = RankKeys().kv(order.namespace, order.chain_hash, (layer, layer + 1))
                payload = encode(request.kv[order.chunk, layer])
                requests.append(PutRequest(key, [payload], shape=(PAYLOAD_BYTES,), dtype="uint8"))
        if requests:
            self.store.submit_put(requests).wait(20)
