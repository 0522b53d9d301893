"""CIDEr against its definition written out, against pycocoevalcap itself, and on the captions that trip it."""

import math
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from evaluation.errors import DataError, PredictionError
from evaluation.metrics.cider import cider
from evaluation.metrics.ptb import find_java


def cider_by_definition(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """CIDEr-D of captions that are plain words, an image at a time: arXiv 1411.5726, Eqs. 1-3 and 6.

    g(c) is the vector of tf-idf weights of a caption's n-grams, tf being the plain count. Per n-gram length, the sum
    over n-grams of min(g(candidate), g(reference)) * g(reference) / (|g(candidate)| |g(reference)|), times
    exp(-(difference in length)^2 / (2 * 6^2)); then the mean over lengths 1 to 4 and over references, times 10, and
    times 100 for print. Lengths count bigrams in pycocoevalcap: an empty caption is as long as a single word.
    """

    def ngrams(caption: str, length: int) -> Counter[tuple[str, ...]]:
        words = caption.split()
        return Counter(tuple(words[start : start + length]) for start in range(len(words) - length + 1))

    def idf(ngram: tuple[str, ...]) -> float:
        images = sum(
            any(ngram in ngrams(caption, len(ngram)) for caption in captions) for captions in references.values()
        )
        return math.log(len(references) / max(1, images))

    def similarity(candidate: str, reference: str, length: int) -> float:
        g_candidate = {ngram: count * idf(ngram) for ngram, count in ngrams(candidate, length).items()}
        g_reference = {ngram: count * idf(ngram) for ngram, count in ngrams(reference, length).items()}
        norms = math.hypot(*g_candidate.values()) * math.hypot(*g_reference.values())
        shared = g_candidate.keys() & g_reference.keys()
        clipped = sum(min(g_candidate[ngram], g_reference[ngram]) * g_reference[ngram] for ngram in shared)
        bigrams = ngrams(candidate, 2).total() - ngrams(reference, 2).total()
        return (clipped / norms if norms else 0.0) * math.exp(-(bigrams**2) / (2 * 6.0**2))

    return {
        image: 1000
        * sum(similarity(predictions[image], reference, length) for reference in captions for length in (1, 2, 3, 4))
        / (4 * len(captions))
        for image, captions in references.items()
    }


REFERENCES = {
    "beach": ["a man walks a dog on the beach", "a man and a dog walk along the sea", "dog on sand"],
    "street": ["a red bus drives down the street", "the bus is red"],
    "kitchen": ["a woman cooks in a small kitchen", "a woman in a kitchen", "someone is cooking soup", "soup"],
}


@pytest.mark.parametrize(
    "captions",
    [
        {"beach": "a man walks a dog on the beach", "street": "the bus is red", "kitchen": "soup"},
        {"beach": "dog dog dog dog on sand", "street": "a red bus", "kitchen": "a woman in a kitchen"},  # clipping
        {
            "beach": "a dog",
            "street": "a red bus drives down the street " * 2,  # length penalty
            "kitchen": "unknown words only here",
        },
        {"beach": "", "street": "a red bus drives down the street", "kitchen": "kitchen"},
    ],
)
def test_definition(captions: dict[str, str]) -> None:
    expected = cider_by_definition(captions, REFERENCES)
    result = cider(captions, REFERENCES)
    assert result.per_image == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert result.value == pytest.approx(sum(expected.values()) / len(expected), rel=1e-12)


def test_definition_on_random_captions() -> None:
    rng = random.Random(0)

    words = ["red", "blue", "dog", "cat", "runs", "sits", "on", "grass", "near", "tree"]

    def caption() -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, 9)))

    references = {str(image): [caption() for _ in range(rng.randint(1, 5))] for image in range(12)}
    predictions = {image: caption() for image in references}
    expected = cider_by_definition(predictions, references)
    assert cider(predictions, references).per_image == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_equal_to_pycocoevalcap_on_captions_without_traps(monkeypatch: pytest.MonkeyPatch) -> None:
    ptbtokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    if not os.access(Path(ptbtokenizer.__file__).parent, os.W_OK):
        pytest.skip("pycocoevalcap writes into its own folder")
    from pycocoevalcap.cider.cider import Cider

    references = {
        "1": ["A man's dog isn't here.", "Two dogs - one black, one white!", "He said: “no”"],
        "2": ["An 8-year-old boy (left) at 10:30 a.m.", "a boy; a girl...", "Mr. Smith's U.S. flag"],
        "3": ["The café costs $5.50", "it's rock 'n' roll, gonna go", "no. 7 bus at Main St."],
    }
    predictions = {"1": "A black dog isn't here.", "2": "A boy (left) & Mr. Smith", "3": "no. 7 bus; the café"}
    monkeypatch.setenv("PATH", f"{find_java().parent}{os.pathsep}{os.environ['PATH']}")
    tokenizer = ptbtokenizer.PTBTokenizer()
    theirs, per_image = Cider().compute_score(
        tokenizer.tokenize({image: [{"caption": each} for each in captions] for image, captions in references.items()}),
        tokenizer.tokenize({image: [{"caption": caption}] for image, caption in predictions.items()}),
    )
    ours = cider(predictions, references)
    assert ours.value == 100 * theirs
    assert list(ours.per_image.values()) == [100 * each for each in per_image]


