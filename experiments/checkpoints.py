"""Checkpoint folders as they are given: what identifies one, and LoRA adapters that stand in for one."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch

from experiments.artifacts import HASHED_BYTES, canonical, write_atomically
from experiments.errors import ModelError
from experiments.models.adapter import Placement
from experiments.models.families import adapter_of
from tailor.checkpoint import Checkpoint

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def is_lora(folder: Path) -> bool:
    """Whether the folder holds adapters of peft and no weights of a whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not list(folder.glob("model*.safetensors"))


def fingerprint(folder: Path, home: Path) -> str:
    """A short hash of the contents of the folder's files; those of large files are noted under ``home``."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    described = {path.name: _content(path, home) for path in files}
    return hashlib.sha256(canonical(described)).hexdigest()[:16]


def _content(path: Path, home: Path) -> str:
    """sha256 of a file, looked up where its inode has not changed since it was read; any write or copy changes that."""
    state = path.stat()
    identity = [str(path.resolve()), state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]
    known = home / "digests" / hashlib.sha256(canonical(identity)).hexdigest()[:16]
    if state.st_size > HASHED_BYTES and known.is_file():
        return known.read_text()
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if state.st_size > HASHED_BYTES:
        known.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(known, digest)
    return digest


def merge_lora(base: Path, adapters: Path, out: Path) -> None:
    """Writes ``base`` with the LoRA adapters merged into its weights, as float32: rounding comes with fusing.

    Raises ModelError if peft can't read the adapters, or an adapter belongs to no module of the base: it would be lost.
    """
    from peft import PeftConfig, PeftModel, load_peft_weights

    if not (adapters / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{adapters}: holds no {ADAPTER_WEIGHTS}; save the adapters as safetensors")
    family = adapter_of(base)
    loaded = family.load(base, torch.float32, Placement(torch.device("cpu")))
    try:
        config = PeftConfig.from_pretrained(str(adapters))
        model = PeftModel(loaded.model, config)
        stored = load_peft_weights(str(adapters), device="cpu")
        _set_all(model, stored, adapters, base)
    except (ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
        raise ModelError(f"{adapters}: peft can't put these adapters on {base} ({error})") from error
    merged = model.merge_and_unload()
    merged.save_pretrained(out)
    _copy_companions(base, out)


def _set_all(model: Any, stored: dict[str, torch.Tensor], adapters: Path, base: Path) -> None:
    from peft import set_peft_model_state_dict

    outcome = set_peft_model_state_dict(model, stored)
    missing = [name for name in outcome.missing_keys if "lora_" in name or "modules_to_save" in name]
    if outcome.unexpected_keys or missing:
        lost = ", ".join([*outcome.unexpected_keys, *missing][:4])
        raise ModelError(
            f"{adapters}: {len(outcome.unexpected_keys)} adapters belong to no module of {base}, and {len(missing)} of "
            f"its modules lack theirs ({lost}, …); merge them where they were trained, and give the merged checkpoint"
        )


def _copy_companions(base: Path, out: Path) -> None:
    for path in Checkpoint(base).other_files():
        if not (out / path).exists():
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base / path, out / path)
