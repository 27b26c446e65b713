"""A clothed walking figure: looks, joint angles, projection and drawing.

Body coordinates are (left, forward, up) in body heights: left is the person's left, the ground is at up = 0. A picture
is 1 high and 0.5 wide here, so one unit is the same length along both axes; the canvas turns units into pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

NOSE, NECK, R_SHOULDER, R_ELBOW, R_WRIST, L_SHOULDER, L_ELBOW, L_WRIST = range(8)
R_HIP, R_KNEE, R_ANKLE, L_HIP, L_KNEE, L_ANKLE, R_EYE, L_EYE, R_EAR, L_EAR = range(8, 18)
ARMS = ((R_SHOULDER, R_ELBOW, R_WRIST), (L_SHOULDER, L_ELBOW, L_WRIST))
LEGS = ((R_HIP, R_KNEE, R_ANKLE), (L_HIP, L_KNEE, L_ANKLE))

# Name: (red, green, blue), how often it is worn. Street clothes are mostly black, grey, blue and white.
_CLOTHES: dict[str, tuple[tuple[int, int, int], float]] = {
    "black": ((30, 30, 33), 16),
    "charcoal": ((62, 63, 67), 9),
    "grey": ((122, 123, 126), 8),
    "light grey": ((178, 179, 180), 6),
    "white": ((228, 228, 224), 9),
    "navy": ((34, 42, 74), 9),
    "denim": ((66, 88, 124), 8),
    "light blue": ((138, 170, 204), 5),
    "royal blue": ((38, 78, 176), 4),
    "beige": ((198, 180, 148), 5),
    "khaki": ((142, 128, 94), 4),
    "brown": ((98, 68, 48), 4),
    "olive": ((84, 88, 56), 3),
    "dark green": ((34, 80, 58), 3),
    "red": ((186, 40, 42), 5),
    "burgundy": ((104, 30, 46), 3),
    "pink": ((222, 150, 164), 3),
    "orange": ((222, 118, 42), 2),
    "yellow": ((224, 194, 66), 3),
    "purple": ((102, 66, 134), 2),
    "teal": ((34, 128, 132), 2),
}
_CLOTH_COLOURS = np.array([colour for colour, _ in _CLOTHES.values()], dtype=np.float64)
_CLOTH_ODDS = np.array([odds for _, odds in _CLOTHES.values()]) / sum(odds for _, odds in _CLOTHES.values())
_SKINS = np.array([(240, 208, 184), (226, 186, 156), (204, 158, 124), (164, 116, 84), (116, 78, 56), (78, 54, 42)])
_SKIN_ODDS = (0.26, 0.26, 0.18, 0.12, 0.1, 0.08)
_HAIRS = np.array([(28, 24, 24), (52, 38, 30), (92, 64, 42), (150, 112, 66), (196, 166, 112), (150, 148, 146)])
_PATTERNS = ("plain", "horizontal", "vertical", "checks", "block", "logo", "open")
_PATTERN_ODDS = (0.38, 0.11, 0.07, 0.09, 0.10, 0.12, 0.13)

# Height, half-width across and half-width front to back of the rings which the torso is stretched over.
_TORSO = np.array(
    [
        (0.30, 0.110, 0.088),
        (0.46, 0.101, 0.076),
        (0.53, 0.098, 0.072),
        (0.62, 0.086, 0.060),
        (0.73, 0.103, 0.068),
        (0.79, 0.112, 0.060),
        (0.82, 0.106, 0.046),
        (0.836, 0.070, 0.042),
        (0.85, 0.036, 0.036),
    ]
)
_HEAD_CENTRE = 0.93
_HEAD_RADII = np.array([0.052, 0.061, 0.073])
_HALF_TURN = np.exp(1j * np.linspace(-np.pi / 2, np.pi / 2, 7))
_WHOLE_TURN = np.exp(1j * np.linspace(0.0, 2 * np.pi, 10, endpoint=False))
_LEFT = np.array([1.0, 0.0, 0.0])
_FORWARD = np.array([0.0, 1.0, 0.0])
_SEGMENTS = 24
_AZIMUTH = np.linspace(-np.pi, np.pi, _SEGMENTS + 1)
_AZIMUTH_MIDDLE = (_AZIMUTH[1:] + _AZIMUTH[:-1]) / 2


@dataclass(frozen=True, eq=False)
class Look:
    """What one person looks like in every picture.

    Attributes:
        stature: Body height relative to the average.
        girth: Width relative to the average.
        hair: One of "short", "long", "bald", "cap".
        hair_volume: How far hair stands out, 1 being flat.
        pattern: One of "plain", "horizontal", "vertical", "checks", "block", "logo", "open", of the top garment.
        pattern_period: Length of the pattern, in body heights.
        sleeve: How much of the arm the sleeves cover, 0 to 1 (0.5 is the elbow).
        hem: Height at which the top garment ends, in body heights.
        bottom: One of "trousers", "shorts", "skirt".
        bag: One of "none", "backpack", "shoulder", "hand".
        bag_side: -1 for the person's right, 1 for the left.
        colours: RGB in 0..255 of "skin", "hair", "cap", "top", "second", "bottom", "shoes", "bag", "legs".
        infrared: The same parts as an infrared camera shows them: grey, and unrelated to the colours.
    """

    stature: float
    girth: float
    hair: str
    hair_volume: float
    pattern: str
    pattern_period: float
    sleeve: float
    hem: float
    bottom: str
    bag: str
    bag_side: int
    colours: Mapping[str, Floats]
    infrared: Mapping[str, Floats]


@dataclass(frozen=True)
class JointAngles:
    """Joint angles in radians; pairs are (right, left).

    Attributes:
        thighs: Forward swing of the thighs.
        knees: How far the knees are bent.
        arms: Forward swing of the upper arms.
        spread: How far the arms stand out sideways.
        elbows: How far the elbows are bent.
        lean: Forward lean of the trunk.
        twist: Turn of the shoulders against the hips.
        turn: Turn of the head to the person's left.
        nod: Downward tilt of the head.
    """

    thighs: tuple[float, float]
    knees: tuple[float, float]
    arms: tuple[float, float]
    spread: tuple[float, float]
    elbows: tuple[float, float]
    lean: float
    twist: float
    turn: float
    nod: float


@dataclass(frozen=True)
class View:
    """How the body is seen: an orthographic camera that looks slightly down.

    Attributes:
        yaw: Walking direction in radians: 0 towards the camera, pi / 2 towards the right edge of the picture.
        tilt: How far the camera looks down, in radians.
        scale: Picture heights per body height.
        stretch: Widening of the figure, as a box resized to a fixed shape causes.
        centre: Where the middle of the body lies, in picture units.
        light: Direction of the light in radians: 0 from the camera, positive from the right.
    """

    yaw: float
    tilt: float
    scale: float
    stretch: float
    centre: tuple[float, float]
    light: float

    def project(self, points: Floats) -> Floats:
        """Turns body points (..., 3) into picture x, picture y and nearness to the camera (..., 3)."""
        left, forward, up = points[..., 0], points[..., 1], points[..., 2]
        sine, cosine = np.sin(self.yaw), np.cos(self.yaw)
        across = left * cosine + forward * sine
        near = forward * cosine - left * sine
        down = (0.5 - up) * np.cos(self.tilt) + near * np.sin(self.tilt)
        x = self.centre[0] + across * self.scale * self.stretch
        y = self.centre[1] + down * self.scale
        return np.stack([x, y, near], axis=-1)


class Canvas:
    """A transparent picture, supersampled, that takes polygons in picture units."""

    def __init__(self, size: tuple[int, int], supersampling: int = 4) -> None:
        height, width = size
        self._supersampling = supersampling
        self._scale = np.array([2.0 * width * supersampling, float(height * supersampling)])
        self._image = Image.new("RGBA", (width * supersampling, height * supersampling))
        self._draw = ImageDraw.Draw(self._image)

    def polygon(self, points: ArrayLike, colour: ArrayLike, alpha: int = 255) -> None:
        """Fills one polygon (P, 2) with an RGB colour in 0..255."""
        corners = (np.asarray(points) * self._scale).ravel().tolist()
        red, green, blue = np.clip(colour, 0, 255).astype(int).tolist()
        self._draw.polygon(corners, fill=(red, green, blue, alpha))

    def polygons(self, points: Floats, colours: Floats) -> None:
        """Fills polygons (N, P, 2) with RGB colours (N, 3), one after another."""
        corners = (points * self._scale).reshape(len(points), -1).tolist()
        fills = np.clip(colours, 0, 255).astype(int).tolist()
        for polygon, (red, green, blue) in zip(corners, fills, strict=True):
            self._draw.polygon(polygon, fill=(red, green, blue, 255))

    def layer(self) -> Floats:
        """Returns the picture at its own size: (H, W, 4), red, green, blue and alpha in 0..255."""
        return np.asarray(self._image.reduce(self._supersampling), dtype=np.float64)


def random_cloth(rng: np.random.Generator) -> Floats:
    """Draws one clothing colour: RGB in 0..255."""
    colour = _CLOTH_COLOURS[rng.choice(len(_CLOTH_COLOURS), p=_CLOTH_ODDS)]
    jittered: Floats = np.clip(colour * rng.normal(1.0, 0.1) + rng.normal(0.0, 7.0, 3), 12, 244)
    return jittered


def random_look(rng: np.random.Generator) -> Look:
    """Draws one person's look."""
    top = random_cloth(rng)
    second = random_cloth(rng)
    if np.abs(second - top).sum() < 110:
        second = top + 75 if top.mean() < 128 else top - 75
    tone = int(rng.choice(len(_SKINS), p=_SKIN_ODDS))
    skin = _mix(_SKINS, tone, rng)
    hair = _mix(_HAIRS, int(rng.integers(len(_HAIRS) if tone < 3 else 2)), rng)
    bottom = str(rng.choice(("trousers", "shorts", "skirt"), p=(0.68, 0.18, 0.14)))
    tights = bottom == "skirt" and rng.random() < 0.35
    colours = {
        "skin": skin,
        "hair": hair,
        "cap": random_cloth(rng),
        "top": top,
        "second": second,
        "bottom": random_cloth(rng),
        "shoes": random_cloth(rng),
        "bag": random_cloth(rng),
        "legs": np.array([44.0, 42.0, 46.0]) if tights else skin,
    }
    sleeve = 1.0 if rng.random() < 0.58 else float(rng.uniform(0.24, 0.5))
    coat = sleeve == 1.0 and bottom == "trousers" and rng.random() < 0.22
    return Look(
        stature=float(np.clip(rng.normal(1.0, 0.05), 0.88, 1.1)),
        girth=float(np.clip(rng.normal(1.0, 0.1), 0.8, 1.3)),
        hair=str(rng.choice(("short", "long", "bald", "cap"), p=(0.46, 0.32, 0.07, 0.15))),
        hair_volume=float(rng.uniform(1.02, 1.2)),
        pattern=str(rng.choice(_PATTERNS, p=_PATTERN_ODDS)),
        pattern_period=float(rng.choice((0.052, 0.078))),
        sleeve=sleeve,
        hem=float(rng.uniform(0.31, 0.37) if coat else rng.uniform(0.455, 0.51)),
        bottom=bottom,
        bag=str(rng.choice(("none", "backpack", "shoulder", "hand"), p=(0.4, 0.26, 0.2, 0.14))),
        bag_side=int(rng.choice((-1, 1))),
        colours=colours,
        infrared=_infrared_albedos(rng, tights=tights),
    )


