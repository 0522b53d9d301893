"""Fusion of a run: the method with the evidence that it asks for, and the patch it makes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tailor.fuse import fuse_to_patch, fused_tensors
from tailor.method import Evidence, Method
from tailor.methods.finetune import FineTune
from tailor.methods.zero_shot import ZeroShot
from tailor.report import FusionReport

PATCH = "patch.safetensors"
REPORT = "fusion_report.json"


@dataclass(frozen=True)
class Weights:
    """Weights to evaluate: a checkpoint folder, changed in memory by a patch if there is one."""

    folder: Path
    patch: Path | None


def fuse_into(
    out: Path, pretrained: Path, finetuned: Path, method: Method, evidence: Evidence, seed: int, device: torch.device
) -> None:
    """Writes the fusion report and the patch. The two ends are whole checkpoints already and get no patch."""
    with advancing("fuse") as progress:
        settings: dict[str, Any] = {"evidence": evidence, "seed": seed, "device": device, "progress": progress}
        if is_end(method):
            stream = fused_tensors(pretrained, finetuned, method, **settings)
            report = FusionReport.of(method, seed, [row for _, _, row in stream])
        else:
            patch, report = fuse_to_patch(pretrained, finetuned, method, **settings)
            patch.save(out / PATCH)
    write_report(out, report)


def fused_weights(method: Method, pretrained: Path, finetuned: Path, fusion: Path) -> Weights:
    """Where the weights that ``method`` made are to be had."""
    if is_end(method):
        return Weights(pretrained if isinstance(method, ZeroShot) else finetuned, None)
    return Weights(pretrained, fusion / PATCH)


def is_end(method: Method) -> bool:
    return isinstance(method, ZeroShot | FineTune)


@contextmanager
def advancing(what: str) -> Iterator[Callable[[str], None]]:
    """To be called with each tensor that is done."""
    with tqdm(desc=what, unit="tensor", leave=False, dynamic_ncols=True, disable=None) as progress:

        def advance(name: str) -> None:
            progress.update()

        yield advance


def write_report(out: Path, report: FusionReport) -> None:
    (out / REPORT).write_text(json.dumps(report.to_json(), indent=1) + "\n")
