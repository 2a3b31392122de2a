"""What costs and saved states of a loaded model depend on: weights, device, dtypes, threads, attention."""

from __future__ import annotations

import torch

from cacheflow.engine.attention import ATTENTION_NAME
from cacheflow.engine.model import LoadedModel
from cacheflow.plan.costs import CostIdentity
from cacheflow.tensors.device import device_name
from cacheflow.types import HybridShape, ModelShape


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
        attention=ATTENTION_NAME,
    )


def state_identity(shape: ModelShape) -> tuple[tuple[str, str], ...]:
    """What a namespace has to say of running states: their dtype; nothing without recurrent layers."""
    return (("state_dtype", shape.state_dtype),) if isinstance(shape, HybridShape) else ()
