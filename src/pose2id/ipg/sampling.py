"""`Sampling`: the settings that, with image, pose and weights, determine a picture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pose2id.io.checks import checked_choice, checked_count, checked_number, checked_size

# diffusers' names, which the methods of the generator and the notes in pictures use.
_FIELDS = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "seed": "seed",
    "size": "size",
    "ablation": "ablation",
}
# What a picture is made from: the reference's bank, its identity tokens, the pose.
_SEEN = {
    "none": {"bank", "tokens", "pose"},
    "pose-alone": {"pose"},
    "appearance-alone": {"bank", "tokens"},
    "no-bank": {"tokens", "pose"},
    "no-tokens": {"bank", "pose"},
}
ABLATIONS = tuple(_SEEN)


@dataclass(frozen=True)
class Sampling:
    """How pictures are sampled.

    Attributes:
        steps: of the scheduler, at least 1 (`num_inference_steps`).
        guidance: scale of classifier-free guidance, from 0 to 1000; 1 leaves guidance out (`guidance_scale`).
        seed: of the noise, at least 0.
        size: (height, width) of the pictures in pixels, resized as the published code does (bicubic); None: as
            generated.
        ablation: what pictures do without, to measure what it is worth (the paper's ablations). "none": nothing.
            "pose-alone": the reference is not seen, as in unconditional rows. "appearance-alone": pose features are 0.
            "no-bank": no reference attention. "no-tokens": both UNets get the unconditional tokens, those of a
            mid-grey image.
    """

    steps: int = 20
    guidance: float = 3.5
    seed: int = 42
    size: tuple[int, int] | None = (256, 128)
    ablation: str = "none"

    def __post_init__(self) -> None:
        checked = {
            "steps": checked_count(self.steps, "steps (num_inference_steps)"),
            "guidance": checked_number(self.guidance, "guidance (guidance_scale)", 0, 1000),
            "seed": checked_count(self.seed, "seed", least=0),
            "size": None if self.size is None else checked_size(self.size),
            "ablation": checked_choice(self.ablation, "ablation", ABLATIONS),
        }
        for name, value in checked.items():  # plain Python numbers: JSON cannot store NumPy's
            object.__setattr__(self, name, value)

    def replaced(self, **settings: Any) -> Sampling:
        """With other settings: `num_inference_steps`, `guidance_scale`, `seed`, `size`, `ablation`."""
        for name in settings.keys() - _FIELDS.keys():
            raise TypeError(f"sampling has no setting {name!r}. They are {', '.join(_FIELDS)}.")
        return replace(self, **{_FIELDS[name]: value for name, value in settings.items()})

    def sees(self, what: str) -> bool:
        """Whether pictures are made from the "bank", the "tokens" or the "pose"."""
        return what in _SEEN[self.ablation]

    def keywords(self) -> dict[str, Any]:
        """As keywords of `generate`. No ablation has no keyword, which generators of your own need not know."""
        given = {name: getattr(self, field) for name, field in _FIELDS.items()}
        return {name: value for name, value in given.items() if (name, value) != ("ablation", "none")}

    def note(self) -> dict[str, Any]:
        """As a picture's note records it, ready for JSON."""
        return self.keywords() | {"size": None if self.size is None else list(self.size)}
