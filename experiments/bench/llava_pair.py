"""A pair of checkpoints of LLaVA's shape with random weights, and random samples for it, made on the spot."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

WORDS = 64
VOCABULARY = 32_064  # of LLaVA-1.5


@dataclass(frozen=True)
class Shape:
    """Of the language model. The vision tower is CLIP's ViT-L at 336 pixels, or a small one beside a small model."""

    hidden: int
    intermediate: int
    blocks: int

    @property
    def is_small(self) -> bool:
        return self.hidden < 4096

    @property
    def image_size(self) -> int:
        return 112 if self.is_small else 336


LLAVA_7B = Shape(hidden=4096, intermediate=11_008, blocks=12)


def make_pair(folder: Path, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
    """Writes ``pretrained`` and ``finetuned`` into ``folder``; they differ in projector and blocks."""
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(0)
    config, processor = _config(shape)
    model = LlavaForConditionalGeneration(config).to(dtype)
    out = folder / "pretrained", folder / "finetuned"
    for path in out:
        if path.name == "finetuned":
            _change(model)
        model.save_pretrained(path)
        processor.save_pretrained(path)
    return out


def make_samples(folder: Path, shape: Shape, count: int) -> Path:
    """Writes ``count`` samples: a picture of noise, a prompt and an answer of a few random words."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    lines = []
    for number in range(count):
        pixels = random.integers(0, 256, (shape.image_size, shape.image_size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        prompt, answer = (" ".join(f"w{word}" for word in random.integers(0, WORDS, length)) for length in (24, 12))
        lines.append(json.dumps({"image": f"{number}.png", "prompt": prompt, "answer": answer}))
    path = folder / "samples.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def _change(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model.layers" in name or "multi_modal_projector" in name:
                parameter += torch.randn_like(parameter) * (0.02 * parameter.abs().mean())


def _config(shape: Shape) -> tuple[object, object]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "USER", "ASSISTANT", ":", *(f"w{n}" for n in range(WORDS))]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    patch = 14
    vision = CLIPVisionConfig(
        hidden_size=128 if shape.is_small else 1024,
        intermediate_size=256 if shape.is_small else 4096,
        num_hidden_layers=2 if shape.is_small else 24,
        num_attention_heads=4 if shape.is_small else 16,
        image_size=shape.image_size,
        patch_size=patch,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY if not shape.is_small else len(words),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.hidden // 128 if shape.hidden >= 512 else 4,
        max_position_embeddings=4096,
        pad_token_id=3,
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=vocabulary["<image>"],
        image_seq_length=(shape.image_size // patch) ** 2,
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": shape.image_size}, crop_size={"height": shape.image_size, "width": shape.image_size}
    )
    processor = LlavaProcessor(
        images, tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return config, processor
