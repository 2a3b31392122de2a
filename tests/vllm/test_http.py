"""What a user touches: ``cacheflow serve`` over HTTP, beside a server without CacheFlow.

In float32: between an engine that decoded a session's answers and one that prefills them again lie rounding errors, at
which greedy tokens in bfloat16 may part.
"""

import json
import re
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.torch, pytest.mark.timeout(600)]

CHUNK = 128
ANSWER_TOKENS = 16
EXPLAIN = {"kv_transfer_params": {"explain": True}}
TURNS = json.loads((Path(__file__).parents[1] / "data" / "session.json").read_text(encoding="utf-8"))


@dataclass
class Asked:
    """A session's answers; of each turn, the prompt's tokens, those that were not computed, and what was explained."""

    answers: list[str] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    cached_tokens: list[int] = field(default_factory=list)
    params: list[dict | None] = field(default_factory=list)

    @property
    def restored_tokens(self) -> list[int]:
        records = [(params or {}).get("cacheflow", []) for params in self.params]
        return [sum(record["end"] - record["start"] for record in each) for each in records]


def chat(server, *, extra: dict | None = None) -> Asked:
    """The sample session, as chat: each turn carries the whole history."""
    from support.vllm_http import MODEL

    asked, messages = Asked(), []
    with server.client() as client:
        for turn in TURNS:
            messages.append({"role": "user", "content": turn})
            reply = client.chat.completions.create(
                model=MODEL, messages=messages, temperature=0, max_tokens=ANSWER_TOKENS, extra_body=extra
            )
            messages.append({"role": "assistant", "content": reply.choices[0].message.content})
            _note(asked, reply, reply.choices[0].message.content)
    return asked


def complete(server, turns: list[list[int]], *, extra: dict | None = None) -> Asked:
    """A session of token ids: the answer to each turn becomes part of the next prompt."""
    from support.vllm_http import MODEL

    asked, prompt = Asked(), []
    body = {"return_token_ids": True, "ignore_eos": True, **(extra or {})}
    with server.client() as client:
        for turn in turns:
            prompt = [*prompt, *turn]
            reply = client.completions.create(
                model=MODEL, prompt=prompt, temperature=0, max_tokens=ANSWER_TOKENS, extra_body=body
            )
            answer = list(reply.choices[0].token_ids)
            prompt = [*prompt, *answer]
            _note(asked, reply, answer)
    return asked


def _note(asked: Asked, reply, answer) -> None:
    asked.answers.append(answer)
    asked.prompt_tokens.append(reply.usage.prompt_tokens)
    asked.cached_tokens.append(reply.usage.prompt_tokens_details.cached_tokens or 0)
    asked.params.append(reply.kv_transfer_params)


@dataclass
class Smollm:
    """SmolLM2 behind ``cacheflow serve``, asked twice with its prefix cache reset in between."""

    server: object
    folder: Path
    model: Path
    stock: Asked
    first: Asked
    again: Asked
    before: dict
    after: dict

    def rose(self, name: str, label: str = "") -> float:
        """By how much a metric rose from before the second time to after it."""
        return self.after.get((name, label), 0.0) - self.before.get((name, label), 0.0)


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    from cacheflow.engine.smollm2 import smollm2_folder
    from support.vllm_http import cacheflow_server, stock_server

    folder, model = tmp_path_factory.mktemp("smollm"), smollm2_folder()
    with ExitStack() as stack:
        # Slow enough that recomputing a part pays on most machines.
        served = stack.enter_context(cacheflow_server("smollm2-135m", folder, "--throttle-bytes-per-s", "3e7"))
        with stock_server(str(model), folder) as plain:
            stock = chat(plain.wait_ready())
        first = chat(served.wait_ready(), extra=EXPLAIN)
        served.reset()
        before = served.metrics()
        again = chat(served, extra=EXPLAIN)
        yield Smollm(served, folder, model, stock, first, again, before, served.metrics())


@pytest.mark.model
def test_a_session_asked_again_after_a_reset_gets_the_answers_of_a_server_without_cacheflow(smollm):
    assert smollm.first.answers == smollm.stock.answers
    assert smollm.again.answers == smollm.stock.answers
    assert len(set(smollm.stock.answers)) == len(TURNS)  # equal answers to all turns would prove little
    first_turn = smollm.again.prompt_tokens[0]
    assert smollm.again.restored_tokens[0] == (first_turn - 1) // CHUNK * CHUNK
    assert smollm.again.cached_tokens[0] == smollm.again.restored_tokens[0]


