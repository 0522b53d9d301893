"""Exact match as GQA is scored."""


def exact_match(prediction: str, reference: str) -> bool:
    """Whether both are equal once stripped, without one final period, in lower case. An empty prediction is wrong."""
    return bool(prediction.strip()) and _plain(prediction) == _plain(reference)


def _plain(answer: str) -> str:
    return answer.strip().removesuffix(".").lower()
