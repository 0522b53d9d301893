"""Which adapter reads a checkpoint folder, by what its config says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.errors import ModelError
from experiments.models.adapter import Adapter
from experiments.models.causal_lm import CausalLM
from experiments.models.instructblip import InstructBlip
from experiments.models.llava import Llava

CONFIG = "config.json"
# What LLaVA-1.5 was tuned with: the opening of Vicuna's conversations, version 1.
VICUNA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint folder's `config.json`. Raises ModelError if it can't be read."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); complete the checkpoint's folder") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: is no JSON object; complete the checkpoint's folder")
    return config


def adapter_of(folder: Path) -> Adapter:
    """The adapter for the model in ``folder``. Raises ModelError if its config can't be read or names no known kind."""
    config = read_config(folder)
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    if model_type == "llava":
        return Llava("llava", VICUNA_SYSTEM)
    if model_type == "instructblip":
        return InstructBlip("instructblip")
    if any(name.endswith("ForCausalLM") for name in architectures):
        return CausalLM("text")
    kind = f"model_type {model_type!r} ({', '.join(architectures) or 'no architectures'})"
    raise ModelError(
        f"{folder / CONFIG}: {kind} is none that can be calibrated: llava, instructblip, or a language model of a "
        "class …ForCausalLM; methods that need no evidence fuse it all the same"
    )
