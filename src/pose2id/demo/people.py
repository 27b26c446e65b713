"""Synthetic pedestrians: a re-identification data set drawn by code, the same everywhere and free of real people."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from tqdm.auto import tqdm

from pose2id.demo.figure import (
    L_ANKLE,
    R_ANKLE,
    Bools,
    Canvas,
    Floats,
    Look,
    View,
    body_joints,
    draw_figure,
    keypoint_visibility,
    random_cloth,
    random_look,
    random_pose,
)
from pose2id.io.checks import checked_count, checked_flag, checked_number
from pose2id.io.whole_files import new_directory, whole_directory, whole_file
from pose2id.poses.skeleton import Pose
from pose2id.training.table import PersonImage, write_table

# First number after the seed of every random stream, so that streams of different subjects never meet.
_IDENTITY, _CAMERA, _IMAGE = 1, 2, 3
_ENTROPY_LIMIT = 2**32 - 1
# Steps of a low-discrepancy sequence: the cameras of every seed differ about as much, so no seed is easy by luck.
_SPREAD_STEPS = np.sqrt([2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 6.0])
_PANORAMA_WIDTHS = 4
_PANORAMA_MARGIN = 0.2


@dataclass(frozen=True, eq=False)
class Sample:
    """One drawn picture and what is known about it.

    Attributes:
        image: The picture, (H, W, 3) uint8 RGB in 0..255.
        pid: Person, an integer from 1.
        camid: Camera, an integer from 1.
        index: Number of the picture among those of this person and camera, from 0.
        keypoints: The 18 OpenPose keypoints, (18, 2) float32: x and y as shares of the picture's width and height. A
            keypoint outside the picture lies outside [0, 1]. The order is nose, neck, right shoulder, elbow and wrist,
            left shoulder, elbow and wrist, right hip, knee and ankle, left hip, knee and ankle, right eye, left eye,
            right ear, left ear, where right is the person's right.
        visible: Whether each keypoint can be seen, (18,) bool. It is False outside the picture, behind an object, for
            elbows and wrists behind the trunk, and for parts of the face that are turned away or under long hair. The
            far shoulder, hip, knee and ankle of a person seen from the side count as visible, because pose estimators
            find them too.
    """

    image: NDArray[np.uint8]
    pid: int
    camid: int
    index: int
    keypoints: NDArray[np.float32]
    visible: NDArray[np.bool_]


class SyntheticPedestrians(Sequence[Sample]):
    """Pedestrians drawn by code, seen by several cameras.

    These pictures are synthetic drawings of nobody. They let code run and be tested without any data set; a figure
    measured on them (mAP, Rank-1) says nothing about real people or real cameras.

    A person keeps body, hair, clothes and bag in all pictures. A camera keeps its place, light, colours, sharpness and
    the directions in which people pass. Every picture depends on (seed, pid, camid, index) alone, and on size,
    occlusion and whether the camera is an infrared one: not on the order of access, on the process, or on how many
    people, cameras and pictures there are. With one version of Pillow and NumPy on one kind of machine it is the same
    bit for bit. The items are ordered by pid, then camid, then index. Nothing is stored: each access draws the picture
    anew.

    Attributes:
        name: What this is, for titles of plots and tables.
        pids: The person of each item, (N,) int64, read-only.
        camids: The camera of each item, from 1, (N,) int64, read-only.
        size: Height and width of the pictures.

    Args:
        num_identities: Number of people, at least 1.
        num_cameras: Number of cameras, at least 1.
        images_per_camera: Number of pictures of each person from each camera, at least 1.
        seed: Chooses the world; from 0 to 2**32 - 1.
        size: Height and width of the pictures, each at least 16. The drawing is stretched to this shape.
        first_pid: The first person's pid, at least 1: people 1..1000 and 1001..1100 share nothing. 0 and -1 are left
            out because Market-1501 uses them for distractors and junk.
        infrared_cameras: Cameras (out of 1..num_cameras) that take grey infrared pictures, in which clothes have
            a brightness of their own that does not follow from their colour.
        occlusion: Share of the pictures, in [0, 1], in which something stands before the person.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of its range.
    """

    name = "SyntheticPedestrians (drawn by code, not real people)"

    def __init__(
        self,
        num_identities: int = 60,
        *,
        num_cameras: int = 4,
        images_per_camera: int = 3,
        seed: int = 0,
        size: tuple[int, int] = (128, 64),
        first_pid: int = 1,
        infrared_cameras: Collection[int] = (),
        occlusion: float = 0.25,
    ) -> None:
        count = checked_count(num_identities, "num_identities", most=_ENTROPY_LIMIT)
        self._num_cameras = checked_count(num_cameras, "num_cameras", most=_ENTROPY_LIMIT)
        self._per_camera = checked_count(images_per_camera, "images_per_camera", most=_ENTROPY_LIMIT)
        self._seed = checked_count(seed, "seed", 0, _ENTROPY_LIMIT)
        first = checked_count(first_pid, "first_pid", most=_ENTROPY_LIMIT)
        self.size = _size(size)
        self._infrared = frozenset(_infrared(infrared_cameras, self._num_cameras))
        self._occlusion = checked_number(occlusion, "occlusion", 0, 1)
        people = np.arange(first, first + count, dtype=np.int64)
        cameras = np.arange(1, self._num_cameras + 1, dtype=np.int64)
        self.pids: NDArray[np.int64] = np.repeat(people, self._num_cameras * self._per_camera)
        self.camids: NDArray[np.int64] = np.tile(np.repeat(cameras, self._per_camera), count)
        self.pids.flags.writeable = False
        self.camids.flags.writeable = False
        self._looks: dict[int, Look] = {}
        self._cameras: dict[int, _Camera] = {}

    def __len__(self) -> int:
        return len(self.pids)

    @overload
    def __getitem__(self, i: int) -> Sample: ...

    @overload
    def __getitem__(self, i: slice) -> list[Sample]: ...

    def __getitem__(self, i: int | slice) -> Sample | list[Sample]:
        """Draws one item, or the list of items of a slice.

        Raises:
            TypeError: If i is neither an integer nor a slice.
            IndexError: If i is out of range.
        """
        if isinstance(i, slice):
            return [self[position] for position in range(*i.indices(len(self)))]
        position = operator.index(i)
        if not -len(self) <= position < len(self):
            raise IndexError(f"index must be in [{-len(self)}, {len(self)}), got {position}")
        position %= len(self)
        return self.render(int(self.pids[position]), int(self.camids[position]), position % self._per_camera)

    def render(self, pid: int, camid: int, index: int, *, yaw: float | None = None) -> Sample:
        """Draws any picture of any person, also one that is not among the items.

        Args:
            pid: Person, at least 1.
            camid: Camera, in 1..num_cameras.
            index: Number of the picture, at least 0.
            yaw: Walking direction in degrees to draw instead of the picture's own: 0 is towards the camera, 90 to the
                right edge of the picture, 180 away, 270 to the left edge. None keeps the picture's own direction.

        Returns:
            The picture with its keypoints.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument is out of its range.
        """
        person = checked_count(pid, "pid", most=_ENTROPY_LIMIT)
        place = checked_count(camid, "camid", most=self._num_cameras)
        number = checked_count(index, "index", 0, _ENTROPY_LIMIT)
        turn = None if yaw is None else math.radians(checked_number(yaw, "yaw", -1e6, 1e6))
        layers = self._layers(person, place, number, turn)
        keypoints = (layers.keypoints[:, :2] * (2.0, 1.0)).astype(np.float32)
        image = layers.develop(self._camera(place), self.size)
        return Sample(image, person, place, number, keypoints, layers.visible)

    def query_gallery(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Splits the items as Market-1501 does: one query per person and camera (index 0), all others gallery.

        Returns:
            Positions of the queries and of the gallery items, both int64 and ascending.

        Raises:
            ValueError: If images_per_camera is 1, which leaves no gallery.
        """
        if self._per_camera == 1:
            raise ValueError(
                "query_gallery needs images_per_camera of at least 2, got 1, which leaves no gallery; "
                "raise images_per_camera"
            )
        is_query = np.arange(len(self)) % self._per_camera == 0
        return np.flatnonzero(is_query), np.flatnonzero(~is_query)

    def _look(self, pid: int) -> Look:
        if pid not in self._looks:
            self._looks[pid] = random_look(_generator(self._seed, _IDENTITY, pid))
        return self._looks[pid]

    def _camera(self, camid: int) -> _Camera:
        if camid not in self._cameras:
            rng = _generator(self._seed, _CAMERA, camid)
            spread = (_generator(self._seed, _CAMERA).random(7) + camid * _SPREAD_STEPS) % 1.0
            self._cameras[camid] = _random_camera(rng, spread, self.size, camid in self._infrared)
        return self._cameras[camid]

    def _layers(self, pid: int, camid: int, index: int, yaw: float | None) -> _Layers:
        """Draws the parts of one picture that do not depend on the camera's electronics."""
        rng = _generator(self._seed, _IMAGE, pid, camid, index)
        camera, look = self._camera(camid), self._look(pid)
        pose = random_pose(rng)
        passing = camera.random_yaw(rng)
        joints = body_joints(pose, look)
        view = _frame(joints, look, camera, passing if yaw is None else yaw, rng)
        background = camera.background(rng, self.size)
        canvas = Canvas(self.size)
        _draw_shadow(canvas, joints, view)
        draw_figure(canvas, pose, look, view, infrared=camera.infrared)
        keypoints = view.project(joints)
        visible = keypoint_visibility(pose, look, joints, view) & _inside(keypoints)
        occluder = None
        if rng.random() < self._occlusion:
            occluder = _draw_occluder(rng, self.size, camera, view)
            visible &= ~_covered(occluder, keypoints)
        return _Layers(background, canvas.layer(), occluder, keypoints, visible, rng)


