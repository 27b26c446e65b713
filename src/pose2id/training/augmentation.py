"""Random flip, shift and erasing of an image, by the draws of a given generator."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_ERASED_AREA = (0.02, 0.4)  # shares of the image
_ERASED_ASPECT = (0.3, 1 / 0.3)  # height over width, in pixels
_ATTEMPTS = 10  # a rectangle that does not fit is drawn again
_SHIFT = 1 / 16  # of height and width, at most


def augment(
    image: NDArray[np.uint8], draws: np.random.Generator, *, flip: float = 0.5, erase: float = 0.5, shift: bool = False
) -> NDArray[np.uint8]:
    """An augmented copy of an image; erasing as in "Random Erasing Data Augmentation" (AAAI 2020), with random values.

    Grey images stay grey.

    Args:
        image: (H, W, 3) uint8; not modified.
        draws: of all that is random.
        flip: probability of a mirrored image.
        erase: probability of an erased rectangle.
        shift: move by up to a sixteenth of height and width, edges repeated.

    Returns:
        (H, W, 3) uint8.
    """
    height, width = image.shape[:2]
    image = np.array(image[:, ::-1] if draws.random() < flip else image)
    if shift:
        down, right = int(height * _SHIFT), int(width * _SHIFT)
        top, left = draws.integers(2 * down + 1), draws.integers(2 * right + 1)
        padded = np.pad(image, ((down, down), (right, right), (0, 0)), mode="edge")
        image = padded[top : top + height, left : left + width].copy()
    if draws.random() < erase:
        _erase(image, draws)
    return image


def _erase(image: NDArray[np.uint8], draws: np.random.Generator) -> None:
    height, width = image.shape[:2]
    for _ in range(_ATTEMPTS):
        area = draws.uniform(*_ERASED_AREA) * height * width
        aspect = math.exp(draws.uniform(math.log(_ERASED_ASPECT[0]), math.log(_ERASED_ASPECT[1])))
        tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < tall < height and 0 < wide < width:
            top, left = draws.integers(height - tall + 1), draws.integers(width - wide + 1)
            values = draws.integers(256, size=(tall, wide, 3), dtype=np.uint8)
            grey = (image == image[..., :1]).all()  # infrared: colours would be a sign that nothing else gives
            image[top : top + tall, left : left + wide] = values[..., :1] if grey else values
            return
