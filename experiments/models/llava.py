"""LLaVA-1.5 through transformers: its Vicuna conversation, its names on disk, its token masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from experiments.errors import ModelError
from experiments.models.adapter import (
    Batch,
    Loaded,
    Placement,
    Sample,
    append_answers,
    reading,
    require_model_type,
    tensor_names,
)
from tailor.checkpoint import Checkpoint

RENAMINGS = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.vision_tower.", "vision_tower."),
    ("model.vision_tower.", "vision_tower.vision_model."),
)


@dataclass(frozen=True)
class Llava:
    """``system`` is the sentence before the first turn, with its closing space; empty for none."""

    prompt_style: str
    system: str

    def load(self, folder: Path, dtype: torch.dtype | str, placement: Placement) -> Loaded:
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        require_model_type(folder, "llava")
        model = placement.load(LlavaForConditionalGeneration, folder, dtype)
        with reading(folder):
            processor = AutoProcessor.from_pretrained(folder)
        processor.tokenizer.padding_side = "left"
        return Loaded(model, processor, tensor_names(model, Checkpoint(folder), RENAMINGS))

    def prompt_batch(self, processor: Any, images: Sequence[Image], prompts: Sequence[str]) -> Batch:
        texts = [self._conversation(prompt, with_image=True) for prompt in prompts]
        return dict(processor(images=list(images), text=texts, padding=True, return_tensors="pt"))

    def training_batch(self, processor: Any, samples: Sequence[Sample]) -> Batch:
        images = [sample.image for sample in samples if sample.image is not None]
        texts = [
            "" if sample.prompt is None else self._conversation(sample.prompt, with_image=bool(images))
            for sample in samples
        ]
        answers = [sample.answer for sample in samples]
        if not images:
            return append_answers(processor.tokenizer(texts)["input_ids"], answers, processor.tokenizer)
        encoded = processor(images=images, text=texts)
        batch = append_answers(encoded["input_ids"], answers, processor.tokenizer)
        return {**batch, "pixel_values": torch.as_tensor(np.stack(encoded["pixel_values"]))}

    def token_mask(self, module: str, batch: Batch) -> Tensor | None:
        if "multi_modal_projector" in module or "vision_tower" in module:
            return None
        return batch["attention_mask"].bool()

    def _conversation(self, prompt: str, *, with_image: bool) -> str:
        if "<image>" in prompt:
            raise ModelError(
                f"the prompt {prompt!r} holds <image>, which is added where the picture goes; leave it out"
            )
        picture = "<image>\n" if with_image else ""
        return f"{self.system}USER: {picture}{prompt} ASSISTANT:"
