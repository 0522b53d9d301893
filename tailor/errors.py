"""Foreseen errors. A message names the place, the finding and the way out, so it can be shown without a traceback."""

# ruff: noqa: N818 (what was found says more than a suffix)

from __future__ import annotations


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
    """A Gram, or the part of it on a support, is not positive definite."""


class PatchError(TailorError):
    """A patch is unreadable or does not fit the weights it is applied to."""


class PrecisionLoss(TailorError):
    """A dtype too coarse to hold what fine-tuning changed."""