def random_pose(rng: np.random.Generator) -> JointAngles:
    """Draws the joint angles of one moment: mostly walking, sometimes standing."""
    walking = rng.random() < 0.78
    phase = rng.uniform(0.0, 2 * np.pi)
    stride = rng.uniform(0.3, 0.56) if walking else rng.uniform(0.0, 0.12)
    bend = rng.uniform(0.6, 1.05) if walking else 0.06
    swing = rng.uniform(0.25, 0.75) if walking else rng.uniform(0.0, 0.15)
    right, left = phase, phase + np.pi
    elbows = [rng.uniform(0.1, 0.45) + 0.5 * swing * max(0.0, np.sin(angle)) for angle in (left, right)]
    arms = [swing * np.sin(angle) for angle in (left, right)]
    for side in range(2):
        if rng.random() < 0.13:
            arms[side], elbows[side] = rng.uniform(0.0, 0.4), rng.uniform(1.2, 2.0)
    return JointAngles(
        thighs=(0.05 + stride * np.sin(right), 0.05 + stride * np.sin(left)),
        knees=(_knee(right, bend), _knee(left, bend)),
        arms=(arms[0], arms[1]),
        spread=(rng.uniform(0.06, 0.26), rng.uniform(0.06, 0.26)),
        elbows=(elbows[0], elbows[1]),
        lean=rng.uniform(0.0, 0.12),
        twist=0.3 * swing * np.sin(right) if walking else rng.uniform(-0.1, 0.1),
        turn=float(np.clip(rng.normal(0.0, 0.25), -0.8, 0.8)),
        nod=rng.uniform(-0.05, 0.3),
    )