@dataclass(frozen=True, eq=False)
class _Camera:
    """What one camera does to every picture; its panorama is (1.2 H, 4 W, 3) in 0..255."""

    infrared: bool
    panorama: Floats
    yaw: float
    yaw_spread: float
    tilt: float
    light: float
    margin: float
    gains: Floats
    gamma: float
    contrast: float
    saturation: float
    blur: float
    noise: float

    def random_yaw(self, rng: np.random.Generator) -> float:
        """Draws a walking direction: along the camera's path, either way, and now and then any."""
        either = self.yaw + (math.pi if rng.random() < 0.35 else 0.0)
        along, anywhere = rng.normal(either, self.yaw_spread), rng.uniform(0.0, 2 * math.pi)
        return float(anywhere if rng.random() < 0.2 else along)

    def background(self, rng: np.random.Generator, size: tuple[int, int]) -> Floats:
        """Cuts a background (H, W, 3) out of the panorama."""
        height, width = size
        down, along = rng.random(2)
        top = int(down * (self.panorama.shape[0] - height + 1))
        left = int(along * (self.panorama.shape[1] - width + 1))
        return self.panorama[top : top + height, left : left + width] * rng.uniform(0.85, 1.15)


@dataclass(frozen=True, eq=False)
class _Layers:
    """One picture in parts, far to near; figure and occluder are (H, W, 4), red, green, blue and alpha in 0..255."""

    background: Floats
    figure: Floats
    occluder: Floats | None
    keypoints: Floats
    visible: Bools
    rng: np.random.Generator

    def develop(self, camera: _Camera, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Joins the parts and applies the camera's optics and electronics: (H, W, 3) uint8."""
        joined = _over(self.figure, self.background)
        if self.occluder is not None:
            joined = _over(self.occluder, joined)
        sharp = Image.fromarray(_to_bytes(joined))
        blurred = sharp.filter(ImageFilter.GaussianBlur(camera.blur * self.rng.uniform(0.6, 1.4) * size[0] / 128))
        light = np.asarray(blurred, dtype=np.float64) / 255
        grey = light.mean(axis=-1, keepdims=True)
        saturation = 0.0 if camera.infrared else camera.saturation
        light = (grey + saturation * (light - grey)) * camera.gains * self.rng.normal(1.0, 0.09)
        light = np.clip((light - 0.5) * camera.contrast + 0.5, 0.0, 1.0) ** camera.gamma
        channels = 1 if camera.infrared else 3
        light = light + camera.noise * self.rng.standard_normal((*size, channels))
        return _to_bytes(light * 255)


def _random_camera(rng: np.random.Generator, spread: Floats, size: tuple[int, int], infrared: bool) -> _Camera:
    """Draws one camera; spread holds its places in 0..1 on the scales along which cameras differ most."""
    panorama_rng, rng = rng.spawn(2)
    panorama = _random_panorama(panorama_rng, spread[4:], size)
    if infrared:
        panorama = np.repeat(panorama[..., :1], 3, axis=-1)
    cast = 0.07 * np.cos(2 * math.pi * (spread[0] + np.array([0.0, 1 / 3, 2 / 3])))
    gains = np.exp(cast + rng.uniform(-0.1, 0.1))
    return _Camera(
        infrared=infrared,
        panorama=panorama,
        yaw=rng.uniform(0.0, 2 * math.pi),
        yaw_spread=rng.uniform(0.3, 0.8),
        tilt=rng.uniform(0.05, 0.3),
        light=rng.uniform(-1.1, 1.1),
        margin=rng.uniform(0.9, 1.0),
        gains=np.full(3, gains.mean()) if infrared else gains,
        gamma=math.exp(0.45 * (spread[1] - 0.5)),
        contrast=0.8 + 0.3 * float(spread[3]),
        saturation=0.6 + 0.5 * float(spread[2]),
        blur=rng.uniform(0.1, 0.8),
        noise=rng.uniform(0.006, 0.024),
    )


def _frame(joints: Floats, look: Look, camera: _Camera, yaw: float, rng: np.random.Generator) -> View:
    """Frames a body as an imperfect detector would: a box around it, badly placed, resized to the picture's shape."""
    plain = View(yaw=yaw, tilt=camera.tilt, scale=1.0, stretch=1.0, centre=(0.0, 0.0), light=camera.light)
    seen = plain.project(joints)
    low, high = seen[:, :2].min(axis=0), seen[:, :2].max(axis=0)
    scale = 0.93 * look.stature**0.4 * camera.margin * rng.normal(1.0, 0.045)
    widest = 0.47 / ((high[0] - low[0] + 0.06) * scale)
    stretch = min(rng.normal(1.32, 0.07), max(widest, 0.8))
    shift = rng.normal(0.0, (0.018, 0.02))
    centre_x = 0.25 + shift[0] - 0.7 * (low[0] + high[0]) / 2 * scale * stretch
    centre_y = 0.5 + shift[1] - ((low[1] + high[1]) / 2 - 0.015) * scale
    return replace(plain, scale=float(scale), stretch=float(stretch), centre=(float(centre_x), float(centre_y)))


def _draw_shadow(canvas: Canvas, joints: Floats, view: View) -> None:
    ground = joints[[R_ANKLE, L_ANKLE]].mean(axis=0)
    ground[2] = 0.01
    centre = view.project(ground)
    turn = np.linspace(0.0, 2 * math.pi, 20, endpoint=False)
    for radius, alpha in ((0.17, 40), (0.12, 75)):
        outline = np.stack([radius * np.cos(turn), 0.28 * radius * np.sin(turn)], axis=-1)
        canvas.polygon(centre[:2] + outline * view.scale, (12, 12, 14), alpha)


def _draw_occluder(rng: np.random.Generator, size: tuple[int, int], camera: _Camera, view: View) -> Floats:
    """Draws what stands before the person: a pole, a car, a bin or somebody else."""
    canvas = Canvas(size)
    colour, albedo = random_cloth(rng), rng.uniform(50, 210)
    if camera.infrared:
        colour = np.full(3, albedo)
    kind = rng.choice(("pole", "car", "bin", "person"), p=(0.25, 0.25, 0.2, 0.3))
    side = int(rng.choice((-1, 1)))
    if kind == "pole":
        _draw_pole(canvas, rng, colour)
    elif kind == "car":
        _draw_car(canvas, rng, colour, side)
    elif kind == "bin":
        _draw_bin(canvas, rng, colour, side)
    else:
        stranger, pose = random_look(rng), random_pose(rng)
        beside = (0.25 + side * rng.uniform(0.17, 0.27), 0.5 + rng.uniform(-0.05, 0.1))
        near = replace(view, yaw=camera.random_yaw(rng), scale=rng.uniform(0.9, 1.15), centre=beside)
        draw_figure(canvas, pose, stranger, near, infrared=camera.infrared)
    return canvas.layer()


def _box(canvas: Canvas, corners: tuple[float, float, float, float], colour: Floats) -> None:
    left, top, right, bottom = corners
    canvas.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour)


