"""A contact sheet of chosen poses: each drawn beside the crop that it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from pose2id.io.images import load_image
from pose2id.poses.drawing import draw
from pose2id.poses.representative import ChosenPose

_CROP = (128, 256)  # (width, height)
_GAP, _CAPTION, _POSES_A_ROW = 4, 28, 8
_PAPER, _INK = (255, 255, 255), (0, 0, 0)


def contact_sheet(chosen: Sequence[ChosenPose], crops: Sequence[Any]) -> Image.Image:
    """Each crop and its pose, in order; below them the pose's name, where it faces and how many are nearest to it.

    Args:
        chosen: what `choose_poses` returns.
        crops: the image of each, as a path, PIL image or array; those of mirrored poses are shown mirrored.
    """
    width, height = 2 * _CROP[0] + 2 * _GAP, _CROP[1] + _CAPTION
    across = min(max(len(chosen), 1), _POSES_A_ROW)
    sheet = Image.new("RGB", (across * width, max(-(-len(chosen) // across), 1) * height), _PAPER)
    drawing, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for place, (each, crop) in enumerate(zip(chosen, crops, strict=True)):
        left, top = place % across * width + _GAP, place // across * height
        picture = load_image(crop, f"crops[{place}]").resize(_CROP, Image.Resampling.BICUBIC)
        sheet.paste(ImageOps.mirror(picture) if each.mirrored else picture, (left, top))
        sheet.paste(draw(each.pose, _CROP[::-1]), (left + _CROP[0], top))
        caption = f"{each.pose.name}{' (mirrored)' if each.mirrored else ''}\n{each.facing:.0f} deg, {each.share:.0%}"
        drawing.multiline_text((left, top + _CROP[1] + 1), caption, _INK, font, spacing=0)
    return sheet