def body_joints(pose: JointAngles, look: Look) -> Floats:
    """Places the 18 keypoints of a pose: (18, 3) body coordinates, the lower foot on the ground."""
    joints = np.zeros((18, 3))
    shoulder_left = _trunk_axes(pose)[0]
    neck = _trunk_point(0.82, pose)
    joints[NECK] = neck
    for side, (hip, knee, ankle), (shoulder, elbow, wrist) in zip((-1, 1), LEGS, ARMS, strict=True):
        index = (side + 1) // 2
        joints[hip] = (side * 0.062 * look.girth, 0.0, 0.525)
        thigh, shin = pose.thighs[index], pose.thighs[index] - pose.knees[index]
        joints[knee] = joints[hip] + 0.245 * _swung(thigh)
        joints[ankle] = joints[knee] + 0.235 * _swung(shin)
        joints[shoulder] = neck + side * 0.108 * look.girth * shoulder_left - [0.0, 0.0, 0.018]
        upper, lower = pose.arms[index], pose.arms[index] + pose.elbows[index]
        out = side * np.sin(pose.spread[index]) * shoulder_left
        joints[elbow] = joints[shoulder] + 0.168 * (out + _swung(upper))
        joints[wrist] = joints[elbow] + 0.15 * (0.3 * out + _swung(lower))
    left, forward, up = _head_axes(pose)
    centre = _head_centre(pose)
    for joint, (across, ahead, above) in _FACE.items():
        joints[joint] = centre + across * left + ahead * forward + above * up
    joints[:, 2] += 0.05 - min(joints[R_ANKLE, 2], joints[L_ANKLE, 2])
    return joints


