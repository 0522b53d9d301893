"""Language models without images (Llama, Qwen, Mistral, …) through transformers' automatic classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from experiments.errors import ModelError
from experiments.models.adapter import Batch, Loaded, Placement, Sample, append_answers, reading, tensor_names
from tailor.checkpoint import Checkpoint

RENAMINGS = (("", ""),)


@dataclass(frozen=True)
class CausalLM:
    """``prompt_style`` is for benchmarks. Prompts go through the tokenizer's chat template if it has one."""

    prompt_style: str

    def load(self, folder: Path, dtype: torch.dtype | str, placement: Placement) -> Loaded:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = placement.load(AutoModelForCausalLM, folder, dtype)
        with reading(folder):
            tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:  # padding is masked, so any token will do
            tokenizer.pad_token = tokenizer.eos_token
        return Loaded(model, tokenizer, tensor_names(model, Checkpoint(folder), RENAMINGS))

    def prompt_batch(self, processor: Any, images: Sequence[Image], prompts: Sequence[str]) -> Batch:
        if images:
            raise ModelError("a language model reads no images; choose a multimodal model, or tasks of text alone")
        ids = [self._prompt_ids(processor, prompt) for prompt in prompts]
        return dict(processor.pad({"input_ids": ids}, padding=True, return_tensors="pt"))

    def training_batch(self, processor: Any, samples: Sequence[Sample]) -> Batch:
        if any(sample.image is not None for sample in samples):
            raise ModelError("a language model reads no images; give samples of text alone")
        ids = [self._prompt_ids(processor, sample.prompt) for sample in samples]
        return append_answers(ids, [sample.answer for sample in samples], processor)

    def token_mask(self, module: str, batch: Batch) -> Tensor | None:
        return batch["attention_mask"].bool()

    @staticmethod
    def _prompt_ids(tokenizer: Any, prompt: str | None) -> list[int]:
        if prompt is None or tokenizer.chat_template is None:
            return list(tokenizer(prompt or "")["input_ids"])
        turns = [{"role": "user", "content": prompt}]
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False))
