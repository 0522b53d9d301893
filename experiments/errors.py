"""Foreseen errors: one message that names the place, the finding and the way out, and no traceback."""

from __future__ import annotations

from evaluation.errors import EvaluationError
from tailor.errors import TailorError


class ExperimentError(Exception):
    """A foreseen error of a run."""


class ConfigError(ExperimentError):
    """A configuration that can't be run: an unknown key, a value of the wrong type or out of its range."""


class ArtifactError(ExperimentError):
    """An artifact that can't be written, or was damaged after it was written."""


class TrainingError(ExperimentError):
    """A training run that can't go on: a loss that is not finite, nothing to train."""


class ModelError(ExperimentError):
    """A model whose parameters and checkpoint don't fit each other, or the adapter."""


class SampleError(ExperimentError):
    """A file of samples, or an image that it names, that can't be read."""


class RunsError(ExperimentError):
    """No finished run to read, or a run folder that can't be read."""


FORESEEN = (ExperimentError, TailorError, EvaluationError)
