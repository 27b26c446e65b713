from __future__ import annotations

import builtins
import inspect
import sys
import types
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from pose2id.poses import KEYPOINTS, Pose, detect, standard
from pose2id.poses.skeleton import COCO_KEYPOINTS

HEIGHT, WIDTH = 128, 64
IMAGE = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
IMAGE[..., 0], IMAGE[..., 1] = 200, 30


def person(pose=None, score=0.9):
    """(17, 2) pixels and (17,) scores."""
    coco = (pose or standard()[0]).to_coco(size=(HEIGHT, WIDTH))
    return coco[:, :2], np.where(coco[:, 2] > 0, score, 0.0)


def returning(*people):
    found = np.stack([p[0] for p in people]), np.stack([p[1] for p in people]).astype(np.float32)
    return lambda image: found


def test_the_detector_sees_bgr():
    seen = []

    def model(image):
        seen.append((image.dtype, image.shape, image.flags.c_contiguous, image[0, 0].tolist()))
        image[:] = 0  # it may: the image is its own
        return person()[0][None], person()[1][None]

    detect([IMAGE], model)
    assert seen == [(np.uint8, (HEIGHT, WIDTH, 3), True, [0, 30, 200])]
    assert IMAGE[0, 0, 0] == 200


def test_coco_and_openpose():
    pose = standard()[2]
    (found,) = detect([IMAGE], returning(person(pose)))
    assert found == Pose.from_coco(pose.to_coco())
    pixels = np.nan_to_num(pose.keypoints) * (WIDTH, HEIGHT)
    (found,) = detect([IMAGE], lambda image: (pixels[None], pose.visible[None].astype(float)))
    assert found == pose


def test_images_of_every_kind_and_size(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(IMAGE).save(path)
    tensor = torch.from_numpy(IMAGE).permute(2, 0, 1) / 255
    larger = np.kron(IMAGE, np.ones((2, 3, 1), np.uint8))
    sizes = []

    def model(image):
        sizes.append(image.shape[:2])
        assert image[0, 0].tolist() == [0, 30, 200]
        keypoints, scores = person()
        return keypoints[None] * (image.shape[1] / WIDTH, image.shape[0] / HEIGHT), scores[None]

    found = detect([path, str(path), Image.fromarray(IMAGE), IMAGE, tensor, larger], model, progress=False)
    assert len(set(found)) == 1
    assert sizes == [(HEIGHT, WIDTH)] * 5 + [(2 * HEIGHT, 3 * WIDTH)]
    assert detect(np.stack([IMAGE] * 2), model) == found[:2]


def test_the_main_person_has_the_highest_mean_confidence():
    first, second = standard()[:2]
    # One joint of the background's person is surer than any of the main one's.
    keypoints, scores = person(first, 0.4)
    scores[0] = 1.0
    (found,) = detect([IMAGE], returning((keypoints, scores), person(second, 0.8)))
    assert found == Pose.from_coco(second.to_coco())
    (found,) = detect([IMAGE], returning(person(first, 0.9), person(second, 0.8)))
    assert found == Pose.from_coco(first.to_coco())


@pytest.mark.parametrize(
    "output",
    [
        (np.empty((0, 17, 2)), np.empty((0, 17))),
        (np.array([]), np.array([])),
        ([], []),
        returning(person(score=0.2))(IMAGE),
        (np.zeros((1, 17, 2)), np.zeros((1, 17))),
        (np.full((1, 17, 2), np.nan), np.ones((1, 17))),
        (np.full((1, 17, 2), 1e6), np.ones((1, 17))),
        (np.ones((1, 17, 2)), np.full((1, 17), np.nan)),
    ],
)
def test_nobody(output):
    assert detect([IMAGE, IMAGE], lambda image: output) == [None, None]


def test_threshold():
    keypoints, scores = person()
    scores[0], scores[5] = 0.29, 0.31  # nose, left shoulder
    (found,) = detect([IMAGE], returning((keypoints, scores)))
    np.testing.assert_array_equal(np.flatnonzero(~found.visible), [KEYPOINTS.index("nose")])
    (found,) = detect([IMAGE], returning((keypoints, scores)), threshold=0.5)
    hidden = [KEYPOINTS.index(name) for name in ("nose", "neck", "left_shoulder")]
    np.testing.assert_array_equal(np.flatnonzero(~found.visible), hidden)


def test_wild_keypoints_are_hidden_and_near_ones_kept():
    keypoints, scores = person()
    keypoints[0], keypoints[9], keypoints[10] = (-WIDTH, 0), (-WIDTH - 1, 0), (0, np.inf)
    (found,) = detect([IMAGE], returning((keypoints, scores)))
    hidden = [KEYPOINTS.index(COCO_KEYPOINTS[i]) for i in (10, 9)]
    np.testing.assert_array_equal(np.flatnonzero(~found.visible), hidden)
    np.testing.assert_array_equal(found.keypoints[0], [-1, 0])


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (None, TypeError, r"\(keypoints, scores\), got NoneType for images\[1\]"),
        ((np.zeros((1, 17, 2)),), TypeError, r"got tuple for images\[1\]"),
        ((np.zeros((1, 17, 2)), "a"), TypeError, r"images\[1\]"),
        ((np.zeros((1, 26, 2)), np.zeros((1, 26))), ValueError, r"\(P, 17, 2\) or .*got \(1, 26, 2\) for images\[1\]"),
        ((np.zeros((17, 2)), np.zeros(17)), ValueError, r"got \(17, 2\)"),
        ((np.zeros((1, 17, 3)), np.zeros((1, 17))), ValueError, r"got \(1, 17, 3\)"),
        ((np.zeros((1, 17, 2)), np.zeros((1, 18))), ValueError, r"\(P, K\) = \(1, 17\), got \(1, 18\) for images\[1\]"),
    ],
)
def test_bad_outputs_are_named(output, error, message):
    outputs = iter([returning(person())(IMAGE), output])
    with pytest.raises(error, match=message):
        detect([IMAGE, IMAGE], lambda image: next(outputs))


