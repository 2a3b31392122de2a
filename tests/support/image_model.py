"""A tiny model that takes images (Idefics3): the tokenizer of the demo's model, configurations, dummy weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from support.vllm_models import TINY

IMAGE_SIZE, PATCH_SIZE, SCALE = 56, 14, 2
NUM_IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE // SCALE) ** 2
IMAGE, AROUND, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"


def write_image_model(folder: Path) -> tuple[Path, int]:
    """A folder that vLLM can serve with ``load_format="dummy"``, and the id of the token that stands for an image."""
    from transformers import AutoTokenizer, Idefics3ImageProcessorPil, Idefics3Processor

    from cacheflow.engine.smollm2 import smollm2_folder

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    parts = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer.add_special_tokens({"additional_special_tokens": [AROUND, IMAGE, WHOLE, "<end_of_utterance>", *parts]})
    image_token = tokenizer.convert_tokens_to_ids(IMAGE)
    size = {"longest_edge": IMAGE_SIZE}
    images = Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False)
    Idefics3Processor(images, tokenizer, image_seq_len=NUM_IMAGE_TOKENS).save_pretrained(folder)
    vision = {
        "model_type": "idefics3_vision", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE,
    }  # fmt: skip
    config = {
        "architectures": ["Idefics3ForConditionalGeneration"], "model_type": "idefics3", "image_token_id": image_token,
        "scale_factor": SCALE, "vision_config": vision, "tie_word_embeddings": False,
        "text_config": TINY | {"model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": 0},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder, image_token


def picture(seed: int):
    """An image of noise."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