def keypoint_visibility(pose: JointAngles, look: Look, joints: Floats, view: View) -> Bools:
    """Tells which of the 18 keypoints the person's own head and trunk leave visible."""
    visible = np.ones(18, dtype=np.bool_)
    left, forward, _ = _head_axes(pose)
    for joint, (across, ahead, _) in _FACE.items():
        if joint in (R_EAR, L_EAR):
            outwards = np.sign(across) * left - 0.05 * forward
            visible[joint] = look.hair != "long" and _nearness(outwards, view) > -0.2
        else:
            outwards = (across * left + ahead * forward) / np.hypot(across, ahead)
            visible[joint] = _nearness(outwards, view) > (-0.2 if joint == NOSE else 0.1)
    rings = view.project(_torso_mesh(pose, look, joints, np.linspace(look.hem, 0.82, 8)))
    projected = view.project(joints)
    for _, elbow, wrist in ARMS:
        for joint in (elbow, wrist):
            x, y, near = projected[joint]
            ring = rings[np.abs(rings[..., 1].mean(axis=1) - y).argmin()]
            inside = ring[:, 0].min() + 0.012 < x < ring[:, 0].max() - 0.012
            above_hem = y < rings[0, :, 1].max() + 0.03
            visible[joint] = not (inside and above_hem and near < ring[:, 2].mean())
    return visible


def draw_figure(canvas: Canvas, pose: JointAngles, look: Look, view: View, *, infrared: bool = False) -> None:
    """Draws one person, the parts far from the camera first."""
    joints = body_joints(pose, look)
    _Figure(canvas, pose, look, view, joints, look.infrared if infrared else look.colours).draw()


# Keypoints of the head, (left, forward, up) from its centre.
_FACE: dict[int, tuple[float, float, float]] = {
    NOSE: (0.0, 0.062, -0.006),
    R_EYE: (-0.021, 0.050, 0.012),
    L_EYE: (0.021, 0.050, 0.012),
    R_EAR: (-0.050, -0.002, 0.002),
    L_EAR: (0.050, -0.002, 0.002),
}


