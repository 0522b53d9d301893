"""Which adapter reads a checkpoint folder, by what its config says."""

from __future__ import annotations

import logging
from pathlib import Path

from experiments.errors import ModelError
from experiments.models.adapter import CONFIG, Adapter, read_config
from experiments.models.causal_lm import CausalLM
from experiments.models.instructblip import InstructBlip
from experiments.models.llava import Llava

log = logging.getLogger(__name__)

# What LLaVA-1.5 was tuned with: the opening of Vicuna's conversations, version 1.
VICUNA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)


def adapter_of(folder: Path) -> Adapter:
    """The adapter for the model in ``folder``. Raises ModelError if its config can't be read or names no known kind."""
    config = read_config(folder)
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    if model_type == "llava":
        text = config.get("text_config") or {}
        if text.get("model_type", "llama") != "llama" or text.get("vocab_size", 32_000) > 33_000:
            log.warning(
                "%s: prompts get the conversation of LLaVA-1.5; if it is another, name a model of its own", folder
            )
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
