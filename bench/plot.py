"""Plots as SVG, without a library: lines over a few points, or bars; readable on light and dark pages.

`python -m bench.plot erofs` draws the last figures of `make bench-erofs` into docs/erofs.svg.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 360, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 34, 44
COLOURS = ("#0072b2", "#d55e00", "#009e73")


def panel(title: str, unit: str, points: Sequence[str], series: Mapping[str, Sequence[float]]) -> str:
    """One plot: the x axis has `points` at even distances, the y axis begins at 0."""
    most = _round_up(max(value for values in series.values() for value in values))
    inner = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)

    def x(number: int) -> float:
        return LEFT + inner[0] * (number + 0.5) / len(points)

    def y(value: float) -> float:
        return TOP + inner[1] * (1 - value / most)

    parts = [f'<text x="{WIDTH / 2}" y="16" text-anchor="middle" font-weight="bold">{escape(title)}</text>']
    for step in range(5):
        value = most * step / 4
        parts.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="#999" stroke-width="0.5"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    parts.append(f'<text x="{LEFT - 6}" y="{TOP - 8}" text-anchor="end">{escape(unit)}</text>')
    for number, point in enumerate(points):
        parts.append(
            f'<text x="{x(number):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(point)}</text>'
        )
    for colour, values in zip(COLOURS, series.values(), strict=False):
        line = " ".join(f"{x(number):.1f},{y(value):.1f}" for number, value in enumerate(values))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(n):.1f}" cy="{y(v):.1f}" r="3" fill="{colour}"/>' for n, v in enumerate(values)]
    for number, (colour, name) in enumerate(zip(COLOURS, series, strict=False)):
        at = LEFT + 100 * number
        parts.append(f'<circle cx="{at}" cy="{HEIGHT - 10}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{at + 9}" y="{HEIGHT - 6}">{escape(name)}</text>')
    return "\n".join(parts)


def bars(title: str, unit: str, values: Mapping[str, float]) -> str:
    """One plot: a bar a name, from the left, with its value behind it."""
    parts = [
        f'<text x="{WIDTH / 2}" y="16" text-anchor="middle" font-weight="bold">{escape(title)} ({escape(unit)})</text>'
    ]
    most, room, left = max(values.values()), WIDTH - 200, 130
    for number, (name, value) in enumerate(values.items()):
        y = TOP + number * (HEIGHT - TOP - 10) / len(values)
        high = (HEIGHT - TOP - 10) / len(values) - 8
        colour = (
            COLOURS[0] if name.startswith(("fanotify", "blobfs", "ours")) else COLOURS[1 + name.startswith("EROFS")]
        )
        parts.append(f'<text x="{left - 6}" y="{y + high / 2 + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<rect x="{left}" y="{y:.1f}" width="{room * value / most:.1f}" height="{high:.1f}" fill="{colour}"/>'
        )
        parts.append(f'<text x="{left + room * value / most + 5:.1f}" y="{y + high / 2 + 4:.1f}">{value:,.0f}</text>')
    return "\n".join(parts)


def page(panels: Sequence[str]) -> str:
    """The panels beside each other, as the text of an SVG file."""
    moved = [f'<g transform="translate({WIDTH * number} 0)">\n{text}\n</g>' for number, text in enumerate(panels)]
    size = f'width="{WIDTH * len(panels)}" height="{HEIGHT}" viewBox="0 0 {WIDTH * len(panels)} {HEIGHT}"'
    style = 'font-family="sans-serif" font-size="12" fill="#777"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(moved) + "\n</svg>\n"


def _round_up(value: float) -> float:
    """A number of one or two digits and zeros that is not less."""
    scale = 1.0
    while scale * 10 <= value:
        scale *= 10
    while scale > value > 0:
        scale /= 10
    return next(scale * step for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 5, 6, 8, 10) if scale * step >= value)


def main() -> int:
    """Draw what `make bench-erofs` has measured last."""
    from bench.run import FOLDER

    if sys.argv[1:] != ["erofs"]:
        print("usage: python -m bench.plot erofs", file=sys.stderr)
        return 1
    panels = []
    for name, where in (("erofs-ways.json", "in memory"), ("erofs-ways-disk.json", "cold disk")):
        path = FOLDER / name
        if not path.exists():
            continue
        figures = json.loads(path.read_text())
        for key, unit in (("warm MB/s", "MB/s"), ("random 4 jobs, 1/s", "1/s")):
            title = f"{'sequential' if unit == 'MB/s' else 'random 4 KiB, 4 jobs'}, {where}"
            panels.append(bars(title, unit, {who: row[key] for who, row in figures.items() if key in row}))
    (Path(__file__).resolve().parents[1] / "docs/erofs.svg").write_text(page(panels))
    return 0


if __name__ == "__main__":
    sys.exit(main())
