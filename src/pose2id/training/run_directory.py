"""The directory of a training run: what it began with, who trains in it, and which weights it has published.

A start claims it first, before minutes of work on images; then it begins with the images.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import pose2id
from pose2id.io.whole_files import whole_file
from pose2id.ipg.batch import fingerprint
from pose2id.ipg.generator import IdentityGenerator
from pose2id.ipg.weights import CARD, model_card
from pose2id.training import checkpoints
from pose2id.training.cleansed_people import Cleansed
from pose2id.training.log import RECENT, Metrics
from pose2id.training.objective import TRAINED
from pose2id.training.pairs import Selection
from pose2id.training.settings import FREE, TrainingSettings

logger = logging.getLogger(__name__)

RUN_FILE, LOCK = "run.json", ".lock"
_FORMAT = 2
_ELSEWHERE = "Train in another directory."
# Of the first start, whatever generator a later one is given: the checkpoints' weights come from there.
_OPTIONS = ("license", "sources", "round_bank")
_ORIGIN = (*_OPTIONS, "origin")
_SINCE = {"clean": False, "poses": "all", "occlude": 0.0}  # settings that older runs do not name, and what they did
_KEYS = frozenset({"format", "settings", "images", "generator", "start", "published", *_ORIGIN})


class RunDirectory:
    """A directory that a run begins in, or goes on in. Only the main process of several writes to it.

    Args:
        path: new or empty, or of a run.

    Attributes:
        path: as given.
        content: of `run.json`. "settings" (among them the generator's "ifr"), "images" (a digest) and "generator" (a
            digest of what training does not change) must be the same at every start; "start" (a digest of the weights
            that training began with), "license", "sources", "round_bank" and "origin" stay the first start's;
            "published" is the step of the published weights, None: not known, or there are none. "cleansing" is what
            was left out (`cleansed_people.Cleansed`; None: nothing was judged), "poses_refused" images that are no
            targets, and why.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {}
        self._about = ""
        self._before: dict[str, Any] = {}  # of the run that goes on, as it was found
        self._lock = FileLock(path / LOCK)

    @property
    def origin(self) -> dict[str, Any]:
        """Arguments of `IdentityGenerator` that stay the first start's."""
        return {name: self.content[name] for name in _OPTIONS}

    def older_defaults(self) -> dict[str, Any]:
        """Settings that a run of a version without data cleansing had by default: it goes on with them."""
        file = self.path / RUN_FILE
        if not file.is_file() or "clean" in (settings := _read(file)["settings"]):
            return {}
        return {name: settings.get(name, value) for name, value in _SINCE.items()}

    def recorded_cleansing(self, key: str) -> Cleansed | None:
        """What the run left out of the images of this key (`Cleansed.key`) at an earlier start, if there was one.

        After `claim`, before minutes of work on images with which the run cannot go on.
        """
        found = Cleansed.from_json(self._before.get("cleansing"))
        if found is not None and found.key != key and checkpoints.found(self.path):
            raise self._other_images()
        return found

    def claim(self, settings: TrainingSettings, generator: IdentityGenerator, *, origin: str, longer: bool) -> None:
        """Lock the directory until `release`, and see that it is free, or that its run can go on with these.

        `longer`: the number of steps may be another than before.
        """
        require_directory(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise FileExistsError(f"{self.path} is being trained in by another process. Wait for it.") from error
        height, width = generator.image_size
        self._about = f"{height} x {width} pixels"
        self.content = {
            "format": _FORMAT,
            "settings": {
                **{name: value for name, value in asdict(settings).items() if name not in FREE},
                "ifr": generator.identity_tokens.ifr,
            },
            "generator": _architecture(generator),
            "start": fingerprint(generator, TRAINED, sampling=False),
            **{name: getattr(generator, name) for name in _OPTIONS},
            "origin": origin,
            "published": None,
        }
        if not (self.path / RUN_FILE).exists():
            return
        self._before = _read(self.path / RUN_FILE)
        if known := checkpoints.found(self.path):
            self._check_same(("steps",) if longer else (), known[-1])
        elif (self.path / checkpoints.WEIGHTS).exists():
            raise FileExistsError(f"{self.path} has weights of a run whose checkpoints are gone. Choose another.")
        checkpoints.remove_unfinished(self.path)

    def begin(self, selection: Selection) -> None:
        """Make the directory, which is claimed, that of a run on these images, or see that it is.

        `run.json` of a run that goes on is written later, by `write`, when nothing else has gone wrong.
        """
        self._about += f", on {str(selection).splitlines()[0]}"
        self.content |= {
            "images": selection.digest,
            "cleansing": None if selection.cleansed is None else selection.cleansed.to_json(),
            "poses_refused": [list(refused) for refused in selection.refused],
        }
        if not self._before:
            self.write()
            return
        if checkpoints.found(self.path):
            self._check_same_images()
            self._take_over()
        elif self._before["start"] != self.content["start"]:
            logger.warning(
                "%s has no checkpoint and begins anew, with other weights than before. Training changes a generator in "
                "place: load it again to start where the first attempt did.",
                self.path,
            )

    def write(self) -> None:
        """Write `run.json`."""
        with whole_file(self.path / RUN_FILE) as unfinished:
            unfinished.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")

    def publish(self, step: int, *, keep: int) -> None:
        """Publish the newest checkpoint's weights, which are of this step, unless they are published already."""
        if self.content["published"] == step and (self.path / checkpoints.WEIGHTS).exists():
            return
        checkpoints.prune(self.path, keep)  # a kill after the last checkpoint may have left more
        self.content["published"] = None  # a kill on the way must not leave weights under a wrong number
        self.write()
        checkpoints.publish(self.path)
        self.content["published"] = step
        self.write()

    def notes(self, step: int, metrics: Metrics) -> str:
        """For the model card: how the weights of a step were trained."""
        content = self.content
        # With a constant rate the weights of a step do not depend on how many more were to come.
        hidden = "steps" if content["settings"]["schedule"] == "constant" else ""
        listed = "".join(f"* {name}: {value}\n" for name, value in content["settings"].items() if name != hidden)
        began = f" Started from {content['origin']}." if content["origin"] else ""
        validation = metrics.validations.get(step)
        seen = "" if validation is None else f" Identity retention {validation['retention']:.3f}."
        return (
            f"## Training\n\nTrained with pose2id {pose2id.__version__} for {step} steps, {self._about}.{began} Mean "
            f"loss of the last {min(RECENT, step)} steps {metrics.recent_loss():.4f}.{seen}\n\n{listed}"
        )

    def update_card(self, step: int, metrics: Metrics, *, new: bool) -> None:
        """Have the model card of this step's checkpoint, if any, say what its validation found."""
        known = checkpoints.found(self.path)
        published = self.content["published"] == step and not new  # with that on its card
        lost = not math.isfinite(metrics.recent_loss())  # the log was removed
        if not known or checkpoints.step_of(known[-1]) != step or published or lost:
            return
        self.content["published"] = None
        with whole_file(known[-1] / checkpoints.WEIGHTS / CARD) as unfinished:
            card = model_card(self.content["sources"], self.content["license"], self.notes(step, metrics))
            unfinished.write_text(card, encoding="utf-8")

    def release(self) -> None:
        """Let others train in the directory."""
        self._lock.release()

    def newest(self) -> str:
        """Where the run would go on from, in words."""
        known = checkpoints.found(self.path) if self.path.is_dir() else []
        return f"step {checkpoints.step_of(known[-1])}, its newest checkpoint" if known else "its beginning"

    def _take_over(self) -> None:
        began = self._before
        for name in _ORIGIN:
            if began[name] != self.content[name]:
                logger.warning(
                    "the run in %s goes on with the %s that it began with, %r, not with the generator's, %r",
                    self.path,
                    name,
                    began[name],
                    self.content[name],
                )
        before, steps = began["settings"].get("steps"), self.content["settings"]["steps"]
        if steps != before:
            logger.info("the run in %s goes on to %d steps, where it was to have %s", self.path, steps, before)
        self.content |= {name: began[name] for name in ("start", "published", *_ORIGIN)}

    def _check_same(self, free: Collection[str], newest: Path) -> None:
        """Raise if the run would go on with other settings or networks, or with fewer steps than it has done."""
        fixed, before = self.content["settings"], {"ifr": True, **_SINCE, **self._before["settings"]}
        differing = [name for name in fixed if name not in free and before.get(name) != fixed[name]]
        if differing:
            shown = ", ".join(f"{name} {before.get(name)!r} then, {fixed[name]!r} now" for name in differing)
            remedy = _ELSEWHERE
            if differing == ["steps"]:  # with a cosine, all rates would differ
                remedy = f"With a cosine they are fixed: start anew from the weights in {newest / checkpoints.WEIGHTS}."
                if fixed["schedule"] == "constant":
                    remedy = f"Pass steps={fixed['steps']} if it is to go on to as many."
            raise ValueError(f"settings must be those that {self._began_with}: {shown}. {remedy}")
        if self._before["generator"] != self.content["generator"]:
            what = "in its identity encoder, VAE, scheduler, image_size and architecture"
            raise ValueError(f"generator must be the one that {self._began_with}, {what}. {_ELSEWHERE}")
        done = checkpoints.step_of(newest)
        if (steps := fixed["steps"]) < done:
            raise ValueError(f"steps must be at least the {done} that the run in {self.path} has done, got {steps}.")

    def _check_same_images(self) -> None:
        """Raise if the run would go on with other images, or other targets."""
        if self._before["images"] != self.content["images"]:
            raise self._other_images()
        # By the rules of another version other images would be targets.
        refused, now = ([name for name, *_ in of.get("poses_refused") or []] for of in (self._before, self.content))
        if refused != now:
            given = f"{len(refused)} poses refused then, {len(now)} now, or other ones"
            raise ValueError(
                f"poses must be valid by the rules that {self._began_with}: {given}. Go on with its version of pose2id."
            )

    def _other_images(self) -> ValueError:
        return ValueError(f"images must be those that {self._began_with}, in the same order and poses. {_ELSEWHERE}")

    @property
    def _began_with(self) -> str:
        return f"the run in {self.path} began with"


def require_directory(directory: str | os.PathLike[str]) -> None:
    """Raise a FileExistsError if the directory of a run would be where something else is."""
    path = Path(directory).expanduser()
    # A first start that was killed may have left an unfinished run file and its lock, and nothing else.
    others = [file for file in path.glob("*") if file.name != LOCK and not file.match(f".{RUN_FILE}.*")]
    if path.is_file() or (others and not (path / RUN_FILE).exists()):
        raise FileExistsError(f"{path} must be new, empty, or the directory of a run. Choose another.")


def _architecture(generator: IdentityGenerator) -> str:
    """A digest of what a generator computes with that training does not change."""
    shapes = [
        [f"{name}.{key}", *tensor.shape]
        for name in TRAINED
        for key, tensor in generator.parts[name].state_dict().items()
    ]
    frozen = fingerprint(generator, ("vae", "identity_encoder"), sampling=False)
    return hashlib.sha256(json.dumps([frozen, shapes]).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content["settings"], dict) and content.keys() >= _KEYS and content["format"] == _FORMAT:
            return content
    except (KeyError, RecursionError, TypeError, ValueError):
        pass
    raise ValueError(f"{path} is damaged, or of another version of pose2id. Train in another directory.")
