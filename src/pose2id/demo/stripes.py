"""A classical person descriptor: soft colour histograms of horizontal stripes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pose2id.io.checks import checked_count

_CHUNK = 16
_CENTRE_WIDTH = 0.1
_GREY_MEAN = 0.43
# Hue tells people apart across cameras better than saturation and brightness, which follow the light.
_WEIGHTS = np.array([1.0, 0.6, 0.6])


def colour_stripes(
    images: NDArray[np.uint8] | Sequence[NDArray[np.uint8]], *, stripes: int = 8, bins: int = 8
) -> NDArray[np.float32]:
    """Describes each picture by the colours of its horizontal stripes.

    The picture is first balanced to a grey mean, which takes away most of a camera's colour cast and exposure. Every
    stripe then gives three soft histograms: hue (weighted with the chroma), saturation and brightness. A Gaussian over
    the columns favours the person over the background at the sides. The square root of the histograms makes the
    Euclidean distance between descriptors the Hellinger distance between histograms. The result is a raw model output:
    it is not L2-normalised.

    Args:
        images: Pictures (N, H, W, 3) or a sequence of N pictures (H, W, 3), RGB, uint8 in 0..255. The pictures of a
            sequence may differ in size.
        stripes: Number of horizontal stripes, at least 1 and at most H.
        bins: Number of bins of each histogram, at least 2.

    Returns:
        Descriptors (N, stripes * 3 * bins), float32, values in 0..1.

    Raises:
        TypeError: If the pictures are not uint8, or stripes or bins is not an integer.
        ValueError: If a picture is not (H, W, 3), or stripes or bins is out of its range.
    """
    checked_count(stripes, "stripes")
    checked_count(bins, "bins", 2)
    if isinstance(images, np.ndarray):
        _check(images, 4, "images", stripes)
        chunks = [images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK)]
    else:
        for position, image in enumerate(images):
            _check(image, 3, f"images[{position}]", stripes)
        chunks = [image[None] for image in images]
    described = [_describe(chunk, stripes, bins) for chunk in chunks]
    return np.concatenate([np.zeros((0, stripes * 3 * bins), dtype=np.float32), *described])


def _check(image: object, dimensions: int, name: str, stripes: int) -> None:
    shape = "(N, H, W, 3)" if dimensions == 4 else "(H, W, 3)"
    if not isinstance(image, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array {shape}, got {type(image).__name__}; convert it with np.asarray")
    if image.dtype != np.uint8:
        raise TypeError(f"{name} must be uint8 with values in 0..255, got {image.dtype}; scale and convert it first")
    if image.ndim != dimensions or image.shape[-1] != 3:
        raise ValueError(f"{name} must have the shape {shape}, RGB, got {image.shape}; put the channels last")
    if image.shape[-3] < stripes or image.shape[-2] < 1:
        raise ValueError(
            f"{name} must be at least {stripes} rows high (one a stripe) and 1 column wide, got {image.shape}; "
            "pass larger pictures or fewer stripes"
        )


def _describe(images: NDArray[np.uint8], stripes: int, bins: int) -> NDArray[np.float32]:
    count, height, width, _ = images.shape
    columns = (np.arange(width) + 0.5) / width - 0.5
    mask = np.exp(-0.5 * (columns / _CENTRE_WIDTH) ** 2)
    mask = mask / mask.sum()
    hue, saturation, value = _hue_saturation_value(_balanced(images, mask))
    stripe = np.arange(height) * stripes // height
    rows = np.bincount(stripe, minlength=stripes)
    place = (np.arange(count)[:, None] * stripes + stripe[None, :])[:, :, None]
    weight = np.broadcast_to(mask, hue.shape) / rows[stripe][:, None]
    histograms = [
        _soft_histogram(hue * bins, weight * saturation * value, place, count * stripes, bins, circular=True),
        _soft_histogram(saturation * (bins - 1), weight * value, place, count * stripes, bins),
        _soft_histogram(value * (bins - 1), weight, place, count * stripes, bins),
    ]
    joined = (np.stack(histograms, axis=1) * _WEIGHTS[:, None]).reshape(count, stripes * 3 * bins)
    described: NDArray[np.float32] = np.sqrt(joined).astype(np.float32)
    return described


def _balanced(images: NDArray[np.uint8], mask: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scales each channel of each picture to the same mean: (N, H, W, 3) in 0..1."""
    light = images.astype(np.float64)
    means = np.einsum("nhwc,w->nc", light, mask) / images.shape[1]
    balanced: NDArray[np.float64] = np.clip(light * (_GREY_MEAN / np.maximum(means, 1.0))[:, None, None, :], 0.0, 1.0)
    return balanced


def _hue_saturation_value(
    images: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Turns RGB (N, H, W, 3) in 0..1 into hue, saturation and value, each (N, H, W) in 0..1."""
    red, green, blue = images[..., 0], images[..., 1], images[..., 2]
    highest = np.maximum(np.maximum(red, green), blue)
    chroma = highest - np.minimum(np.minimum(red, green), blue)
    divisor = np.where(chroma > 0, chroma, 1.0)
    sector = np.where(
        highest == red,
        (green - blue) / divisor,
        np.where(highest == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    return sector / 6 % 1.0, chroma / np.where(highest > 0, highest, 1.0), highest


def _soft_histogram(
    position: NDArray[np.float64],
    weight: NDArray[np.float64],
    place: NDArray[np.int64],
    places: int,
    bins: int,
    *,
    circular: bool = False,
) -> NDArray[np.float64]:
    """Shares each pixel's weight between the two bins next to its position: (places, bins)."""
    lower = np.floor(position).astype(np.int64)
    share = position - lower
    last = bins if circular else bins - 1
    first, second = (lower % bins, (lower + 1) % bins) if circular else (lower, np.minimum(lower + 1, last))
    histogram: NDArray[np.float64] = np.bincount(
        (place * bins + first).ravel(), (weight * (1 - share)).ravel(), places * bins
    ).astype(np.float64)
    histogram += np.bincount((place * bins + second).ravel(), (weight * share).ravel(), places * bins)
    return histogram.reshape(places, bins)
