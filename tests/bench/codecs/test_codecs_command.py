"""``cacheflow bench codecs`` through the command line."""

import pytest

from cacheflow import cli
from cacheflow.bench import readme
from cacheflow.bench.codecs.study import OTHER_CHUNKS
from cacheflow.bench.records.codecs import CodecRecord
from cacheflow.bench.records.suites import read_records
from cacheflow.stores.channel_codec import Int8Codec
from cacheflow.stores.zstd_codec import ZstdCodec
from support.embedded_cases import save_tiny

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("torch_threads")]

SHORT = ("--tokens", "48", "--suffix", "8", "--chunk", "16", "--repeats", "2")
KV_BYTES = {"bfloat16": 2, "float32": 4}


@pytest.fixture
def bench(tmp_path, model_folder, capsys):
    """Runs the command on the tiny model in one folder; the exit code, the records so far, and what was printed."""

    def run(*options, model=model_folder):
        code = cli.main(["bench", "codecs", "--out", str(tmp_path / "out"), "--model", str(model), *SHORT, *options])
        results = tmp_path / "out" / "results.jsonl"
        return code, read_records(results, CodecRecord) if results.exists() else [], capsys.readouterr().out

    return run


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_each_codec_is_compared_on_each_excerpt_and_once(bench, dtype):
    code, records, shown = bench("--dtype", dtype)
    assert code == 0
    assert [(each.excerpt, each.codec) for each in records] == [
        (excerpt, codec) for excerpt in (0, 1) for codec in (OTHER_CHUNKS, "zstd", "fp8", "int8")
    ]
    for each in records:
        assert each.dtype == dtype
        assert each.raw_bytes % (48 * KV_BYTES[dtype]) == 0
        exact = each.codec == "zstd"
        assert each.lossless is exact
        assert (each.keys_error == 0) is (each.values_error == 0) is (each.divergence == 0) is exact
        assert each.same_tokens <= 1
        assert (each.encode_bytes_per_s is None) is (each.codec == OTHER_CHUNKS)
        if each.codec in ("fp8", "int8"):
            assert each.stored_bytes < each.raw_bytes
            assert 1e-4 < each.keys_error < 0.05
            assert each.keys_largest_error < 0.07
    assert {each.keys_error for each in records if each.excerpt == 0 and each.codec == "int8"}.isdisjoint(
        each.keys_error for each in records if each.excerpt == 1
    ), "another text"
    assert f"{dtype}: 48 tokens in chunks of 16, 1 layer an object" in shown
    code, again, _ = bench("--dtype", dtype)
    assert code == 0
    assert again == records


def test_what_is_off_is_said_as_it_is(bench, monkeypatch):
    """Of numbers that all come back as 0 the error is what they were."""
    monkeypatch.setattr(Int8Codec, "decode", lambda self, encoded, form, out: out.fill(0))
    code, records, _ = bench("--codecs", "int8", "--repeats", "1")
    assert code == 0
    _, found = records
    assert found.keys_error == found.values_error == found.keys_largest_error == found.values_largest_error == 1.0
    assert found.divergence > records[0].divergence


def test_a_lossless_codec_that_changes_a_bit_is_wrong(bench, monkeypatch):
    decode = ZstdCodec.decode

    def flip(self, encoded, form, out):
        decode(self, encoded, form, out)
        out[5] ^= 1

    monkeypatch.setattr(ZstdCodec, "decode", flip)
    code, records, shown = bench("--codecs", "zstd", "--repeats", "1", "--layers-per-block", "2")
    assert code == 1
    assert [each.is_good for each in records] == [True, False]
    assert "wrong" in shown


def test_running_states_are_those_after_the_prefix(bench, tmp_path):
    """A hybrid's, for every codec: else what follows exact keys and values would differ."""
    hybrid = save_tiny(tmp_path / "hybrid", "qwen3_5_text")
    code, records, _ = bench("--codecs", "zstd", "--tokens", "128", "--chunk", "64", model=hybrid)
    assert code == 0
    assert {each.divergence for each in records if each.codec == "zstd"} == {0.0}
    assert {each.divergence == 0.0 for each in records if each.codec == OTHER_CHUNKS} == {False}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--device", "cuda"), "codecs run on CPUs"),
        (("--codecs", "int4"), "codec 'int4' is not known; known are zstd, fp8, int8"),
        (("--chunk", "1"), "--chunk is 1, must be at least 2"),
        (("--tokens", "100000"), "are more than the"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, said, refused, tmp_path, model_folder):
    assert said in refused("bench", "codecs", "--out", tmp_path, "--model", model_folder, *SHORT, *options)


def test_a_page_shows_one_setting(bench, tmp_path, refused):
    bench("--repeats", "1")
    begin, end = readme.markers_of("codecs")
    page, results = tmp_path / "page.md", tmp_path / "out" / "results.jsonl"
    page.write_text(f"{begin}\n{end}\n")
    words = ("bench", "readme", "--suite", "codecs", "--results", results, "--readme", page)
    assert cli.main([*map(str, words)]) == 0
    assert "| `int8` | " in page.read_text()
    assert "2 layers an object" not in page.read_text()
    bench("--repeats", "1", "--layers-per-block", "2")
    assert "records of codecs are of 2 settings, a table has one" in refused(*words)
