"""Which adapter reads a checkpoint folder, by what its config says."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.errors import ModelError
from experiments.models.adapter import Adapter
from experiments.models.causal_lm import CausalLM
from experiments.models.instructblip import InstructBlip
from experiments.models.llava import Llava

# What LLaVA-1.5 was tuned with: the opening of Vicuna's conversations, version 1.
VICUNA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)


def adapter_of(folder: Path) -> Adapter:
    """The adapter for the model in ``folder``. Raises ModelError if its config can't be read or names no known kind."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        model_type, architectures = config.get("model_type"), config.get("architectures") or []
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); complete the checkpoint's folder") from error
    if model_type == "llava":
        return Llava("llava", VICUNA_SYSTEM)
    if model_type == "instructblip":
        return InstructBlip("instructblip")
    if any(name.endswith("ForCausalLM") for name in architectures):
        return CausalLM("text")
    raise ModelError(
        f"{path}: model_type {model_type!r} ({', '.join(architectures) or 'no architectures'}) is none that can be "
        "calibrated: llava, instructblip, or a language model of a class …ForCausalLM; methods that need no evidence "
        "fuse it all the same"
    )