@pytest.mark.model
def test_every_request_explains_what_was_done_with_it(smollm):
    nothing = smollm.first.params[0]
    assert nothing["cacheflow"] == []
    assert "the store holds 0" in nothing["cacheflow_reason"]
    (record,) = smollm.again.params[0]["cacheflow"]
    assert record["outcome"] == "done"
    assert record["policy"] == "cacheflow"
    assert record["choice"] in ("hybrid", "load")
    assert str(record["choice"]) in record["reason"]
    cells = "".join(record["cells"])
    assert len(record["cells"]) == record["end"] // CHUNK
    assert cells.count("c") == record["recomputed_cells"]
    assert cells.count("l") == record["loaded_cells"] > 0
    assert record["restore_s"] > 0
    assert record["bound_restore_s"] > 0
    assert smollm.stock.params == [None] * len(TURNS)


@pytest.mark.model
def test_metrics_count_what_the_records_say(smollm):
    from support.vllm_http import objects

    records = [record for params in smollm.again.params for record in params["cacheflow"]]
    restored = sum(smollm.again.restored_tokens)
    by_source = {source: smollm.rose("vllm:cacheflow_tokens_total", source) for source in ("loaded", "recomputed")}
    assert sum(by_source.values()) == pytest.approx(restored)
    assert by_source["loaded"] > 0
    assert smollm.rose("vllm:cacheflow_restorations_total", "done") == len(records)
    assert smollm.rose("vllm:cacheflow_restore_seconds_count") == len(records)
    assert smollm.rose("vllm:cacheflow_restore_seconds_sum") == pytest.approx(sum(r["restore_s"] for r in records))
    assert smollm.rose("vllm:cacheflow_bound_ratio_count") == len(records)
    assert smollm.rose("vllm:cacheflow_loaded_bytes_total") == sum(record["loaded_bytes"] for record in records)
    assert smollm.rose("vllm:prompt_tokens_by_source_total", "external_kv_transfer") == restored
    assert smollm.after["vllm:cacheflow_link_bytes_per_second", ""] > 0
    assert smollm.after.get(("vllm:cacheflow_lookup_timeouts_total", ""), 0) == 0
    num_chunks = len(objects(smollm.folder / "store")) / 30  # an object a layer
    # What the last step saved is counted with the next.
    assert num_chunks - 1 <= smollm.after["vllm:cacheflow_chunks_saved_total", "stored"] <= num_chunks


@pytest.mark.model
def test_a_wish_that_is_not_understood_is_answered(smollm):
    from support.vllm_http import MODEL

    wish = {"kv_transfer_params": {"cacheflow": "fast"}}
    with smollm.server.client() as client:
        reply = client.completions.create(model=MODEL, prompt="Hello", max_tokens=1, extra_body=wish)
    assert "must be one of auto, load, recompute, off" in reply.kv_transfer_params["cacheflow_error"]


@pytest.mark.model
def test_a_request_keeps_its_prefix_in_the_store(smollm):
    """In the store's files that shows as a last use which lies ahead."""
    from support.vllm_http import MODEL, objects, wait_for

    prompt = [2000 + number for number in range(2 * CHUNK + 5)]
    with smollm.server.client() as client:

        def ask(prompt, **params):
            extra = {"kv_transfer_params": params}
            return client.completions.create(model=MODEL, prompt=prompt, max_tokens=1, extra_body=extra)

        assert ask(prompt, keep="tool").kv_transfer_params is None
        assert ask(prompt, keep=600).kv_transfer_params is None
        said = ask(prompt, keep="later").kv_transfer_params["cacheflow_error"]
        assert "keep is 'later', must be 'tool' or seconds, from 0 to 3600" in said

        def counted():
            ask("Hello")  # what a worker has done is counted with its next step
            return smollm.server.metrics().get(("vllm:cacheflow_kept_chunks_total", "pinned"), 0) == 4

        wait_for(counted, "both keeps to be counted")
    ahead = [path for path in objects(smollm.folder / "store") if path.stat().st_mtime > time.time() + 60]
    assert len(ahead) == 2 * 30, "an object a layer"


