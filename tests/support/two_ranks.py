"""A vLLM engine of two tensor-parallel ranks on the CPU, in processes of its own: asked by JSON, answers by JSON.

``python -m support.two_ranks`` reads an order from standard input and writes the answers to the file it names. The
engine's processes are not this one, so nothing in here reaches into them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RANKS = 2
BLOCK = 128
"""Tokens of a KV block on the CPU; vLLM keeps one block for itself."""
PATIENCE_S = 100.0
TESTS = Path(__file__).parents[1]


def run(order: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Start an engine, ask what is ordered, end it.

    Args:
        order: ``model``, ``chunk_tokens``, ``max_tokens`` of a request, which fill the KV cache, ``transfer`` (None:
            without the connector), ``store``, and ``requests``: for each ``tokens``, ``params``, and
            ``wait_for_objects``, how many are to be in the store before the prefix cache is emptied.
        folder: For the log and the answers.

    Returns:
        For each request its ``tokens``, ``ttft_s`` and ``params``.
    """
    cores = sorted(os.sched_getaffinity(0))
    binds = [str(cores[rank % len(cores)]) for rank in range(RANKS)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")]),
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(binds), "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    answers, log = folder / "answers.json", folder / "log"
    answers.unlink(missing_ok=True)
    with log.open("w") as out:
        ended = subprocess.run(
            [sys.executable, "-m", "support.two_ranks"], input=json.dumps({**order, "answers": str(answers)}),
            text=True, env=environment, stdout=out, stderr=out, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
    text = log.read_text(errors="replace")
    assert ended.returncode == 0, f"the engine ended with {ended.returncode}:\n{text[-6000:]}"
    return json.loads(answers.read_text())


def main() -> None:
    """Carry one order out."""
    from cacheflow.vllm.plugin import register
    from vllm import LLM

    register()
    order = json.load(sys.stdin)
    llm = LLM(
        model=order["model"], dtype="float32", skip_tokenizer_init=True, enforce_eager=True, seed=0,
        tensor_parallel_size=RANKS, distributed_executor_backend="mp", max_num_seqs=4, enable_prefix_caching=True,
        max_model_len=order["max_tokens"], num_gpu_blocks_override=order["max_tokens"] // BLOCK + 1,
        max_num_batched_tokens=order["chunk_tokens"], kv_transfer_config=order["transfer"],
    )  # fmt: skip
    answers = []
    for request in order["requests"]:
        answers.append(ask(llm, request))
        if "wait_for_objects" in request:
            wait_for_objects(Path(order["store"]), request["wait_for_objects"])
        if not llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache")
    Path(order["answers"]).write_text(json.dumps(answers))


def ask(llm: Any, request: dict[str, Any]) -> dict[str, Any]:
    """One request from its arrival to its end."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        max_tokens=request.get("num_tokens", 16), temperature=0.0, ignore_eos=True, detokenize=False,
        extra_args={"kv_transfer_params": request["params"]} if request.get("params") else None,
    )  # fmt: skip
    began_s = time.perf_counter()
    llm.llm_engine.add_request(f"{began_s}", {"prompt_token_ids": request["tokens"]}, sampling)
    ttft_s = None
    while True:
        for output in llm.llm_engine.step():
            ttft_s = ttft_s or time.perf_counter() - began_s
            if output.finished:
                return {
                    "tokens": list(output.outputs[0].token_ids),
                    "ttft_s": ttft_s,
                    "params": output.kv_transfer_params,
                }


def wait_for_objects(store: Path, count: int) -> None:
    """Wait until the workers have written so many objects."""
    end_s = time.monotonic() + 20.0
    while (found := num_objects(store)) != count:
        if time.monotonic() > end_s:
            raise RuntimeError(f"{found} objects are in {store}, not {count}")
        time.sleep(0.02)


def num_objects(store: Path) -> int:
    return sum(1 for path in (store / "objects").rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
