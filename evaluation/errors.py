"""Foreseen errors. Each message names the place, the finding and the way out."""


class EvaluationError(Exception):
    """Base of every foreseen error of this package; its text alone is fit to be shown to a user."""


class DataError(EvaluationError):
    """A data row, or what was made of it, is not what the benchmark expects."""


class PredictionError(EvaluationError):
    """Predictions are malformed, or are not those of the examples to be scored."""


class PromptError(EvaluationError):
    """A prompt style, a kind of instruction or a generation setting that does not exist."""


class RuleError(EvaluationError):
    """A scoring rule that does not exist."""


class AggregateError(EvaluationError):
    """Scores that have no average or harmonic mean."""


class ScoreFileError(EvaluationError):
    """A stored score that cannot be read back."""


class TokenizerError(EvaluationError):
    """The Java tokeniser ran but failed, or returned something other than one line a caption."""


class MissingJava(EvaluationError):  # noqa: N818  (the finding is the name)
    """No Java runtime was found for the caption tokeniser."""
