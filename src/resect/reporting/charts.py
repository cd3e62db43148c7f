"""Pictures of the report as inline SVG and PNG text: the size-accuracy curve, unit strips, activity maps."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

_WIDTH, _HEIGHT = 860, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 24, 48
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
_MAP_COLOUR = (30, 136, 182)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One network in the size-accuracy curve: share of the cost that remains, accuracy, both in [0, 1]; `kind` is its style."""

    share: float
    accuracy: float
    kind: str
    label: str
    low: float | None = None


@dataclass(frozen=True, kw_only=True)
class Axes:
    """From shares and accuracies to pixels; the cost axis is logarithmic, the accuracy axis shows what there is."""

    smallest: float
    lowest: float
    highest: float

    def x(self, share: float) -> float:
        part = 1 - np.log(max(share, self.smallest)) / np.log(self.smallest)
        return _LEFT + float(part) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, accuracy: float) -> float:
        part = (accuracy - self.lowest) / (self.highest - self.lowest)
        return _HEIGHT - _BOTTOM - min(max(part, 0.0), 1.0) * (_HEIGHT - _TOP - _BOTTOM)

    def ticks(self) -> list[float]:
        """Four to nine round accuracies."""
        step = next(s for s in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if (self.highest - self.lowest) / s <= 8.5)
        first = int(np.ceil(self.lowest / step - 1e-9))
        return [i * step for i in range(first, int(self.highest / step + 1e-9) + 1)]


def curve(points: Sequence[Point], *, floor: float | None, cost: str, relative: bool = False) -> str:
    """Size-accuracy curve of `points` as an SVG element, with the floor as a line; `cost` names the horizontal axis.

    relative: accuracies (and the floor) are differences to the dense network, shown in points, not shares.
    """
    axes = _axes(points, floor)
    head = f'<svg class="curve" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="accuracy by {escape(cost)}">'
    lines = [
        _horizontal(axes, tick, f"{100 * tick:+.4g}" if relative else f"{100 * tick:.4g} %", "grid") for tick in axes.ticks()
    ]
    if floor is not None:
        lines.append(_horizontal(axes, floor, "floor", "floor"))
    ticks = [_share_tick(axes, share) for share in _SHARES if share >= axes.smallest]
    title = f"{escape(cost)} that remain (logarithmic)"
    below = f'<text class="axis" x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{title}</text>'
    return "".join([head, *lines, *ticks, below, *(_mark(axes, point) for point in points), "</svg>"])


def _share_tick(axes: Axes, share: float) -> str:
    return f'<text class="tick" x="{axes.x(share):.1f}" y="{_HEIGHT - 26}" text-anchor="middle">{share:.0%}</text>'


def _axes(points: Sequence[Point], floor: float | None) -> Axes:
    """Axes that show the region around the floor; collapsed networks are drawn at the lower edge."""
    values = [point.accuracy for point in points] + [point.low for point in points if point.low is not None]
    highest = max([*values, *([] if floor is None else [floor])])
    lowest = min(values)
    if floor is not None:
        lowest = min(max(lowest, floor - 4 * max(highest - floor, 0.01)), floor)
    air = max(0.08 * (highest - lowest), 0.002)
    smallest = min([0.5, *(0.9 * point.share for point in points if point.share > 0)])
    return Axes(smallest=max(smallest, 0.005), lowest=lowest - air, highest=highest + air / 2)


def _horizontal(axes: Axes, accuracy: float, label: str, css: str) -> str:
    y = axes.y(accuracy)
    anchor = 'x="56" text-anchor="end"' if css == "grid" else f'x="{_WIDTH - _RIGHT}" text-anchor="end"'
    shift = 4 if css == "grid" else -6
    return (
        f'<line class="{css}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="{"tick" if css == "grid" else "floor-label"}" {anchor} y="{y + shift:.1f}">{label}</text>'
    )


def _mark(axes: Axes, point: Point) -> str:
    x, y = axes.x(point.share), axes.y(point.accuracy)
    whisker = ""
    if point.low is not None:
        whisker = f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{axes.y(point.low):.1f}"/>'
    radius = {"trial": 4, "below": 3, "dense": 6, "delivered": 8}.get(point.kind, 4)
    return (
        f"{whisker}<circle class='{escape(point.kind)}' cx='{x:.1f}' cy='{y:.1f}' r='{radius}'>"
        f"<title>{escape(point.label)}</title></circle>"
    )


def strip(mask: np.ndarray, *, columns: int = 512) -> str:
    """Which units of a group stay, as an image of one pixel a unit in index order; mask of shape (units,)."""
    width = min(len(mask), columns)
    rows = -(-len(mask) // width)
    alpha = np.zeros(rows * width, dtype=np.uint8)
    alpha[: len(mask)] = np.where(mask, 255, 36)
    return image(alpha.reshape(rows, width))


def activity(strength: np.ndarray) -> str:
    """Response of units by class as an image, (classes, units) of values of at least 0; a unit's strongest class is opaque."""
    peak = strength.max(axis=0)
    relative = np.divide(strength, peak, out=np.zeros_like(strength, dtype=float), where=peak > 0)
    return image(np.round(255 * relative).astype(np.uint8))


def by_preference(strength: np.ndarray) -> np.ndarray:
    """Order of units, (units,) indices: by the class that moves them most, then by how much it stands out."""
    peak = strength.max(axis=0)
    contrast = np.divide(peak - strength.mean(axis=0), peak, out=np.zeros_like(peak, dtype=float), where=peak > 0)
    return np.lexsort((-contrast, strength.argmax(axis=0)))


def image(alpha: np.ndarray) -> str:
    """A PNG data URI of one colour, with opacity `alpha`, (rows, columns) uint8."""
    rows, columns = alpha.shape
    pixels = np.empty((rows, columns, 4), dtype=np.uint8)
    pixels[..., :3] = _MAP_COLOUR
    pixels[..., 3] = alpha
    lines = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 6, 0, 0, 0)
    chunks = (_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(lines, 9)), _chunk(b"IEND", b""))
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