@dataclass(frozen=True, eq=False)
class _Figure:
    canvas: Canvas
    pose: JointAngles
    look: Look
    view: View
    joints: Floats
    colours: Mapping[str, Floats]

    def draw(self) -> None:
        seen = self.view.project(self.joints)[:, 2]
        facing = _nearness(_trunk_axes(self.pose)[1], self.view) > 0
        bag_near = self._bag_nearness() > 0
        arms = sorted((float(seen[list(arm)].sum()), side) for side, arm in enumerate(ARMS))
        legs = sorted((float(seen[list(leg)].sum()), side) for side, leg in enumerate(LEGS))
        behind: list[Callable[[], None]] = [partial(self._arm, side) for nearness, side in arms if nearness < 0]
        before: list[Callable[[], None]] = [partial(self._arm, side) for nearness, side in arms if nearness >= 0]
        middle: list[Callable[[], None]] = [partial(self._leg, side) for _, side in legs]
        behind += [] if bag_near else [self._bag]
        behind += [self._long_hair] if facing else []
        trunk = [self._torso, self._strap, self._neck] if facing else [self._neck, self._torso, self._strap]
        middle += [self._pelvis, *trunk, self._head]
        middle += [] if facing else [self._long_hair]
        middle += [self._bag] if bag_near else []
        for part in behind + middle + before:
            part()

    def _limb(self, start: Floats, end: Floats, radii: tuple[float, float], colour: Floats) -> None:
        """Draws a tapered limb between two body points: dark rim, body, highlight."""
        seen = self.view.project(np.stack([start, end]))
        first, second = complex(seen[0, 0], seen[0, 1]), complex(seen[1, 0], seen[1, 1])
        along = second - first
        along = along / abs(along) if abs(along) > 1e-9 else 1.0 + 0.0j
        thickness = self.view.scale * (0.55 + 0.45 * self.look.girth) * np.array(radii)
        for width, tone in ((1.0, 0.66), (0.8, 0.94), (0.42, 1.06)):
            shift = 0.5 * (1 - width) * thickness * np.sin(self.view.light)
            head = second + shift[1] + along * (_HALF_TURN * width * thickness[1])
            tail = first + shift[0] - along * (_HALF_TURN * width * thickness[0])
            outline = np.concatenate([head, tail])
            self.canvas.polygon(np.stack([outline.real, outline.imag], axis=-1), colour * tone)

    def _mesh(self, points: Floats, outwards: Floats, colours: Floats) -> None:
        """Draws the quads of rings (R, S + 1, 3) that face the camera, shaded by their outward normals (S, 3)."""
        seen = self.view.project(points)[..., :2]
        quads = np.stack([seen[:-1, :-1], seen[:-1, 1:], seen[1:, 1:], seen[1:, :-1]], axis=2)
        one, two = quads[:, :, 2] - quads[:, :, 0], quads[:, :, 3] - quads[:, :, 1]
        front = one[..., 0] * two[..., 1] - one[..., 1] * two[..., 0] < 0
        sine, cosine = np.sin(self.view.yaw), np.cos(self.view.yaw)
        across = outwards[:, 0] * cosine + outwards[:, 1] * sine
        near = outwards[:, 1] * cosine - outwards[:, 0] * sine
        lit = np.maximum(0.0, across * np.sin(self.view.light) + near * np.cos(self.view.light))
        shaded = colours * (0.62 + 0.42 * lit)[None, :, None]
        self.canvas.polygons(quads[front], shaded[front])

    def _dot(self, centre: Floats, radii: tuple[float, float], colour: Floats) -> None:
        outline = _WHOLE_TURN * self.view.scale
        points = np.stack([outline.real * radii[0], outline.imag * radii[1]], axis=-1)
        self.canvas.polygon(self.view.project(centre)[:2] + points, colour)

    def _arm(self, side: int) -> None:
        shoulder, elbow, wrist = self.joints[list(ARMS[side])]
        skin = self.colours["skin"]
        sleeve = self.colours["second"] if self.look.pattern == "block" else self.colours["top"]
        hand = wrist + 0.22 * (wrist - elbow)
        if self.look.bag == "hand" and side == (self.look.bag_side + 1) // 2:
            self._hand_bag(hand)
        self._limb(wrist, hand, (0.019, 0.021), skin)
        covered = self.look.sleeve
        lower = np.clip(2 * covered - 1, 0.0, 1.0)
        if lower < 1:
            self._limb(elbow, wrist, (0.027, 0.02), skin)
        if lower > 0:
            self._limb(elbow, elbow + lower * (wrist - elbow), (0.034, 0.027), sleeve)
        upper = min(1.0, 2 * covered)
        if upper < 1:
            self._limb(shoulder, elbow, (0.033, 0.027), skin)
        self._limb(shoulder, shoulder + upper * (elbow - shoulder), (0.038, 0.034 + 0.005 * (upper < 1)), sleeve)
        if self.look.pattern in ("horizontal", "checks"):
            for at in (0.35, 0.75):
                if at < upper:
                    point = shoulder + at * (elbow - shoulder)
                    self._limb(point, point + 0.12 * (elbow - shoulder), (0.036, 0.035), self.colours["second"])

    def _leg(self, side: int) -> None:
        hip, knee, ankle = self.joints[list(LEGS[side])]
        shin = ankle - knee
        pitch = 0.55 * np.arctan2(shin[1], -shin[2])
        ahead = np.array([0.0, np.cos(pitch), np.sin(pitch)])
        sole = ankle - np.array([0.0, 0.0, 0.026])
        bare, cloth = self.colours["legs"], self.colours["bottom"]
        self._limb(ankle, sole - 0.012 * ahead, (0.027, 0.026), self.colours["shoes"])
        self._limb(sole - 0.012 * ahead, sole + 0.078 * ahead, (0.027, 0.021), self.colours["shoes"])
        if self.look.bottom == "trousers":
            self._limb(knee, ankle, (0.043, 0.035), cloth)
            self._limb(hip, knee, (0.054, 0.045), cloth)
            return
        self._limb(knee, ankle, (0.037, 0.023), bare)
        self._limb(hip, knee, (0.052, 0.039), bare)
        if self.look.bottom == "shorts":
            self._limb(hip, hip + 0.82 * (knee - hip), (0.056, 0.056), cloth)

    def _pelvis(self) -> None:
        skirt = self.look.bottom == "skirt"
        lowest = 0.31 if skirt else 0.47
        heights = np.array([lowest, 0.46, 0.55]) if skirt else np.array([lowest, 0.5, 0.56])
        points = _torso_mesh(self.pose, self.look, self.joints, heights)
        if skirt:
            points[0, :, :2] *= 1.2
        else:
            points[0, :, :2] *= 0.9
        colours = np.broadcast_to(self.colours["bottom"], (2, _SEGMENTS, 3))
        self._mesh(points, _outwards(_LEFT, _FORWARD), colours)

    def _torso(self) -> None:
        look = self.look
        step = look.pattern_period / 2 if look.pattern in ("horizontal", "checks") else 0.052
        heights = np.append(np.arange(look.hem, 0.835, step), 0.85)
        middles = (heights[1:] + heights[:-1]) / 2
        mask = _pattern(look, middles)
        colours = np.where(mask[..., None], self.colours["second"], self.colours["top"])
        if look.bag == "backpack":
            straps = (np.abs(np.abs(_AZIMUTH_MIDDLE) - 0.65) < 0.2) & (middles > 0.6)[:, None]
            colours = np.where(straps[..., None], self.colours["bag"], colours)
        left, forward = _trunk_axes(self.pose)
        self._mesh(_torso_mesh(self.pose, look, self.joints, heights), _outwards(left, forward), colours)

    def _neck(self) -> None:
        base = self.joints[NECK] - [0.0, 0.0, 0.005]
        self._limb(base, self._head_centre() - [0.0, 0.0, 0.03], (0.031, 0.031), self.colours["skin"] * 0.9)

    def _head(self) -> None:
        colours = self.colours
        left, forward, up = _head_axes(self.pose)
        centre = self._head_centre()
        elevations = np.radians([-90, -55, -30, -8, 12, 30, 48, 68, 90])
        middles = (elevations[1:] + elevations[:-1]) / 2
        hairy = _hair_mask(self.look.hair, middles)
        volume = np.where(np.vstack([hairy, hairy[-1:]]), self.look.hair_volume, 1.0)
        volume = np.hstack([volume, volume[:, :1]])[..., None]
        across = (_HEAD_RADII[0] * np.cos(elevations))[:, None] * np.sin(_AZIMUTH)
        ahead = (_HEAD_RADII[1] * np.cos(elevations))[:, None] * np.cos(_AZIMUTH)
        above = np.broadcast_to((_HEAD_RADII[2] * np.sin(elevations))[:, None], across.shape)
        offsets = across[..., None] * left + ahead[..., None] * forward + above[..., None] * up
        crown = colours["cap"] if self.look.hair == "cap" else colours["hair"]
        painted = np.where(hairy[..., None], crown, colours["skin"])
        if self.look.hair == "cap":
            low = (middles < 0.35)[:, None, None]
            painted = np.where(hairy[..., None] & low, colours["hair"], painted)
        facing = _nearness(forward, self.view)
        if self.look.hair == "cap" and facing <= 0:
            self._brim(centre, left, forward, up)
        self._mesh(centre + offsets * volume, _outwards(left, forward), painted)
        self._ears(left)
        self._face(centre, left, forward, up)
        if self.look.hair == "cap" and facing > 0:
            self._brim(centre, left, forward, up)

    def _ears(self, left: Floats) -> None:
        if self.look.hair == "long":
            return
        for ear, side in ((R_EAR, -1), (L_EAR, 1)):
            if _nearness(side * left, self.view) > -0.2:
                self._dot(self.joints[ear], (0.01, 0.016), self.colours["skin"] * 0.78)

    def _face(self, centre: Floats, left: Floats, forward: Floats, up: Floats) -> None:
        dark = self.colours["skin"] * 0.2
        for eye, side in ((R_EYE, -1), (L_EYE, 1)):
            if _nearness(0.4 * side * left + 0.9 * forward, self.view) > 0.1:
                self._dot(self.joints[eye], (0.0085, 0.0085), dark)
        if _nearness(forward, self.view) > -0.2:
            self._dot(self.joints[NOSE], (0.009, 0.013), self.colours["skin"] * 1.08)
        if _nearness(forward, self.view) > 0.3:
            lips = self.colours["skin"] * (0.72, 0.5, 0.5) if np.ptp(self.colours["skin"]) > 0 else dark * 2
            self._dot(centre + 0.052 * forward - 0.034 * up, (0.014, 0.005), lips)

    def _brim(self, centre: Floats, left: Floats, forward: Floats, up: Floats) -> None:
        angles = np.linspace(-1.1, 1.1, 7)
        near = 0.052 * np.sin(angles)[:, None] * left + 0.055 * np.cos(angles)[:, None] * forward
        far = 0.048 * np.sin(angles)[::-1, None] * left + (0.04 + 0.065 * np.cos(angles))[::-1, None] * forward
        outline = centre + np.vstack([near + 0.03 * up, far + 0.022 * up])
        self.canvas.polygon(self.view.project(outline)[:, :2], self.colours["cap"] * 0.7)

    def _long_hair(self) -> None:
        if self.look.hair != "long":
            return
        left, forward, up = _head_axes(self.pose)
        drops = np.array([-0.15, -0.11, -0.05, 0.03])
        across = np.array([0.05, 0.06, 0.06, 0.05])[:, None] * self.look.hair_volume * np.sin(_AZIMUTH)
        ahead = np.array([0.016, 0.026, 0.034, 0.04])[:, None] * np.cos(_AZIMUTH) - 0.03
        offsets = across[..., None] * left + ahead[..., None] * forward + drops[:, None, None] * up
        colours = np.broadcast_to(self.colours["hair"], (3, _SEGMENTS, 3))
        self._mesh(self._head_centre() + offsets, _outwards(left, forward), colours)

    def _head_centre(self) -> Floats:
        lift = self.joints[NECK] - _trunk_point(0.82, self.pose)
        centre: Floats = _head_centre(self.pose) + lift
        return centre

    def _bag_nearness(self) -> float:
        left, forward = _trunk_axes(self.pose)
        return _nearness(-forward if self.look.bag == "backpack" else self.look.bag_side * left, self.view)

    def _bag(self) -> None:
        left, forward = _trunk_axes(self.pose)
        if self.look.bag == "backpack":
            centre = self.joints[NECK] - 0.1 * forward - np.array([0.0, 0.0, 0.11])
            self._box(centre, (0.083, 0.052, 0.11), left, forward)
        elif self.look.bag == "shoulder":
            hip = (self.joints[R_HIP] + self.joints[L_HIP]) / 2
            centre = hip + self.look.bag_side * 0.118 * self.look.girth * left - np.array([0.0, 0.0, 0.03])
            self._box(centre, (0.03, 0.078, 0.06), left, forward)

    def _hand_bag(self, hand: Floats) -> None:
        for end in (-0.035, 0.035):
            self._limb(hand, hand + np.array([0.0, end, -0.05]), (0.006, 0.006), self.colours["bag"])
        self._box(hand - np.array([0.0, 0.0, 0.095]), (0.024, 0.062, 0.05), _LEFT, _FORWARD)

    def _box(self, centre: Floats, half: tuple[float, float, float], left: Floats, forward: Floats) -> None:
        """Draws a box with rounded edges; its lower half is a darker pocket."""
        heights = np.array([-1.0, -0.82, 0.05, 0.15, 0.75, 1.0])
        widths = np.array([0.8, 1.0, 1.0, 1.0, 0.95, 0.55])
        sine, cosine = np.sin(_AZIMUTH), np.cos(_AZIMUTH)
        across = half[0] * np.sign(sine) * np.abs(sine) ** 0.5
        ahead = half[1] * np.sign(cosine) * np.abs(cosine) ** 0.5
        offsets = (
            (widths[:, None] * across)[..., None] * left
            + (widths[:, None] * ahead)[..., None] * forward
            + (half[2] * heights)[:, None, None] * np.array([0.0, 0.0, 1.0])
        )
        tones = np.array([0.85, 0.9, 0.6, 1.05, 1.1])
        colours = np.broadcast_to(self.colours["bag"] * tones[:, None, None], (5, _SEGMENTS, 3))
        self._mesh(centre + offsets, _outwards(left, forward), colours)

    def _strap(self) -> None:
        """Draws the strap of a shoulder bag, across the trunk from the other shoulder."""
        if self.look.bag != "shoulder":
            return
        side = self.look.bag_side
        left, forward = _trunk_axes(self.pose)
        heights = np.linspace(0.83, 0.53, 7)
        surface = _torso_mesh(self.pose, self.look, self.joints, heights)
        for start, end in ((-0.85, 1.45), (-2.3, -4.7)):
            azimuths = side * np.linspace(start, end, 7)
            columns = np.round((azimuths + np.pi) / (2 * np.pi) * _SEGMENTS).astype(int) % _SEGMENTS
            points = surface[np.arange(7), columns]
            normals = np.sin(azimuths)[:, None] * left + np.cos(azimuths)[:, None] * forward
            for first in range(6):
                if _nearness(normals[first] + normals[first + 1], self.view) > 0:
                    self._limb(points[first], points[first + 1], (0.011, 0.011), self.colours["bag"])