def _draw_pole(canvas: Canvas, rng: np.random.Generator, colour: Floats) -> None:
    left, width = rng.uniform(0.06, 0.38), rng.uniform(0.03, 0.075)
    for share, tone in ((0.0, 0.7), (0.25, 1.1), (0.6, 0.9), (0.85, 0.65)):
        _box(canvas, (left + share * width, -0.1, left + width, 1.1), colour * tone)


def _draw_car(canvas: Canvas, rng: np.random.Generator, colour: Floats, side: int) -> None:
    top, front = rng.uniform(0.6, 0.76), rng.uniform(-0.15, 0.15)
    across = np.array([0.0, 0.06, 0.2, 0.24, 0.7, 0.7, 0.0])
    above = np.array([0.12, 0.09, 0.085, 0.0, 0.0, 0.5, 0.5])
    window = np.array([0.235, 0.262, 0.7, 0.7]), np.array([0.08, 0.015, 0.015, 0.08])
    for xs, ys, tone in ((across, above, 1.0), (*window, 0.25)):
        x = front + xs if side > 0 else 0.5 - front - xs
        canvas.polygon(np.stack([x, top + ys], axis=-1), colour * tone)
    turn = np.linspace(0.0, 2 * math.pi, 16, endpoint=False)
    for wheel in (0.13, 0.52):
        hub = front + wheel if side > 0 else 0.5 - front - wheel
        canvas.polygon(np.stack([hub + 0.05 * np.cos(turn), top + 0.26 + 0.05 * np.sin(turn)], axis=-1), (24, 24, 26))


