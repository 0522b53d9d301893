"""Checkpoint folders for the tests, written without the library's own writer."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

COMPANION = Path("processor") / "vocabulary.txt"
COMPANION_BYTES = b"a\r\nb\x00\xff"


def write_folder(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """A checkpoint folder of so many shards, with a config and a file in a subfolder beside the weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"made_for": folder.name}))
    (folder / COMPANION).parent.mkdir()
    (folder / COMPANION).write_bytes(COMPANION_BYTES)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    shard_of = {}
    for number in range(shards):
        shard = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        names = list(tensors)[number::shards]
        save_file({name: tensors[name] for name in names}, folder / shard, {"format": "pt"})
        shard_of.update(dict.fromkeys(names, shard))
    index = {"metadata": {}, "weight_map": shard_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
