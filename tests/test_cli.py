import argparse
import re
import sys
from types import ModuleType

import pytest

from cacheflow import __version__, cli
from cacheflow.cli import Command
from cacheflow.errors import StoreError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """Registers a command whose ``run`` is the function given."""

    def register(run) -> None:
        module = ModuleType("fake_command")
        module.add_arguments = lambda parser: parser.add_argument("--number", type=int, default=0)
        module.run = run
        monkeypatch.setitem(sys.modules, "fake_command", module)
        monkeypatch.setattr(cli.build_parser, "__defaults__", ((Command(("bench", "fake"), "fake", "fake_command"),),))

    return register


def raising(error: BaseException):
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def test_a_command_gets_its_options_and_its_code_comes_back(command):
    command(lambda args: args.number)
    assert cli.main(["bench", "fake", "--number", "7"]) == 7


def test_a_mistyped_option_is_not_taken_for_a_shorter_one(command, capsys: pytest.CaptureFixture[str]):
    command(lambda args: args.number)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "fake", "--numbe", "7"])
    assert "--numbe" in capsys.readouterr().err


def test_our_errors_are_one_line_and_code_2(command, capsys: pytest.CaptureFixture[str]):
    command(raising(StoreError("store at /x\nis not writable")))
    assert cli.main(["bench", "fake"]) == 2
    assert capsys.readouterr().err == "cacheflow: error: store at /x is not writable\n"


def test_a_missing_extra_is_named(command, capsys: pytest.CaptureFixture[str]):
    command(raising(ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")))
    assert cli.main(["bench", "fake"]) == 2
    assert "pip install 'cacheflow-kv[engine]'" in capsys.readouterr().err


def test_a_bug_is_not_dressed_up_as_the_users_error(command):
    command(raising(ModuleNotFoundError("No module named 'cacheflow.typo'", name="cacheflow.typo")))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["bench", "fake"])


def test_an_interrupt_is_130(command):
    command(raising(KeyboardInterrupt()))
    assert cli.main(["bench", "fake"]) == 130


@pytest.mark.parametrize("argv", [["bench", "fake", "--number", "x"], ["nonsense"], [], ["bench"]], ids=str)
def test_wrong_usage_is_one_line_and_code_2(command, capsys: pytest.CaptureFixture[str], argv: list[str]):
    command(lambda args: 0)
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "error:" in error


def test_version_and_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"cacheflow {__version__}\n"
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    assert "plan" in capsys.readouterr().out


def test_every_registered_command_can_explain_itself(capsys: pytest.CaptureFixture[str]):
    for registered in cli.COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            cli.main([*registered.words, "--help"])
        assert registered.help in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("words", [(), ("bench",), *(each.words for each in cli.COMMANDS)], ids=" ".join)
def test_no_help_shows_the_markup_of_the_source(words, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        cli.main([*words, "--help"])
    shown = capsys.readouterr().out
    assert not re.search(r"`|\*\*|:\w+:`|\]\(|(?<!=)\bNone\b", shown), shown
