"""Line plots as SVG, without a library: a few series over a few points, readable on light and dark pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
