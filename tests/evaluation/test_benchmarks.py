"""Every family: its example of a row, its scores by hand, and the rows it refuses."""

from collections.abc import Mapping
from dataclasses import FrozenInstanceError

import pytest

from evaluation.benchmarks.captions import Captions
from evaluation.benchmarks.contract import Benchmark
from evaluation.benchmarks.gqa import GQA
from evaluation.benchmarks.vqa import VQA
from evaluation.errors import DataError, RuleError
from evaluation.prompts import instruction
from evaluation.records import Example

IMAGE = object()
CAPTION_ROW = {"image_id": 7, "image": IMAGE, "captions": ["a dog", "the dog"], "url": "ignored"}
VQA_ROW = {"question_id": 7, "image": IMAGE, "question": "What colour?", "answers": ["red"] * 10}
GQA_ROW = {"id": "7", "image": IMAGE, "question": "What colour?", "answer": "red"}
FAMILIES: list[tuple[Benchmark, dict[str, object]]] = [
    (Captions("coco"), CAPTION_ROW),
    (VQA("vqav2"), VQA_ROW),
    (GQA("gqa"), GQA_ROW),
]


def example(benchmark: Benchmark, row: Mapping[str, object]) -> Example:
    return benchmark.example(row, instruction("llava", benchmark.kind))


def test_examples() -> None:
    caption_prompt = "Provide a one-sentence caption for the provided image."
    question_prompt = "What colour?\nAnswer the question using a single word or phrase."
    assert example(Captions("coco"), CAPTION_ROW) == Example("7", caption_prompt, ("a dog", "the dog"), IMAGE)
    assert example(VQA("vqav2"), VQA_ROW) == Example("7", question_prompt, ("red",) * 10, IMAGE)
    assert example(GQA("gqa"), GQA_ROW) == Example("7", question_prompt, ("red",), IMAGE)


def test_answers_may_be_mappings_and_groups_may_be_named() -> None:
    answers = [{"answer": "red", "answer_confidence": "yes", "answer_id": number} for number in range(10)]
    row = VQA_ROW | {"answers": answers, "answer_type": "other"}
    found = example(VQA("vqav2", group_column="answer_type"), row)
    assert (found.references, found.group) == (("red",) * 10, "other")


def test_columns_can_be_renamed() -> None:
    flickr = Captions("flickr30k", id_column="img_id", captions_column="caption")
    row = {"img_id": "1000092795", "image": IMAGE, "caption": ["two men"]}
    assert example(flickr, row).references == ("two men",)
    with pytest.raises(DataError, match="expected image_id, image, captions, found img_id, image, caption"):
        example(Captions("coco"), row)


@pytest.mark.parametrize(("benchmark", "row"), FAMILIES, ids=lambda value: getattr(value, "name", ""))
def test_each_needed_column_is_required_and_checked(benchmark: Benchmark, row: dict[str, object]) -> None:
    for column in row.keys() - {"url"}:
        with pytest.raises(DataError, match=f"{benchmark.name}: a row has no column {column};"):
            example(benchmark, {name: value for name, value in row.items() if name != column})
        with pytest.raises(DataError, match=f"{benchmark.name}: column {column} must hold .* found NoneType None"):
            example(benchmark, row | {column: None})


@pytest.mark.parametrize(
    ("benchmark", "row"),
    [
        (Captions("coco"), CAPTION_ROW | {"captions": []}),
        (Captions("coco"), CAPTION_ROW | {"captions": "a dog"}),
        (Captions("coco"), CAPTION_ROW | {"captions": ["a dog", None]}),
        (Captions("coco"), CAPTION_ROW | {"captions": [{"answer": "a dog"}]}),
        (Captions("coco"), CAPTION_ROW | {"image_id": 7.0}),
        (Captions("coco"), CAPTION_ROW | {"image_id": True}),
        (Captions("coco"), CAPTION_ROW | {"image_id": ""}),
        (VQA("vqav2"), VQA_ROW | {"answers": "['red']"}),
        (VQA("vqav2"), VQA_ROW | {"answers": [{"text": "red"}] * 10}),
        (VQA("vqav2"), VQA_ROW | {"question": "  "}),
        (GQA("gqa"), GQA_ROW | {"answer": ["red"]}),
    ],
)
def test_refused_rows(benchmark: Benchmark, row: dict[str, object]) -> None:
    with pytest.raises(DataError, match=f"{benchmark.name}: column .* must hold"):
        example(benchmark, row)


