"""``cacheflow demo``: on a tiny model that reads bytes, and once on the real one."""

import pytest

from cacheflow import cli
from cacheflow.bench.records.restore import RestoreRecord
from cacheflow.bench.records.suites import read_records
from cacheflow.policies.registry import RESTORE_POLICIES

pytestmark = pytest.mark.torch

RECORDS = "demo.jsonl"
EXACT = "every answer, every KV cell and every logit equalled"


@pytest.fixture(autouse=True)
def torch_threads():
    from support.embedded_cases import one_torch_thread

    with one_torch_thread() as usual:
        yield usual


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory):
    """A tiny model whose tokenizer has a token for each byte and for the two marks of the chat format."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from support.embedded_cases import save_tiny

    folder = save_tiny(tmp_path_factory.mktemp("models") / "tiny-bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in ("<|im_start|>", "<|im_end|>")])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def short(monkeypatch):
    """A session of some 1,700 bytes in chunks of 128."""
    from cacheflow.commands import demo as demo_command
    from cacheflow.commands import demo_session as demo
    from cacheflow.embedded import EngineOptions
    from cacheflow.profiling.calibrate import CalibrationOptions

    monkeypatch.setattr(demo_command, "TURN_CHARS", (500, 300, 0))
    monkeypatch.setattr(demo, "MAX_TOKENS", 2048)
    monkeypatch.setattr(demo, "EngineOptions", lambda: EngineOptions(chunk_tokens=128))
    monkeypatch.setattr(
        demo, "CalibrationOptions", lambda **options: CalibrationOptions(**{**options, "chunk_tokens": 128})
    )


@pytest.fixture
def demo(byte_model, tmp_path, capsys, short):
    """Plays the session; the exit code, the records, and what was printed."""

    def run(*options, out=tmp_path / "out"):
        code = cli.main(["demo", "--out", str(out), "--model", str(byte_model), *options])
        return code, read_records(out / RECORDS, RestoreRecord), " ".join(capsys.readouterr().out.split())

    return run


def test_every_turn_is_restored_under_every_policy(demo):
    code, records, shown = demo("--repeats", "1")
    assert code == 0
    assert EXACT in shown
    turns = sorted({record.num_tokens for record in records})
    assert len(turns) == 2
    assert len(records) == 3 * len(RESTORE_POLICIES)  # the last turn also without its new tokens
    assert {record.num_tokens for record in records if record.suffix_tokens == 0} == {turns[-1]}
    assert {record.policy for record in records} == set(RESTORE_POLICIES)
    for record in records:
        assert record.suite == "demo"
        assert record.correct is True
        assert record.timed
        assert (record.ttft_s is not None) == (record.suffix_tokens > 0)
        assert record.recomputed_cells + record.loaded_cells > 0
        assert record.bound_restore_s > 0
    assert "turn 3" in shown
    assert shown.count("KV saved, then evicted") == 3


def test_chosen_policies_repeat_and_pictures_are_drawn(demo, tmp_path):
    pytest.importorskip("matplotlib")
    code, records, shown = demo("--repeats", "2", "--policy", "cacheflow", "--policy", "recompute")
    assert code == 0
    assert {record.policy for record in records} == {"cacheflow", "recompute"}
    assert len(records) == 3 * 2 * 2
    assert {record.repeat for record in records} == {0, 1}
    assert (tmp_path / "out" / "timeline.png").stat().st_size > 0
    assert len(list((tmp_path / "out").glob("*.png"))) >= 2
    assert shown.count("drew ") == len(list((tmp_path / "out").glob("*.png")))


def test_a_wrong_restoration_is_said_and_exits_1(demo, monkeypatch):
    from cacheflow.engine.transfer_port import StoreTransferPort

    place = StoreTransferPort.place

    def flip(port, ticket):
        ticket.staging.array[0] ^= 1
        place(port, ticket)

    monkeypatch.setattr(StoreTransferPort, "place", flip)
    code, records, shown = demo("--repeats", "1", "--policy", "load", "--policy", "recompute")
    assert code == 1
    assert "NOT EXACT" in shown
    assert EXACT not in shown
    assert {(record.policy, record.correct) for record in records} == {("load", False), ("recompute", True)}


def test_a_new_demo_replaces_the_records_of_the_last_and_no_other_file(demo, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / RECORDS).write_text("old\n")
    (tmp_path / "out" / "results.jsonl").write_text("of a benchmark\n")
    code, records, _ = demo("--repeats", "1", "--policy", "recompute")
    assert code == 0
    assert len(records) == 3
    assert (tmp_path / "out" / "results.jsonl").read_text() == "of a benchmark\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--policy", "magic"), "policy 'magic' is not known; known are recompute, load"),
        (("--repeats", "0"), "--repeats is 0, must be at least 1"),
        (("--model", "/nowhere/at/all"), "/nowhere/at/all"),
    ],
)
def test_bad_options_are_one_line_and_lose_nothing(byte_model, tmp_path, capsys, options, message):
    (tmp_path / RECORDS).write_text("of an earlier demo\n")
    assert cli.main(["demo", "--out", str(tmp_path), "--model", str(byte_model), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert (tmp_path / RECORDS).read_text() == "of an earlier demo\n"


def test_a_model_without_a_tokenizer_is_refused(tmp_path, capsys):
    from support.embedded_cases import save_tiny

    folder = save_tiny(tmp_path / "tiny")
    assert cli.main(["demo", "--out", str(tmp_path / "out"), "--model", str(folder)]) == 2
    assert "has no tokenizer; the demo needs one" in capsys.readouterr().err


def test_a_folder_that_cannot_be_is_one_line_and_code_2(byte_model, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "file" / "out"), "--model", str(byte_model)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot be used" in error


def test_one_turn_leaves_nothing_to_restore(byte_model):
    from cacheflow.commands.demo_session import Demo
    from cacheflow.errors import ConfigError

    with pytest.raises(ConfigError, match="from the second turn on, 1 turn is too few"):
        Demo.open(str(byte_model), policies=("load",), num_turns=1)


@pytest.mark.model
@pytest.mark.slow
def test_the_real_model_is_exact(tmp_path, capsys, monkeypatch):
    """SmolLM2 over a shorter session than the demo's own."""
    from cacheflow.commands import demo as demo_command
    from cacheflow.commands import demo_session as demo

    monkeypatch.setattr(demo_command, "TURN_CHARS", (2000, 0))
    monkeypatch.setattr(demo, "MAX_TOKENS", 1024)
    policies = ("--policy", "cacheflow", "--policy", "recompute")
    assert cli.main(["demo", "--out", str(tmp_path), "--repeats", "1", *policies]) == 0
    assert EXACT in " ".join(capsys.readouterr().out.split())
    records = read_records(tmp_path / RECORDS, RestoreRecord)
    assert len(records) == 2 * 2
    assert all(record.correct for record in records)
    assert any(record.loaded_cells and record.recomputed_cells for record in records if record.policy == "cacheflow")
