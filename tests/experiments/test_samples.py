"""Samples from files: what a line may say, and what is told about a bad one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from experiments.errors import ConfigError, SampleError
from experiments.samples import draw_lines, read_lines


def write(folder: Path, *lines: object) -> Path:
    path = folder / "samples.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_line_is_a_turn_about_an_image_or_a_text(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("L", (3, 2), 7).save(tmp_path / "pictures" / "a.png")
    path = write(
        tmp_path,
        {"image": "pictures/a.png", "prompt": "What?", "answer": "Grey \u2028 dust"},
        "",
        {"image": None, "prompt": "Say nothing."},
        {"text": "Once upon a time."},
    )
    turn, question, text = (line.sample() for line in read_lines(path))
    assert turn.image is not None
    assert (turn.image.mode, turn.image.size, turn.image.getpixel((0, 0))) == ("RGB", (3, 2), (7, 7, 7))
    assert (turn.prompt, turn.answer) == ("What?", "Grey \u2028 dust")
    assert (question.image, question.prompt, question.answer) == (None, "Say nothing.", None)
    assert (text.image, text.prompt, text.answer) == (None, None, "Once upon a time.")


@pytest.mark.parametrize(
    ("line", "finding"),
    [
        ("{'prompt': 'a'}", "not JSON"),
        ('["prompt"]', "not an object; its fields are"),
        ({"prompt": 3}, "holds something else than texts"),
        ({"prompt": "a", "caption": "b"}, "unknown caption; the fields are image, prompt, answer, text"),
        ({"answer": "a"}, "neither prompt nor text"),
        ({"text": "a", "image": "b.png"}, "text stands alone"),
        ({"prompt": "a", "image": "b.png"}, r"b\.png does not exist; paths count from the folder"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, finding: str) -> None:
    path = write(tmp_path, {"prompt": "good"}, line)
    with pytest.raises(SampleError, match=rf"samples\.jsonl:2: .*{finding}"):
        read_lines(path)


def test_an_image_that_cannot_be_read_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    (line,) = read_lines(write(tmp_path, {"prompt": "a", "image": "a.png"}))
    with pytest.raises(SampleError, match=r"samples\.jsonl:1: .*a\.png is no readable image"):
        line.sample()


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe"])
def test_a_file_without_samples_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "samples.jsonl").write_bytes(content)
    with pytest.raises(SampleError, match=r"samples\.jsonl"):
        read_lines(tmp_path / "samples.jsonl")


def test_held_out_lines_are_others_and_the_seed_decides(tmp_path: Path) -> None:
    path = write(tmp_path, *({"text": str(number)} for number in range(10)))
    samples, held_out = draw_lines(path, 4, 3, seed=1)
    texts = [sample.answer for sample in [*samples, *held_out]]
    assert (len(samples), len(held_out), len(set(texts))) == (4, 3, 7)
    assert draw_lines(path, 4, 3, seed=1) == (samples, held_out)
    assert draw_lines(path, 4, 3, seed=2) != (samples, held_out)
    assert len(draw_lines(path, 100, 3, seed=1)[0]) == 7
    with pytest.raises(ConfigError, match=r"held_out=10: .* has 10 samples"):
        draw_lines(path, 4, 10, seed=1)