@pytest.mark.model
def test_explain_is_where_the_docs_say_and_nowhere_else(smollm):
    from support.vllm_http import MODEL

    prompt = [1000 + number for number in range(3 * CHUNK + 5)]
    wish = {"kv_transfer_params": {"explain": True, "cacheflow": "load"}, "ignore_eos": True}
    with smollm.server.client() as client:

        def ask(prompt=prompt, **more):
            smollm.server.reset()
            return client.completions.create(model=MODEL, prompt=prompt, max_tokens=8, extra_body=wish, **more)

        answer = ask(temperature=0).choices[0].text
        several = ask(n=2, temperature=1.0).kv_transfer_params
        restored = [record for record in several["cacheflow"] if record["outcome"] == "done"]
        assert [record["end"] for record in restored] == [3 * CHUNK]
        assert restored[0]["choice_index"] in (0, 1)
        assert "cacheflow_reason" not in several
        short = prompt[: CHUNK // 2]
        of_the_first = ask([short, prompt]).kv_transfer_params
        assert "no whole chunk" in of_the_first["cacheflow_reason"]
        chunks = list(ask(stream=True))
        assert len(chunks) > 1
        assert all(getattr(chunk, "kv_transfer_params", None) is None for chunk in chunks)
        stopped = ask(temperature=0, stop=[answer[2:5]])
        assert stopped.choices[0].finish_reason == "stop"
        assert stopped.kv_transfer_params is None
        computed = ask(echo=True, logprobs=1).kv_transfer_params
        assert computed["cacheflow"] == []
        assert "log-probabilities" in computed["cacheflow_reason"]
        events = list(
            client.responses.create(model=MODEL, input="Hello", max_output_tokens=4, stream=True, extra_body=EXPLAIN)
        )
        assert events[-1].type == "response.completed"
        assert "no whole chunk" in events[-1].response.kv_transfer_params["cacheflow_reason"]


@pytest.mark.model
def test_vllms_own_benchmark_client_runs_through(smollm):
    from support.vllm_http import MODEL

    client = (
        "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
        "p = argparse.ArgumentParser(); add_cli_args(p); main(p.parse_args())"
    )
    command = [
        sys.executable, "-P", "-c", client, "--backend", "openai", "--endpoint", "/v1/completions",
        "--base-url", f"http://127.0.0.1:{smollm.server.port}", "--model", MODEL, "--tokenizer", str(smollm.model),
        "--dataset-name", "random", "--random-input-len", "300", "--random-output-len", "4", "--num-prompts", "4",
        "--ignore-eos", "--disable-tqdm", "--save-result", "--result-dir", str(smollm.folder),
        "--result-filename", "bench.json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=smollm.folder)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((smollm.folder / "bench.json").read_text())
    assert (result["completed"], result["total_output_tokens"]) == (4, 16)
    assert smollm.server.metrics()["vllm:cacheflow_chunks_saved_total", "stored"] >= 4 * (300 // CHUNK)


@pytest.mark.model
@pytest.mark.parametrize("paths", [["/reset_prefix_cache?reset_external=true"], ["/pause?clear_cache=true", "/resume"]])
def test_a_reset_of_the_connector_forgets_what_was_saved_and_saves_anew(smollm, paths):
    turns = [list(range(1000 + len(paths), 1000 + len(paths) + 3 * CHUNK))]
    restored, answers = [], []
    for before in ([], ["/reset_prefix_cache"], paths, ["/reset_prefix_cache"]):
        for path in before:
            assert smollm.server.post(path).get("success", True)
        asked = complete(smollm.server, turns, extra=EXPLAIN)
        restored += asked.restored_tokens
        answers += asked.answers
    assert restored[0] == restored[2] == 0
    assert restored[1] == restored[3] == 2 * CHUNK
    assert len({tuple(answer) for answer in answers}) == 1


@pytest.mark.model
def test_the_server_says_what_it_checked_and_ends_when_asked(smollm):
    """The last test of this server."""
    log = smollm.server.log_text()
    assert log.startswith("--kv-transfer-config '{")
    assert "self-test passed" in log
    assert smollm.server.terminate() == 0
    from support.vllm_http import torn, wait_for

    wait_for(smollm.server.group_is_gone, "the server's other processes")
    assert torn(smollm.folder / "store") == []


def test_the_documented_metrics_are_those_there_are():
    from cacheflow.vllm.prometheus import BANDWIDTH, COUNTERS, HISTOGRAMS

    text = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(vllm:cacheflow_\w+?)(?:_total)?(?:\{\w+\})?` \|", text, flags=re.MULTILINE))
    assert documented == {each[0] for each in (*COUNTERS.values(), *HISTOGRAMS.values(), BANDWIDTH)}


SESSION = (2048, 200, 300)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """A tiny random mixture of experts."""
    from support.vllm_http import write_word_tokenizer
    from support.vllm_models import TINY, write_model

    folder = tmp_path_factory.mktemp("moe")
    write_model(folder, "qwen3_moe")
    write_word_tokenizer(folder, vocab_size=TINY["vocab_size"])
    return folder


def answers_without_cacheflow(folder, turns) -> list[list[int]]:
    """To a session of token ids, of an engine in this process: far sooner there than a server's three are."""
    from support.connector_engine import serving_engine

    answers, prompt = [], []
    with serving_engine(folder, dtype="float32", chunk_tokens=CHUNK) as plain:
        for turn in turns:
            prompt = [*prompt, *turn]
            answers.append(plain.ask(prompt, num_tokens=ANSWER_TOKENS).tokens)
            prompt += answers[-1]
    return answers


@pytest.mark.usefixtures("_single_process_vllm")
def test_a_server_killed_in_mid_save_and_in_mid_restore_leaves_nothing_that_harms_the_next(moe, tmp_path):
    from support.connector_engine import random_tokens
    from support.vllm_http import cacheflow_server, torn, wait_for

    turns = [random_tokens(count, seed=count) for count in SESSION]
    answers = answers_without_cacheflow(moe, turns)
    tmp_path = next(filter(None, (killed_in_mid_save(moe, tmp_path / f"{attempt}", turns) for attempt in range(4))))
    store = tmp_path / "store"
    assert torn(store) == []

    # 2,048 tokens are 4 MB: many seconds of this link.
    with cacheflow_server(str(moe), tmp_path, "--throttle-bytes-per-s", "1e5", name="restoring") as restoring:
        assert complete(restoring.wait_ready(), turns).answers == answers
        restoring.reset()
        asking = in_background(restoring, turns, extra={"kv_transfer_params": {"cacheflow": "load"}})
        wait_for(lambda: restoring.metrics()["vllm:num_requests_waiting", ""], "the request to be parked")
        restoring.kill()
        asking.join()
    assert torn(store) == []
    # At most what each of three writing threads had in hand, twice.
    assert len(list((store / "staging").iterdir())) <= 6

    old = store / "staging" / "1-of-a-dead-writer"
    old.write_bytes(b"half a record")
    make_old(old)
    with cacheflow_server(str(moe), tmp_path, name="after") as after:
        again = complete(after.wait_ready(), turns, extra=EXPLAIN)
        assert again.answers == answers
        assert again.restored_tokens[0] == (SESSION[0] - 1) // CHUNK * CHUNK
        (record,) = again.params[0]["cacheflow"]
        assert record["loaded_cells"] > 0
        assert record["failed_loads"] == {}
        assert after.terminate() == 0
        wait_for(after.group_is_gone, "the server's other processes")
    assert torn(store) == []
    assert not old.exists()


def killed_in_mid_save(moe, folder: Path, turns) -> Path | None:
    """The folder of a server that was killed while it saved the first turn; None when it was through with it sooner."""
    from support.vllm_http import cacheflow_server, objects, wait_for

    folder.mkdir()
    store = folder / "store"
    with cacheflow_server(str(moe), folder, name="saving") as saving:
        saving.wait_ready()
        asking = in_background(saving, turns)
        wait_for(lambda: objects(store), "the first saved object", poll_s=0.001)
        saving.kill()
        asking.join()
    saved = len(objects(store))
    # An object for each of 4 layers.
    return folder if 0 < saved < SESSION[0] // CHUNK * 4 else None


def in_background(server, turns, *, extra: dict | None = None) -> threading.Thread:
    """Ask a session of a server that will not live to answer it."""
    import openai

    def ask() -> None:
        with suppress(openai.APIError):
            complete(server, turns, extra=extra)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def make_old(path: Path) -> None:
    import os
    import time

    from cacheflow.stores.directory import STALE_STAGING_S

    long_ago_s = time.time() - 2 * STALE_STAGING_S
    os.utime(path, (long_ago_s, long_ago_s))
