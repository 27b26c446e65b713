"""What a reader returns: images with their labels, in one order, and the splits of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

JUNK, DISTRACTOR = -1, 0
_COLUMNS = ("images", "identities", "cameras", "tracklets", "junk (-1)", "distractors (0)")


@dataclass(frozen=True, eq=False)
class Split:
    """Images with their labels, in one order.

    Identity -1 is junk, which evaluation drops. Identity 0, as an integer, is a distractor: somebody whom no query asks
    for. Readers of sets that number people from 0 add 1; identities of folders and tables are strings, and none of them
    is a distractor.

    Attributes:
        paths: files, as root / relative.
        pids: (N,) identities, int64 or strings.
        camids: (N,) cameras, int64 or strings, as the set's file names have them; None where the set has none.
        tracklets: (N,) int64, one value for all images of one tracklet; None where the set has none.

    Raises:
        ValueError: labels that are not one per image, or of another kind.
    """

    paths: tuple[str, ...]
    pids: NDArray[Any]
    camids: NDArray[Any] | None = None
    tracklets: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        for name, labels in (("pids", self.pids), ("camids", self.camids), ("tracklets", self.tracklets)):
            if labels is None:
                continue
            given = f"{labels.dtype} of shape {labels.shape}"
            if labels.shape != (len(self.paths),):
                raise ValueError(f"{name} must have shape ({len(self.paths)},), one label per image, got {given}.")
            if labels.dtype != np.int64 and (labels.dtype.kind != "U" or name == "tracklets"):
                raise ValueError(f"{name} must hold int64{'' if name == 'tracklets' else ' or strings'}, got {given}.")

    def __len__(self) -> int:
        return len(self.paths)

    def __str__(self) -> str:
        images, people, cameras, tracklets, junk, distractors = self.counts()
        text = f"{images:,} images, {people:,} identities"
        text += f", {cameras:,} cameras" if self.camids is not None else ", no cameras"
        text += f", {tracklets:,} tracklets" if self.tracklets is not None else ""
        text += f"; junk (-1): {junk:,}" if junk else ""
        return text + (f"; distractors (0): {distractors:,}" if distractors else "")

    def counts(self) -> tuple[int, int, int, int, int, int]:
        """Images, identities (without junk and distractors), cameras, tracklets, images of junk and of distractors."""
        junk = self.pids == (str(JUNK) if self.pids.dtype.kind == "U" else JUNK)
        distractors = self.pids == DISTRACTOR if self.pids.dtype.kind == "i" else np.zeros(len(self), dtype=bool)
        labels = (self.pids[~junk & ~distractors], self.camids, self.tracklets)
        people, cameras, tracklets = (0 if given is None else len(np.unique(given)) for given in labels)
        return len(self), people, cameras, tracklets, int(junk.sum()), int(distractors.sum())


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set as it lies on disk.

    Attributes:
        name: "Market1501", ...
        root: the folder that holds it.
        query, gallery: what is searched for, and where; the very same object where each image is searched for among all
            others, or where the protocol draws the gallery (VehicleID).
        train: the training images, None where they are not there.
        protocol: how it is evaluated: "market1501", "cuhk03", "occluded-reid", "sysu-mm01", "regdb", "vehicleid" or
            "leave-one-out".
        trials: rows of query and of gallery, per trial, where lists of them are published (RegDB).
        permutation: the file of SYSU-MM01's official draws, where it is there.
        notes: what is junk, what was left out, and which counts are not the published ones.
    """

    name: str
    root: Path
    query: Split
    gallery: Split
    train: Split | None
    protocol: str
    trials: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...] | None = None
    permutation: Path | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        same = self.query is self.gallery
        splits = {"train": self.train, "query = gallery" if same else "query": self.query}
        splits |= {} if same else {"gallery": self.gallery}
        counted = {name: split.counts() for name, split in splits.items() if split is not None}
        # Columns that no split fills are left out.
        shown = [at for at in range(len(_COLUMNS)) if any(counts[at] for counts in counted.values())]
        rows = [["split", *(_COLUMNS[at] for at in shown)]]
        rows += [[name, *(f"{counts[at]:,}" for at in shown)] for name, counts in counted.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{self.name}, protocol {self.protocol}, in {self.root}"]
        for first, *others in rows:
            cells = [
                first.ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)),
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, *(f"* {note}" for note in self.notes)])
