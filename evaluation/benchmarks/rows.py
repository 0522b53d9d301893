"""Reading a data row: a column's value in the type asked for, or a DataError that says what was found instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evaluation.errors import DataError


@dataclass(frozen=True)
class Row:
    """A data row of `benchmark`, which must have the columns `expected`; others are ignored."""

    benchmark: str
    columns: Mapping[str, object]
    expected: tuple[str, ...]

    def __post_init__(self) -> None:
        if missing := [name for name in self.expected if name not in self.columns]:
            raise DataError(
                f"{self.benchmark}: a row has no column {', '.join(missing)}; expected {', '.join(self.expected)}, "
                f"found {', '.join(map(str, self.columns)) or 'none'}; name them in the benchmark's configuration"
            )

    def identifier(self, name: str) -> str:
        """An id: a whole number or a text that is not empty, as text."""
        value = self.columns[name]
        if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
            raise self._wrong(name, "a whole number or a text that is not empty")
        return str(value)

    def text(self, name: str) -> str:
        """A text with at least one character that is not white space."""
        value = self.columns[name]
        if not isinstance(value, str) or not value.strip():
            raise self._wrong(name, "a text that is not empty")
        return value

    def texts(self, name: str, key: str | None = None) -> tuple[str, ...]:
        """At least one text, from a list of texts or, with `key`, also from a list of mappings with a text there."""
        value = self.columns[name]
        items = value if isinstance(value, list | tuple) else ()
        found = [each.get(key) if key is not None and isinstance(each, Mapping) else each for each in items]
        texts = tuple(each for each in found if isinstance(each, str))
        if not texts or len(texts) < len(found):
            mappings = f", or of mappings with a text {key!r}" if key is not None else ""
            raise self._wrong(name, f"a list of texts, at least one{mappings}")
        return texts

    def image(self, name: str) -> object:
        """Whatever the data holds as an image, but not None."""
        value = self.columns[name]
        if value is None:
            raise self._wrong(name, "an image")
        return value

    def _wrong(self, name: str, wanted: str) -> DataError:
        value = self.columns[name]
        return DataError(
            f"{self.benchmark}: column {name} must hold {wanted}; found {type(value).__name__} {repr(value)[:80]}; "
            "check the data and the columns named in the benchmark's configuration"
        )
