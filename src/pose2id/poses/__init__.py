"""Poses, the 8 published ones and your own: keypoints, and the drawings that the generator reads."""

from pose2id.poses.detection import detect
from pose2id.poses.drawing import draw
from pose2id.poses.files import read, standard, write
from pose2id.poses.representative import ChosenPose, choose_poses, facing, nearest_to_mean, pose_distances
from pose2id.poses.scrambling import scrambled
from pose2id.poses.skeleton import KEYPOINTS, LIMBS, PALETTE, Pose
from pose2id.poses.validity import Verdict, check_pose

__all__ = [
    "KEYPOINTS",
    "LIMBS",
    "PALETTE",
    "ChosenPose",
    "Pose",
    "Verdict",
    "check_pose",
    "choose_poses",
    "detect",
    "draw",
    "facing",
    "nearest_to_mean",
    "pose_distances",
    "read",
    "scrambled",
    "standard",
    "write",
]
