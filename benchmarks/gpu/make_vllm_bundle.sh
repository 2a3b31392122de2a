#!/bin/bash
# Makes one file that brings vLLM to a machine with a Hopper GPU, PyTorch and transformers, but without a network:
#   bash benchmarks/gpu/make_vllm_bundle.sh [OUT_DIR]      (default: out/vllm-bundle, which git ignores)
# There: mkdir DIR && tar xf vllm-sm90.tar.xz -C DIR && PYTHONPATH=DIR/site:DIR/depsite make bench-gpu-vllm
set -euo pipefail

VLLM=0.32.0            # its wheel for CUDA 13; it loads on torch 2.11.0+cu130, by libtorch's stable ABI
PYTHON_VERSION=3.12    # of the machine with the GPU; here any from 3.11 on makes the bundle
LIMIT_MIB=64
PYTHON=${PYTHON:-python3}
# What vLLM imports and such a machine lacks. Versions that vLLM pins are pinned; others are what it was tried with.
PACKAGES=(
  msgspec pyzmq cachetools cbor2 blake3 pybase64 pydantic pydantic-core annotated-types typing-inspection
  'fastapi>=0.133,<0.137' starlette openai httpx2 httpcore2 truststore distro jiter sniffio oss-harmony partial-json-parser python-json-logger
  setproctitle jsonschema jsonschema-specifications referencing rpds-py lark==1.2.2 compressed-tensors==0.17.0
  depyf==0.20.0 astor dill ijson watchfiles uvicorn prometheus-fastapi-instrumentator apache-tvm-ffi==0.1.11
  mistral_common pydantic-extra-types loguru opentelemetry-api xgrammar==0.2.8 'llguidance>=1.7,<1.8'
  outlines_core==0.2.14 model-hosting-container-standards jmespath python-multipart
)
# Kernels of other models and of other attention; the study needs _C_stable_libtorch and FlashAttention-3.
LEFT_OUT=(
  _moe_C_stable_libtorch.abi3.so _deepselect_C.abi3.so '_flashmla*_C.abi3.so' _flashkda_C.abi3.so _qutlass_C.abi3.so
  vllm-rs vllm_flash_attn/_vllm_fa2_C.abi3.so third_party/deep_gemm third_party/fmha_sm100
)

fail() { echo "make_vllm_bundle: $*" >&2; exit 1; }

for tool in "$PYTHON" tar xz git; do
  command -v "$tool" >/dev/null || fail "$tool is not installed"
done
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$PYTHON is older than 3.11: set PYTHON"
"$PYTHON" -m pip --version >/dev/null 2>&1 || fail "$PYTHON has no pip: set PYTHON to one that has"

here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/../../out/vllm-bundle}
mkdir -p "$out" || fail "$out cannot be made"
out=$(cd "$out" && pwd)
if git -C "$out" rev-parse --is-inside-work-tree >/dev/null 2>&1 && ! git -C "$out" check-ignore --quiet "$out"; then
  fail "$out is in a git tree that does not ignore it, and a bundle must not be committed: choose a folder under out/"
fi
bundle=$out/vllm-sm90.tar.xz

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
download() { # DIR PACKAGE...
  local folder=$1 platforms=() minor
  shift
  for minor in 17 24 26 27 28 31; do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
  "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$folder" \
    --python-version "$PYTHON_VERSION" --implementation cp --abi "cp${PYTHON_VERSION/./}" --abi abi3 --abi none \
    "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 "$@" \
    || fail "pip could not download all of: $*"
}
unpack() { # WHEELS_DIR DIR
  local wheel
  for wheel in "$1"/*.whl; do "$PYTHON" -m zipfile -e "$wheel" "$2" || fail "$wheel cannot be unpacked"; done
}

echo "[1/4] downloading vLLM $VLLM and ${#PACKAGES[@]} packages that it imports"
download vllm-wheel "vllm==$VLLM"
download wheels "${PACKAGES[@]}"
echo "[2/4] unpacking, leaving out kernels of other models"
unpack vllm-wheel site
unpack wheels depsite
(
  cd site/vllm
  # shellcheck disable=SC2086 -- patterns are to be expanded
  for each in "${LEFT_OUT[@]}"; do rm -rf $each; done
  find . \( -name '*.hpp' -o -name '*.cuh' -o -name '*.h' -o -name '*.inl' \) -delete
)
echo "[3/4] leaving out machine code for other GPUs than sm_90"
"$PYTHON" "$here/prune_cubins.py" site/vllm/_C_stable_libtorch.abi3.so
"$PYTHON" "$here/check_vllm_bundle.py" site depsite || fail "the bundle lacks something"
echo "[4/4] compressing"
tar cf - site depsite | xz -6 -T0 -c >"$bundle.part"
bytes=$(stat -c %s "$bundle.part")
if [ "$bytes" -gt $((LIMIT_MIB << 20)) ]; then
  rm "$bundle.part"
  fail "the bundle takes $bytes bytes, more than $LIMIT_MIB MiB: leave out more, see LEFT_OUT"
fi
mv "$bundle.part" "$bundle"
awk -v bytes="$bytes" -v bundle="$bundle" 'BEGIN { printf "%s: %.1f MiB\n", bundle, bytes / 1048576 }'
