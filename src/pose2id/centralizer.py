"""`Centralizer`: feature centralization inside an existing pipeline."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from PIL import Image
from torch import Tensor

from pose2id.centralization.cameras import STATISTICS, CameraModel
from pose2id.centralization.diagnostics import GenerationDiagnostics, generation_diagnostics
from pose2id.centralization.enhancement import METHODS, Enhancement
from pose2id.centralization.fusion import fuse
from pose2id.centralization.nfc import PART_DISTANCES, checked_weights, nfc, with_neighbors
from pose2id.extractor import Extraction, Extractor, FeatureModel, Images, SideInputs, stored
from pose2id.io.checks import (
    BLOCK_BYTES,
    checked_choice,
    checked_count,
    checked_flag,
    checked_flags,
    checked_memory,
    checked_number,
)
from pose2id.io.decoding import decoding_once
from pose2id.io.rows import FeatureArray, Rows, as_container, blocks, checked_pair
from pose2id.ipg.pictures import GeneratedPictures, Generator, PictureFolder, Pictures, PosedPictures, in_order
from pose2id.neighbors.search import BACKENDS, NeighborSearch, checked_search
from pose2id.retrieval.guarded_rerank import reranked

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from pose2id.poses import Pose


logger = logging.getLogger(__name__)
_OF_NFC = ("k1", "k2", "backend", "neighbors", "max_memory")
_EVIDENCE_BYTES = 4096  # a row
_K = 2  # NFC's k1 and k2 unless given


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

        query_feats, gallery_feats = Centralizer().enhance(query_feats, gallery_feats)

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
        method: how `enhance` centralizes.
            "auto": "guarded" without cameras. With cameras "cameras", where the evidence that people repeat is strong
            (gate at least 0.5) and most gallery images are in cameras of at least 16; elsewhere "guarded".
            "guarded": neighbours that are nearer than strangers can be, and nothing where people appear once
            (`evidence`); with cameras after centring, for each pair of cameras.
            "cameras": centring, a map across cameras, links across cameras (`link_map`, `link_weights`), unguarded.
            "centring": camera means alone (`centre_cameras`).
            "nfc": Algorithm 1 as published, on both sets apart (`nfc`): it harms where people appear once.
            All but "nfc" are this library's own, not the paper's.
        k1: how many neighbours a feature proposes (see `nfc`): 2 unless given. Giving k1 or k2 selects method="nfc".
        k2: how many neighbours the other side looks at: 2 unless given.
        eta: weight of generated images in eq. 9: Market1501 2, Occluded-ReID 1, SYSU-MM01 1/4.
        part_distance: how features in parts find neighbours: "visible" or "flattened" (see `nfc`).
        backend: the search engine: "auto", "faiss" or "torch".
        neighbors: a search of your own in its place (see `nfc`), with method="nfc".
        max_memory: bytes for each search, see `pose2id.nearest_neighbors`.
        **shortcuts: transform, inputs, batch_size, device, flip and pad_last_batch, for an `Extractor` of the model;
            generator with generate_options (the generator's keywords), for `GeneratedPictures`; or generated, a folder
            or URL (s3://, hf://, ...), for a `PictureFolder`; poses, num_poses and pose_inputs for either. None means
            the default.
    """

    def __init__(
        self,
        extractor: Extractor | FeatureModel | None = None,
        pictures: Pictures | None = None,
        *,
        method: str = "auto",
        k1: int | None = None,
        k2: int | None = None,
        eta: float = 2.0,
        part_distance: str = "visible",
        backend: str = "auto",
        neighbors: NeighborSearch | None = None,
        max_memory: int | None = None,
        **shortcuts: Unpack[Shortcuts],
    ) -> None:
        checked_choice(method, "method", METHODS)
        if (k1 is not None or k2 is not None) and method not in ("auto", "nfc"):
            raise ValueError(f"k1 and k2 must be None with method={method!r}; they are parameters of 'nfc'.")
        self.method = method if k1 is None and k2 is None else "nfc"
        self.k1 = checked_count(_K if k1 is None else k1, "k1")
        self.k2 = checked_count(_K if k2 is None else k2, "k2")
        self.eta = checked_number(eta, "eta", 0, 1e6)
        self.part_distance = checked_choice(part_distance, "part_distance", PART_DISTANCES)
        self.backend = checked_choice(backend, "backend", BACKENDS)
        self.neighbors = checked_search(neighbors, backend)
        if neighbors is not None and self.method != "nfc":
            raise ValueError(f"neighbors must be None with method={method!r}; a search of your own is for 'nfc'.")
        checked_memory(max_memory)
        self.max_memory = max_memory
        for name in shortcuts.keys() - Shortcuts.__annotations__.keys():
            known = ", ".join(["method", *_OF_NFC, "eta", "part_distance", *Shortcuts.__annotations__])
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
        self,
        images: Any,
        *,
        colors: str = "rgb",
        progress: bool = True,
        return_visibility: bool = False,
        generated_inputs: Mapping[str, Any] | None = None,
        **side_inputs: Any,
    ) -> Any:
        """Fused features of images (eq. 9): of each image and of its generated images, through the user's extractor.

            f~ = normalize(f + eta / M * sum of f_m over m = 1..M)

        The same as `fuse(extract(images, normalize=False), extract_generated(images))`, but the images go through in
        blocks of the extractor's batch size: beside the result, memory does not grow with their number. Pictures are
        generated when their batch is due. Add neighbours with `enhance`.

        Args:
            images: as in `Extractor.__call__`; with a transform, pictures or paths.
            colors: "rgb" or "bgr", of the images, as in `Extractor.__call__`. The source of pictures gets them in RGB,
                and generated images are always RGB.
            progress: show one bar for original and generated images on a terminal.
            return_visibility: also return the visibility (N, P) of the originals' parts, or None.
            generated_inputs: keywords for the model that generated images get in place of their original's, by name:
                what has one entry per image goes to all generated images of that image, anything else, None too, to the
                model as it is: `{"cam_label": None}` for a model that takes None for "no camera".
            **side_inputs: keywords for the model, as in `Extractor.__call__`. Entries of an image go to its generated
                images too (the original's camera, modality), except for those in `generated_inputs` and `pose_inputs`.

        Returns:
            (N, D) L2-normalised features, or (N, P, D) parts, each L2-normalised, in the container, dtype and device
            that the model returns. A part's generated mean is taken over the images that show it, where the model
            returns visibility. With num_poses=0: the normalised features of the originals.
        """
        if getattr(self.pictures, "num_poses", None) == 0:
            options = {"colors": colors, "progress": progress, "return_visibility": return_visibility}
            return self.extract(images, **options, **side_inputs)
        checked_flags(progress=progress, return_visibility=return_visibility)
        fused = visibility = None
        with self._at_work(images, side_inputs, generated_inputs, colors, progress) as (model, originals, pictures):
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
        query_camids: Any = None,
        gallery_camids: Any = None,
        camera_model: CameraModel | None = None,
        camera_statistics: str = "both",
        joint: bool = False,
        query_visibility: Any = None,
        gallery_visibility: Any = None,
    ) -> tuple[FeatureArray, FeatureArray]:
        """Centralize query and gallery features with their neighbours, as `method` says; nothing is learnt from labels.

        Queries meet the gallery alone and never each other, so that a query alone gets what it gets in a batch, but for
        the means of cameras with camera_statistics="both". "nfc" centralizes the two sets apart, as published. Which
        method ran, and on what evidence, is logged in one line (level INFO).

        Args:
            query_feats: (Q, D) raw or normalised features, or (Q, P, D) of their parts, floating numpy array or torch
                tensor. Not modified.
            gallery_feats: (G, D) or (G, P, D) features of the same model.
            query_camids: (Q,) cameras: integers, whole floats or strings; -1 or None, or None for all: unknown. Whole
                features only. A camera that the gallery lacks is allowed.
            gallery_camids: (G,) cameras; without any that is known, methods go without cameras.
            camera_model: means and map of a model (`CameraModel.fit` of the gallery), to treat a live query as the
                gallery was; in place of those of these sets.
            camera_statistics: camera means of "both" sets, or of the "gallery" alone: then no query enters anything. A
                camera_model has its own.
            joint: for "nfc": search neighbours in the union of both sets instead, of which a copy is made; figures are
                then not comparable with published ones.
            query_visibility: (Q, P) of the parts, booleans or weights, as in `nfc`; what `__call__` and `extract` give
                with `return_visibility`. None: every part is fully visible.
            gallery_visibility: (G, P), likewise.

        Returns:
            (query, gallery), L2-normalised, parts each by itself, each in the shape, container, dtype and device it
            came in. Neighbours of parts are those of `part_distances`, or with part_distance="flattened" of all parts
            in one vector.

        Warns:
            UserWarning: method="nfc", and the gallery gives no evidence that people repeat (not looked for where
                max_memory has no room for it: about 4 kB a gallery image). Queries are not asked: NFC harms, too, where
                each person has one query.
        """
        joint = checked_flag(joint, "joint")
        checked_choice(camera_statistics, "camera_statistics", STATISTICS)
        if joint and self.method != "nfc":
            raise ValueError(
                f"joint must be False with method={self.method!r}, which compares queries with the gallery."
            )
        query = Rows(query_feats, "query_feats", normalize=True, parts=True)
        gallery = Rows(gallery_feats, "gallery_feats", normalize=True, parts=True)
        checked_pair(query, gallery, "query_feats", "gallery_feats")
        visibility = (
            checked_weights(query, query_visibility, "query_visibility", self.part_distance),
            checked_weights(gallery, gallery_visibility, "gallery_visibility", self.part_distance),
        )
        enhancement = Enhancement(
            query,
            gallery,
            (query_camids, gallery_camids),
            camera_model=camera_model,
            statistics=camera_statistics,
            visibility=visibility,
            backend=self.backend,
            max_memory=self.max_memory,
        )
        if self.method != "nfc":
            features, reason = enhancement.run(self.method)
            logger.info("enhance: %s", reason)
            return features
        # NFC itself may do with less memory than lists for the evidence need.
        enough = self.max_memory is None or self.max_memory >= _EVIDENCE_BYTES * gallery.n + BLOCK_BYTES
        found = enhancement.evidence() if enough else None
        if found is not None and found.k and found.gate == 0:
            remedy = "method='auto' keeps strangers apart"
            warnings.warn(f"method='nfc' may harm here. {found.numbers} {remedy}.", stacklevel=2)
        said = found.numbers if found else "Evidence not looked for."
        if enhancement.has_cameras:
            said += " Cameras are not used."
        logger.info("enhance: nfc, k1 %d, k2 %d, whatever the evidence. %s", self.k1, self.k2, said)
        if joint:
            given = query_visibility, gallery_visibility
            return self._joint_nfc(query_feats, gallery_feats, given)
        settings: dict[str, Any] = {name: getattr(self, name) for name in _OF_NFC}
        return with_neighbors(query, visibility[0], **settings), with_neighbors(gallery, visibility[1], **settings)

    def _joint_nfc(self, query_feats: Any, gallery_feats: Any, given: tuple[Any, Any]) -> Any:
        """NFC in the union of both sets, of which a copy is made; `given` is their visibility."""
        query, gallery = (
            Rows(x, name, parts=True) for x, name in ((query_feats, "query_feats"), (gallery_feats, "gallery_feats"))
        )
        dtype = torch.promote_types(query.dtype, gallery.dtype)
        rows = torch.cat([rows.read(slice(None), dtype) for rows in (query, gallery)])
        both: Any = as_container(query.by_part(rows) if query.in_parts else rows, query_feats)
        visibility = None
        if given[0] is not None or given[1] is not None:
            shown = query.visibility(given[0], "query_visibility")
            visibility = torch.cat([shown, gallery.visibility(given[1], "gallery_visibility")])
        settings: dict[str, Any] = {name: getattr(self, name) for name in _OF_NFC}
        both = nfc(both, visibility=visibility, part_distance=self.part_distance, **settings)
        enhanced = (both if isinstance(both, Tensor) else torch.from_numpy(both)).flatten(1)
        results = query.empty(), gallery.empty()
        query.write(results[0], slice(None), enhanced[: query.n])
        gallery.write(results[1], slice(None), enhanced[query.n :])
        return results

    def rerank(
        self,
        query_feats: FeatureArray,
        gallery_feats: FeatureArray,
        *,
        query_camids: Any = None,
        gallery_camids: Any = None,
        topk: int | None = None,
        force: bool = False,
    ) -> Any:
        """Re-ranked distances of queries to gallery images, where re-ranking does no harm; joint, as all re-ranking.

        With cameras: both sets are centred, mapped and summed together, as by method="cameras", and compared by the
        camera-aware Jaccard distance (`k_reciprocal` with cameras, lambda_value=0.5). Without cameras and with evidence
        that people repeat: `k_reciprocal` with k1=10, k2=3; without such evidence: plain distances. Which of them is
        logged in one line (level INFO). Independent of `method`; give features as the model made them, or fused ones.

        Args:
            query_feats: (Q, D) floating features, numpy array or torch tensor. Not modified.
            gallery_feats: (G, D) features of the same model, on the same device.
            query_camids: (Q,) cameras, as in `enhance`; without cameras where fewer than half of all images have one.
            gallery_camids: (G,) cameras.
            topk: how many of the nearest gallery images to return for each query; None: distances to all of them.
            force: re-rank without cameras whatever the evidence.

        Returns:
            (Q, G) float32 distances for `evaluate_rank`, or with topk (distances, indices), as `k_reciprocal`. Plain
            ones are squared Euclidean distances of the L2-normalised features.
        """
        checked_flag(force, "force")
        query = Rows(query_feats, "query_feats", normalize=True)
        gallery = Rows(gallery_feats, "gallery_feats", normalize=True)
        checked_pair(query, gallery, "query_feats", "gallery_feats")
        found, reason = reranked(
            query,
            gallery,
            (query_camids, gallery_camids),
            topk=topk,
            force=force,
            backend=self.backend,
            max_memory=self.max_memory,
        )
        logger.info("rerank: %s", reason)
        if topk is None:
            return as_container(found, query_feats)
        return tuple(as_container(values, query_feats) for values in found)

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
        self,
        images: Any,
        *,
        colors: str = "rgb",
        progress: bool = True,
        return_visibility: bool = False,
        generated_inputs: Mapping[str, Any] | None = None,
        **side_inputs: Any,
    ) -> Any:
        """Raw features (N, M, D) or (N, M, P, D) of the generated images: to try several eta, or to keep them.

        Arguments and errors are those of `__call__`; the visibility is that of the generated images' parts, (N, M, P).
        """
        checked_flags(progress=progress, return_visibility=return_visibility)
        with self._at_work(images, side_inputs, generated_inputs, colors, progress, both=False) as (model, _, pictures):
            features, visibility = model.next_features(pictures, len(images))
        return (features, visibility) if return_visibility else features

    def diagnose(
        self,
        images: Any,
        *,
        colors: str = "rgb",
        progress: bool = True,
        generated_inputs: Mapping[str, Any] | None = None,
        **side_inputs: Any,
    ) -> GenerationDiagnostics:
        """How much of a person the model sees in generated images, without labels: `pose2id.generation_diagnostics`.

        Arguments and errors are those of `__call__`, for at least 2 images. All features are held; a few hundred images
        of different people are enough.
        """
        checked_flag(progress, "progress")
        with self._at_work(images, side_inputs, generated_inputs, colors, progress) as (model, originals, pictures):
            features, generated = (model.next_features(some, len(images))[0] for some in (originals, pictures))
        return generation_diagnostics(features, generated)

    @contextmanager
    def _at_work(
        self,
        images: Any,
        side_inputs: Mapping[str, Any],
        generated_inputs: Mapping[str, Any] | None,
        colors: str,
        progress: bool,
        *,
        both: bool = True,
    ) -> Iterator[tuple[Extraction, Images, Images]]:
        """The model at work, the images, and their generated images, after all checks that need no model."""
        extractor = self._given_extractor()
        originals = extractor.checked(images, side_inputs, colors)
        if self.pictures is None:
            remedy = "generator=IdentityGenerator.from_pretrained(...) or generated=DIR"
            raise ValueError(f"pictures must be given to fuse images with generated ones: pass {remedy}.")
        of_pose: dict[str, Any] = {}
        if isinstance(self.pictures, PosedPictures):
            of_pose = self.pictures.side_inputs(originals.side_inputs.get)
        of_image = _of_generated(side_inputs, generated_inputs, of_pose, len(originals.items))
        with decoding_once():
            pictures = _Generated(*in_order(self.pictures, originals.items), of_image, of_pose)
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
        of_nfc = f", k1={self.k1}, k2={self.k2}" if self.method == "nfc" else ""
        settings = f"method={self.method!r}{of_nfc}, eta={self.eta:g}, backend={self.backend!r}"
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


def _of_generated(
    of_original: Mapping[str, Any], given: Mapping[str, Any] | None, of_pose: Mapping[str, Any], n: int
) -> SideInputs:
    """The side inputs of n images, for their generated images: their own where none are given in their place."""
    given = {} if given is None else given
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"generated_inputs must map keywords of the model to values, got {given!r}.")
    for name in given:
        if name in of_pose:
            raise ValueError(f"generated_inputs must not hold {name!r}, which pose_inputs give. Leave one of them out.")
    SideInputs(given, n, "generated_inputs[{!r}]")  # its errors
    return SideInputs({**of_original, **given}, n)


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
