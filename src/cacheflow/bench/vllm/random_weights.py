"""A load format of vLLM's for models without weights: random ones, drawn on the device itself, for timing alone.

vLLM's own format ``dummy`` leaves every weight, those of the norms too, within a thousandth of 0. Attention is then
uniform, and keys and values of a wrong token would change no answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LOAD_FORMAT = "cacheflow_random"
"""For ``--load-format``; known to servers that have the folder ``ENTRY_POINTS`` on their path."""
NORM_SPREAD = 0.2
QKV_GAIN = 1.8
"""Scores of attention then spread by several units."""
SEED = 0


def register() -> None:
    """Make the load format known; vLLM calls it in every process, as an entry point of ``vllm.general_plugins``."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    class RandomWeightsLoader(DummyModelLoader):
        """Draws weights instead of reading them."""

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:  # noqa: ANN401 -- vLLM's
            """Fill what vLLM fills of a model without weights, then draw its parameters."""
            super().load_weights(model, model_config)
            draw_weights(model)

    register_model_loader(LOAD_FORMAT)(RandomWeightsLoader)


def draw_weights(model: torch.nn.Module) -> None:
    """Draw every parameter where it lies: those of norms around 1, rows of matrices by how many values they take."""
    import torch

    generators: dict[torch.device, torch.Generator] = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.device not in generators:
                generators[weight.device] = torch.Generator(device=weight.device).manual_seed(SEED)
            mean, spread = _distribution(name, weight)
            weight.normal_(mean, spread, generator=generators[weight.device])


def _distribution(name: str, weight: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation."""
    if weight.ndim == 1:
        return (1.0, NORM_SPREAD) if "norm" in name else (0.0, NORM_SPREAD)
    if "embed" in name:
        return 0.0, 1.0
    return 0.0, (QKV_GAIN if "qkv" in name else 1.0) / weight.shape[-1] ** 0.5
