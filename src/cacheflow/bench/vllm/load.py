"""``bench vllm --load RATE``: multi-turn sessions arriving at random, driven by vLLM's own benchmark client.

The client is ``vllm.benchmarks.serve``, which nobody here wrote: Poisson arrivals, streamed answers, times by its own
clock. Turns of many sessions are interleaved and need more KV cache together than a server has, so that a session's
prefix is evicted between its turns. Answers are not compared here, so no time goes into ``results.jsonl``.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cacheflow.bench.records.vllm import LoadRecord
from cacheflow.bench.vllm.client import MODEL, ServerError
from cacheflow.bench.vllm.counts import Samples, sample_sum
from cacheflow.bench.vllm.fleet import FleetOptions, open_fleet
from cacheflow.bench.vllm.server import LOG_TAIL_LINES, VllmServer, server_environment
from cacheflow.errors import ConfigError
from cacheflow.workloads.coding import source_text

CLIENT_TIMEOUT_S = 1800.0
CHARS_PER_TOKEN = 4
BLOCK_TOKENS = 128
"""KV blocks of vLLM on the CPU; smaller elsewhere."""
RESTORED = "vllm:prompt_tokens_by_source_total"
_CLIENT = (
    "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
    "p = argparse.ArgumentParser(); add_cli_args(p); main(p.parse_args())"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """Which sessions arrive, and how.

    Attributes:
        rate: Requests per second, Poisson.
        num_sessions: Sessions at a time; every turn is one request.
        chars_per_turn: Characters of source text that a turn adds to its session.
    """

    rate: float
    bytes_per_s: float
    kv_bytes_per_token: int
    num_sessions: int = 16
    num_turns: int = 3
    chars_per_turn: int = 5000
    answer_tokens: int = 32

    @property
    def num_requests(self) -> int:
        """Requests in all."""
        return self.num_sessions * self.num_turns

    @property
    def max_tokens(self) -> int:
        """More than the longest request has: source text has 3 to 4 characters a token."""
        return self.num_turns * self.chars_per_turn // 3 + self.answer_tokens

    @property
    def kv_cache_bytes(self) -> int:
        """KV cache that holds half of all sessions at their end, so that their prefixes are evicted between turns."""
        session_tokens = self.num_turns * self.chars_per_turn // CHARS_PER_TOKEN
        least_tokens = self.max_tokens + 2 * BLOCK_TOKENS  # vLLM refuses a cache that cannot hold the longest request
        return max(least_tokens, self.num_sessions * session_tokens // 2) * self.kv_bytes_per_token


def session_prompts(options: LoadOptions) -> Iterator[str]:
    """Prompts in the order of arrival: first turns of all sessions, then second turns, which extend the first.

    Raises:
        ConfigError: There is not that much source text.
    """
    text = "".join(source_text())
    per_session = options.chars_per_turn * options.num_turns
    if per_session * options.num_sessions > len(text):
        raise ConfigError(f"{options.num_sessions} sessions of {per_session} characters need more than {len(text)}")
    for turn in range(options.num_turns):
        for session in range(options.num_sessions):
            start = session * per_session
            yield text[start : start + (turn + 1) * options.chars_per_turn]


def run_load(
    policies: Sequence[str],
    fleet_options: FleetOptions,
    options: LoadOptions,
    *,
    model: str,
    out: Path,
    on_policy: Callable[[str], None],
) -> Iterator[LoadRecord]:
    """Drive each policy's server, one server after the other; yields one record each.

    Raises:
        ServerError: A server or the client failed.
        ConfigError: The client lacks a package.
    """
    prompts = out / "load-prompts.jsonl"
    with prompts.open("w", encoding="utf-8") as lines:
        for text in session_prompts(options):
            lines.write(json.dumps({"prompt": text}) + "\n")
    small = replace(fleet_options, server=replace(fleet_options.server, kv_cache_bytes=options.kv_cache_bytes))
    for policy in policies:
        on_policy(policy)
        with open_fleet((policy,), small, bytes_per_s=options.bytes_per_s) as fleet, fleet.turn(policy) as server:
            result = _drive(server, small, options, prompts, out / f"load-{policy}.json")
            result["restored_tokens"] = restored_tokens(server.client.metrics())
        yield record_of(result, policy=policy, model=model, options=options)


def restored_tokens(samples: Samples) -> int:
    """Prompt tokens that a server's metrics say came from a connector."""
    return round(sample_sum(samples, RESTORED, 'source="external_kv_transfer"'))


