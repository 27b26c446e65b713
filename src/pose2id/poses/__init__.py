"""Poses, the 8 published ones and your own: keypoints, and the drawings that the generator reads."""

from pose2id.poses.detection import detect
from pose2id.poses.drawing import draw
from pose2id.poses.files import read, standard, write
from pose2id.poses.scrambling import scrambled
from pose2id.poses.skeleton import KEYPOINTS, LIMBS, PALETTE, Pose
from pose2id.poses.validity import Verdict, check_pose

__all__ = [
    "KEYPOINTS",
    "LIMBS",
    "PALETTE",
    "Pose",
    "Verdict",
    "check_pose",
    "detect",
    "draw",
    "read",
    "scrambled",
    "standard",
    "write",
]
