"""A start that fails ends with its reason, as one line."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from cacheflow.errors import ConfigError
from cacheflow.vllm.last_line import REASON_FILE, environment_for_reason, reason_left

SRC = Path(__file__).parents[2] / "src"
SERVER = """
import multiprocessing, sys
sys.path.insert(0, {src!r})
from cacheflow.errors import ConfigError
from cacheflow.vllm.last_line import reason_left
from cacheflow.vllm.plugin import register

def worker(rank):
    register()
    with reason_left():
        raise ConfigError(f"the reason,\\nfound by rank {{rank}}")

if __name__ == "__main__":
    register()
    register()
    for rank in range(2 if "fail" in sys.argv else 0):
        process = multiprocessing.get_context("spawn").Process(target=worker, args=(rank,))
        process.start()
        process.join()
    raise RuntimeError("Engine core initialization failed. See root cause above.")
"""


@pytest.fixture
def server(tmp_path):
    """Runs a server process that starts workers, as vLLM does; returns its exit status and standard error."""
    script = tmp_path / "server.py"
    script.write_text(SERVER.format(src=str(SRC)))

    def run(*words: str, environment: dict[str, str]) -> tuple[int, list[str]]:
        ended = subprocess.run(
            [sys.executable, str(script), *words], env=environment, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
        return ended.returncode, ended.stderr.splitlines()

    return run


def test_the_server_process_prints_last_what_the_first_rank_found(server):
    environment = environment_for_reason({"PATH": "/usr/bin:/bin"})
    code, lines = server("fail", environment=environment)
    assert code == 1
    assert lines[-2] == "RuntimeError: Engine core initialization failed. See root cause above."
    assert lines[-1] == "cacheflow: error: the reason, found by rank 0"
    assert [line for line in lines if line.startswith("cacheflow: error:")] == [
        "cacheflow: error: the reason, found by rank 0",  # the log of the rank, here with no handler of its own
        lines[-1],
    ]
    assert not Path(environment[REASON_FILE]).exists()


def test_a_server_that_ends_for_other_reasons_says_nothing(server):
    code, lines = server(environment=environment_for_reason({"PATH": "/usr/bin:/bin"}))
    assert code == 1
    assert not any("cacheflow: error" in line for line in lines)


def test_without_serve_every_rank_logs_its_reason_and_no_file_is_made(caplog, monkeypatch):
    monkeypatch.delenv(REASON_FILE, raising=False)
    for _ in range(2):
        with caplog.at_level(logging.ERROR, logger="cacheflow"), pytest.raises(ConfigError), reason_left():
            raise ConfigError("a reason\n in two lines")
    assert [record.getMessage() for record in caplog.records] == ["cacheflow: error: a reason in two lines"] * 2


def test_a_place_that_cannot_be_written_costs_nothing_but_the_last_line(caplog, monkeypatch):
    monkeypatch.setenv(REASON_FILE, "/proc/nowhere/reason.txt")
    with caplog.at_level(logging.ERROR, logger="cacheflow"), pytest.raises(ConfigError, match="why"), reason_left():
        raise ConfigError("why")
    assert caplog.records


def test_bugs_are_not_dressed_up(caplog, monkeypatch):
    monkeypatch.delenv(REASON_FILE, raising=False)
    with pytest.raises(ZeroDivisionError), reason_left():
        raise ZeroDivisionError
    assert not caplog.records


def test_the_users_own_warning_filters_stay():
    made = environment_for_reason({"PYTHONWARNINGS": "error::DeprecationWarning", "A": "b"})
    assert made["PYTHONWARNINGS"] == "error::DeprecationWarning,ignore:resource_tracker:UserWarning"
    assert made["A"] == "b"
    assert not Path(made[REASON_FILE]).exists()


@pytest.mark.vllm
@pytest.mark.slow
def test_vllms_server_ends_with_the_reason_that_only_a_worker_can_know(tmp_path):
    from support.vllm_http import cacheflow_server, write_word_tokenizer
    from support.vllm_models import TINY, write_model

    folder = write_model(tmp_path / "model", "mistral", sliding_window=512)
    write_word_tokenizer(folder, vocab_size=TINY["vocab_size"])
    refusal = (
        "cacheflow: error: CacheFlow cannot restore this engine's KV cache: the model keeps a sliding window of "
        "tokens in every layer"
    )
    with cacheflow_server(str(folder), tmp_path, name="door") as server:
        assert server.process.wait(60) == 2
        (line,) = server.log_text().splitlines()  # nothing but the reason: vLLM was not started
        assert line.startswith(refusal)
    with cacheflow_server(str(folder), tmp_path, name="worker", more=("--hf-overrides", '{"unused": 1}')) as server:
        assert server.process.wait(240) == 1  # vLLM's own
        lines = server.log_text().splitlines()
    assert lines[-1].startswith(refusal)
    assert sum("ERROR" in line and refusal in line for line in lines) == 1  # once in the log, whatever vLLM's traces
