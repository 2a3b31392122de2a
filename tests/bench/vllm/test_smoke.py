"""One real server of each kind behind our command line, client and costs. Runs only where vLLM is installed."""

import importlib.util
import sys
from pathlib import Path

import pytest

from cacheflow.bench.vllm.ask import ask, compare, save_prefix
from cacheflow.bench.vllm.fleet import FleetOptions, open_fleet
from cacheflow.bench.vllm.server import ServerOptions
from cacheflow.bench.vllm.workload import open_model, prompt_tokens

OFFLOADING = "vllm_offloading"

_SPEC = importlib.util.find_spec("vllm")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.torch,
    pytest.mark.skipif(_SPEC is None or _SPEC.origin is None, reason="needs vLLM, not a folder of that name"),
]

NUM_TOKENS = 1024


@pytest.mark.parametrize(
    ("name", "policy"),
    [("tiny-qwen3", OFFLOADING), pytest.param("hybrid", "cacheflow", marks=pytest.mark.long)],
)
def test_a_prefix_that_was_evicted_comes_back_and_changes_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, policy: str
):
    monkeypatch.setenv("CACHEFLOW_CACHE", str(tmp_path / "cache"))
    model = open_model(name)
    tokens = prompt_tokens(model, NUM_TOKENS + 37)
    server = ServerOptions(
        python=Path(sys.executable), model_dir=model.folder, dtype="bfloat16", chunk_tokens=512, max_tokens=2048,
        kv_cache_gib=1, compiled=False, log_dir=tmp_path / "logs", hybrid=model.is_hybrid,
    )  # fmt: skip
    options = FleetOptions(server=server, store_root=tmp_path / "store")
    with open_fleet((policy,), options, bytes_per_s=1e8) as fleet, fleet.turn(policy) as running:
        client = running.client
        reference = ask(client, tokens, num_tokens=16).answer  # nothing is stored yet: this is a prefill
        assert reference.cached_tokens == 0
        save_prefix(client, tokens[: NUM_TOKENS + 1])
        restored = ask(client, tokens, num_tokens=16).answer
        client.evict()
        other = [(token + 1) % model.shape.vocab_size for token in tokens]
        unrelated = ask(client, other, num_tokens=16).answer
    assert restored.cached_tokens == NUM_TOKENS
    compared = compare(restored, reference, beside_neighbour=False)
    assert compared.correct, compared.note
    assert unrelated.tokens != reference.tokens  # else equality would say nothing
