"""The directory of a training run: what it was begun with, who trains in it, and which weights it has given out."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pose2id.io.whole_files import whole_file
from pose2id.training import checkpoints

logger = logging.getLogger(__name__)

RUN_FILE, LOCK = "run.json", ".lock"
_FORMAT = 1
# Of what the first start began with, whatever generator a later one is given: the checkpoints' weights come from it.
_ORIGIN = ("license", "sources", "round_bank", "origin")
_KEYS = frozenset({"format", "settings", "images", "generator", "start", "published", *_ORIGIN})


class RunDirectory:
    """A directory that a run is begun in, or goes on in. Only the main process of several writes to it.

    Args:
        path: that is new or empty, or that of a run.

    Attributes:
        path: as given.
        content: of `run.json`. "settings", "images" (a digest) and "generator" (a digest of what training does not
            change) must be the same at every start; "start" (a digest of the weights that training began with),
            "license", "sources", "round_bank" and "origin" stay the first start's; "published" says of how many steps
            the weights are that the run has given out, None: not known, or there are none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {}
        self._lock = FileLock(path / LOCK)

    def claim(self, content: Mapping[str, Any], *, free: Collection[str] = ()) -> None:
        """Make the directory this run's, or see that it is; nobody else may train in it until `release`.

        Of a run that goes on, `write` has the new content written: when everything else has turned out to be right.

        Args:
            content: for `run.json`, but for "published".
            free: settings that may be others than before.

        Raises:
            FileExistsError: the directory holds something else, or weights of a run whose checkpoints are gone, or
                somebody trains in it.
            ValueError: the run was begun with other settings, images or parts; or its file is damaged.
        """
        require_directory(self.path)
        self.content = {"format": _FORMAT, **content, "published": None}
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise FileExistsError(f"{self.path} is being trained in by another process. Wait for it.") from error
        if not (self.path / RUN_FILE).exists():
            self.write()
            return
        began = _read(self.path / RUN_FILE)
        known = checkpoints.found(self.path)
        if known:
            self._check_same(began, free, known[-1])
            self._take_over(began)
        elif (self.path / checkpoints.WEIGHTS).exists():
            raise FileExistsError(
                f"{self.path} has weights of a run whose checkpoints are gone: it can't go on, and beginning anew "
                "would replace them. Train in another directory."
            )
        elif began["start"] != self.content["start"]:
            logger.warning(
                "%s has no checkpoint and begins anew, with other weights than it began with before. Training changes "
                "a generator in place: load it anew to start where the first attempt did.",
                self.path,
            )
        checkpoints.remove_unfinished(self.path)

    def write(self) -> None:
        """Write `run.json`."""
        with whole_file(self.path / RUN_FILE) as unfinished:
            unfinished.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")

    def publish(self, steps: int, *, keep: int) -> None:
        """Give out the newest checkpoint's weights, which are of so many steps, unless they are given out already.

        Only the `keep` newest checkpoints stay: a kill after the last one may have left more.
        """
        if self.content["published"] == steps and (self.path / checkpoints.WEIGHTS).exists():
            return
        checkpoints.prune(self.path, keep)
        self.content["published"] = None  # a kill on the way must not leave weights of which something false is said
        self.write()
        checkpoints.publish(self.path)
        self.content["published"] = steps
        self.write()

    def release(self) -> None:
        """Let others train in the directory."""
        self._lock.release()

    def newest(self) -> str:
        """Where the run would go on from, in words."""
        known = checkpoints.found(self.path) if self.path.is_dir() else []
        return f"step {checkpoints.step_of(known[-1])}, its newest checkpoint" if known else "its beginning"

    def _take_over(self, began: Mapping[str, Any]) -> None:
        for name in _ORIGIN:
            if began[name] != self.content[name]:
                logger.warning(
                    "the run in %s goes on with the %s that it began with, %r, and not with the generator's, %r",
                    self.path,
                    name,
                    began[name],
                    self.content[name],
                )
        before, steps = began["settings"].get("steps"), self.content["settings"]["steps"]
        if steps != before:
            logger.info("the run in %s goes on to %d steps, where it was to have %s", self.path, steps, before)
        self.content |= {name: began[name] for name in ("start", "published", *_ORIGIN)}

    def _check_same(self, began: Mapping[str, Any], free: Collection[str], newest: Path) -> None:
        """Raise if the run would go on as another one, or with fewer steps than it has done."""
        fixed, where = self.content["settings"], f"the run in {self.path} began with"
        differing = [name for name in fixed if name not in free and began["settings"].get(name) != fixed[name]]
        if differing:
            shown = ", ".join(f"{name} {began['settings'].get(name)!r} then, {fixed[name]!r} now" for name in differing)
            raise ValueError(f"settings must be those that {where}: {shown}. {self._instead(differing, newest)}")
        if began["images"] != self.content["images"]:
            raise ValueError(
                f"images must be those that {where}, got others, or in another order, or with other poses, or some of "
                "them can't be read any more. Train in another directory."
            )
        if began["generator"] != self.content["generator"]:
            raise ValueError(
                f"generator must be the one that {where}, got one of another identity encoder, VAE, scheduler, "
                "image_size or architecture. Train in another directory."
            )
        done = checkpoints.step_of(newest)
        if fixed["steps"] < done:
            raise ValueError(
                f"steps must be at least the {done} that the run in {self.path} has done, got {fixed['steps']}. "
                "Weights of earlier steps are in its older checkpoints, as far as they were kept."
            )

    def _instead(self, differing: Sequence[str], newest: Path) -> str:
        """What to do about other settings."""
        given = self.content["settings"]
        if list(differing) != ["steps"]:
            return "Train in another directory."
        if given["schedule"] == "constant":
            return f"Pass steps={given['steps']} if it is to go on to as many."
        return (
            "With a cosine they are fixed: train in another directory, starting from the weights in "
            f"{newest / checkpoints.WEIGHTS}."
        )


def require_directory(directory: str | os.PathLike[str]) -> None:
    """Raise a FileExistsError if a run's directory is to be where something else is."""
    path = Path(directory).expanduser()
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"directory must be one to train in, and {path} is a file.")
    if not path.exists() or (path / RUN_FILE).exists():
        return
    # A first start that was killed may have left the run's file unfinished, and its lock, and nothing else.
    if any(other.name != LOCK and not other.match(f".{RUN_FILE}.*") for other in path.iterdir()):
        raise FileExistsError(
            f"{path} must be new, empty, or the directory of a run, and holds something else. Choose another."
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content["settings"], dict) and content.keys() >= _KEYS and content["format"] == _FORMAT:
            return content
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(
        f"{path} is damaged, or of another version of pose2id, and does not say what the run is. Train in another "
        "directory."
    )
