import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from cacheflow.bench.environment import available_memory
from cacheflow.bench.vllm import server as vllm_server
from cacheflow.bench.vllm.client import ServerError
from cacheflow.bench.vllm.fleet import Fleet
from cacheflow.bench.vllm.policies import RivalMissingError
from cacheflow.bench.vllm.process_group import group_cpu_s, group_memory
from cacheflow.bench.vllm.rivals.lmcache import lmcache_python
from cacheflow.bench.vllm.server import VllmServer, free_port, start_process, stop_process
from cacheflow.bench.vllm.workload import open_model, read_model
from cacheflow.cli import main
from cacheflow.errors import ConfigError
from support.waiting import eventually

PYTHON = Path(sys.executable)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--policies", "magic"], "--policies: policy 'magic' is not known; known are vllm, load"),
        (["--ratios", "0"], "--ratios 0.0 must be above 0 and finite"),
        (["--ratios", "inf"], "must be above 0 and finite"),
        (["--tokens", "1000"], "must be a multiple of --chunk 512"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--load", "-1"], "--load is -1.0"),
        (["--load", "1", "--neighbour"], "exclude each other"),
        (["--time-limit-s", "60"], "--in-memory and --time-limit-s are of --gbps"),
        (["--in-memory"], "--in-memory and --time-limit-s are of --gbps"),
        (["--gbps", "40,0"], "--gbps 40.0,0.0 must be above 0 and finite"),
        (["--gbps", "40", "--load", "1"], "--load and --gbps exclude each other"),
        (["--gbps", "40", "--policies", "vllm,cake"], "a request can ask for: vllm, load, cacheflow"),
        (["--gbps", "40", "--policies", "cacheflow"], "with --gbps vllm, the reference"),
        (["--shape", "Llama-3.1-8B", "--model", "hybrid"], "--model and --shape both say what is restored"),
        (["--shape", "Llama-3.1-8B", "--load", "1"], "Llama-3.1-8B has a tokenizer of made-up words"),
        (["--itl-slo-ms", "60"], "--itl-slo-ms needs --neighbour"),
        (["--itl-slo-ms", "nan", "--neighbour"], "--itl-slo-ms is nan, must be above 0"),
        (["--vllm-python", "/no/python"], "--vllm-python /no/python cannot be started"),
    ],
)
def test_bad_options_are_one_line(options: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "vllm", "--out", str(tmp_path), *options]) == 2
    assert reason in capsys.readouterr().err


def test_an_interpreter_without_vllm_is_told_how_to_get_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # no site-packages
    bare.chmod(0o755)
    assert main(["bench", "vllm", "--out", str(tmp_path), "--vllm-python", str(bare)]) == 2
    assert "has no vLLM: pip install vllm" in capsys.readouterr().err


def test_an_interpreter_without_lmcache_is_named():
    with pytest.raises(RivalMissingError, match="does not import both lmcache and vllm"):
        lmcache_python(Path("/no/python"), PYTHON)


def test_a_model_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="unknown; known: smollm2-135m, tiny-qwen3"):
        open_model("smollm9")
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    with pytest.raises(ConfigError, match="cannot be used"):
        read_model(tmp_path, "m")


