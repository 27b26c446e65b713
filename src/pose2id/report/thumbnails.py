"""Small pictures of the report's page."""

from __future__ import annotations

import hashlib
import io
from typing import Any

from PIL import Image

from pose2id.io.images import load_image

SIZE = (112, 192)  # the widest and the highest


class Thumbnails:
    """Pictures re-encoded small, aspect kept; equal ones are one file, named by its content.

    Attributes:
        files: content of the files, by name.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self._of: dict[tuple[str, Any], str] = {}

    def add(self, item: Any, name: str, key: tuple[str, Any] | None = None) -> str:
        """The address of a picture, relative to the page.

        Args:
            item: a path, PIL picture, (H, W, 3) uint8 RGB array or (3, H, W) float tensor in [0, 1].
            name: of the picture, for errors.
            key: what it is, so that it is read once.
        """
        if key is not None and key in self._of:
            return self._of[key]
        picture = load_image(item, name)
        picture.thumbnail(SIZE, Image.Resampling.LANCZOS)
        encoded = io.BytesIO()
        picture.save(encoded, "JPEG", quality=85)
        file = f"{hashlib.sha256(encoded.getvalue()).hexdigest()[:16]}.jpg"
        self.files[file] = encoded.getvalue()
        address = f"images/{file}"
        if key is not None:
            self._of[key] = address
        return address
