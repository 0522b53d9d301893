"""CIDEr-D of captions as `pycocoevalcap` has it: n = 4, sigma = 6, clipped counts, a Gaussian length penalty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluation.errors import DataError
from evaluation.metrics.ptb import tokenize
from evaluation.records import check_ids


@dataclass(frozen=True)
class CiderResult:
    """`value` is the mean of `per_image`; both are scaled by 100 as papers print them, up to 1000 in theory."""

    value: float
    per_image: Mapping[str, float]


def cider(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> CiderResult:
    """Score one caption an image (id → caption) against its references (id → captions); Vedantam et al., 1411.5726.

    Document frequencies come from these images' references alone, so the value of a subset is not comparable with the
    whole's, and an image on its own scores 0: every n-gram occurs in every document. An empty caption scores 0.

    Raises PredictionError if the ids differ, DataError if an image has no reference or no reference has a word,
    MissingJava or TokenizerError.
    """
    check_ids(references, predictions, "CIDEr")
    if bare := [image for image, captions in references.items() if not captions]:
        raise DataError(f"CIDEr: {len(bare)} images have no reference caption, the first is {bare[0]}; leave them out")
    words = tokenize([*predictions.values(), *(caption for captions in references.values() for caption in captions)])
    documents = {image: [words[caption] for caption in captions] for image, captions in references.items()}
    if not any(map(any, documents.values())):
        raise DataError(f"CIDEr: the references of {len(documents)} images hold no word; check the captions column")

    from pycocoevalcap.cider.cider import Cider

    value, per_image = Cider(n=4, sigma=6.0).compute_score(
        documents, {image: [words[predictions[image]]] for image in documents}
    )
    return CiderResult(
        value=100 * float(value),
        per_image={image: 100 * float(each) for image, each in zip(documents, per_image, strict=True)},
    )
