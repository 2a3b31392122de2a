"""Any architecture that vLLM knows, from a ``config.json`` alone: random weights whose attention is far from uniform.

Near-uniform attention would hide errors, and vLLM's own dummy weights are near zero.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import torch

CONFIGS = Path(__file__).parents[1] / "data" / "models"
NORM_GAIN, PROJECTION_GAIN, BIAS = 1.6, 1.8, 0.3


def model_folder(folder: Path, name: str, **changes) -> Path:
    """A folder with the ``config.json`` of one of ``CONFIGS``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@contextmanager
def random_weights(*, seed: int = 0):
    """Have vLLM's ``load_format="dummy"`` make such weights; only in this process."""
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    before = DummyModelLoader.load_weights

    def load_weights(self, model, model_config):
        generator = torch.Generator().manual_seed(seed)
        for name, weight in model.state_dict().items():
            if weight.is_floating_point():
                with torch.no_grad():
                    weight.copy_(_random(name, weight, generator))

    DummyModelLoader.load_weights = load_weights
    try:
        yield
    finally:
        DummyModelLoader.load_weights = before


def slow_decay(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Weights by which a recurrent layer forgets so slowly that errors in its state show long after."""
    return torch.log(0.002 + 0.048 * torch.rand(shape, generator=generator))


def _random(name: str, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(weight.shape, generator=generator)
    if "_scale" in name:
        return torch.ones(weight.shape)
    if "norm" in name:
        return (NORM_GAIN if "q_norm" in name or "k_norm" in name else 1.0) + 0.2 * noise
    if name.endswith("A_log"):
        return slow_decay(weight.shape, generator)
    if name.endswith(".A"):  # what vLLM makes of Mamba-2's A_log as it loads it
        return -slow_decay(weight.shape, generator).exp()
    if weight.ndim == 1:
        return BIAS * noise
    if "embed" in name or "lm_head" in name:
        return noise
    gain = PROJECTION_GAIN if any(part in name for part in ("qkv", "q_proj", "k_proj", "q_b", "kv_b")) else 1.0
    return noise * gain / weight.shape[-1] ** 0.5
