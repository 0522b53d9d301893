"""InstructBLIP through transformers: the Q-Former reads the prompt too, and each of its branches has other tokens."""

from __future__ import annotations

import re
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

RENAMINGS = (("", ""),)
TEXT_BRANCH = re.compile(r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\.")
SELF_ATTENTION = re.compile(r"qformer\.encoder\.layer\.\d+\.attention\.")


@dataclass(frozen=True)
class InstructBlip:
    prompt_style: str

    def load(self, folder: Path, dtype: torch.dtype | str, placement: Placement) -> Loaded:
        from transformers import AutoProcessor, InstructBlipForConditionalGeneration

        require_model_type(folder, "instructblip")
        model = placement.load(InstructBlipForConditionalGeneration, folder, dtype)
        with reading(folder):
            processor = AutoProcessor.from_pretrained(folder)
        # Only now: set at construction it would turn the Q-Former's text to the left too, and batches change results.
        processor.tokenizer.padding_side = "left"
        # A checkpoint's generation settings may name another end of sentence than its tokenizer.
        model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
        return Loaded(model, processor, tensor_names(model, Checkpoint(folder), RENAMINGS))

    def prompt_batch(self, processor: Any, images: Sequence[Image], prompts: Sequence[str]) -> Batch:
        return dict(processor(images=list(images), text=list(prompts), padding=True, return_tensors="pt"))

    def training_batch(self, processor: Any, samples: Sequence[Sample]) -> Batch:
        images = [sample.image for sample in samples if sample.image is not None]
        if len(images) < len(samples):
            raise ModelError("InstructBLIP reads no text without an image: give every sample an image")
        prompts = [sample.prompt or "" for sample in samples]
        encoded = processor(images=images, text=prompts)
        answers = append_answers(encoded["input_ids"], [sample.answer for sample in samples], processor.tokenizer)
        instructions = processor.qformer_tokenizer(prompts, padding=True, return_tensors="pt")
        return {
            **answers,
            "qformer_input_ids": instructions["input_ids"],
            "qformer_attention_mask": instructions["attention_mask"],
            "pixel_values": torch.as_tensor(np.stack(encoded["pixel_values"])),
        }

    def token_mask(self, module: str, batch: Batch) -> Tensor | None:
        if module.startswith("language_model."):
            return batch["attention_mask"].bool()
        instruction = batch["qformer_attention_mask"].bool()
        if TEXT_BRANCH.match(module):
            return instruction
        if SELF_ATTENTION.match(module):
            # The queries come first; as many as there are image slots in each sequence.
            slots = batch["input_ids"] == batch["input_ids"][0, 0]
            queries = instruction.new_ones(len(instruction), int(slots[0].sum()))
            return torch.cat([queries, instruction], dim=1)
        # Query branches, cross-attention keys (image patches), projection and vision tower hold no padding.
        return None
