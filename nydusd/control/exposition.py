"""The text format of Prometheus (version 0.0.4): families that were declared, their samples, histograms. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from nydusd.errors import InternalError

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

Labels = Mapping[str, str]


class Family(NamedTuple):
    """What a metric is. `unit` is for readers of docs/metrics.md; `kept`: nydus-snapshotter's exporter uses the name."""

    name: str
    kind: str
    """counter, gauge or histogram."""
    unit: str
    labels: tuple[str, ...]
    help: str
    kept: bool = False


class Page:
    """The samples of one scrape, family by family in the order of their declaration."""

    def __init__(self, families: Sequence[Family]) -> None:
        self._families = {family.name: family for family in families}
        self._lines: dict[str, list[str]] = {name: [] for name in self._families}

    def add(self, name: str, value: object, **labels: str) -> None:
        """One sample; a value that is no number is left out: not every daemon knows everything."""
        family = self._family(name, labels)
        if isinstance(value, int | float) and not isinstance(value, bool):
            self._lines[family.name].append(f"{name}{_labels(labels)} {_number(value)}")

    def histogram(self, name: str, bounds: Sequence[float], counts: object, total: object, **labels: str) -> None:
        """Counts by class, one more than there are bounds, and the sum of what was counted; left out if it is none."""
        family = self._family(name, labels)
        if not isinstance(counts, list) or len(counts) != len(bounds) + 1 or not isinstance(total, int | float):
            return
        if not all(isinstance(count, int | float) for count in counts):
            return
        lines = self._lines[family.name]
        running = 0
        for bound, count in zip([*map(_number, bounds), "+Inf"], counts, strict=True):
            running += count
            lines.append(f"{name}_bucket{_labels({**labels, 'le': bound})} {_number(running)}")
        lines.append(f"{name}_sum{_labels(labels)} {_number(total)}")
        lines.append(f"{name}_count{_labels(labels)} {_number(running)}")

    def _family(self, name: str, labels: Labels) -> Family:
        family = self._families.get(name)
        if family is None or set(family.labels) != set(labels):
            raise InternalError(f"metric {name} with labels {sorted(labels)} is not declared")
        return family

    def text(self) -> str:
        """The page."""
        return "".join(self._text())

    def _text(self) -> Iterator[str]:
        for name, lines in self._lines.items():
            if lines:
                family = self._families[name]
                yield f"# HELP {name} {_escape(family.help, quotes=False)}\n# TYPE {name} {family.kind}\n"
                yield "\n".join(lines) + "\n"


def _labels(labels: Labels) -> str:
    inner = ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items())
    return f"{{{inner}}}" if inner else ""


def _escape(text: str, quotes: bool = True) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return (text.replace('"', '\\"') if quotes else text).encode(errors="backslashreplace").decode()


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1 << 53 else repr(float(value))
