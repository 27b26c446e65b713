"""`Sampling`: the settings that, with image, pose and weights, determine a picture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pose2id.io.checks import checked_count, checked_number, checked_size

# diffusers' names, which the methods of the generator and the notes in pictures use.
_FIELDS = {"num_inference_steps": "steps", "guidance_scale": "guidance", "seed": "seed", "size": "size"}


@dataclass(frozen=True)
class Sampling:
    """How pictures are sampled.

    Attributes:
        steps: of the scheduler, at least 1 (`num_inference_steps`).
        guidance: scale of classifier-free guidance, from 0 to 1000; 1 leaves guidance out (`guidance_scale`).
        seed: of the noise, at least 0.
        size: (height, width) of the pictures in pixels, resized as the published code does (bicubic); None: as
            generated.
    """

    steps: int = 20
    guidance: float = 3.5
    seed: int = 42
    size: tuple[int, int] | None = (256, 128)

    def __post_init__(self) -> None:
        checked = {
            "steps": checked_count(self.steps, "steps (num_inference_steps)"),
            "guidance": checked_number(self.guidance, "guidance (guidance_scale)", 0, 1000),
            "seed": checked_count(self.seed, "seed", least=0),
            "size": None if self.size is None else checked_size(self.size),
        }
        for name, value in checked.items():  # plain Python numbers: JSON cannot store NumPy's
            object.__setattr__(self, name, value)

    def replaced(self, **settings: Any) -> Sampling:
        """With other settings: `num_inference_steps`, `guidance_scale`, `seed`, `size`."""
        for name in settings.keys() - _FIELDS.keys():
            raise TypeError(f"sampling has no setting {name!r}. They are {', '.join(_FIELDS)}.")
        return replace(self, **{_FIELDS[name]: value for name, value in settings.items()})

    def keywords(self) -> dict[str, Any]:
        """As keywords of `generate`."""
        return {name: getattr(self, field) for name, field in _FIELDS.items()}

    def note(self) -> dict[str, Any]:
        """As a picture's note records it, ready for JSON."""
        return self.keywords() | {"size": None if self.size is None else list(self.size)}
