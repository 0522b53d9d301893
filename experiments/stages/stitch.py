"""Stitching of a run: several fine-tuned models, each with its evidence, become one patch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.stages.fuse import PATCH, advancing, write_report
from tailor.method import GramEvidence
from tailor.methods.stitched import Stitched


def stitch_into(
    out: Path,
    pretrained: Path,
    finetuned: Sequence[Path],
    method: Stitched,
    evidence: Sequence[GramEvidence],
    seed: int,
    device: torch.device,
) -> None:
    """Writes the fusion report and the patch."""
    with advancing("stitch") as progress:
        patch, report = method.stitch(
            pretrained, finetuned, evidence=evidence, seed=seed, device=device, progress=progress
        )
    patch.save(out / PATCH)
    write_report(out, report)
