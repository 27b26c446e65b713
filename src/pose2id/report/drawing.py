"""Charts of the report's page as inline SVG, coloured by the page's style sheet, in light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pose2id.plots.content import PairDistances

_WIDTH, _HEIGHT = 380, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 34
_SERIES = 6  # colours of lines in the style sheet
_SHAPES = (  # one per identity, so that colour is not all that tells them apart
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "M-3.5,-3.5h7v7h-7z",
    "M0,-5L4.5,3.5L-4.5,3.5z",
    "M0,-5L4.5,0L0,5L-4.5,0z",
    "M0,5L4.5,-3.5L-4.5,-3.5z",
    "M-1.5,-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "M-5,0L3.5,-4.5L3.5,4.5z",
    "M5,0L-3.5,-4.5L-3.5,4.5z",
    "M-4.5,-2h9v4h-9z",
    "M-2,-4.5h4v9h-4z",
)


def gain_bar(gain: float, most: float) -> str:
    """A bar from the middle, to the right for a gain and to the left for a loss; `most` is half the width."""
    length = 50 * min(1.0, abs(gain) / most) if most else 0.0
    left = 50 - (length if gain < 0 else 0)
    kind = "loss" if gain < 0 else "gain"
    bar = f'<rect class="{kind}" x="{left:.2f}" y="1" width="{length:.2f}" height="8"/>'
    middle = '<path class="axis" d="M50,0V10"/>'
    return f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{bar}{middle}</svg>'


def distributions(counts: PairDistances, name: str, limits: tuple[float, float]) -> str:
    """Shares of positive and negative pairs by distance, between `limits`, and the threshold of equal error."""
    edges, *shares = counts.coarse()
    most = max(share.max() for share in shares)
    frame = _Frame(limits, (0, most * 1.08), "distance", "share of pairs")
    parts = [frame.axes()]
    for kind, share in zip(("positive", "negative"), shares, strict=True):
        inside = (edges[1:] >= limits[0]) & (edges[:-1] <= limits[1])
        xs = np.clip(np.repeat(edges, 2)[1:-1].reshape(-1, 2)[inside].ravel(), *limits)
        ys = np.repeat(share[inside], 2)
        line = frame.path(xs, ys)
        base = f"L{frame.x(xs[-1]):.1f},{frame.y(0):.1f}L{frame.x(xs[0]):.1f},{frame.y(0):.1f}z"
        parts.append(f'<path class="area {kind}" d="{line}{base}"/><path class="line {kind}" d="{line}"/>')
    text = f"{name}: distances of positive and negative pairs"
    if np.isfinite(counts.threshold):
        at = frame.x(counts.threshold)
        parts.append(f'<path class="threshold" d="M{at:.1f},{_TOP}V{_HEIGHT - _BOTTOM}"/>')
        text += f", equal error {counts.equal_error:.1%} at distance {counts.threshold:.3f}"
    return _svg(parts, text)


def identity_map(places: NDArray[np.float64], identities: NDArray[np.int64], name: str) -> str:
    """Places of images, a colour and a shape for each identity."""
    low, high = places.min(axis=0), places.max(axis=0)
    scaled = (places - low) / np.where(high > low, high - low, 1)
    xs, ys = 12 + (_WIDTH - 24) * scaled[:, 0], 12 + (_HEIGHT - 24) * scaled[:, 1]
    dots = [
        f'<path class="dot i{who % 10}" transform="translate({x:.1f},{y:.1f})" d="{_SHAPES[who % len(_SHAPES)]}"/>'
        for x, y, who in zip(xs, ys, identities.tolist(), strict=True)
    ]
    frame = f'<rect class="frame" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{_HEIGHT - 1}"/>'
    text = f"{name}: t-SNE of {len(places)} images of {len(np.unique(identities))} identities"
    return _svg([frame, *dots], text)


def curves(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str) -> str:
    """A line for each name, of (xs, values)."""
    xs, ys = (np.concatenate([np.asarray(line[side], float) for line in lines.values()]) for side in (0, 1))
    margin = 0.08 * ((ys.max() - ys.min()) or 1.0)
    frame = _Frame((xs.min(), xs.max()), (ys.min() - margin, ys.max() + margin), "", "")
    parts, told = [frame.axes()], []
    for number, (name, (at, values)) in enumerate(lines.items()):
        kind = f"s{number % _SERIES}"
        parts.append(f'<path class="line {kind}" d="{frame.path(at, values)}"/>')
        parts += [
            f'<circle class="point {kind}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3"/>'
            for x, y in zip(at, values, strict=True)
        ]
        told.append(f"{name} from {values[0]:.4g} at {at[0]:g} to {values[-1]:.4g} at {at[-1]:g}")
    return _svg(parts, f"{title}: {'; '.join(told)}")


class _Frame:
    """From values to places in the picture."""

    def __init__(self, xs: tuple[float, float], ys: tuple[float, float], x_label: str, y_label: str) -> None:
        self.xs, self.ys = (self._wide(*xs), self._wide(*ys))
        self.labels = x_label, y_label

    @staticmethod
    def _wide(low: float, high: float) -> tuple[float, float]:
        return (float(low), float(high)) if high > low else (float(low) - 0.5, float(low) + 0.5)

    def x(self, value: Any) -> float:
        low, high = self.xs
        return float(_LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT))

    def y(self, value: Any) -> float:
        low, high = self.ys
        return float(_HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM))

    def path(self, xs: Any, ys: Any) -> str:
        return "M" + "L".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in zip(xs, ys, strict=True))

    def axes(self) -> str:
        """Grid, ticks and labels."""
        parts = []
        for value in _ticks(*self.ys):
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{_LEFT},{y:.1f}H{_WIDTH - _RIGHT}"/>')
            parts.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        bottom = _HEIGHT - _BOTTOM
        for value in _ticks(*self.xs):
            parts.append(f'<text x="{self.x(value):.1f}" y="{bottom + 15}" text-anchor="middle">{value:g}</text>')
        parts.append(f'<path class="axis" d="M{_LEFT},{bottom}H{_WIDTH - _RIGHT}"/>')
        label = (
            f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(self.labels[0])}</text>'
        )
        return "".join([*parts, label])


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between two."""
    step = 10 ** np.floor(np.log10((high - low) / most))
    step = next(step * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= most)
    first, last = int(np.ceil(low / step - 1e-9)), int(np.floor(high / step + 1e-9))
    return [float(f"{number * step:.10g}") for number in range(first, last + 1)]


def _svg(parts: Sequence[str], text: str) -> str:
    told = escape(text)
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{told}">'
        f"<title>{told}</title>{''.join(parts)}</svg>"
    )
