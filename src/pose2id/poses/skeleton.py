"""A pose: 18 keypoints in OpenPose's order, and how they correspond to COCO's 17.

Coordinates are (x, y) in fractions of a picture's width and height; sizes in pixels are (height, width).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pose2id.io.checks import checked_number, checked_size

# fmt: off
KEYPOINTS = (
    "nose", "neck",
    "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist",
    "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle",
    "right_eye", "left_eye", "right_ear", "left_ear",
)
"""Names of the 18 keypoints. Left and right are the person's own."""

COCO_KEYPOINTS = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear",
    "left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist",
    "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle",
)
"""Names of COCO's 17 keypoints: the same joints without the neck."""

LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7),
    (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)
"""The 17 limbs, in the order in which they are drawn, as pairs of indices into `KEYPOINTS`."""

PALETTE = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0),
    (0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255),
    (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
)
"""Colours, RGB in 0..255: of keypoint i, and of limb i."""
# fmt: on

THRESHOLD = 0.3
"""Least confidence of a visible keypoint."""

LOWEST, HIGHEST = -1.0, 2.0
"""Range of visible coordinates: [0, 1] is the picture, and detectors place joints beyond its border."""

_NAME = re.compile(r"(\w([\w .-]*\w)?)?")
_FLIPPED = "-flipped"
_MILLION = 1e6
_TO_COCO = tuple(KEYPOINTS.index(name) for name in COCO_KEYPOINTS)
_SHOULDERS = tuple(COCO_KEYPOINTS.index(name) for name in ("left_shoulder", "right_shoulder"))
_MIRRORED = tuple(
    KEYPOINTS.index(name.replace("left", "right") if "left" in name else name.replace("right", "left"))
    for name in KEYPOINTS
)


@dataclass(frozen=True, eq=False)
class Pose:
    """Where a person's 18 keypoints are. Poses with the same `key` are equal, whatever their names.

    Attributes:
        keypoints: (18, 2) float64, a read-only copy: (x, y) in fractions of the picture's width and height, in the
            order of `KEYPOINTS`; NaN, NaN where a keypoint is not visible. Visible ones, of which there must be one,
            may lie outside the picture, in [-1, 2].
        name: for file names: empty, or letters, digits and underscores, with spaces, dots and hyphens in between.
    """

    keypoints: NDArray[np.float64]
    name: str = ""

    def __post_init__(self) -> None:
        keypoints = checked_numbers(self.keypoints, "keypoints")
        _check_keypoints(keypoints)
        if not _NAME.fullmatch(self.name):
            rule = "fit for a file name: letters, digits, _, and spaces, dots, hyphens in between"
            raise ValueError(f"name must be {rule}, got {self.name!r}.")
        keypoints.setflags(write=False)
        object.__setattr__(self, "keypoints", keypoints)

    def __eq__(self, other: object) -> bool:
        return self.key == other.key if isinstance(other, Pose) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.key)

    def __reduce__(self) -> tuple[type[Pose], tuple[NDArray[np.float64], str]]:
        return Pose, (self.keypoints, self.name)  # anew: copied and unpickled arrays are writable

    def __repr__(self) -> str:
        return f"Pose({self.name!r}, {self.visible.sum()} of {len(KEYPOINTS)} keypoints visible, {self.key[:8]})"

    @property
    def visible(self) -> NDArray[np.bool_]:
        """(18,) bool: which keypoints have coordinates."""
        return ~np.isnan(self.keypoints[:, 0])

    @property
    def key(self) -> str:
        """Hexadecimal SHA-256 of the keypoints, rounded to 6 decimals, and their visibility, whatever the name."""
        # Whole millionths in a fixed byte order: the same bytes on every machine, and no negative zero.
        millionths = np.rint(np.nan_to_num(self.keypoints) * _MILLION).astype("<i8")
        return hashlib.sha256(millionths.tobytes() + self.visible.tobytes()).hexdigest()

    def flipped(self) -> Pose:
        """The mirror image: x becomes 1 - x, left and right change places; "a" is named "a-flipped", and back.

        In whole millionths, as in `key`: equal poses have equal mirror images, and the mirror image's is equal to the
        pose.
        """
        name = self.name.removesuffix(_FLIPPED)
        if name == self.name and name:
            name += _FLIPPED
        keypoints = self.keypoints.copy()
        keypoints[:, 0] = (_MILLION - np.rint(keypoints[:, 0] * _MILLION)) / _MILLION
        return Pose(keypoints[list(_MIRRORED)], name)

    @classmethod
    def from_coco(
        cls, keypoints: Any, *, threshold: float = THRESHOLD, size: tuple[int, int] | None = None, name: str = ""
    ) -> Pose:
        """A pose of COCO's 17 keypoints, with the neck half-way between the shoulders if both are visible.

        Args:
            keypoints: (17, 2) with NaN where not visible, or (17, 3) with a confidence (or COCO's visibility 0, 1, 2).
            threshold: least confidence of a visible keypoint.
            size: (height, width) of the picture, for coordinates in pixels; None: they are fractions.
            name: as of `Pose`.
        """
        array = checked_numbers(keypoints, "keypoints")
        if array.shape not in ((17, 2), (17, 3)):
            raise ValueError(f"keypoints must have COCO's shape (17, 2) or (17, 3), got {array.shape}.")
        placed = openpose(array, checked_number(threshold, "threshold", 0, 1))
        return cls(placed if size is None else placed / checked_size(size)[::-1], name)

    def to_coco(self, size: tuple[int, int] | None = None) -> NDArray[np.float64]:
        """(17, 3) float64 (x, y, visible) in COCO's order, without the neck; 0, 0, 0 where not visible.

        Args:
            size: (height, width) of a picture, for coordinates in its pixels; None: fractions.
        """
        visible = self.visible[list(_TO_COCO), None]
        placed = self.keypoints[list(_TO_COCO)] * (1 if size is None else checked_size(size)[::-1])
        return np.hstack([np.where(visible, placed, 0.0), visible])


