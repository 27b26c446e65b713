"""Camera-aware centralization: centre cameras, shrink what differs across them, add linked neighbours.

What a camera does to all of its images hides who is on them. Its mean is known without labels, and so are images of the
same person in two cameras, roughly: those that are each other's nearest by far (`links`). Methods of this library, not
of the paper.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pose2id.centralization.links import cross_camera_weight, map_of
from pose2id.io.checks import FIRST_WORD, camera_numbers, checked_choice
from pose2id.io.rows import FeatureArray, Rows, checked_pair, unit
from pose2id.io.whole_files import new_file, whole_file
from pose2id.neighbors.members import Compared, Links

STATISTICS = ("both", "gallery")
_PRIOR = 30.0  # images that a camera's offset is shrunk by
_FORMAT = "pose2id camera model"


@dataclass(frozen=True, eq=False)
class CameraModel:
    """What is known of cameras: their means and the map across them; a live query is treated as the gallery was.

    Attributes:
        cameras: (C,) names of the cameras, as strings.
        mean: (D,) float64 mean of all images.
        offsets: (C, D) float64, each camera's mean minus that of all, shrunk by n / (n + 30) for n images.
        link_map: (D, D) float64, see `link_map`.
    """

    cameras: tuple[str, ...]
    mean: Tensor
    offsets: Tensor
    link_map: Tensor

    @staticmethod
    def fit(feats: Any, camids: Any, *, backend: str = "auto", max_memory: int | None = None) -> CameraModel:
        """The model of a gallery.

        Args:
            feats: (N, D) floating features, numpy array or torch tensor; L2-normalised first.
            camids: (N,) cameras: integers, whole floats or strings; -1 or None is unknown.
            backend: as in `pose2id.nearest_neighbors`.
            max_memory: as in `link_map`.
        """
        rows = Rows(feats, "feats", normalize=True)
        cameras = camera_numbers({"camids": (camids, rows.n)})[0].to(rows.device)
        if rows.n == 0:
            raise ValueError("feats must hold at least one row, got an empty set.")
        centres = Centres.of([(rows, cameras)])
        centred = centres.applied(rows, cameras)
        names = dict(zip(cameras.tolist(), [-1] * rows.n if camids is None else list(camids), strict=True))
        return CameraModel(
            tuple(
                str(names[number]).strip() if number >= FIRST_WORD else str(number)
                for number in centres.cameras.tolist()
            ),
            centres.mean.cpu(),
            centres.offsets.cpu(),
            map_of(Compared(centred, None, backend, max_memory), cameras).cpu(),
        )

    def __repr__(self) -> str:
        """Without the numbers."""
        return f"CameraModel({len(self.cameras)} cameras, {len(self.mean)} columns)"

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a .safetensors file, which appears whole or not at all.

        Raises:
            FileExistsError: there is one, and overwrite is False.
        """
        from safetensors.torch import save  # noqa: PLC0415 - slow to import

        tensors = {name: getattr(self, name).contiguous() for name in ("mean", "offsets", "link_map")}
        with whole_file(new_file(path, overwrite=overwrite, suffixes=(".safetensors",))) as unfinished:
            unfinished.write_bytes(save(tensors, {"format": _FORMAT, "cameras": json.dumps(self.cameras)}))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> CameraModel:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or another kind of file.
        """
        from safetensors import safe_open  # noqa: PLC0415

        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no camera model {path}.")
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name).double() for name in ("mean", "offsets", "link_map")}
            cameras = tuple(map(str, json.loads(about["cameras"])))
        except Exception as error:  # a damaged file can fail in any way
            raise ValueError(f"{path} must be a camera model, written by CameraModel.save ({error!r}).") from error
        dim = tensors["mean"].shape[0] if tensors["mean"].ndim == 1 else -1
        shapes = [tuple(tensor.shape) for tensor in tensors.values()]
        if shapes != [(dim,), (len(cameras), dim), (dim, dim)] or not all(x.isfinite().all() for x in tensors.values()):
            raise ValueError(f"{path} must be a camera model of one width with finite values, got shapes {shapes}.")
        return CameraModel(cameras, **tensors)

    def centres(self, cameras: Tensor, device: torch.device) -> Centres:
        """The means; cameras: (C,) int64 numbers of its names, on `device`."""
        order = torch.argsort(cameras)
        return Centres(self.mean.to(device), cameras[order], self.offsets.to(device)[order])


class Centres:
    """The mean of all images, and the offsets of cameras from it: (D,), (C,) int64 ascending, (C, D), float64."""

    def __init__(self, mean: Tensor, cameras: Tensor, offsets: Tensor) -> None:
        self.mean, self.cameras, self.offsets = mean, cameras, offsets

    @staticmethod
    def of(sides: list[tuple[Rows, Tensor]]) -> Centres:
        """Of the rows of one or two sets and their cameras; of less than two cameras there is nothing to centre."""
        rows = sides[0][0]
        every = torch.cat([cameras for _, cameras in sides])
        names, counts = torch.unique(every[every != -1], return_counts=True)
        mean = torch.zeros(rows.dim, dtype=torch.float64, device=rows.device)
        sums = torch.zeros((len(names), rows.dim), dtype=torch.float64, device=rows.device)
        if len(names) < 2:
            return Centres(mean, names, sums)
        for rows, cameras in sides:
            for block in rows.blocks():
                x = rows.read(block, torch.float64)
                mean += x.sum(0)
                place = torch.searchsorted(names, cameras[block])
                for at in torch.unique(place[cameras[block] != -1]).tolist():
                    sums[at] += x[(place == at) & (cameras[block] != -1)].sum(0)
        mean /= sum(rows.n for rows, _ in sides)
        offsets = (sums - counts[:, None] * mean) / (counts[:, None] + _PRIOR)
        return Centres(mean, names, offsets)

    def applied(self, rows: Rows, cameras: Tensor) -> Rows:
        """Rows without their camera's mean, normalised again, as a copy; unknown cameras without the mean of all."""
        result = torch.empty((rows.n, rows.dim), dtype=rows.dtype, device=rows.device)
        for block in rows.blocks():
            result[block] = self.centred(rows, cameras, block)
        return Rows(result, "features")

    def centred(self, rows: Rows, cameras: Tensor, block: slice) -> Tensor:
        """`applied` of a block: (B, D) float64."""
        return unit(rows.read(block, torch.float64).sub_(self.at(cameras[block])))

    def at(self, cameras: Tensor) -> Tensor:
        """(B, D) float64 mean of each camera; of unknown ones the mean of all."""
        centres = self.mean.repeat(len(cameras), 1)
        if len(self.cameras):
            at = torch.searchsorted(self.cameras, cameras).clamp(max=len(self.cameras) - 1)
            known = self.cameras[at] == cameras
            centres[known] += self.offsets[at[known]]
        return centres