def _mix(tones: NDArray[np.int64], first: int, rng: np.random.Generator) -> Floats:
    """Draws a colour between one of the given tones and the next."""
    second = min(first + 1, len(tones) - 1)
    share = rng.uniform(0.0, 0.6)
    colour: Floats = (1 - share) * tones[first] + share * tones[second]
    return colour


def _infrared_albedos(rng: np.random.Generator, *, tights: bool) -> dict[str, Floats]:
    """Draws how bright each part is in the near infrared, where dyes hardly matter but the fabric does."""
    grey = {
        part: np.full(3, rng.uniform(70, 215)) for part in ("cap", "top", "second", "bottom", "shoes", "bag", "legs")
    }
    grey["second"] = np.clip(grey["top"] + rng.choice((-1, 1)) * rng.uniform(12, 45), 50, 230)
    grey["skin"] = np.full(3, rng.uniform(176, 206))
    grey["hair"] = np.full(3, rng.uniform(60, 130))
    if not tights:
        grey["legs"] = grey["skin"]
    return grey


def _knee(phase: float, bend: float) -> float:
    """Bend of the knee: almost none while the leg carries, most while it swings forward."""
    return float(0.06 + bend * max(0.0, np.cos(phase)) ** 1.5)


def _swung(angle: float) -> Floats:
    """Direction of a limb that hangs down at angle 0 and points forward at a quarter turn."""
    return np.array([0.0, np.sin(angle), -np.cos(angle)])


