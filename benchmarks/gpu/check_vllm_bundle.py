"""Checks that an unpacked bundle of vLLM has what its server needs beside what a machine with PyTorch has.

usage: check_vllm_bundle.py SITE DEPSITE (vLLM's wheel unpacked; the other wheels unpacked)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

FILES = (
    "vllm/_C_stable_libtorch.abi3.so",
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
    "vllm/entrypoints/openai/api_server.py",
)
ON_MACHINE = {
    "aiohttp", "annotated-doc", "anyio", "attrs", "click", "cloudpickle", "einops", "filelock", "h11", "httpx",
    "huggingface-hub", "idna", "jinja2", "ninja", "numba", "numpy", "nvidia-ml-py", "opencv-python-headless",
    "packaging", "pillow", "prometheus-client", "protobuf", "psutil", "py-cpuinfo", "pyyaml", "regex", "requests",
    "safetensors", "sentencepiece", "setuptools", "six", "tiktoken", "tokenizers", "torch", "torchaudio",
    "torchvision", "tqdm", "transformers", "triton", "typer", "typing-extensions",
}  # fmt: skip
"""What comes with torch 2.11.0+cu130, transformers 5.17 and what is usually installed beside them."""
NOT_IMPORTED = {
    "anthropic", "fastsafetensors", "flashinfer-python", "humming-kernels", "instanttensor", "lm-format-enforcer",
    "mcp", "nvidia-cudnn-frontend", "nvidia-cutlass-dsl", "nvtx", "opentelemetry-exporter-otlp", "opentelemetry-sdk",
    "opentelemetry-semantic-conventions-ai", "pynvvideocodec", "quack-kernels", "supervisor", "tilelang",
    "tokenspeed-mla", "torchcodec",
}  # fmt: skip
"""What vLLM and its packages name, and a server of text completions does not import at its start: other kernels and
models, other ways to load weights, other interfaces, traces."""
MACHINE = {"python_version": "3.12", "python_full_version": "3.12.3", "platform_machine": "x86_64", "extra": "",
           "sys_platform": "linux", "platform_system": "Linux", "implementation_name": "cpython",
           "platform_python_implementation": "CPython"}  # fmt: skip


def faults(folders: list[str]) -> Iterator[str]:
    """What is missing or of another version than is asked for, one line each."""
    for name in FILES:
        if not any((Path(folder) / name).is_file() for folder in folders):
            yield f"the file {name} is missing: is this another version of vLLM?"
    bundled = {canonicalize_name(each.metadata["Name"]): each for each in distributions(path=folders)}
    if "vllm" not in bundled:
        yield "vLLM itself is missing"
    for owner in bundled.values():
        for requirement in _required(owner):
            name = canonicalize_name(requirement.name)
            if name in bundled:
                version = bundled[name].version
                if not requirement.specifier.contains(version, prereleases=True):
                    yield f"{owner.metadata['Name']} needs {requirement}, the bundle has {version}"
            elif name not in ON_MACHINE | NOT_IMPORTED:
                yield f"{owner.metadata['Name']} needs {requirement}: add it to PACKAGES, or say here why not"


def _required(owner: Distribution) -> Iterator[Requirement]:
    for text in owner.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate(MACHINE):
            yield requirement


def main(folders: list[str]) -> int:
    """Print the faults; 1 when there are any."""
    found = sorted(set(faults(folders)))
    sys.stderr.writelines(f"check_vllm_bundle: {each}\n" for each in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
