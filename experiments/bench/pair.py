"""Random checkpoints of a LLaMA's shapes to measure on: a base, and what fine-tuning might make of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# Of the size that they have in trained models: a bfloat16 step at 0.02 is about 1e-4, so that many entries stay put.
WEIGHT_STD = 0.02
DELTA_STD = 2e-4


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA: ``layers`` blocks of width ``hidden``, ``vocabulary`` tokens."""

    layers: int
    hidden: int = 2048
    inner: int = 5632
    vocabulary: int = 32000

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            for projection in ("q", "k", "v", "o"):
                yield f"{prefix}.self_attn.{projection}_proj.weight", (self.hidden, self.hidden)
            yield f"{prefix}.mlp.gate_proj.weight", (self.inner, self.hidden)
            yield f"{prefix}.mlp.up_proj.weight", (self.inner, self.hidden)
            yield f"{prefix}.mlp.down_proj.weight", (self.hidden, self.inner)
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for _, shape in self.tensors())

    def config(self) -> Mapping[str, object]:
        """The ``config.json`` by which transformers and mergekit know the architecture."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": self.hidden // 64,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


def of_size(gigabytes: float) -> Shape:
    """The shape whose bfloat16 weights come closest to so many gigabytes (10⁹ bytes); at least one layer."""
    one, two = Shape(1).numel, Shape(2).numel
    return Shape(max(1, 1 + round((gigabytes * 1e9 / 2 - one) / (two - one))))


def write_pair(folder: Path, shape: Shape, seed: int = 0) -> tuple[Path, Path]:
    """Writes the folders ``base`` and ``finetuned``, bfloat16, one file each; returns their paths."""
    import torch  # here, since what measures other processes must be small itself
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    base, tuned = {}, {}
    for name, size in shape.tensors():
        weight = torch.randn(size, generator=generator) * WEIGHT_STD
        base[name] = weight.bfloat16()
        tuned[name] = weight.add_(torch.randn(size, generator=generator), alpha=DELTA_STD).bfloat16()
    folders = folder / "base", folder / "finetuned"
    for path, tensors in zip(folders, (base, tuned), strict=True):
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(shape.config(), indent=1) + "\n")
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return folders