def _draw_bin(canvas: Canvas, rng: np.random.Generator, colour: Floats, side: int) -> None:
    top, width = rng.uniform(0.6, 0.75), rng.uniform(0.13, 0.2)
    left = 0.25 + side * rng.uniform(0.07, 0.2) - width / 2
    _box(canvas, (left, top, left + width, 1.1), colour * 0.85)
    for share in (0.2, 0.5, 0.8):
        _box(canvas, (left + share * width, top, left + share * width + 0.006, 1.1), colour * 0.6)
    _box(canvas, (left - 0.012, top - 0.03, left + width + 0.012, top + 0.012), colour * 1.1)


def _random_panorama(rng: np.random.Generator, spread: Floats, size: tuple[int, int]) -> Floats:
    """Draws the place a camera looks at: ground below, wall, plants or hall above."""
    height, width = round(size[0] * (1 + _PANORAMA_MARGIN)), size[1] * _PANORAMA_WIDTHS
    horizon = rng.uniform(0.3, 0.62)
    wall = (90 + 85 * spread[0]) * np.exp(rng.normal(0.0, 0.04, 3))
    ground = (95 + 65 * spread[1]) * np.exp(rng.normal(0.0, 0.03, 3))
    kind = ("windows", "foliage", "hall", "bricks")[int(4 * spread[2])]
    image = Image.new("RGB", (width, height), _fill(wall))
    draw = ImageDraw.Draw(image)
    if kind == "windows":
        _draw_windows(draw, rng, wall, image.size)
    elif kind == "bricks":
        _draw_bricks(draw, rng, wall, image.size)
    elif kind == "hall":
        _draw_columns(draw, rng, wall, image.size)
    _draw_ground(draw, rng, ground, image.size, horizon)
    picture = np.asarray(image, dtype=np.float64)
    if kind == "foliage":
        above = (np.arange(height) < horizon * height)[:, None, None]
        picture = np.where(above, _foliage(rng, (height, width)), picture)
    shade = 1 + 0.25 * _clouds(rng, (height, width), (3, 7)) + 0.08 * _clouds(rng, (height, width), (24, 96))
    return np.clip(picture * shade[..., None], 0, 255)


