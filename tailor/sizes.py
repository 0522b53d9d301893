"""Sizes as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

from tailor.errors import InvalidSetting

_UNITS = {"B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {f"{_letter}B": 1000**_power, f"{_letter}iB": 1024**_power}


def parse_bytes(size: int | str, setting: str) -> int:
    """Bytes of a size such as 5000000, "5GB" (10⁹ each) or "1.5 GiB" (2³⁰ each); the case of letters is free.

    Raises InvalidSetting, naming the setting, unless it is at least one byte.
    """
    units = {unit.upper(): Fraction(count) for unit, count in _UNITS.items()} | {"": Fraction(1)}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    if isinstance(size, bool) or match is None or match[2].upper() not in units:
        raise InvalidSetting(f"{setting} = {size!r} is not a size; write bytes, or a number with {', '.join(_UNITS)}")
    count = round(Fraction(match[1]) * units[match[2].upper()])
    if count < 1:
        raise InvalidSetting(f"{setting} = {size!r} is less than a byte; give at least one")
    return count
