"""Line charts as SVG text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

__all__ = ["lines_svg"]

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 40, 50
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#9c6b4e", "#a463f2")
TICKS = 5


def lines_svg(
    title: str, x_label: str, y_label: str, lines: Sequence[tuple[str, Sequence[tuple[float, float]]]]
) -> str:
    """A chart of named lines.

    Args:
        title: Above the chart.
        x_label: Below it.
        y_label: At the upper left.
        lines: Name and points (x, y) of each line, at least one point in all.

    Returns:
        The text of an SVG file.
    """
    points = np.array([point for _, line in lines for point in line], np.float64)
    (x_low, y_low), (x_high, y_high) = points.min(axis=0), points.max(axis=0)
    x_span, y_span = max(x_high - x_low, 1e-12), max(y_high - y_low, 1e-12)

    def x(value: float) -> float:
        return LEFT + (value - x_low) / x_span * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_low) / y_span * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 18, title, size=14),
        _text(LEFT, 34, y_label),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_label, anchor="middle"),
    ]
    for i in range(TICKS):
        across, up = x_low + x_span * i / (TICKS - 1), y_low + y_span * i / (TICKS - 1)
        parts += [
            f'<path d="M{LEFT} {y(up):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>',
            _text(LEFT - 6, y(up) + 4, f"{up:.4g}", anchor="end"),
            _text(x(across), HEIGHT - BOTTOM + 18, f"{across:.4g}", anchor="middle"),
        ]
    for i, (name, line) in enumerate(lines):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line)
        parts += [
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<path d="M{WIDTH - RIGHT + 12} {TOP + 20 * i + 8}h18" stroke="{colour}" stroke-width="3"/>',
            _text(WIDTH - RIGHT + 36, TOP + 20 * i + 12, name),
        ]
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