def _draw_windows(draw: ImageDraw.ImageDraw, rng: np.random.Generator, wall: Floats, size: tuple[int, int]) -> None:
    width, height = size
    step_x, step_y = height * rng.uniform(0.18, 0.4), height * rng.uniform(0.2, 0.35)
    glass = np.array([96.0, 112.0, 128.0]) * rng.uniform(0.5, 1.3)
    for row in range(math.ceil(height / step_y)):
        for column in range(math.ceil(width / step_x)):
            left, top = column * step_x, (row - 0.3) * step_y
            frame = (left, top, left + 0.62 * step_x, top + 0.7 * step_y)
            draw.rectangle(frame, fill=_fill(glass * rng.uniform(0.7, 1.3)), outline=_fill(wall * 1.25))


def _draw_bricks(draw: ImageDraw.ImageDraw, rng: np.random.Generator, wall: Floats, size: tuple[int, int]) -> None:
    width, height = size
    tall, long = height / 26, height / 9
    brick = np.array([142.0, 100.0, 84.0]) if rng.random() < 0.6 else wall
    for row in range(27):
        for column in range(-1, math.ceil(width / long)):
            left, top = (column + 0.5 * (row % 2)) * long, row * tall
            bottom = top + max(tall - 1, 0)  # of small pictures a row is less than a pixel
            draw.rectangle((left, top, left + long - 1, bottom), fill=_fill(brick * rng.uniform(0.8, 1.15)))


