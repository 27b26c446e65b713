"""Small drawings in SVG, whose colours are the page's: bars, histograms, curves, maps."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 640, 240
_LEFT, _BOTTOM, _TOP, _RIGHT = 46, 30, 14, 10
_DASHES = ("", "6 4", "2 3", "9 3 2 3")


def bars(gains: Mapping[str, float]) -> str:
    """A bar for each name, to the right above 0 and to the left below; in points of percent."""
    most = max([abs(value) for value in gains.values()] + [1e-9])
    row, left, half = 22, 210, 170
    lines = []
    for i, (name, value) in enumerate(gains.items()):
        width, y = half * abs(value) / most, 4 + i * row
        x = left + half + (0 if value >= 0 else -width)
        end = left + half + (width + 4 if value >= 0 else -width - 4)
        anchor = "start" if value >= 0 else "end"
        lines += [
            f'<text x="{left - 6}" y="{y + 13}" text-anchor="end">{html.escape(name)}</text>',
            f'<rect class="{"gain" if value >= 0 else "loss"}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="16"/>',
            f'<text x="{end:.1f}" y="{y + 13}" text-anchor="{anchor}">{value:+.1f}</text>',
        ]
    height = 8 + row * len(gains)
    axis = f'<line class="axis" x1="{left + half}" y1="0" x2="{left + half}" y2="{height}"/>'
    return _drawing(
        "gain in mAP of each row over the features as they are", [axis, *lines], height, left + 2 * half + 50
    )


def histogram(
    edges: NDArray[np.float64], shares: Mapping[str, NDArray[np.float64]], threshold: float, title: str
) -> str:
    """Shares of positive and negative pairs by distance, as areas, and a threshold."""
    low, high = float(edges[0]), float(edges[-1])
    most = max(float(values.max()) for values in shares.values()) or 1.0
    parts = [_axes(low, high, 0, most, "distance", "")]
    for name, values in shares.items():
        x = _across(np.repeat(edges, 2)[1:-1], low, high)
        y = _up(np.repeat(values, 2), 0, most)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        base = f"{x[-1]:.1f},{HEIGHT - _BOTTOM} {x[0]:.1f},{HEIGHT - _BOTTOM}"
        parts.append(f'<polygon class="area {name}" points="{points} {base}"/>')
    at = float(_across(np.array([threshold]), low, high)[0])
    parts.append(f'<line class="threshold" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{HEIGHT - _BOTTOM}"/>')
    parts.append(f'<text x="{at + 4:.1f}" y="{_TOP + 10}">{threshold:.3f}</text>')
    return _drawing(title, parts)


def curves(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str) -> str:
    """Percent against a parameter; lines differ in colour and dashes."""
    xs = np.concatenate([np.asarray(x, float) for x, _ in lines.values()])
    ys = 100 * np.concatenate([np.asarray(y, float) for _, y in lines.values()])
    margin = max(1.0, 0.1 * float(np.ptp(ys)))
    low, high = float(ys.min()) - margin, float(ys.max()) + margin
    parts = [_axes(float(xs.min()), float(xs.max()), low, high, "", "mAP in %")]
    for i, (name, (x, y)) in enumerate(lines.items()):
        at = _across(np.asarray(x, float), float(xs.min()), float(xs.max())), _up(100 * np.asarray(y, float), low, high)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(*at, strict=True))
        dashes = _DASHES[i % len(_DASHES)]
        parts.append(f'<polyline class="line c{i % 4}" stroke-dasharray="{dashes}" points="{points}"/>')
        y_name = _TOP + 12 + 15 * i
        parts.append(
            f'<line class="line c{i % 4}" stroke-dasharray="{dashes}" x1="60" x2="90" y1="{y_name}" y2="{y_name}"/>'
        )
        parts.append(f'<text x="95" y="{y_name + 4}">{html.escape(name)}</text>')
    return _drawing(title, parts)


def scatter(points: NDArray[np.float64], groups: NDArray[np.int64], title: str) -> str:
    """A map of points; a group has one of 10 colours and one of 3 shapes."""
    low, high = points.min(0), points.max(0)
    x = _across(points[:, 0], float(low[0]), float(high[0]))
    y = _up(points[:, 1], float(low[1]), float(high[1]))
    shapes = [_mark(a, b, int(group)) for a, b, group in zip(x, y, groups, strict=True)]
    return _drawing(title, shapes)


def _mark(x: float, y: float, group: int) -> str:
    shape, colour = group % 3, f'class="dot d{group % 10}"'
    if shape == 0:
        return f'<circle {colour} cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    if shape == 1:
        return f'<rect {colour} x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"/>'
    return f'<polygon {colour} points="{x:.1f},{y - 5:.1f} {x + 4.5:.1f},{y + 3:.1f} {x - 4.5:.1f},{y + 3:.1f}"/>'


def _across(values: NDArray[Any], low: float, high: float) -> NDArray[np.float64]:
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * (values - low) / ((high - low) or 1.0)


def _up(values: NDArray[Any], low: float, high: float) -> NDArray[np.float64]:
    return HEIGHT - _BOTTOM - (HEIGHT - _BOTTOM - _TOP) * (values - low) / ((high - low) or 1.0)


def _axes(left: float, right: float, low: float, high: float, across: str, up: str) -> str:
    bottom = HEIGHT - _BOTTOM
    parts = [f'<line class="axis" x1="{_LEFT}" y1="{bottom}" x2="{WIDTH - _RIGHT}" y2="{bottom}"/>']
    for value in np.linspace(left, right, 5):
        at = float(_across(np.array([value]), left, right)[0])
        parts.append(f'<text x="{at:.1f}" y="{bottom + 15}" text-anchor="middle">{value:.3g}</text>')
    for value in np.linspace(low, high, 3) if up else ():
        at = float(_up(np.array([value]), low, high)[0])
        parts.append(f'<text x="{_LEFT - 4}" y="{at + 4:.1f}" text-anchor="end">{value:.1f}</text>')
    parts.append(f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{html.escape(across)}</text>')
    return "".join(parts)


def _drawing(title: str, parts: Sequence[str], height: float = HEIGHT, width: float = WIDTH) -> str:
    label, content = html.escape(title, quote=True), "".join(parts)
    start = f'<svg role="img" aria-label="{label}" viewBox="0 0 {width:g} {height:g}">'
    return f'<div class="drawing" tabindex="0">{start}<title>{label}</title>{content}</svg></div>'
