"""`Centralizer`: feature centralization inside an existing pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from PIL import Image
from torch import Tensor

from pose2id.centralization.diagnostics import GenerationDiagnostics, generation_diagnostics
from pose2id.centralization.fusion import fuse
from pose2id.centralization.nfc import PART_DISTANCES, checked_weights, nfc, with_neighbors
from pose2id.extractor import Extraction, Extractor, FeatureModel, Images, SideInputs, stored
from pose2id.io.checks import checked_choice, checked_count, checked_flag, checked_flags, checked_memory, checked_number
from pose2id.io.decoding import decoding_once
from pose2id.io.rows import FeatureArray, Rows, as_container, blocks, checked_pair
from pose2id.ipg.pictures import GeneratedPictures, Generator, PictureFolder, Pictures, PosedPictures, in_order
from pose2id.neighbors.search import BACKENDS, NeighborSearch, checked_search

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from pose2id.poses import Pose


_OF_NFC = ("k1", "k2", "backend", "neighbors", "max_memory")


class _OfExtractor(TypedDict, total=False):
    transform: Callable[[Image.Image], Tensor] | str | None
    inputs: str
    batch_size: int
    device: torch.device | str | None
    flip: bool
    pad_last_batch: bool


class Shortcuts(_OfExtractor, total=False):
    """Parameters of the parts, from which `Centralizer` builds them."""

    generator: Generator | None
    generated: str | os.PathLike[str] | None
    poses: Any
    num_poses: int | None
    pose_inputs: Mapping[str, Callable[[Pose], Any]] | None
    generate_options: Mapping[str, Any] | None


class Centralizer:
    """Centralizes the features of any ReID model towards their identity's centre; trains and changes nothing.

    With features at hand, no model is needed:

        query_feats, gallery_feats = Centralizer(k1=2, k2=2).enhance(query_feats, gallery_feats)

    With images, it fuses their features with those of generated images of the same people (eq. 9):

        centralizer = Centralizer(Extractor(my_model, transform=my_transform), GeneratedPictures(generator), eta=2.0)
        gallery_feats = centralizer(gallery_images, cam_label=cams)

    For short, the parts' parameters may be given instead of the parts:

        centralizer = Centralizer(my_model, transform=my_transform, generator=generator, eta=2.0)

    Args:
        extractor: an `Extractor`, or your model, of which one is made. `enhance` and `fuse` don't need it.
        pictures: where generated images come from: `GeneratedPictures`, a `PictureFolder`, or any callable
            `pictures(images)` that gives, for each image in order, a sequence of M pictures, the same M for every
            image. Only `__call__`, `extract_generated` and `diagnose` need it.
        k1: how many neighbours a feature proposes (see `nfc`).
        k2: how many neighbours the other side looks at.
        eta: weight of generated images in eq. 9: Market1501 2, Occluded-ReID 1, SYSU-MM01 1/4.
        part_distance: how features in parts find neighbours: "visible" or "flattened" (see `nfc`).
        backend: the search engine: "auto", "faiss" or "torch".
        neighbors: a search of your own in its place (see `nfc`).
        max_memory: bytes for working blocks, see `pose2id.nearest_neighbors`.
        **shortcuts: transform, inputs, batch_size, device, flip and pad_last_batch, for an `Extractor` of the model;
            generator with generate_options (the generator's keywords), for `GeneratedPictures`; or generated, for a
            `PictureFolder`; poses, num_poses and pose_inputs for either. None means the default.
    """

    def __init__(
        self,
        extractor: Extractor | FeatureModel | None = None,
        pictures: Pictures | None = None,
        *,
        k1: int = 2,
        k2: int = 2,
        eta: float = 2.0,
        part_distance: str = "visible",
        backend: str = "auto",
        neighbors: NeighborSearch | None = None,
        max_memory: int | None = None,
        **shortcuts: Unpack[Shortcuts],
    ) -> None:
        self.k1 = checked_count(k1, "k1")
        self.k2 = checked_count(k2, "k2")
        self.eta = checked_number(eta, "eta", 0, 1e6)
        self.part_distance = checked_choice(part_distance, "part_distance", PART_DISTANCES)
        self.backend = checked_choice(backend, "backend", BACKENDS)
        self.neighbors = checked_search(neighbors, backend)
        checked_memory(max_memory)
        self.max_memory = max_memory
        for name in shortcuts.keys() - Shortcuts.__annotations__.keys():
            known = ", ".join([*_OF_NFC, "eta", "part_distance", *Shortcuts.__annotations__])
            raise TypeError(f"Centralizer got an unexpected keyword argument {name!r}. It knows {known}.")
        given = {name: value for name, value in shortcuts.items() if value is not None}
        of_extractor = {name: given.pop(name) for name in _OfExtractor.__annotations__ if name in given}
        self.extractor = _extractor(extractor, of_extractor)
        self.pictures = _pictures(pictures, given)
        if self.extractor and isinstance(self.pictures, PosedPictures):
            if self.extractor.transform is None and self.extractor.inputs == "batch":
                raise ValueError("transform must be given with generated pictures, or inputs='images'.")
            if self.extractor.flip and self.pictures.pose_inputs:
                raise ValueError("flip must be False with pose_inputs, which would not be mirrored with the picture.")

    def __call__(
        self, images: Any, *, progress: bool = True, return_visibility: bool = False, **side_inputs: Any
    ) -> Any:
        """Fused features of images (eq. 9): of each image and of its generated images, through the user's extractor.

            f~ = normalize(f + eta / M * sum of f_m over m = 1..M)

        The same as `fuse(extract(images, normalize=False), extract_generated(images))`, but the images go through in
        blocks of the extractor's batch size: beside the result, memory does not grow with their number. Pictures are
        generated when their batch is due. Add neighbours with `enhance`.

        Args:
            images: as in `Extractor.__call__`; with a transform, pictures or paths.
            progress: show one bar for original and generated images on a terminal.
            return_visibility: also return the visibility (N, P) of the originals' parts, or None.
            **side_inputs: keywords for the model, as in `Extractor.__call__`. Entries of an image go to its generated
                images too (the original's camera, modality), except for those in `pose_inputs`.

        Returns:
            (N, D) L2-normalised features, or (N, P, D) parts, each L2-normalised, in the container, dtype and device
            that the model returns. A part's generated mean is taken over the images that show it, where the model
            returns visibility. With num_poses=0: the normalised features of the originals.
        """
        if getattr(self.pictures, "num_poses", None) == 0:
            return self.extract(images, progress=progress, return_visibility=return_visibility, **side_inputs)
        checked_flags(progress=progress, return_visibility=return_visibility)
        fused = visibility = None
        with self._at_work(images, side_inputs, progress) as (model, originals, pictures):
            for block in blocks(len(images), model.extractor.batch_size):
                features, visible = model.next_features(originals, block.stop - block.start)
                generated, weights = model.next_features(pictures, block.stop - block.start)
                centralized = fuse(features, generated, self.eta, visibility=weights)
                fused = stored(fused, centralized, block, len(images))
                visibility = stored(visibility, visible, block, len(images))
        return (fused, visibility) if return_visibility else fused

    def enhance(
        self,
        query_feats: FeatureArray,
        gallery_feats: FeatureArray,
        *,
        joint: bool = False,
        query_visibility: Any = None,
        gallery_visibility: Any = None,
    ) -> tuple[FeatureArray, FeatureArray]:
        """Centralize query and gallery features with their mutual nearest neighbours (`nfc`).

        The two sets are centralized apart by default: the authors hold that a query must not borrow from the gallery it
        is compared with, nor the gallery from queries that a deployed system has not seen yet (information leakage).

        Args:
            query_feats: (Q, D) raw or normalised features, or (Q, P, D) of their parts, floating numpy array or torch
                tensor. Not modified.
            gallery_feats: (G, D) or (G, P, D) features of the same model.
            joint: search neighbours in the union of both sets instead, of which a copy is made; figures are then not
                comparable with published ones.
            query_visibility: (Q, P) of the parts, booleans or weights, as in `nfc`; what `__call__` and `extract` give
                with `return_visibility`. None: every part is fully visible.
            gallery_visibility: (G, P), likewise.

        Returns:
            (query, gallery), L2-normalised, parts each by itself, each in the shape, container, dtype and device it
            came in.
        """
        joint = checked_flag(joint, "joint")
        query = Rows(query_feats, "query_feats", normalize=not joint, parts=True)
        gallery = Rows(gallery_feats, "gallery_feats", normalize=not joint, parts=True)
        checked_pair(query, gallery, "query_feats", "gallery_feats")
        of_query = checked_weights(query, query_visibility, "query_visibility", self.part_distance)
        of_gallery = checked_weights(gallery, gallery_visibility, "gallery_visibility", self.part_distance)
        settings: dict[str, Any] = {name: getattr(self, name) for name in _OF_NFC}
        if not joint:
            return with_neighbors(query, of_query, **settings), with_neighbors(gallery, of_gallery, **settings)
        dtype = torch.promote_types(query.dtype, gallery.dtype)
        rows = torch.cat([rows.read(slice(None), dtype) for rows in (query, gallery)])
        both: Any = as_container(query.by_part(rows) if query.in_parts else rows, query_feats)
        visibility = None
        if query_visibility is not None or gallery_visibility is not None:
            shown = query.visibility(query_visibility, "query_visibility")
            visibility = torch.cat([shown, gallery.visibility(gallery_visibility, "gallery_visibility")])
        both = nfc(both, visibility=visibility, part_distance=self.part_distance, **settings)
        enhanced = (both if isinstance(both, Tensor) else torch.from_numpy(both)).flatten(1)
        results = query.empty(), gallery.empty()
        query.write(results[0], slice(None), enhanced[: query.n])
        gallery.write(results[1], slice(None), enhanced[query.n :])
        return results  # type: ignore[return-value]

    def fuse(
        self,
        features: FeatureArray,
        generated: FeatureArray,
        eta: float | None = None,
        *,
        visibility: FeatureArray | None = None,
    ) -> FeatureArray:
        """Eq. 9 on raw features (N, D) and (N, M, D) of generated images: `pose2id.fuse`; None: own eta."""
        return fuse(features, generated, self.eta if eta is None else eta, visibility=visibility)

    def extract(self, images: Any, **options: Any) -> Any:
        """Features of images alone, L2-normalised unless `normalize=False`: see `Extractor.__call__`."""
        return self._given_extractor()(images, **options)

    def extract_generated(
        self, images: Any, *, progress: bool = True, return_visibility: bool = False, **side_inputs: Any
    ) -> Any:
        """Raw features (N, M, D) or (N, M, P, D) of the generated images: to try several eta, or to keep them.

        Arguments and errors are those of `__call__`; the visibility is that of the generated images' parts, (N, M, P).
        """
        checked_flags(progress=progress, return_visibility=return_visibility)
        with self._at_work(images, side_inputs, progress, both=False) as (model, _, pictures):
            features, visibility = model.next_features(pictures, len(images))
        return (features, visibility) if return_visibility else features

    def diagnose(self, images: Any, *, progress: bool = True, **side_inputs: Any) -> GenerationDiagnostics:
        """How much of a person the model sees in generated images, without labels: `pose2id.generation_diagnostics`.

        Arguments and errors are those of `__call__`, for at least 2 images. All features are held; a few hundred images
        of different people are enough.
        """
        checked_flag(progress, "progress")
        with self._at_work(images, side_inputs, progress) as (model, originals, pictures):
            features, generated = (model.next_features(some, len(images))[0] for some in (originals, pictures))
        return generation_diagnostics(features, generated)

    @contextmanager
    def _at_work(
        self, images: Any, side_inputs: Mapping[str, Any], progress: bool, *, both: bool = True
    ) -> Iterator[tuple[Extraction, Images, Images]]:
        """The model at work, the images, and their generated images, after all checks that need no model."""
        extractor, originals = self._given_extractor(), Images(images, side_inputs)
        if self.pictures is None:
            remedy = "generator=IdentityGenerator.from_pretrained(...) or generated=DIR"
            raise ValueError(f"pictures must be given to fuse images with generated ones: pass {remedy}.")
        of_pose: dict[str, Any] = {}
        if isinstance(self.pictures, PosedPictures):
            of_pose = self.pictures.side_inputs(originals.side_inputs.get)
        with decoding_once():
            pictures = _Generated(*in_order(self.pictures, originals.items), originals.side_inputs, of_pose)
            with extractor.at_work(len(images) * (pictures.m + both), progress) as model:
                yield model, originals, pictures

    def _given_extractor(self) -> Extractor:
        if self.extractor is None:
            raise ValueError("extractor must be given to extract features: Centralizer(my_model, transform=...).")
        return self.extractor

    def __repr__(self) -> str:
        """The parameters."""
        parts = "".join(f"{part!r}, " for part in (self.extractor, self.pictures) if part is not None)
        own = "" if self.neighbors is None else f", neighbors={self.neighbors!r}"
        flattened = f", part_distance={self.part_distance!r}" if self.part_distance != "visible" else ""
        settings = f"k1={self.k1}, k2={self.k2}, eta={self.eta:g}, backend={self.backend!r}"
        return f"Centralizer({parts}{settings}{flattened}{own})"


def _extractor(given: Extractor | FeatureModel | None, parameters: dict[str, Any]) -> Extractor | None:
    """The extractor, built where a model and parameters were given instead."""
    if parameters and (given is None or isinstance(given, Extractor)):
        raise ValueError(f"{', '.join(parameters)} must be given with a model, or to the Extractor itself.")
    return given if given is None or isinstance(given, Extractor) else Extractor(given, **parameters)


def _pictures(given: Pictures | None, parameters: dict[str, Any]) -> Pictures | None:
    """The source of pictures, built where its parameters were given instead."""
    names = ", ".join(parameters)
    if parameters and given is not None:
        raise ValueError(f"{names} must be given to the source of pictures itself, such as {type(given).__name__}.")
    if parameters and ("generator" in parameters) == ("generated" in parameters):
        raise ValueError(f"{names} needs exactly one source: generator= or generated=.")
    if "generator" in parameters:
        return GeneratedPictures(parameters.pop("generator"), **parameters.pop("generate_options", {}), **parameters)
    if "generated" in parameters:
        return PictureFolder(parameters.pop("generated"), **parameters)
    if given is not None and not callable(given):
        wanted = "callable, such as GeneratedPictures(generator) or PictureFolder(directory)"
        raise TypeError(f"pictures must be {wanted}, got {type(given).__name__}.")
    return given


class _Generated(Images):
    """The M generated images of each image, with its side inputs and those of their poses."""

    def __init__(self, stream: Iterator[Any], m: int, of_image: SideInputs, of_pose: Mapping[str, Any]) -> None:
        self.m, self.each = m, (m,)
        self.of_image, self.of_pose = of_image, SideInputs(of_pose, m)
        self.stream = (picture for pictures in stream for picture in pictures)

    def name(self, row: int) -> str:
        return f"generated image {row % self.m + 1} of images[{row // self.m}]"

    def keywords(self, rows: Sequence[int], device: torch.device) -> dict[str, Any]:
        of_image = self.of_image.take((row // self.m for row in rows), device)
        return {**of_image, **self.of_pose.take((row % self.m for row in rows), device)}