@pytest.mark.parametrize(
    "separator", ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\xa0", "\t"]
)
def test_no_white_space_inside_a_caption_shifts_the_others(separator: str) -> None:
    plain = {"beach": "a man walks a dog", "street": "the bus is red", "kitchen": "a woman in a kitchen"}
    odd = plain | {"beach": f"{separator}a man{separator}walks a{separator} dog{separator}"}
    assert cider(odd, REFERENCES) == cider(plain, REFERENCES)


@pytest.mark.parametrize("wordless", ["", " ", "\n", ".", "... !", "-", "😀", "\ud83d"])
def test_a_caption_without_words_scores_0_and_leaves_the_others_alone(wordless: str) -> None:
    good = {"beach": "a man walks a dog", "street": "the bus is red", "kitchen": "a woman in a kitchen"}
    result = cider(good | {"street": wordless}, REFERENCES)
    assert result.per_image == dict(cider(good, REFERENCES).per_image) | {"street": 0.0}


def test_document_frequencies_come_from_the_scored_images_alone() -> None:
    captions = {"beach": "a dog on the beach", "street": "the red bus"}
    two = {image: REFERENCES[image] for image in captions}
    assert cider(captions, two).per_image["street"] != pytest.approx(
        cider(captions | {"kitchen": "a woman"}, REFERENCES).per_image["street"]
    )
    # One image alone: every n-gram is in every document, so its weight is log 1 = 0.
    assert cider({"a": "a dog"}, {"a": ["a dog"]}).value == 0.0


def test_order_does_not_matter_and_results_follow_the_references() -> None:
    captions = {"beach": "a dog on the beach", "street": "the red bus", "kitchen": "soup"}
    forward, backward = cider(captions, REFERENCES), cider(dict(reversed(captions.items())), REFERENCES)
    assert forward == backward
    assert list(backward.per_image) == list(REFERENCES)


def test_ids_that_differ_and_references_without_words_are_errors() -> None:
    with pytest.raises(
        PredictionError, match=r"CIDEr: of 3 expected predictions, 2 missing \(street, kitchen\), 1 foreign \(sea\)"
    ):
        cider({"beach": "a dog", "sea": "a ship"}, REFERENCES)
    with pytest.raises(DataError, match=r"1 images have no reference caption, the first is b"):
        cider({"a": "x", "b": "x"}, {"a": ["x"], "b": []})
    with pytest.raises(DataError, match="hold no word"):
        cider({"a": "x", "b": "x"}, {"a": ["."], "b": [""]})
