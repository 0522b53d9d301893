"""A pretrained model: the family's adapter, and where the checkpoint comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from experiments.models.adapter import Adapter


class Base(Protocol):
    """A frozen value that knows how to make the pretrained checkpoint folder."""

    def build(self, out: Path) -> None: ...


@dataclass(frozen=True)
class PretrainedModel:
    adapter: Adapter
    base: Base
