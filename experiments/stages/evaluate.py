"""Batched generation of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from tqdm import tqdm

from evaluation.prompts import Generation
from evaluation.records import Example, Prediction
from experiments.models.adapter import Adapter, Loaded


def generate(
    adapter: Adapter, loaded: Loaded, examples: Sequence[Example], generation: Generation, batch_size: int, desc: str
) -> list[Prediction]:
    """One text for each example, in order. Batches are left-padded, so the answers don't depend on their size."""
    tokenizer = loaded.processor.tokenizer
    predictions = []
    starts = range(0, len(examples), batch_size)
    for start in tqdm(starts, desc=desc, leave=False, dynamic_ncols=True, disable=None):
        part = examples[start : start + batch_size]
        batch = adapter.prompt_batch(loaded.processor, [example.image for example in part], [e.prompt for e in part])
        batch = {name: tensor.to(loaded.device) for name, tensor in batch.items()}
        with torch.no_grad():
            ids = loaded.model.generate(**batch, **asdict(generation), do_sample=False)
        # Both families return the prompt too, image slots included.
        texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        predictions += [
            Prediction(example.id, example.prompt, text.strip()) for example, text in zip(part, texts, strict=True)
        ]
    return predictions
