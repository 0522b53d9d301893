"""Image captioning scored by CIDEr: COCO, NoCaps, Flickr30k and their like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evaluation.benchmarks.contract import Outcome
from evaluation.benchmarks.rows import Row
from evaluation.metrics.cider import cider
from evaluation.prompts import Instruction
from evaluation.records import Example


@dataclass(frozen=True)
class Captions:
    """One caption an image. NoCaps's domains are benchmarks of their own: they share no document frequencies."""

    name: str
    kind: str = "caption"
    id_column: str = "image_id"
    image_column: str = "image"
    captions_column: str = "captions"

    def example(self, row: Mapping[str, object], instruction: Instruction) -> Example:
        read = Row(self.name, row, (self.id_column, self.image_column, self.captions_column))
        return Example(
            id=read.identifier(self.id_column),
            prompt=instruction.render(),
            references=read.texts(self.captions_column),
            image=read.image(self.image_column),
        )

    def answers(self, example: Example) -> tuple[str, ...]:
        return example.references

    def score(self, examples: Sequence[Example], texts: Mapping[str, str]) -> Outcome:
        result = cider(texts, {each.id: each.references for each in examples})
        return Outcome(
            metric="CIDEr",
            rule="pycocoevalcap, n=4, sigma=6, document frequencies of these images",
            value=result.value,
            per_example=result.per_image,
        )