def _draw_columns(draw: ImageDraw.ImageDraw, rng: np.random.Generator, wall: Floats, size: tuple[int, int]) -> None:
    width, height = size
    for row in range(height):
        draw.line((0, row, width, row), fill=_fill(wall * (1.2 - 0.4 * row / height)))
    step = height * rng.uniform(0.5, 0.9)
    for column in range(math.ceil(width / step)):
        left = column * step
        draw.rectangle((left, 0, left + 0.12 * step, height), fill=_fill(wall * rng.uniform(0.6, 0.8)))
        poster = (left + 0.35 * step, 0.08 * height, left + 0.75 * step, rng.uniform(0.25, 0.4) * height)
        draw.rectangle(poster, fill=_fill(random_cloth(rng)))


def _draw_ground(
    draw: ImageDraw.ImageDraw, rng: np.random.Generator, ground: Floats, size: tuple[int, int], horizon: float
) -> None:
    """Draws pavement in perspective, or asphalt with a kerb and a line."""
    width, height = size
    top = horizon * height
    draw.rectangle((0, top, width, height), fill=_fill(ground))
    if rng.random() < 0.6:
        joint = _fill(ground * 0.8)
        for row in range(1, 9):
            y = top + (height - top) * (row / 8) ** 1.7
            draw.line((0, y, width, y), fill=joint)
        vanishing, step = width * rng.uniform(0.2, 0.8), height * rng.uniform(0.1, 0.2)
        for column in range(-12, math.ceil(width / step) + 12):
            draw.line((0.6 * vanishing + 0.4 * column * step, top, column * step, height), fill=joint)
    else:
        kerb = height * 0.03
        draw.rectangle((0, top, width, top + kerb), fill=_fill(ground * 1.3))
        line = top + (height - top) * rng.uniform(0.4, 0.8)
        draw.rectangle((0, line, width, line + kerb), fill=(222, 220, 206))