def test_bad_input(tmp_path):
    with pytest.raises(TypeError, match="model must be callable, or None for rtmlib's, got str"):
        detect([IMAGE], "rtmpose")
    with pytest.raises(TypeError, match="images must be a sequence of images"):
        detect(IMAGE, returning(person()))
    with pytest.raises(ValueError, match=r"images\[1\] cannot be read"):
        detect([IMAGE, tmp_path / "none.png"], returning(person()))
    with pytest.raises(ValueError, match="threshold must be in"):
        detect([IMAGE], returning(person()), threshold=-1)
    with pytest.raises(ValueError, match="device must be a torch device"):
        detect([IMAGE], returning(person()), device="gpu")


class Body:
    """rtmlib 0.0.16's signatures (0.0.13's too), without its networks."""

    made = ()

    def __init__(
        self,
        det: str = None,  # noqa: RUF013 - as rtmlib has it
        det_input_size: tuple = (640, 640),
        pose: str = None,  # noqa: RUF013
        pose_input_size: tuple = (288, 384),
        mode: str = "balanced",
        to_openpose: bool = False,
        backend: str = "onnxruntime",
        device: str = "cpu",
    ):
        assert not to_openpose
        Body.made += ((backend, device),)

    def __call__(self, image: np.ndarray):
        assert image[0, 0].tolist() == [0, 30, 200]
        keypoints, scores = person()
        return keypoints[None], scores[None].astype(np.float32)


@pytest.fixture
def rtmlib(monkeypatch):
    module = types.ModuleType("rtmlib")
    module.Body = Body
    monkeypatch.setattr(Body, "made", ())
    monkeypatch.setitem(sys.modules, "rtmlib", module)


def test_rtmlib(rtmlib):
    expected = Pose.from_coco(standard()[0].to_coco())
    assert detect([IMAGE, IMAGE]) == [expected, expected]
    assert detect([IMAGE], device=torch.device("cuda", 1)) == [expected]
    assert detect([IMAGE], Body()) == [expected]
    assert Body.made == (("onnxruntime", "cpu"), ("onnxruntime", "cuda:1"), ("onnxruntime", "cpu"))


def test_weights_that_cannot_be_downloaded(rtmlib, monkeypatch):
    def unreachable(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr(Body, "__init__", unreachable)
    with pytest.raises(
        OSError, match=r"weights of rtmlib's detector cannot be downloaded \(Name or service not known\)"
    ):
        detect([IMAGE])


def test_that_rtmlib_has_these_signatures():
    reason = "needs rtmlib: pip install --no-deps rtmlib"
    real = pytest.importorskip("rtmlib", reason=reason, exc_type=ImportError).Body
    for name in ("__init__", "__call__"):
        ours, theirs = (inspect.signature(getattr(body, name)).parameters.values() for body in (Body, real))
        assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


def test_without_rtmlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "rtmlib", None)
    with pytest.raises(ImportError, match=r'pip install "pose2id\[pose\]"'):
        detect([IMAGE])
    assert detect([IMAGE], returning(person()))[0] is not None


def test_a_missing_library_of_opencv_is_named(monkeypatch):
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "rtmlib":
            raise ImportError("libGL.so.1: cannot open shared object file")
        return original(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "rtmlib", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"libGL\.so\.1.*pip install --force-reinstall --no-deps opencv-python-head"):
        detect([IMAGE])


def test_an_empty_opencv_is_named(rtmlib, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", types.ModuleType("cv2"))
    with pytest.raises(ImportError, match=r"cv2 is empty.*pip install --force-reinstall"):
        detect([IMAGE])
