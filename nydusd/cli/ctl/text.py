"""Turning answers of the API into lines and tables. Pure.

An answer can come from another version of the daemon, so nothing is taken for granted: what is missing is shown as "-".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final

MISSING: Final = "-"
SIZE_CLASSES: Final = ("<1K", "1K~", "4K~", "16K~", "64K~", "128K~", "512K~", "1M~")
"""How the metrics classify the sizes of requests."""


def one_line(data: object) -> str:
    """JSON as `--raw` prints it."""
    return json.dumps(data, separators=(",", ":"))


def table_at(data: object, key: str) -> Mapping[str, object]:
    """The object under a key, empty if it is not one."""
    value = data.get(key) if isinstance(data, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def list_at(data: object, key: str) -> Sequence[object]:
    """The list under a key, empty if it is not one."""
    value = data.get(key) if isinstance(data, Mapping) else None
    return value if isinstance(value, list) else []


def number_at(data: object, key: str) -> float:
    """The number under a key, 0 if it is not one."""
    value = data.get(key) if isinstance(data, Mapping) else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else 0


def count_of_processes(processes: Sequence[object]) -> str:
    """How many of the places in a daemon have a process now."""
    count = sum(number_at(process, "pid") > 0 for process in processes)
    return f"{count} process{'' if count == 1 else 'es'}"


def text_at(data: object, key: str) -> str:
    """The value under a key for a reader: text as it is, anything else as JSON."""
    value = data.get(key) if isinstance(data, Mapping) else None
    if value is None:
        return MISSING
    return printable(value) if isinstance(value, str) else one_line(value)


def printable(text: str) -> str:
    """A text that cannot drive the terminal."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """`Name:  value` lines, the values below each other."""
    width = max(len(name) for name, _ in rows) + 1
    return "\n".join(f"{name + ':':<{width}}  {value}" for name, value in rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns wide enough for what is in them; the first and last to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    last = len(head) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in (0, last) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def size(amount: float) -> str:
    """Bytes for a reader: `17`, `4.0 KiB`, `1.2 GiB`."""
    for unit in ("", " KiB", " MiB", " GiB"):
        if abs(amount) < 1024:
            return f"{amount:.1f}{unit}" if unit else f"{amount:.0f}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds for a reader: `7 s`, `3 min 5 s`, `2 h 0 min`, `9 d 4 h`."""
    whole = int(seconds)
    for unit, below, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= below:
            return f"{whole // below} {unit} {whole % below // part} {smaller}"
    return f"{whole} s"