def _foliage(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    leaves = 0.5 * _clouds(rng, shape, (8, 26)) + 0.5 * _clouds(rng, shape, (32, 110))
    green = np.array([88.0, 104.0, 72.0]) * rng.uniform(0.6, 1.3)
    return green * (1 + 0.75 * leaves[..., None])


def _clouds(rng: np.random.Generator, shape: tuple[int, int], cells: tuple[int, int]) -> Floats:
    """Draws smooth noise in about -1..1: random values on a coarse grid, enlarged."""
    grid = Image.fromarray(rng.uniform(-1.0, 1.0, cells).astype(np.float32))
    return np.asarray(grid.resize((shape[1], shape[0]), Image.Resampling.BICUBIC), dtype=np.float64)


def _fill(colour: Floats) -> tuple[int, int, int]:
    red, green, blue = np.clip(colour, 0, 255).astype(int).tolist()
    return red, green, blue


def _over(layer: Floats, below: Floats) -> Floats:
    return below + (layer[..., 3:] / 255) * (layer[..., :3] - below)


def _to_bytes(picture: Floats) -> NDArray[np.uint8]:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _inside(keypoints: Floats) -> Bools:
    x, y = keypoints[:, 0] * 2, keypoints[:, 1]
    inside: Bools = (x >= 0) & (x < 1) & (y >= 0) & (y < 1)
    return inside


def _covered(layer: Floats, keypoints: Floats) -> Bools:
    """Tells which keypoints lie behind a layer."""
    height, width = layer.shape[:2]
    columns = np.clip(keypoints[:, 0] * 2 * width, 0, width - 1).astype(int)
    rows = np.clip(keypoints[:, 1] * height, 0, height - 1).astype(int)
    covered: Bools = layer[rows, columns, 3] > 127
    return covered


def _generator(*entropy: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))


def _size(size: Any) -> tuple[int, int]:
    if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 2:
        raise TypeError(f"size must be a pair of integers (height, width), got {size!r}.")
    return checked_count(size[0], "size[0]", 16), checked_count(size[1], "size[1]", 16)


def _infrared(cameras: Any, num_cameras: int) -> list[int]:
    if not isinstance(cameras, Collection) or isinstance(cameras, str):
        raise TypeError(f"infrared_cameras must be a collection of cameras in 1..{num_cameras}, got {cameras!r}.")
    return [checked_count(camera, "infrared_cameras", most=num_cameras) for camera in cameras]


def write_people(people: Sequence[Sample], folder: str | os.PathLike[str], *, progress: bool = True) -> Path:
    """Write drawn pedestrians as files, all or none: pictures as `images/PID_cCAMID_INDEX.png`, and `table.csv`.

    Args:
        people: `SyntheticPedestrians`, or some of its samples.
        folder: new or empty.
        progress: show a bar on a terminal.

    Returns:
        The table's path.

    Raises:
        FileExistsError: the folder is there and not empty.
        OSError: a file cannot be written.
        ValueError: no samples, or one that is there twice.
    """
    checked_flag(progress, "progress")
    folder, images = new_directory(folder), []
    with whole_directory(folder, last="table.csv") as unfinished:
        (unfinished / "images").mkdir()
        for sample in tqdm(people, unit="img", disable=None if progress else True):
            identity, camera = f"{sample.pid:04d}", str(sample.camid)
            path = unfinished / "images" / f"{identity}_c{camera}_{sample.index}.png"
            with whole_file(path) as file:
                Image.fromarray(sample.image).save(file, "PNG")
            seen = np.where(sample.visible[:, None], sample.keypoints, np.nan)
            images.append(PersonImage(path, identity, camera, Pose(seen) if sample.visible.any() else None))
        write_table(images, unfinished / "table.csv")
    return folder / "table.csv"