def centre_cameras(
    query_feats: FeatureArray,
    gallery_feats: FeatureArray,
    query_camids: Any,
    gallery_camids: Any,
    *,
    statistics: str = "both",
    camera_model: CameraModel | None = None,
) -> tuple[FeatureArray, FeatureArray]:
    """Subtract from every feature the mean of all and its camera's shrunk offset.

        x <- unit(x - m - n_c / (n_c + 30) (m_c - m)),   m of all images, m_c of the n_c images of camera c

    Of fewer than two cameras nothing is subtracted. From images of unknown cameras only m is.

    Args:
        query_feats: (Q, D) float16, bfloat16, float32 or float64, numpy array or torch tensor. Not modified.
        gallery_feats: (G, D), on the same device.
        query_camids: (Q,) cameras: integers, whole floats or strings; -1 or None, or None for all: unknown.
        gallery_camids: (G,), likewise.
        statistics: means of "both" sets, or of the "gallery" alone, so that no query enters anything.
        camera_model: means of a model instead; cameras that it does not know count as unknown.

    Returns:
        (query, gallery), L2-normalised, each in the container, dtype and device it came in.
    """
    query = Rows(query_feats, "query_feats", normalize=True)
    gallery = Rows(gallery_feats, "gallery_feats", normalize=True)
    checked_pair(query, gallery, "query_feats", "gallery_feats")
    checked_choice(statistics, "statistics", STATISTICS)
    sides = known_cameras(query, gallery, query_camids, gallery_camids, camera_model)
    centres = centres_of(query, gallery, *sides, statistics, camera_model)
    return written(centres.applied(query, sides[0]), query), written(centres.applied(gallery, sides[1]), gallery)


def known_cameras(
    query: Rows, gallery: Rows, query_camids: Any, gallery_camids: Any, model: CameraModel | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of the cameras of both sets and of the model, on the rows' device; -1 is unknown."""
    sides = {"query_camids": (query_camids, query.n), "gallery_camids": (gallery_camids, gallery.n)}
    if model is not None:
        if not isinstance(model, CameraModel):
            raise TypeError(f"camera_model must be a pose2id.CameraModel, got {type(model).__name__}.")
        if model.mean.shape[0] != gallery.dim:
            given = f"got one of {model.mean.shape[0]}"
            raise ValueError(f"camera_model must be of features with {gallery.dim} columns, {given}.")
        sides["camera_model"] = (list(model.cameras), len(model.cameras))
    found = camera_numbers(sides)
    empty = torch.empty(0, dtype=torch.int64, device="cpu")  # whatever the default device
    of_query, of_gallery, of_model = (side.to(query.device) for side in (*found, empty)[:3])
    return of_query, of_gallery, of_model


def centres_of(
    query: Rows,
    gallery: Rows,
    of_query: Tensor,
    of_gallery: Tensor,
    of_model: Tensor,
    statistics: str,
    model: CameraModel | None,
) -> Centres:
    """The means of a model, of the gallery, or of both sets."""
    if model is not None:
        return model.centres(of_model, query.device)
    sides = [(query, of_query), (gallery, of_gallery)]
    return Centres.of(sides if statistics == "both" else sides[1:])


def written(rows: Rows, like: Rows) -> Any:
    """Rows in the shape, container and dtype of others."""
    result = like.empty()
    for block in rows.blocks():
        like.write(result, block, rows.read(block))
    return result


def mapped(rows: Rows, matrix: Tensor) -> Rows:
    """Normalised rows @ matrix, as a copy."""
    result = torch.empty((rows.n, rows.dim), dtype=rows.dtype, device=rows.device)
    for block in rows.blocks():
        result[block] = mapped_block(rows, matrix, block)
    return Rows(result, "features")


def mapped_block(rows: Rows, matrix: Tensor, block: slice) -> Tensor:
    """`mapped` of a block: (B, D) float64."""
    return unit(rows.read(block, torch.float64) @ matrix)


def sum_weights(links: Links, cameras: Tensor, others: Tensor, num_cameras: int) -> Links:
    """Links with what they count in the sum: across cameras more, as there are fewer of them."""
    factor = cross_camera_weight(cameras[links.row], others[links.column], num_cameras)
    return Links(links.row, links.column, links.weight * factor)
