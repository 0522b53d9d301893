"""Foreseen errors. A message names the place, the finding and the way out, so it can be shown without a traceback."""

# ruff: noqa: N818 (what was found says more than a suffix)

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class TailorError(Exception):
    """Base of every error that this package foresees."""


class InvalidSetting(TailorError):
    """A field of a method or an argument lies outside its range."""


class ScopeError(TailorError):
    """The scope of a fusion cannot be what was meant: a pattern without a match, a tensor that cannot be fused."""


class CheckpointError(TailorError):
    """A checkpoint or another weight file cannot be read or written."""


class CheckpointMismatch(TailorError):
    """Two checkpoints do not hold the same tensors."""


class NotFinite(TailorError):
    """A tensor holds NaN or infinity."""


class EmptyCalibration(TailorError):
    """No calibration token reached a layer."""


class SingularGram(TailorError):
    """A Gram, or the part of it on a support, is not positive definite. `token_count` is None where not known."""

    def __init__(self, message: str, token_count: int | None = None) -> None:
        super().__init__(message)
        self.token_count = token_count


class PatchError(TailorError):
    """A patch is unreadable or does not fit the weights it is applied to."""


class PrecisionLoss(TailorError):
    """A dtype too coarse to hold what fine-tuning changed."""


@contextmanager
def telling_tokens(token_count: int) -> Iterator[None]:
    """Have every SingularGram raised inside say over how many tokens the layer's Gram was taken."""
    try:
        yield
    except SingularGram as error:
        if error.token_count is not None:
            raise
        raise SingularGram(f"{error} (this Gram is of {token_count} tokens)", token_count) from error
