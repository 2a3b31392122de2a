"""What costs and saved states of a loaded model depend on: weights, device, dtypes, threads, attention."""

from __future__ import annotations

import torch

from cacheflow.engine.attention import ATTENTION_NAME
from cacheflow.engine.cuda_attention import AttentionKernel
from cacheflow.engine.model import LoadedModel
from cacheflow.hybrid_shape import HybridShape
from cacheflow.model_shape import ModelShape
from cacheflow.plan.costs import CostIdentity
from cacheflow.tensors.device import device_name
from cacheflow.tensors.fingerprint import kernel_identity


def model_identity(model: LoadedModel) -> CostIdentity:
    """The identity costs of this model have on this machine, now."""
    on_cuda = model.device.type == "cuda"
    return CostIdentity(
        model=model.name,
        fingerprint=model.fingerprint,
        num_layers=model.shape.num_layers,
        device_type=model.device.type,
        device=device_name(model.device),
        dtype=model.shape.dtype,
        num_threads=0 if on_cuda else torch.get_num_threads(),
        attention=_attention_name(model.attention),
    )


def asks_flash3(identity: CostIdentity) -> bool:
    """Whether costs were measured with FlashAttention-3."""
    return identity.attention == _attention_name(AttentionKernel.FLASH3)


def bits_identity(model: LoadedModel) -> tuple[tuple[str, str], ...]:
    """What besides weights and tokens decides the bits of this model's KV on this machine; for ``Namespace.extra``."""
    extra = (
        *kernel_identity(model.device, library="transformers"),
        # a float32 product of a few rows rounds differently when more threads share it
        ("num_threads", str(model_identity(model).num_threads)),
    )
    if model.attention is AttentionKernel.MERGED:
        return extra
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return (*extra, ("attention", model.attention.value), ("cudnn", str(cudnn)))


def _attention_name(kernel: AttentionKernel) -> str:
    return ATTENTION_NAME if kernel is AttentionKernel.MERGED else f"{ATTENTION_NAME}-{kernel.value}"


def state_identity(shape: ModelShape) -> tuple[tuple[str, str], ...]:
    """What a namespace has to say of running states: their dtype; nothing without recurrent layers."""
    return (("state_dtype", shape.state_dtype),) if isinstance(shape, HybridShape) else ()
