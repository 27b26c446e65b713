"""`Centralizer`: feature centralization inside an existing pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from pose2id.centralization.diagnostics import GenerationDiagnostics, generation_diagnostics
from pose2id.centralization.fusion import fuse
from pose2id.centralization.nfc import PART_DISTANCES, checked_weights, nfc
from pose2id.extractor import INPUTS, Extraction, Extractor, SideInputs, checked_transform, extract, extracting, stored
from pose2id.io.checks import (
    checked_choice,
    checked_count,
    checked_device,
    checked_flag,
    checked_memory,
    checked_number,
)
from pose2id.io.images import checked_images
from pose2id.io.rows import FeatureArray, Rows, checked_pair
from pose2id.ipg.folder import (
    Generator,
    check_notes,
    checked_directory,
    checked_generator,
    checked_options,
    checked_pose_inputs,
    checked_poses,
    find,
    generate,
    stack_values,
)
from pose2id.neighbors.search import BACKENDS

if TYPE_CHECKING:
    from pose2id.poses import Pose

_STANDARD_POSES = 8


class Centralizer:
    """Centralizes the features of any ReID model towards their identity's centre; trains and changes nothing.

    With features at hand, no model is needed:

        query_feats, gallery_feats = Centralizer(k1=2, k2=2).enhance(query_feats, gallery_feats)

    With images, it fuses their features with those of generated images of the same people (eq. 9):

        centralizer = Centralizer(my_model, generator=generator, transform=my_transform, eta=2.0)
        gallery_feats = centralizer(gallery_images, cam_label=cams)

    Args:
        extractor: the user's model (`pose2id.extractor.Extractor`): any callable from images to features. `enhance` and
            `fuse` don't need it.
        k1: how many neighbours a feature proposes (see `nfc`).
        k2: how many neighbours the other side looks at.
        part_distance: how features in parts find neighbours: "visible" or "flattened" (see `nfc`).
        eta: weight of generated images in eq. 9: Market1501 2, Occluded-ReID 1, SYSU-MM01 1/4.
        transform: picture to (3, H, W) float tensor; or a preset's name (`pose2id.extractor.PRESETS`), or a
            `pose2id.extractor.Preprocess(size, mean, std)`. None: images are tensors that the model takes as they are.
        inputs: "batch", or "images" for an extractor that reads paths or (H, W, 3) uint8 RGB arrays itself.
        batch_size: images per call of the extractor.
        device: where batches go; None: where the model is. The model is never moved. A module's batches come in the
            dtype of its parameters, half precision too.
        backend: "auto", "faiss" or "torch": who searches neighbours.
        max_memory: bytes for working blocks, see `pose2id.nearest_neighbors`.
        generator: makes pictures of the person on an image in other poses: a `pose2id.IdentityGenerator`, or any
            object with its `generate_iter` (`pose2id.ipg.folder.Generator`).
        generated: a directory of already generated images in place of a generator, `DIR/pose{m}/name` or a folder for
            each image (`pose2id.ipg.folder.find`); images must then be paths. Pictures that tell what they were made
            from, as those of `pose2id generate` do, must have been made from these images, in these poses; others are
            taken as they are.
        poses: "standard", the paper's eight, or a sequence of `pose2id.poses.Pose` or drawn poses.
        num_poses: M of eq. 9: the first so many of the poses. None: 8, or all of your own poses. 0: nothing is
            generated.
        flip: use f(x) + f(mirror(x)) as the feature of every image, original or generated.
        pose_inputs: keywords of the extractor that depend on the pose drawn: functions of a `Pose` which give a
            generated image's value in place of its original's, as for a model that takes keypoints
            `{"keypoints_xyc": lambda pose: pose.to_coco(size=(384, 128))}`.
        generate_options: keywords for the generator, such as seed or num_inference_steps.

    Raises:
        TypeError, ValueError: a parameter is out of range, or does not go with another; named.
    """

    def __init__(
        self,
        extractor: Extractor | None = None,
        *,
        k1: int = 2,
        k2: int = 2,
        part_distance: str = "visible",
        eta: float = 2.0,
        transform: Callable[[Image.Image], Tensor] | str | None = None,
        inputs: str = "batch",
        batch_size: int = 64,
        device: torch.device | str | None = None,
        backend: str = "auto",
        max_memory: int | None = None,
        generator: Generator | None = None,
        generated: str | os.PathLike[str] | None = None,
        poses: Any = "standard",
        num_poses: int | None = None,
        flip: bool = False,
        pose_inputs: Mapping[str, Callable[[Pose], Any]] | None = None,
        generate_options: Mapping[str, Any] | None = None,
    ) -> None:
        if extractor is not None and not callable(extractor):
            raise TypeError(f"extractor must be callable, got {type(extractor).__name__}.")
        self.extractor = extractor
        self.k1 = checked_count(k1, "k1")
        self.k2 = checked_count(k2, "k2")
        self.part_distance = checked_choice(part_distance, "part_distance", PART_DISTANCES)
        self.eta = checked_number(eta, "eta", 0, 1e6)
        self.inputs = checked_choice(inputs, "inputs", INPUTS)
        self.transform = checked_transform(transform, self.inputs)
        self.batch_size = checked_count(batch_size, "batch_size")
        self.device = None if device is None else checked_device(device)
        self.backend = checked_choice(backend, "backend", BACKENDS)
        checked_memory(max_memory)
        self.max_memory = max_memory
        if num_poses is None:
            num_poses = _STANDARD_POSES if isinstance(poses, str) or not hasattr(poses, "__len__") else len(poses)
        self.num_poses = checked_count(num_poses, "num_poses", least=0)
        self.flip = checked_flag(flip, "flip")
        self.generator = None if generator is None else checked_generator(generator)
        self.generated = None if generated is None else checked_directory(generated, self.num_poses)
        self.pose_inputs = checked_pose_inputs({} if pose_inputs is None else pose_inputs)
        self.generate_options = checked_options({} if generate_options is None else generate_options)
        self._check_generation()
        self.poses: tuple[Any, ...] = ()
        if generator is not None or self.pose_inputs or not isinstance(poses, str):
            self.poses = checked_poses(poses, self.num_poses, drawings=not self.pose_inputs)

    def __call__(
        self, images: Any, *, progress: bool = True, return_visibility: bool = False, **side_inputs: Any
    ) -> Any:
        """Fused features of images (eq. 9): of each image and of its generated images, through the user's extractor.

            f~ = normalize(f + eta / M * sum of f_m over m = 1..M)

        The same as `fuse(extract(images, normalize=False), extract_generated(images))`, but the images go through in
        blocks of `batch_size`: beside the result, memory does not grow with their number. Pictures are generated when
        their batch is due. Add neighbours with `enhance`.

        Args:
            images: as in `extract`; with a generator or a directory, pictures or paths.
            progress: show one bar for original and generated images on a terminal.
            return_visibility: also return the visibility (N, P) of the originals' parts, or None.
            **side_inputs: keywords for the extractor, as in `extract`. Entries of an image go to its generated images
                too (the original's camera, modality), except for those in `pose_inputs`.

        Returns:
            (N, D) L2-normalised features, or (N, P, D) parts, each L2-normalised, in the container, dtype and device
            that the extractor returns. A part's generated mean is taken over the images that show it, where the
            extractor returns visibility. With num_poses=0: the normalised features of the originals.

        Raises:
            TypeError, ValueError: nothing to take generated images from, or as in `extract`.
        """
        if self.num_poses == 0:
            return self.extract(images, progress=progress, return_visibility=return_visibility, **side_inputs)
        fused = visibility = None
        with self._reading(images, side_inputs, progress, pictures_per_image=1 + self.num_poses) as reading:
            n = len(images)
            for low in range(0, n, self.batch_size):
                index = range(low, min(low + self.batch_size, n))
                features, visible = reading.originals(index)
                generated, weights = reading.generated(index)
                fused = stored(fused, fuse(features, generated, self.eta, visibility=weights), index, n)
                visibility = stored(visibility, visible, index, n)
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

        Raises:
            TypeError, ValueError: bad input, named; an empty set, or a row that is not finite.
        """
        query = Rows(query_feats, "query_feats", parts=True)
        gallery = Rows(gallery_feats, "gallery_feats", parts=True)
        checked_pair(query, gallery, "query_feats", "gallery_feats")
        checked_weights(query, query_visibility, "query_visibility", self.part_distance)
        checked_weights(gallery, gallery_visibility, "gallery_visibility", self.part_distance)
        settings: dict[str, Any] = {
            "k1": self.k1,
            "k2": self.k2,
            "part_distance": self.part_distance,
            "backend": self.backend,
            "max_memory": self.max_memory,
        }
        if not joint:
            return (
                nfc(query_feats, visibility=query_visibility, **settings),
                nfc(gallery_feats, visibility=gallery_visibility, **settings),
            )
        dtype = torch.promote_types(query.dtype, gallery.dtype)
        both = torch.cat([rows.read(slice(None), dtype) for rows in (query, gallery)])
        if query.in_parts:
            both = query.by_part(both)
        visibility = None
        if query_visibility is not None or gallery_visibility is not None:
            shown = query.visibility(query_visibility, "query_visibility")
            visibility = torch.cat([shown, gallery.visibility(gallery_visibility, "gallery_visibility")])
        enhanced = nfc(both, visibility=visibility, **settings).flatten(1)
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
        """Eq. 9 on raw features (N, D) and (N, M, D) of generated images: `pose2id.fuse`; default: the own eta."""
        return fuse(features, generated, self.eta if eta is None else eta, visibility=visibility)

    def extract(
        self,
        images: Any,
        *,
        normalize: bool = True,
        progress: bool = True,
        return_visibility: bool = False,
        **side_inputs: Any,
    ) -> Any:
        """Features of images from the user's extractor, L2-normalised unless told otherwise.

        Args:
            images: sequence of paths, PIL pictures, (H, W, 3) uint8 RGB arrays or (3, H, W) float tensors in [0, 1], or
                one array of them; without a transform, tensors that the model takes as they are.
            normalize: L2-normalise each feature, or each part's. False gives the raw outputs, which `fuse` wants.
            progress: show a bar on a terminal.
            return_visibility: also return the visibility (N, P) that came with part features, or None.
            **side_inputs: keywords for the extractor (`cam_label=cams`). Tensors, arrays and lists have one entry per
                image and are sliced with the batch, and so are tuples of that length; anything else is passed on.

        Returns:
            (N, D) features, or (N, P, D) parts, in the container, dtype and device that the extractor returns.

        Raises:
            TypeError, ValueError: no extractor, bad or unreadable images (named), outputs that are no finite features.
        """
        features, visibility = extract(
            self._given_extractor(),
            images,
            transform=self.transform,
            inputs=self.inputs,
            batch_size=self.batch_size,
            device=self.device,
            flip=self.flip,
            progress=progress,
            side_inputs=side_inputs,
        )
        rows = Rows(features, "extractor output", normalize=normalize, parts=True)
        if normalize:
            # The array is new: normalised where it lies.
            for block in rows.blocks():
                rows.write(features, block, rows.read(block))
        return (features, visibility) if return_visibility else features

    def extract_generated(
        self, images: Any, *, progress: bool = True, return_visibility: bool = False, **side_inputs: Any
    ) -> Any:
        """Raw features of the generated images: to try several eta with `fuse`, or to keep them.

        Args:
            images: the originals, as in `__call__`.
            progress: as in `__call__`.
            return_visibility: also return the visibility (N, M, P) of the generated images' parts, or None.
            **side_inputs: as in `__call__`.

        Returns:
            (N, M, D) or (N, M, P, D) features, not normalised, as the extractor returns them.

        Raises:
            TypeError, ValueError: as in `__call__`, and if num_poses is 0.
        """
        with self._reading(images, side_inputs, progress, pictures_per_image=self.num_poses) as reading:
            features, visibility = reading.generated(range(len(images)))
        return (features, visibility) if return_visibility else features

    def diagnose(self, images: Any, *, progress: bool = True, **side_inputs: Any) -> GenerationDiagnostics:
        """How much of a person the model sees in generated images, without labels, and what that suggests for eta.

        Holds all features; a few hundred images of different people are enough.

        Args:
            images: at least 2, as in `__call__`.
            progress: as in `__call__`.
            **side_inputs: as in `__call__`.

        Returns:
            `pose2id.generation_diagnostics` of the images' features.

        Raises:
            TypeError, ValueError: as in `__call__`, fewer than 2 images, and if num_poses is 0.
        """
        if len(checked_images(images)) < 2:
            raise ValueError("images must be at least 2, to compare with other images' pictures, got 1.")
        with self._reading(images, side_inputs, progress, pictures_per_image=1 + self.num_poses) as reading:
            everything = range(len(images))
            return generation_diagnostics(reading.originals(everything)[0], reading.generated(everything)[0])

    @contextmanager
    def _reading(
        self, images: Any, side_inputs: Mapping[str, Any], progress: bool, *, pictures_per_image: int
    ) -> Iterator[_Reading]:
        """The extractor at work on images and their generated images, after all checks that need no model."""
        extractor, items = self._given_extractor(), checked_images(images)
        if self.num_poses == 0:
            raise ValueError("num_poses must be at least 1 for features of generated images, got 0.")
        side = SideInputs(side_inputs, len(items))
        values = {name: [function(pose) for pose in self.poses] for name, function in self.pose_inputs.items()}
        stacked = {name: stack_values(of_poses, side.get(name), name) for name, of_poses in values.items()}
        pictures = self._pictures(items)
        with extracting(
            extractor,
            transform=self.transform,
            inputs=self.inputs,
            batch_size=self.batch_size,
            device=self.device,
            flip=self.flip,
            total=len(items) * pictures_per_image,
            progress=progress,
        ) as run:
            yield _Reading(run, iter(items), side, pictures, self.num_poses, SideInputs(stacked, self.num_poses))

    def _pictures(self, images: Any) -> Iterator[Any]:
        if self.generated is not None:
            found = find(self.generated, images, self.num_poses)
            check_notes(found, images, self.poses)
            return iter(found)
        if self.generator is not None:
            return generate(self.generator, images, self.poses, self.generate_options)
        raise ValueError(
            "generator or generated must be given to fuse images with generated ones: Centralizer(my_model, "
            "transform=..., generator=IdentityGenerator.from_pretrained(...)), or generated=DIR. Without generated "
            "images use extract, then enhance."
        )

    def _given_extractor(self) -> Extractor:
        if self.extractor is None:
            raise ValueError("extractor must be given to extract features: Centralizer(my_model, transform=...).")
        return self.extractor

    def _check_generation(self) -> None:
        if self.generator is not None and self.generated is not None:
            raise ValueError("generator and generated must not be given both: one of them is where pictures come from.")
        if self.generator is None and self.generate_options:
            raise ValueError("generate_options must not be given without a generator: there is nothing to generate.")
        given = "generator" if self.generator is not None else "generated" if self.generated is not None else None
        if given and self.transform is None and self.inputs == "batch":
            raise ValueError(
                f"transform must be given with {given}=, got None: images must be pictures, and generated ones become "
                "the model's tensors by it. For an extractor that reads images itself pass inputs='images'."
            )
        if self.flip and self.pose_inputs:
            raise ValueError(
                "flip must be False with pose_inputs: what they say of a pose would not be mirrored with the picture."
            )

    def __repr__(self) -> str:
        """The parameters."""
        model = "" if self.extractor is None else f"{type(self.extractor).__name__}, "
        source = "" if self.generator is None else f", generator={type(self.generator).__name__}"
        source = source if self.generated is None else f", generated={os.fspath(self.generated)!r}"
        poses = f", num_poses={self.num_poses}" if source else ""
        flattened = f", part_distance={self.part_distance!r}" if self.part_distance != "visible" else ""
        return (
            f"Centralizer({model}k1={self.k1}, k2={self.k2}, eta={self.eta:g}, backend={self.backend!r}"
            f"{flattened}{source}{poses})"
        )


@dataclass
class _Reading:
    """One pass over images and their generated images, block by block and in order."""

    run: Extraction
    images: Iterator[Any]
    side: SideInputs
    pictures: Iterator[Any]  # one sequence of generated images for each image
    num_poses: int
    pose_side: SideInputs

    def originals(self, index: range) -> tuple[Any, Any]:
        """Raw features (B, ...) and visibility of the next B images."""

        def keywords(rows: range, device: torch.device) -> dict[str, Any]:
            return self.side.take([index[row] for row in rows], device)

        return self.run.features(self.images, len(index), keywords, lambda row: f"images[{index[row]}]")

    def generated(self, index: range) -> tuple[Any, Any]:
        """Raw features (B, M, ...) and visibility of the next B images' generated images."""
        m = self.num_poses

        def keywords(rows: range, device: torch.device) -> dict[str, Any]:
            of_image = self.side.take([index[row // m] for row in rows], device)
            return {**of_image, **self.pose_side.take([row % m for row in rows], device)}

        items = (picture for _ in index for picture in next(self.pictures))
        outputs = self.run.features(
            items, len(index) * m, keywords, lambda row: f"generated image {row % m + 1} of images[{index[row // m]}]"
        )
        features, visibility = (
            None if output is None else output.reshape(len(index), m, *output.shape[1:]) for output in outputs
        )
        return features, visibility
