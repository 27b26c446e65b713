"""Identity-guided pedestrian generation (IPG): the person on a reference image, in other poses.

Built from parts, each of which can be replaced; `IdentityGenerator` puts them together.
"""

from pose2id.ipg.files import generate_files
from pose2id.ipg.generator import IdentityEncoder, IdentityGenerator
from pose2id.ipg.identity import IdentityTokens, TransReID
from pose2id.ipg.pose_encoder import PoseEncoder
from pose2id.ipg.weights import convert

__all__ = [
    "IdentityEncoder",
    "IdentityGenerator",
    "IdentityTokens",
    "PoseEncoder",
    "TransReID",
    "convert",
    "generate_files",
]
