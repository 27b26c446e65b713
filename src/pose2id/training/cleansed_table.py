"""What `pose2id clean` writes: the table of what is kept, a list of what was dropped, a contact sheet to look at it."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pose2id.io.images import load_image
from pose2id.io.whole_files import new_file, write_files
from pose2id.training.cleansing import Cleansing
from pose2id.training.table import PersonImage, csv_content, path_from, table_content

SHEET_PAIRS = 200
_COLUMNS = ("path", "identity", "camera", "distance", "reason")
_CROP = (64, 128)  # (width, height)
_GAP, _CAPTION, _PAIRS_A_ROW = 4, 28, 8
_PAPER, _INK, _NOTHING = (255, 255, 255), (0, 0, 0), (200, 200, 200)


class CleansedTable:
    """Where to write; names are checked before any work.

    Args:
        path: of the new table, NAME.csv; NAME.dropped.csv lists what it lacks, with distances and reasons.
        sheet: a .png with the dropped crops, or None.
        overwrite: replace files that are there.
        root: as of `write_table`.

    Raises:
        FileExistsError: a file is there, and `overwrite` is False.
        ValueError: a wrong ending.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        sheet: str | os.PathLike[str] | None = None,
        *,
        overwrite: bool = False,
        root: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path, self.overwrite, self.root = Path(path), overwrite, root
        self._table = new_file(path, overwrite=overwrite, suffixes=(".csv",))
        self.dropped = new_file(self.path.with_suffix(".dropped.csv"), overwrite=overwrite)
        self.sheet = None if sheet is None else new_file(sheet, overwrite=overwrite, suffixes=(".png",))

    def write(self, images: Sequence[PersonImage], cleansing: Cleansing) -> None:
        """Write all files, or none if one of them cannot be made: where a new table is, its list and sheet are, too.

        A kill on the way may leave list and sheet without it, or, with `overwrite`, beside the old one.
        """
        lines = [_COLUMNS]
        for i in farthest_dropped(cleansing):
            path = path_from(self.path, images[i].path, self.root)
            distance = f"{cleansing.distances[i]:.6g}"
            lines.append((path, images[i].identity, images[i].camera, distance, cleansing.reasons[i]))
        contents = {self.dropped: csv_content(lines)}
        if self.sheet is not None:
            picture = io.BytesIO()
            contact_sheet(images, cleansing).save(picture, "PNG")
            contents[self.sheet] = picture.getvalue()
        kept = [image for image, keep in zip(images, cleansing.kept, strict=True) if keep]
        contents[self._table] = table_content(kept, self.path, self.root)
        write_files(contents, replace=self.overwrite)


def farthest_dropped(cleansing: Cleansing) -> list[int]:
    """Indices of dropped images, farthest first."""
    return [i for i in np.argsort(-cleansing.distances, kind="stable").tolist() if not cleansing.kept[i]]


def contact_sheet(images: Sequence[PersonImage], cleansing: Cleansing) -> Image.Image:
    """Each dropped crop beside the kept one that is nearest to the mean of the same identity.

    The farthest come first, 200 at the most. Below: identity, distance and reason. Grey: none of the identity is kept.
    """
    kept = [i for i in np.argsort(-cleansing.distances, kind="stable") if cleansing.kept[i]]
    nearest = {images[i].identity: i for i in kept}  # the last one stays
    dropped = farthest_dropped(cleansing)[:SHEET_PAIRS]
    width, height = 2 * _CROP[0] + 2 * _GAP, _CROP[1] + _CAPTION
    across = min(max(len(dropped), 1), _PAIRS_A_ROW)
    sheet = Image.new("RGB", (across * width, max(-(-len(dropped) // across), 1) * height), _PAPER)
    drawing, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for place, i in enumerate(dropped):
        left, top = place % across * width + _GAP, place // across * height
        identity = images[i].identity
        for x, shown in ((left, i), (left + _CROP[0], nearest.get(identity))):
            crop = Image.new("RGB", _CROP, _NOTHING) if shown is None else _crop(images[shown].path)
            sheet.paste(crop, (x, top))
        # The font has no more letters.
        name = identity.encode("ascii", "replace").decode()[:20]
        caption = f"{name}\n{cleansing.distances[i]:.3g} {cleansing.reasons[i]}"
        drawing.multiline_text((left, top + _CROP[1] + 1), caption, _INK, font, spacing=0)
    return sheet


def _crop(path: Path) -> Image.Image:
    return load_image(path, "image").resize(_CROP, Image.Resampling.BICUBIC)
