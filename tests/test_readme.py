"""What README.md and docs/vllm.md show can be pasted: into an empty folder, and into the argument parser."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cacheflow import cli

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs" / "vllm.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(path.read_text(encoding="utf-8")) if kind == language]


def commands(path: Path) -> list[list[str]]:
    lines = [line for text in blocks(path, "") for line in text.splitlines() if line.startswith("cacheflow ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def pasted(folder: Path, *command: str, timeout_s: float) -> str:
    """Run Python in a folder as a user would, with nothing of the repository in it; returns all it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    ended = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-3000:]
    return ended.stdout


@pytest.mark.parametrize("words", [*commands(README), *commands(DOCS)], ids=" ".join)
def test_every_command_that_is_shown_is_one(words):
    args = cli.parse(list(words))
    assert callable(args.run)


def test_commands_are_shown_in_both():
    assert len(commands(README)) >= 6
    assert len(commands(DOCS)) >= 2
    assert len(blocks(README, "python")) == 2


@pytest.mark.slow
def test_predictions_run_in_an_empty_folder(tmp_path):
    pytest.importorskip("matplotlib")
    for words in commands(README):
        if words[0] in ("plan", "simulate"):
            fewer = ["--sessions", "5"] if words[0] == "simulate" else []
            pasted(tmp_path, "-m", "cacheflow.cli", *words, *fewer, timeout_s=200)
    assert {path.name for path in tmp_path.iterdir()} == {"plan", "sim"}


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.torch
@pytest.mark.timeout(1800)
def test_the_python_runs_as_pasted_into_an_empty_folder(tmp_path):
    shown = pasted(tmp_path, "-c", "\n".join(blocks(README, "python")), timeout_s=1700)
    (restored,) = re.findall(r"^(\d+) [\d.]+ (?:\{|None)", shown, re.MULTILINE)
    (several,) = re.findall(r"^\[(\d+), (\d+)\]$", shown, re.MULTILINE)
    if "not to be relied on" not in shown:  # a machine so busy that costs could not be measured so far
        assert all(int(each) >= 1024 for each in (restored, *several))
    assert {path.name for path in tmp_path.iterdir()} == {"kv", "profile.json"}


def test_what_calibrate_writes_is_what_the_python_reads():
    (words,) = [each for each in commands(README) if each[0] == "calibrate"]
    first = blocks(README, "python")[0]
    assert f'load_profile(Path("{words[words.index("--out") + 1]}"))' in first
    (own,) = re.findall(r"main\((\[.*\])\)", first)
    args = cli.parse(json.loads(own))
    assert (args.model, str(args.out)) == (words[1], words[words.index("--out") + 1])