def test_number_of_annotators() -> None:
    row = VQA_ROW | {"answers": ["red"] * 9}
    with pytest.raises(DataError, match="question 7 has 9 answers in column answers, expected 10"):
        example(VQA("vqav2"), row)
    assert len(example(VQA("vqav2", annotators=None), row).references) == 9


def test_an_instruction_of_another_kind_is_refused() -> None:
    with pytest.raises(DataError, match="the benchmark gave question"):
        VQA("vqav2").example(VQA_ROW, instruction("llava", "caption"))


def test_unknown_rule_fails_when_the_benchmark_is_made() -> None:
    with pytest.raises(RuleError, match="'strict'"):
        VQA("vqav2", rule="strict")


def test_vqa_scores() -> None:
    benchmark = VQA("vqav2")
    examples = [
        example(benchmark, VQA_ROW | {"question_id": number, "answers": ["Red"] * number + ["blue"] * (10 - number)})
        for number in (1, 2, 10)
    ]
    outcome = benchmark.score(examples, {"1": "red.", "2": "red", "10": "green"})
    assert outcome.per_example == pytest.approx({"1": 30.0, "2": 60.0, "10": 0.0})
    assert outcome.value == pytest.approx(30.0)
    assert (outcome.metric, outcome.rule) == ("VQA accuracy", "normalise_both")


def test_the_rule_of_a_vqa_benchmark_is_used_and_named() -> None:
    benchmark = VQA("vqav2", rule="official")
    outcome = benchmark.score([example(benchmark, VQA_ROW)], {"7": "Red"})
    assert (outcome.rule, outcome.value) == ("official", 0.0)


def test_gqa_scores() -> None:
    benchmark = GQA("gqa")
    examples = [example(benchmark, GQA_ROW | {"id": number}) for number in ("1", "2", "3")]
    outcome = benchmark.score(examples, {"1": "Red.", "2": "the red", "3": ""})
    assert outcome.per_example == {"1": 100.0, "2": 0.0, "3": 0.0}
    assert outcome.value == pytest.approx(100 / 3)


def test_caption_scores() -> None:
    benchmark = Captions("coco")
    captions = {"1": "a red dog runs fast", "2": "two blue cats sit here"}
    examples = [example(benchmark, CAPTION_ROW | {"image_id": id, "captions": [text]}) for id, text in captions.items()]
    # All n-grams occur in one image alone and match their only reference: full marks, 10 x 100.
    assert benchmark.score(examples, captions).per_example == pytest.approx({"1": 1000.0, "2": 1000.0})
    swapped = benchmark.score(examples, {"1": captions["2"], "2": captions["1"]})
    assert (swapped.metric, swapped.value) == ("CIDEr", 0.0)


@pytest.mark.parametrize(("benchmark", "row"), FAMILIES, ids=lambda value: getattr(value, "name", ""))
def test_contract(benchmark: Benchmark, row: dict[str, object]) -> None:
    """Frozen; scores every example; the value is the mean; texts are taken by id, not by position."""
    with pytest.raises(FrozenInstanceError):
        benchmark.name = "other"  # type: ignore[misc]
    id_column = next(iter(row))
    examples = [example(benchmark, row | {id_column: f"x{number}"}) for number in range(3)]
    texts = {"x0": "red", "x1": "", "x2": "blue"}
    outcome = benchmark.score(examples, texts)
    assert list(outcome.per_example) == ["x0", "x1", "x2"]
    assert outcome.value == pytest.approx(sum(outcome.per_example.values()) / 3)
    assert outcome.per_example["x1"] == 0.0
    assert benchmark.score(examples, dict(reversed(texts.items()))) == outcome