def openpose(keypoints: NDArray[np.float64], threshold: float) -> NDArray[np.float64]:
    """(18, 2) coordinates of (18, 2), (18, 3), (17, 2) or (17, 3) keypoints, NaN where they are not visible.

    A third column is a confidence, and 17 keypoints are COCO's; the neck is half-way between visible shoulders.
    """
    found: NDArray[np.float64] = keypoints[:, :2].copy()
    if keypoints.shape[1] == 3:
        # A confidence of 0 says that there is nothing, even at a threshold of 0. NaN compares false.
        found[~((keypoints[:, 2] >= threshold) & (keypoints[:, 2] > 0))] = np.nan
    if len(found) == len(KEYPOINTS):
        return found
    placed = np.empty((len(KEYPOINTS), 2))
    placed[list(_TO_COCO)] = found
    placed[KEYPOINTS.index("neck")] = found[list(_SHOULDERS)].mean(axis=0)
    return placed


def checked_numbers(values: Any, name: str) -> NDArray[np.float64]:
    """A float64 copy of real numbers."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:  # a tensor on a GPU, or rows of several lengths
        raise TypeError(f"{name} must be an array of numbers, got {type(values).__name__} ({error}).") from error
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be an array of numbers, got {type(values).__name__} of {array.dtype}.")
    return array.astype(np.float64)


def _check_keypoints(keypoints: NDArray[np.float64]) -> None:
    if keypoints.shape != (len(KEYPOINTS), 2):
        raise ValueError(f"keypoints must have shape (18, 2), got {keypoints.shape}. Pose.from_coco takes COCO's 17.")
    missing = np.isnan(keypoints)
    if missing.all():
        raise ValueError("keypoints must have at least one visible keypoint, got none. Leave this pose out.")
    outside = ((keypoints < LOWEST) | (keypoints > HIGHEST)).any(axis=1)  # NaN compares false
    for rule, bad in (
        ("have both coordinates, or NaN for both", missing[:, 0] != missing[:, 1]),
        (f"lie in [{LOWEST:g}, {HIGHEST:g}] (divide pixels by width and height)", outside),
    ):
        if bad.any():
            first = int(np.argmax(bad))
            raise ValueError(f"keypoints[{first}] ({KEYPOINTS[first]}) must {rule}, got {keypoints[first].tolist()}.")
