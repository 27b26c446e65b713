"""Validations of a training run: a few people are generated, and the identity encoder looks at the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pose2id.centralization.diagnostics import GenerationDiagnostics, generation_diagnostics
from pose2id.ipg.batch import contact_sheet, stacked
from pose2id.ipg.generator import IdentityGenerator
from pose2id.ipg.pixels import load_poses, load_reference, pixels
from pose2id.training.cache import identity_features
from pose2id.training.settings import TrainingSettings
from pose2id.training.table import PersonImage


def people_shown(images: Sequence[Any], count: int) -> list[Any]:
    """The first `count` images, of `PersonImage`s the first one of each person, each of which can be read."""
    chosen = require_people(images, count)
    for i, image in enumerate(chosen):  # now, not when the first validation is due
        load_reference(image, f"validation[{i}]")
    return chosen


def require_people(images: Sequence[Any], count: int) -> list[Any]:
    """`people_shown`, but no image is read; raise if it is one person."""
    given = list(images)
    if given and all(isinstance(image, PersonImage) for image in given):
        first: dict[str, Any] = {}
        for image in given:
            first.setdefault(image.identity, image.path)
        given = list(first.values())
    chosen = given[:count]
    if count and len(chosen) < 2:
        raise ValueError(
            f"validation must show at least 2 people, whose images are told apart, got {len(chosen)}. Show others "
            "(--validation TABLE), or none: validation_images=0 (--validation-images 0)."
        )
    return chosen


def validate(
    generator: IdentityGenerator, people: Sequence[Any], settings: TrainingSettings
) -> tuple[Image.Image, GenerationDiagnostics]:
    """A contact sheet of generated people, and how well the identity encoder recognises them."""
    references = [load_reference(image, "validation image") for image in people]
    drawings = [drawing for _, drawing in load_poses("standard")]
    generated = generator.generate(
        references,
        num_inference_steps=settings.validation_steps,
        guidance_scale=settings.validation_guidance,
        size=None,
        progress=False,
    )
    sheets = [contact_sheet(reference, drawings, row) for reference, row in zip(references, generated, strict=True)]
    size = tuple(generator.identity_encoder.image_size)

    def features(images: Sequence[Image.Image]) -> Tensor:
        seen = torch.stack([pixels(image, size) for image in images]).to(generator.device)
        return identity_features(generator.networks, seen)

    of_people = torch.stack([features(row) for row in generated])
    return stacked(sheets), generation_diagnostics(features(references), of_people)