def record_of(result: dict[str, Any], *, policy: str, model: str, options: LoadOptions) -> LoadRecord:
    """The client's JSON as a record.

    Raises:
        ServerError: It lacks a value, or no request succeeded.
    """
    try:
        completed = int(result["completed"])
        if completed == 0:
            raise ServerError(f"policy {policy}: none of {options.num_requests} requests succeeded")
        return LoadRecord(
            policy=policy,
            model=model,
            rate=options.rate,
            link_bytes_per_s=options.bytes_per_s,
            num_requests=options.num_requests,
            num_failed=options.num_requests - completed,
            prompt_tokens=result["total_input_tokens"],
            restored_tokens=result["restored_tokens"],
            ttft_mean_s=result["mean_ttft_ms"] / 1e3,
            ttft_p50_s=result["median_ttft_ms"] / 1e3,
            ttft_p99_s=result["p99_ttft_ms"] / 1e3,
            itl_mean_s=result["mean_itl_ms"] / 1e3,
            itl_p99_s=result["p99_itl_ms"] / 1e3,
            requests_per_s=result["request_throughput"],
            tokens_per_s=result["total_token_throughput"],
        )
    except KeyError as error:
        raise ServerError(f"the result of vLLM's client lacks {error}; vLLM 0.32 writes it") from error


def client_command(server: VllmServer, fleet: FleetOptions, options: LoadOptions, prompts: Path, to: Path) -> list[str]:
    """The command line of vLLM's benchmark client."""
    return [
        str(fleet.server.python), "-P", "-c", _CLIENT,
        "--backend", "openai", "--base-url", f"http://127.0.0.1:{server.port}", "--endpoint", "/v1/completions",
        "--model", MODEL, "--served-model-name", MODEL, "--tokenizer", str(fleet.server.model_dir),
        "--dataset-name", "custom", "--dataset-path", str(prompts), "--skip-chat-template", "--disable-shuffle",
        "--custom-output-len", str(options.answer_tokens), "--ignore-eos", "--temperature", "0",
        "--num-prompts", str(options.num_requests), "--request-rate", str(options.rate), "--seed", "0",
        "--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,99", "--disable-tqdm",
        "--save-result", "--result-dir", str(to.parent), "--result-filename", to.name,
    ]  # fmt: skip


def _drive(server: VllmServer, fleet: FleetOptions, options: LoadOptions, prompts: Path, to: Path) -> dict[str, Any]:
    try:
        done = subprocess.run(
            client_command(server, fleet, options, prompts, to),
            capture_output=True,
            text=True,
            check=False,
            timeout=CLIENT_TIMEOUT_S,
            env=server_environment(fleet.server),
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise ServerError(
            f"vLLM's client did not end within {CLIENT_TIMEOUT_S:.0f} s on {server.name}: fewer --sessions, please"
        ) from error
    if "get_vllm_optional_dependencies" in done.stderr:  # vLLM looks for its extra "bench" and says so badly
        raise ConfigError(f"vLLM's client needs pandas beside vLLM: {fleet.server.python} -m pip install pandas")
    if done.returncode or not to.is_file():
        tail = "\n".join(done.stderr.splitlines()[-LOG_TAIL_LINES:])
        raise ServerError(f"vLLM's client failed on {server.name}:\n{tail}")
    result: dict[str, Any] = json.loads(to.read_text(encoding="utf-8"))
    return result
