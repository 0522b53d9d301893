"""Pairs of checkpoints to fuse: untrained tiny models of every family, and the same after a little "fine-tuning"."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from experiments.worlds import tiny_models
from experiments.worlds.pool import vocabulary
from experiments.worlds.questions import SKILLS
from experiments.worlds.scenes import generator, render, sample_scene

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}


def llama(words: list[str]) -> tuple[PreTrainedModel, Any]:
    tokenizer = tiny_models.language_tokenizer(sorted(words))
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **TEXT)), tokenizer


def tied_qwen(words: list[str]) -> tuple[PreTrainedModel, Any]:
    tokenizer = tiny_models.language_tokenizer(sorted(words))
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True, **TEXT)
    return Qwen2ForCausalLM(config), tokenizer


FAMILIES: dict[str, Callable[[list[str]], tuple[PreTrainedModel, Any]]] = {
    "llava": tiny_models.llava,
    "instructblip": tiny_models.instructblip,
    "llama": llama,
    "qwen": tied_qwen,
}
Fuse = Callable[..., "Done"]
FROZEN = ("vision_tower", "vision_model.encoder", "vision_model.embeddings")


@dataclass(frozen=True)
class Done:
    """What a fusion left: its stages by label, and its report."""

    stages: dict[str, dict[str, Any]]
    report: dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """Folders of a pretrained and a fine-tuned checkpoint, and a file of samples."""

    family: str
    pretrained: Path
    finetuned: Path
    samples: Path

    @property
    def arguments(self) -> list[str]:
        return [f"pretrained={self.pretrained}", f"finetuned={self.finetuned}"]


def make_pair(folder: Path, family: str, dtype: torch.dtype = torch.float32, *, seed: int = 0, **saving: Any) -> Pair:
    """A pair whose every parameter outside the vision tower differs, and ten samples for it.

    ``seed`` decides what fine-tuning changes; the pretrained model is always the same.
    """
    torch.manual_seed(0)
    model, processor = FAMILIES[family](vocabulary())
    model.to(dtype)
    for name in ("pretrained", "finetuned"):
        if name == "finetuned":
            torch.manual_seed(seed)
            with torch.no_grad():
                for path, parameter in model.named_parameters():
                    if not any(part in path for part in FROZEN):
                        parameter += (0.02 * torch.randn(parameter.shape)).to(dtype)
        model.save_pretrained(folder / name, **saving)
        processor.save_pretrained(folder / name)
    samples = write_samples(folder / "samples", 10, with_image=family in ("llava", "instructblip"))
    return Pair(family, folder / "pretrained", folder / "finetuned", samples)


def write_samples(folder: Path, count: int, *, with_image: bool) -> Path:
    """A JSON Lines file of questions about scenes, with pictures beside it."""
    folder.mkdir()
    rng = generator("pairs")
    lines = []
    for number in range(count):
        scene = sample_scene(rng)
        question = SKILLS["where"].ask(scene, rng)
        line = {"prompt": question.text, "answer": question.answer}
        if with_image:
            render(scene, rng, "train").save(folder / f"{number}.png")
            line["image"] = f"{number}.png"
        lines.append(line)
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
