import pytest

from evaluation.metrics.exact_match import exact_match


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("yes", "yes", True),
        ("Yes.", "yes", True),
        (" yes\n", "yes", True),
        ("yes..", "yes", False),  # one period is dropped, no more
        ("yes .", "yes", False),  # and the space before it stays
        ("the cat", "cat", False),
        ("two", "2", False),
        ("", "yes", False),
        ("", "", False),
        (".", "yes", False),
    ],
)
def test_exact_match(prediction: str, reference: str, expected: bool) -> None:
    assert exact_match(prediction, reference) is expected
