"""What a model is asked and how it generates: one instruction for each style of prompt and kind of task.

The texts are the published ones, letter for letter. The conversation around them (LLaVA's system sentence, `USER:
<image>\\n… ASSISTANT:`) belongs to the model, not to the benchmark, and is added by the model's adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from string import Formatter
from types import MappingProxyType
from typing import Final

from evaluation.errors import DataError, PromptError


@dataclass(frozen=True)
class Generation:
    """Settings of deterministic decoding: beam search, or greedy where `num_beams` is 1. Lengths count new tokens."""

    num_beams: int
    max_new_tokens: int
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.num_beams < 1 or self.max_new_tokens < 1 or not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise PromptError(
                f"{self}: num_beams and max_new_tokens must be at least 1, min_new_tokens from 0 to max_new_tokens"
            )

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Instruction:
    """A prompt template in `str.format` syntax and the generation settings that go with it."""

    template: str
    generation: Generation

    def render(self, **fields: str) -> str:
        """The prompt. Raises DataError unless the fields are exactly those that the template names."""
        named = {name for _, name, _, _ in Formatter().parse(self.template) if name is not None}
        if named != fields.keys():
            raise DataError(
                f"prompt {self.template!r} takes the fields {_list(named)}; the benchmark gave {_list(fields)}; "
                "choose a kind of instruction that fits the benchmark"
            )
        return self.template.format(**fields)


_INSTRUCTIONS: Final[Mapping[str, Mapping[str, Instruction]]] = MappingProxyType(
    {
        # https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md; caption text and lengths as in lmms-eval.
        "llava": {
            "caption": Instruction(
                "Provide a one-sentence caption for the provided image.", Generation(num_beams=1, max_new_tokens=64)
            ),
            "short_answer": Instruction(
                "{question}\nAnswer the question using a single word or phrase.",
                Generation(num_beams=1, max_new_tokens=16),
            ),
        },
        # https://github.com/salesforce/LAVIS/tree/main/projects/instructblip. The repetition penalty is the default of
        # its generate(), which neither its caption task nor its VQA task overrides.
        "instructblip": {
            "caption": Instruction(
                "A short image caption.",
                Generation(num_beams=5, max_new_tokens=80, min_new_tokens=10, repetition_penalty=1.5),
            ),
            "short_answer": Instruction(
                "Question: {question} Short answer:",
                Generation(
                    num_beams=5, max_new_tokens=10, min_new_tokens=1, length_penalty=-1.0, repetition_penalty=1.5
                ),
            ),
        },
        # The embedded world of digits: a lower-case word-level vocabulary, full stop apart.
        "digits_llava": {
            "caption": Instruction("a short image caption .", Generation(num_beams=1, max_new_tokens=32)),
            "short_answer": Instruction("{question}", Generation(num_beams=1, max_new_tokens=4)),
        },
        "digits_instructblip": {
            "caption": Instruction("a short image caption .", Generation(num_beams=3, max_new_tokens=32)),
            "short_answer": Instruction("{question}", Generation(num_beams=1, max_new_tokens=4)),
        },
    }
)


def instruction(style: str, kind: str) -> Instruction:
    """The instruction of a style ("llava", …) for a kind ("caption", "short_answer"). Raises PromptError."""
    if style not in _INSTRUCTIONS:
        raise PromptError(f"prompt style {style!r} is unknown; known: {_list(_INSTRUCTIONS)}")
    kinds = _INSTRUCTIONS[style]
    if kind not in kinds:
        raise PromptError(f"prompt style {style!r} has no instruction of kind {kind!r}; it has: {_list(kinds)}")
    return kinds[kind]


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
