"""What brings vLLM to a machine without a network: which code of a library is kept, what is missed, what is refused."""

import importlib.util
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[3] / "benchmarks" / "gpu"
MAKE = SCRIPTS / "make_vllm_bundle.sh"
PTX, CUBIN = 1, 2


def load(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prune_cubins():
    return load("prune_cubins")


@pytest.fixture(scope="module")
def check_vllm_bundle():
    return load("check_vllm_bundle")


def entry(kind, arch, code):
    header = struct.pack("<HHIQ", kind, 0, 32, len(code)).ljust(28, b"\0") + struct.pack("<I", arch)
    return header + code


def container(*entries):
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def library(fatbin):
    """An ELF file with a section of code for GPUs, one of other bytes, and one of their names."""
    names = b"\0.nv_fatbin\0.text\0.names\0"
    sections = [(names.index(b".nv_fatbin"), fatbin), (names.index(b".text"), b"\x77" * 40),
                (names.index(b".names"), names)]  # fmt: skip
    data, headers = bytearray(64), b"\0" * 64
    for name, content in sections:
        headers += struct.pack("<IIQQQQ", name, 1, 0, 0, len(data), len(content)).ljust(64, b"\0")
        data += content
    struct.pack_into("<6s", data, 0, b"\x7fELF\x02\x01")
    struct.pack_into("<Q", data, 40, len(data))
    struct.pack_into("<HHH", data, 58, 64, len(sections) + 1, len(sections))
    return bytearray(data + headers)


def test_code_for_other_architectures_is_zeroed_and_all_else_stays(prune_cubins):
    kept, other, ptx = b"\x90" * 24, b"\x80" * 32, b"\x01" * 8
    data = library(
        container(entry(CUBIN, 80, other), entry(CUBIN, 90, kept), entry(PTX, 90, ptx))
        + b"\0" * 8
        + container(entry(CUBIN, 80, other), entry(PTX, 80, ptx))
    )
    before = bytes(data)
    found, num_kept = prune_cubins.prune(data)
    assert found == {"sm_80": 64, "sm_90": 24, "PTX_90": 8, "PTX_80": 8}
    assert num_kept == 24 + 8  # of a container without code for the GPU, what it could be compiled from
    assert len(data) == len(before)
    assert data == before.replace(other, bytes(32)).replace(ptx, bytes(8), 1)


def test_a_library_without_code_for_the_gpu_is_refused_and_left_alone(prune_cubins, tmp_path, capsys):
    path = tmp_path / "lib.so"
    for content, reason in (
        (library(container(entry(CUBIN, 80, b"\x80" * 8))), "no code for sm_90 found; there is {'sm_80': 8}"),
        (b"not a library", "no 64-bit little-endian ELF file"),
    ):
        path.write_bytes(content)
        assert prune_cubins.main(path) == 1
        assert reason in capsys.readouterr().err
        assert path.read_bytes() == content


@pytest.fixture
def bundle(check_vllm_bundle, tmp_path):
    site, depsite = tmp_path / "site", tmp_path / "depsite"
    for name in check_vllm_bundle.FILES:
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).touch()
    packages(site, "vllm", "0.32.0", "torch==2.11.0", "msgspec", "Some_Thing>=2; python_version > '3.11'",
             "colorama; sys_platform == 'win32'", "boto3; extra == 's3'")  # fmt: skip
    packages(depsite, "msgspec", "0.20")
    packages(depsite, "some-thing", "2.1", "numpy")
    return [str(site), str(depsite)]


def packages(folder, name, version, *requires):
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    metadata.write_text("\n".join([*lines, *(f"Requires-Dist: {each}" for each in requires)]) + "\n")


def test_a_bundle_with_all_that_is_named_passes(check_vllm_bundle, bundle):
    assert check_vllm_bundle.main(bundle) == 0


def test_what_a_bundle_lacks_is_named(check_vllm_bundle, bundle, capsys):
    shutil.rmtree(Path(bundle[1]) / "msgspec-0.20.dist-info")
    shutil.rmtree(Path(bundle[1]) / "some_thing-2.1.dist-info")
    packages(Path(bundle[1]), "some-thing", "1.9", "left-pad>1")
    (Path(bundle[0]) / check_vllm_bundle.FILES[0]).unlink()
    assert check_vllm_bundle.main(bundle) == 1
    said = capsys.readouterr().err
    assert "the file vllm/_C_stable_libtorch.abi3.so is missing" in said
    assert "vllm needs msgspec: add it to PACKAGES" in said
    assert "some-thing needs left-pad>1: add it to PACKAGES" in said
    assert 'vllm needs Some_Thing>=2; python_version > "3.11", the bundle has 1.9' in said
    assert "colorama" not in said
    assert "boto3" not in said


def make(*arguments, **environment):
    command = [shutil.which("bash"), str(MAKE), *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_missing_tools_are_named_before_anything_is_done(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert make(tmp_path / "out", PATH=str(empty), PYTHON=sys.executable) == (
        1, "make_vllm_bundle: tar is not installed\n"
    )  # fmt: skip
    code, said = make(tmp_path / "out", PYTHON="/no/python")
    assert (code, said) == (1, "make_vllm_bundle: /no/python is not installed\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not all(map(shutil.which, ("git", "tar", "xz"))), reason="needs git, tar and xz")
def test_a_folder_that_git_would_commit_is_refused(tmp_path):
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    code, said = make(tmp_path / "bundles", PYTHON=sys.executable)
    assert code == 1
    assert "a git tree that does not ignore it, and a bundle must not be committed" in said