def _trunk_axes(pose: JointAngles) -> tuple[Floats, Floats]:
    sine, cosine = np.sin(pose.twist), np.cos(pose.twist)
    return np.array([cosine, sine, 0.0]), np.array([-sine, cosine, 0.0])


def _trunk_point(height: float, pose: JointAngles) -> Floats:
    """Returns the point of the spine at a height; below the hips it stays upright."""
    above = max(0.0, height - 0.525)
    return np.array([0.0, above * np.sin(pose.lean), height - above * (1 - np.cos(pose.lean))])


def _head_centre(pose: JointAngles) -> Floats:
    centre: Floats = _trunk_point(_HEAD_CENTRE, pose) + np.array([0.0, 0.012, 0.0])
    return centre


def _head_axes(pose: JointAngles) -> tuple[Floats, Floats, Floats]:
    angle = pose.twist - pose.turn
    sine, cosine = np.sin(angle), np.cos(angle)
    left, level = np.array([cosine, sine, 0.0]), np.array([-sine, cosine, 0.0])
    upright = np.array([0.0, 0.0, 1.0])
    forward = np.cos(pose.nod) * level - np.sin(pose.nod) * upright
    up = np.cos(pose.nod) * upright + np.sin(pose.nod) * level
    return left, forward, up


def _outwards(left: Floats, forward: Floats) -> Floats:
    normals: Floats = np.sin(_AZIMUTH_MIDDLE)[:, None] * left + np.cos(_AZIMUTH_MIDDLE)[:, None] * forward
    return normals


