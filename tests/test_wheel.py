"""What the wheel leaves out, and that nothing in it needs that."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path

import pytest

from cacheflow import cli
from cacheflow.bench.vllm import policies

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture
def excluded(project) -> list[str]:
    """The modules that the wheel leaves out."""
    paths = project["tool"]["hatch"]["build"]["targets"]["wheel"]["exclude"]
    assert all((ROOT / path.lstrip("/")).exists() for path in paths)
    return [path.removeprefix("/src/").removesuffix(".py").replace("/", ".") for path in paths]


def test_the_linter_keeps_the_product_from_importing_it(project, excluded):
    (contract,) = (each for each in project["tool"]["importlinter"]["contracts"] if each["type"] == "protected")
    assert contract["protected_modules"] == excluded
    assert contract["allowed_importers"] == []


def test_what_is_found_by_name_alone_is_known_to_be_left_out(excluded):
    found = [command.module for command in cli.COMMANDS if command.in_repository]
    names = [*found, f"{policies.RIVALS}.registry"]
    assert all(any(f"{name}.".startswith(f"{each}.") for name in names) for each in excluded)
    assert all(any(f"{name}.".startswith(f"{each}.") for each in excluded) for name in names)
    others = [command.module for command in cli.COMMANDS if not command.in_repository]
    assert not any(f"{name}.".startswith(f"{each}.") for name in others for each in excluded)


@pytest.mark.parametrize("words", [("bench", "figures"), ("bench", "readme")])
def test_a_command_that_is_not_there_is_one_line_and_not_in_the_help(monkeypatch, capsys, words):
    real = importlib.util.find_spec

    def without(name):
        if name.startswith("cacheflow.bench.figures"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return None if name == "cacheflow.bench.readme" else real(name)

    monkeypatch.setattr(cli, "find_spec", without)
    assert cli.main([*words, "--out", "x"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"cacheflow {' '.join(words)} serves CacheFlow's own repository and is not in the installed" in error
    with pytest.raises(SystemExit, match="0"):
        cli.main(["bench", "--help"])
    shown = capsys.readouterr().out
    assert "restore" in shown
    assert "figures" not in shown
    assert "readme" not in shown
