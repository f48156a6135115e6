"""Two drawings in SVG: scores of methods, and scores over what is varied. Colors come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["draw_scores", "draw_sweep"]

_WIDTH, _ROW, _LEFT, _RIGHT, _COLORS = 460, 22, 150, 52, 7
_HEIGHT, _MARGIN = 220, 30


def draw_scores(points: Mapping[str, tuple[float, float]]) -> str | None:
    """A row per method: a dot at the mean, a bar of one standard error to both sides; None without a number.

    Args:
        points: mean and standard error by name; NaN where there is none.
    """
    found = {name: point for name, point in points.items() if math.isfinite(point[0])}
    if not found:
        return None
    ends = [mean + sign * _finite(error) for mean, error in found.values() for sign in (-1, 1)]
    scale = _scale(min(ends), max(ends), _LEFT, _WIDTH - _RIGHT)
    parts = []
    for place, (name, (mean, error)) in enumerate(found.items()):
        y = _ROW * place + _ROW / 2
        color, left, right = (
            f"var(--run-{place % _COLORS})",
            scale(mean - _finite(error)),
            scale(mean + _finite(error)),
        )
        parts.append(
            f'<text x="0" y="{y + 4:.1f}" font-size="12" fill="var(--ink)">{escape(name)}</text>'
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--rule)"/>'
            f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{color}" stroke-width="3"/>'
            f'<circle cx="{scale(mean):.1f}" cy="{y:.1f}" r="4.5" fill="{color}"/>'
            f'<text x="{_WIDTH}" y="{y + 4:.1f}" font-size="12" text-anchor="end" fill="var(--ink-2)">{mean:.3f}</text>'
        )
    return _svg("".join(parts), _WIDTH, _ROW * len(found))


def draw_sweep(lines: Mapping[str, Sequence[tuple[float, float, float]]]) -> str | None:
    """A line per method over the values of an option, evenly spaced; None without a number.

    Args:
        lines: value, mean and standard error by name.
    """
    points = [point for line in lines.values() for point in line if math.isfinite(point[1])]
    if not points:
        return None
    values = sorted({value for value, _, _ in points})
    ends = [mean + sign * _finite(error) for _, mean, error in points for sign in (-1, 1)]
    across = _scale(0, max(1, len(values) - 1), _MARGIN + 10, _WIDTH - _MARGIN)
    up = _scale(min(ends), max(ends), _HEIGHT - _MARGIN, 8)
    parts = [
        f'<text x="{across(place):.1f}" y="{_HEIGHT - 8}" font-size="12" text-anchor="middle" fill="var(--ink-2)">'
        f"{value:g}</text>"
        for place, value in enumerate(values)
    ]
    for value in (min(ends), max(ends)):
        parts.append(f'<text x="0" y="{up(value) + 4:.1f}" font-size="12" fill="var(--ink-2)">{value:.2f}</text>')
    for number, line in enumerate(lines.values()):
        color = f"var(--run-{number % _COLORS})"
        found = [(across(values.index(v)), mean, error) for v, mean, error in line if math.isfinite(mean)]
        path = " ".join(f"{x:.1f},{up(mean):.1f}" for x, mean, _ in found)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        parts += [
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{up(mean - _finite(e)):.1f}" y2="{up(mean + _finite(e)):.1f}" '
            f'stroke="{color}" stroke-opacity="0.5"/><circle cx="{x:.1f}" cy="{up(mean):.1f}" r="3" fill="{color}"/>'
            for x, mean, e in found
        ]
    return _svg("".join(parts), _WIDTH, _HEIGHT)


def _scale(low: float, high: float, start: float, end: float):
    width = (high - low) or 1.0
    return lambda value: start + (value - low) / width * (end - start)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _svg(content: str, width: float, height: float) -> str:
    return f'<svg role="img" viewBox="0 0 {width:g} {height:g}" xmlns="http://www.w3.org/2000/svg">{content}</svg>'