def _nearness(direction: Floats, view: View) -> float:
    return float(direction[1] * np.cos(view.yaw) - direction[0] * np.sin(view.yaw))


def _torso_mesh(pose: JointAngles, look: Look, joints: Floats, heights: Floats) -> Floats:
    """Returns rings around the trunk at the given heights: (R, S + 1, 3)."""
    across = np.interp(heights, _TORSO[:, 0], _TORSO[:, 1]) * look.girth
    ahead = np.interp(heights, _TORSO[:, 0], _TORSO[:, 2]) * look.girth
    left, forward = _trunk_axes(pose)
    lift = joints[NECK] - _trunk_point(0.82, pose)
    centres = np.stack([_trunk_point(float(height), pose) for height in heights]) + lift
    rings: Floats = (
        centres[:, None]
        + (across[:, None] * np.sin(_AZIMUTH))[..., None] * left
        + (ahead[:, None] * np.cos(_AZIMUTH))[..., None] * forward
    )
    return rings


def _pattern(look: Look, heights: Floats) -> Bools:
    """Tells where the top garment shows its second colour: (rows, segments)."""
    rows, columns = heights[:, None], _AZIMUTH_MIDDLE[None, :]
    bands = np.floor(rows / look.pattern_period * 2) % 2 > 0
    stripes = np.arange(_SEGMENTS)[None, :] // (1 if look.pattern_period < 0.06 else 2) % 2 > 0
    whole = np.zeros((len(heights), _SEGMENTS), dtype=np.bool_)
    masks: dict[str, Bools] = {
        "plain": whole,
        "horizontal": bands | whole,
        "vertical": stripes | whole,
        "checks": (bands ^ stripes) | whole,
        "block": (rows > 0.69) | whole,
        "logo": (np.abs(columns) < 0.5) & (np.abs(rows - 0.72) < 0.045),
        "open": (np.abs(columns) < 0.32) & (rows > look.hem),
    }
    return masks[look.pattern]


def _hair_mask(style: str, elevations: Floats) -> Bools:
    """Tells which quads of the head are hair or cap: (rows, segments)."""
    turned = np.abs(_AZIMUTH_MIDDLE)[None, :]
    line = np.interp(turned, [0.0, 0.8, 1.3, 1.9, np.pi], np.radians([38.0, 34.0, 12.0, -20.0, -45.0]))
    if style == "long":
        line = np.interp(turned, [0.0, 0.7, 1.1, np.pi], np.radians([36.0, 28.0, -50.0, -80.0]))
    elif style == "cap":
        line = np.interp(turned, [0.0, 1.3, 1.9, np.pi], np.radians([16.0, 16.0, -10.0, -30.0]))
    elif style == "bald":
        line = np.interp(turned, [0.0, 1.4, 2.2, np.pi], np.radians([120.0, 120.0, 120.0, 120.0]))
    return np.asarray(elevations[:, None] > line)
