"""A dry run: what would become of every tensor, and what it would take, before anything is read in full."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from rich.table import Table
from torch import Tensor

from experiments.checkpoints import is_lora
from experiments.console import console, size
from experiments.cost import Cost, Layer, cost, measure
from experiments.errors import ConfigError
from experiments.fuse_checks import check, require_room
from experiments.fuse_config import Fusing
from experiments.models.adapter import device_of, read_config
from experiments.samples import read_lines
from tailor.align import Aligned, align
from tailor.checkpoint import Checkpoint
from tailor.scope import select

PIECES, PIECE = 64, 256  # of each tensor that are compared, and entries of a piece
USUAL_TOKENS = 64  # of a prompt and its answer, where there is no file to look at
TENSORS = "tensors.csv"


@dataclass(frozen=True)
class Expected:
    """What is known of a tensor from its header and a few of its entries."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fate: str

    @property
    def entries(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        return self.entries * self.dtype.itemsize

    @property
    def is_layer(self) -> bool:
        """Whether it looks like a linear weight; only the model could tell for sure."""
        return self.fate == "fused" and len(self.shape) == 2 and "embed" not in self.name


def show(parts: Fusing, folder: Path) -> None:
    """Prints the dry run, and writes the whole list of tensors into ``folder``."""
    check(parts)
    require_room(parts)
    lora = [folder for folder in parts.finetuned if is_lora(folder)]
    if lora:
        raise ConfigError(
            f"dry_run: {lora[0]} holds LoRA adapters, and what they change shows when they are merged; run without it"
        )
    expected = list(_expected(parts))
    rows = [
        {"tensor": each.name, "shape": "x".join(map(str, each.shape)), "dtype": str(each.dtype), "fate": each.fate}
        for each in expected
    ]
    pd.DataFrame(rows).to_csv(folder / TENSORS, index=False)
    out = console(width=200, markup=False)
    out.print(_table(expected))
    for line in _lines(parts, expected):
        out.print(line, soft_wrap=True)
    out.print(f"Every tensor: {folder / TENSORS}", soft_wrap=True)


def _expected(parts: Fusing) -> Iterator[Expected]:
    base = Checkpoint(parts.pretrained)
    aligned = [align(base, Checkpoint(folder), embeddings=parts.embeddings) for folder in parts.finetuned]
    first = aligned[0]
    scope = frozenset(select(first.pretrained, parts.scope)) if parts.scope is not None else None
    for name in first.pretrained:
        in_scope = scope is None or name in scope
        if in_scope and any(_differs(each, name) for each in aligned):
            fate = "fused"
        else:
            fate = "kept" if scope is not None and in_scope else "copied"
        yield Expected(name, base.shape(name), base.dtype(name), fate)
    for name, original in {**first.copies, **first.dropped}.items():
        yield Expected(name, base.shape(original), base.dtype(original), "tied")


def _differs(aligned: Aligned, name: str) -> bool:
    """Whether the fine-tuned tensor differs in any of some pieces; memory maps read no more."""
    base, tuned = aligned.pretrained[name].reshape(-1), aligned.finetuned[name].reshape(-1)
    starts = {number * max(0, len(base) - PIECE) // (PIECES - 1) for number in range(PIECES)}
    return any(not torch.equal(_piece(base, start).to(tuned.dtype), _piece(tuned, start)) for start in starts)


def _piece(flat: Tensor, start: int) -> Tensor:
    return flat[start : start + PIECE]


def _table(expected: list[Expected]) -> Table:
    """One row for the tensors that differ only in the numbers in their names."""
    groups: dict[tuple[str, object, object, str], list[Expected]] = {}
    for each in expected:
        pattern = re.sub(r"\.\d+\.", ".{}.", each.name)
        groups.setdefault((pattern, each.shape, each.dtype, each.fate), []).append(each)
    table = Table()
    for column in ("tensors", "number", "dtype", "shape", "parameters", "fate"):
        table.add_column(column, justify="right" if column in ("number", "parameters") else "left", no_wrap=True)
    for (pattern, _, dtype, fate), members in groups.items():
        shape = "×".join(map(str, members[0].shape)) or "scalar"
        count = sum(each.entries for each in members)
        name = pattern.format(*_numbers([each.name for each in members]))
        table.add_row(name, str(len(members)), str(dtype).removeprefix("torch."), shape, f"{count:,}", fate)
    return table


def _numbers(names: list[str]) -> list[str]:
    """What stands for each number in names that differ in their numbers alone: it, or the range that it runs over."""
    found = zip(*(map(int, re.findall(r"(?<=\.)\d+(?=\.)", name)) for name in names), strict=True)
    return [str(min(each)) if min(each) == max(each) else f"[{min(each)}-{max(each)}]" for each in map(list, found)]


def _lines(parts: Fusing, expected: list[Expected]) -> Iterator[str]:
    counts = {fate: [each for each in expected if each.fate == fate] for fate in ("fused", "kept", "copied", "tied")}
    told = [f"{len(group)} {fate} ({sum(e.entries for e in group):,})" for fate, group in counts.items() if group]
    yield f"Tensors (parameters): {', '.join(told)}. Fates go by some pieces of each tensor."
    needs = parts.method.needs
    whole = sum(each.bytes for each in expected if each.fate != "tied")
    yield f"Disk: {size(whole)} for a checkpoint" + (
        f", {size(_gram_bytes(expected))} for Grams, which later settings reuse" if needs == "grams" else ""
    )
    largest = max((each.bytes for each in expected), default=0)
    if needs != "grams":
        yield f"Memory: a few times the largest tensor, {size(largest)}" + (
            "; Grafting holds the whole model in float32, three times" if needs == "gradients" else ""
        )
        yield "Time: about that of copying the checkpoint" if needs == "nothing" else "Time: that of a training run"
        return
    estimated = _cost(parts, expected, whole)
    yield (
        f"Memory: {size(estimated.memory)} for Grams or the largest layer; "
        f"while calibrating also the model, {size(whole)}, unless it is offloaded"
    )
    yield (
        f"Time: about {estimated.calibrating:.0f} s of calibrating and {estimated.fusing:.0f} s of fusing at the rates "
        f"measured on {parts.devices[0]} just now, besides loading; offloading and a busy machine add to it"
    )


def _gram_bytes(expected: list[Expected]) -> int:
    return sum(4 * width**2 for width in _widths(expected))


def _widths(expected: list[Expected]) -> list[int]:
    """Of each layer's input, counting layers that read one input (q, k and v; gate and up) once, by their names."""
    shared: dict[str, int] = {}
    for each in expected:
        if each.is_layer:
            name = re.sub(r"\.(q|k|v)_proj\.|\.(query|key|value)\.", ".qkv.", each.name)
            name = re.sub(r"\.(gate|up)_proj\.", ".gate_up.", name)
            shared[name] = each.shape[1]
    return list(shared.values())


def _tokens(parts: Fusing) -> int:
    """Of all calibration sequences, at four letters a token and as many slots for a picture as the config says."""
    calibration = parts.calibration
    config = read_config(parts.pretrained)
    picture = int(config.get("image_seq_length") or config.get("num_query_tokens") or 0)
    data = calibration.data if isinstance(calibration.data, str | None) else calibration.data[0]
    count, letters = calibration.samples, 4 * USUAL_TOKENS
    if data is not None and Path(data).is_file():
        lines = read_lines(Path(data))
        count = min(count, len(lines) - calibration.held_out)
        letters = sum(len(line.prompt or "") + len(line.answer or "") for line in lines) // len(lines)
    return (count + calibration.held_out) * len(parts.finetuned) * (picture + letters // 4)


def _cost(parts: Fusing, expected: list[Expected], whole: int) -> Cost:
    settings = parts.config["baseline"]
    return cost(
        [Layer(*each.shape) for each in expected if each.is_layer],
        _widths(expected),
        3 * whole,
        measure(device_of(parts.devices[0])),
        sparsity=float(settings.get("sparsity", 1.0)),
        decorator=str(settings.get("decorator", "exact")),
        parameters_run=sum(each.entries for each in expected),
        tokens=_tokens(parts),
        gram_memory=int(parts.calibration.memory_gb * 1e9),
    )