def test_a_hybrids_chunks_are_blocks_that_hold_a_running_state(tmp_path: Path):
    sizes = {
        "model_type": "qwen3_5_text", "num_hidden_layers": 8, "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 96, "vocab_size": 320,
        "linear_num_key_heads": 5, "linear_num_value_heads": 15, "linear_key_head_dim": 64,
        "linear_value_head_dim": 64, "linear_conv_kernel_dim": 4, "max_position_embeddings": 4096,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    model = read_model(tmp_path, "m")
    assert model.is_hybrid
    model.require_block_size(512)
    for wrong in (448, 520):
        with pytest.raises(ConfigError, match=r"499 tokens.*give --chunk 512"):
            model.require_block_size(wrong)


def test_a_server_that_ends_while_starting_shows_the_end_of_its_log(tmp_path: Path):
    command = [sys.executable, "-c", "print('out of memory'); raise SystemExit(3)"]
    process, log = start_process("vllm", command, {}, tmp_path)
    with (
        closing(VllmServer("vllm", process, port=1, log=log)) as server,
        pytest.raises(ServerError, match="out of memory"),
    ):
        server.wait_ready(timeout_s=60.0)


def test_a_frozen_server_uses_no_processor_and_closing_ends_its_children(tmp_path: Path):
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'while True: pass'])"
    spin = child + "\nprint('up', flush=True)\nwhile True: pass"
    process, log = start_process("spin", [sys.executable, "-c", spin], {}, tmp_path)
    server = VllmServer("spin", process, port=1, log=log)
    try:
        while "up" not in log.read_text() or server.cpu_s() == 0.0:
            assert process.poll() is None
        server.freeze()
        subprocess.run([sys.executable, "-c", "pass"], check=True)  # gives the stop time to arrive
        frozen_s = server.cpu_s()
        for _ in range(10):
            subprocess.run([sys.executable, "-c", "pass"], check=True)
        assert server.cpu_s() == frozen_s
        server.thaw()
        while server.cpu_s() == frozen_s:
            pass
    finally:
        server.close()
    assert process.poll() is not None
    while group_cpu_s(process.pid):  # the child is killed, its parent is gone: reaped in a moment
        pass


def test_memory_is_that_of_the_group_process_by_process(tmp_path: Path):
    held = "held = b'x' * (64 << 20)"
    child = [sys.executable, "-c", "import signal; print('up', flush=True); signal.pause()"]
    parent = f"import subprocess; {held}; subprocess.run({child})"
    process, log = start_process("held", [sys.executable, "-c", parent], {}, tmp_path)
    try:
        while "up" not in log.read_text():
            assert process.poll() is None
        greatest, least = sorted(group_memory(process.pid), reverse=True)
        assert greatest > 64 << 20 > least > 0
        assert greatest < available_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    finally:
        stop_process(process)
    assert sum(group_memory(process.pid)) == 0


def test_a_server_that_fails_in_its_turn_names_its_log(tmp_path: Path):
    process, log = start_process("gone", [sys.executable, "-c", "pass"], {}, tmp_path)
    process.wait()
    fleet = Fleet({"gone": VllmServer("gone", process, port=free_port(), log=log)})
    with pytest.raises(ServerError) as caught, fleet.turn("gone") as server:
        server.client.evict()
    assert "failed at POST /reset_prefix_cache" in str(caught.value)
    assert str(log) in str(caught.value)


def test_stopping_what_has_ended_is_no_error(tmp_path: Path):
    process, _ = start_process("done", [sys.executable, "-c", "pass"], {}, tmp_path)
    process.wait()
    stop_process(process)


def test_children_tidy_up_behind_a_parent_that_ended_first(tmp_path: Path):
    """As vLLM's server ends before Python's resource tracker has removed the shared memory of its workers."""
    child = "import signal, time; signal.sigwait([signal.SIGTERM]); time.sleep(0.5); print('tidied', flush=True)"
    block = "import signal, subprocess, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])"
    start = f"child = subprocess.Popen([sys.executable, '-c', {child!r}])"
    parent = f"{block}; {start}; print('up', flush=True); signal.sigwait([signal.SIGTERM])"
    process, log = start_process("tidy", [sys.executable, "-c", parent], {}, tmp_path)
    while "up" not in log.read_text():
        assert process.poll() is None
    stop_process(process)
    assert log.read_text() == "up\ntidied\n"


def test_a_child_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vllm_server, "TIDY_TIMEOUT_S", 0.3)
    stays = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    parent = f"import subprocess, sys, signal; subprocess.Popen([sys.executable, '-c', {stays!r}]); signal.pause()"
    process, log = start_process("stays", [sys.executable, "-c", parent], {}, tmp_path)
    while "up" not in log.read_text():
        assert process.poll() is None
    stop_process(process)
    eventually(lambda: not group_memory(process.pid))  # it is killed: reaped in a moment


def test_a_program_that_is_missing_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="/no/program cannot be started"):
        start_process("x", ["/no/program"], {}, tmp_path)
