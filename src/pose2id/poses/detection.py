"""Poses of people on images, by your own detector or rtmlib's.

The detector takes images as OpenCV has them, (H, W, 3) uint8 BGR, and returns keypoints in pixels.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol
from urllib.error import URLError

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from pose2id.io.checks import checked_device, checked_flag, checked_number
from pose2id.io.images import checked_images, load_image
from pose2id.poses.skeleton import HIGHEST, LOWEST, THRESHOLD, Pose, openpose


class Detector(Protocol):
    """Any callable from one image to the people on it; rtmlib's `Body` is one."""

    def __call__(self, image: NDArray[np.uint8], /) -> Any:
        """People on an (H, W, 3) uint8 image in **BGR** order, which the detector may change.

        Returns:
            (keypoints, scores): (P, K, 2) in pixels and (P, K) confidences of P >= 0 people; K is 17, in COCO's order,
            or 18, in that of `KEYPOINTS`.
        """


def detect(
    images: Any,
    model: Detector | None = None,
    *,
    threshold: float = THRESHOLD,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> list[Pose | None]:
    """The pose of the main person on each image, the one with the highest mean confidence; None: nobody is visible.

    Args:
        images: paths, PIL pictures, (H, W, 3) uint8 RGB arrays or (3, H, W) floats in [0, 1], of any sizes.
        model: see `Detector`. None: rtmlib's `Body`, which needs the extra "pose" and downloads its weights on first
            use. Make it yourself for other weights or settings.
        threshold: least confidence, in [0, 1], of a visible keypoint.
        device: of rtmlib's model, such as "cpu", "cuda" or "cuda:1" (which needs onnxruntime-gpu); your own model
            stays where it is.
        progress: show a bar on a terminal.

    Returns:
        One pose per image, its keypoints in fractions of the image. Keypoints further outside than a `Pose` allows are
        not visible.

    Raises:
        ImportError: no model is given, and rtmlib is missing; with the pip command.
        OSError: rtmlib's weights cannot be downloaded.
        TypeError, ValueError: an unreadable image or an output of another shape, named by index.
    """
    images = checked_images(images)
    threshold = checked_number(threshold, "threshold", 0, 1)
    device = checked_device(device)
    checked_flag(progress, "progress")
    if model is None:
        model = _rtmlib_body(str(device))
    if not callable(model):
        raise TypeError(f"model must be callable, or None for rtmlib's, got {type(model).__name__}.")
    poses = []
    for i, image in enumerate(tqdm(images, unit="img", disable=None if progress else True)):
        pixels = np.array(load_image(image, f"images[{i}]"))
        found = _checked_output(model(np.ascontiguousarray(pixels[..., ::-1])), f"images[{i}]")
        poses.append(_main_person(*found, pixels.shape[:2], threshold))
    return poses


def _rtmlib_body(device: str) -> Detector:
    try:
        from rtmlib import Body  # noqa: PLC0415

        # The wheels of OpenCV share files: uninstalling one leaves an empty cv2 of another.
        if "cv2" in sys.modules and not hasattr(sys.modules["cv2"], "warpAffine"):
            raise ImportError("cv2 is empty")
    except (AttributeError, ImportError) as error:
        repair = "--force-reinstall --no-deps opencv-python-headless"
        packages = '"pose2id[pose]"' if isinstance(error, ModuleNotFoundError) else repair
        needs = f"detect needs rtmlib with OpenCV ({error})"
        raise ImportError(f"{needs}: pip install {packages}; or pass a model of your own.") from error
    try:
        detector: Detector = Body(backend="onnxruntime", device=device)
    except URLError as error:
        raise OSError(f"the weights of rtmlib's detector cannot be downloaded ({error.reason}). Connect.") from error
    return detector


def _checked_output(output: Any, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    try:
        keypoints, scores = (np.asarray(part, dtype=np.float64) for part in output)
    except (TypeError, ValueError) as error:
        given = type(output).__name__
        raise TypeError(f"model must return arrays (keypoints, scores), got {given} for {name}.") from error
    if len(keypoints) == 0 and len(scores) == 0:  # without people, detectors return many shapes
        return np.empty((0, 17, 2)), np.empty((0, 17))
    if keypoints.shape[1:] not in ((17, 2), (18, 2)):
        raise ValueError(f"model must return keypoints (P, 17, 2) or (P, 18, 2), got {keypoints.shape} for {name}.")
    if scores.shape != keypoints.shape[:2]:
        raise ValueError(f"model must return scores (P, K) = {keypoints.shape[:2]}, got {scores.shape} for {name}.")
    return keypoints, scores


def _main_person(
    keypoints: NDArray[np.float64], scores: NDArray[np.float64], size: tuple[int, ...], threshold: float
) -> Pose | None:
    if len(keypoints) == 0:
        return None
    best = int(np.argmax(np.nan_to_num(scores).mean(axis=1)))
    placed = keypoints[best] / size[::-1]
    # One wild keypoint, of a limb guessed far beyond the border, must not end a long run.
    near = ((placed >= LOWEST) & (placed <= HIGHEST)).all(axis=1)
    found = openpose(np.column_stack([placed, np.where(near, scores[best], 0.0)]), threshold)
    return None if np.isnan(found).all() else Pose(found)
