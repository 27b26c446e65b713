"""`Gallery`: people who come and go, queries one at a time, features centralized as they come."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pose2id.centralization.guard import Evidence
from pose2id.centralizer import Centralizer
from pose2id.gallery.file import is_gallery, read, write
from pose2id.gallery.fitting import EXACT_UP_TO, Fit, Settings
from pose2id.gallery.locks import SharedLock
from pose2id.gallery.state import State
from pose2id.gallery.tracklets import Tracks, for_all, pooled
from pose2id.gallery.unknown import LEAST, Threshold, from_impostors, from_spacings
from pose2id.io.checks import (
    FIRST_WORD,
    as_numpy,
    camera_numbers,
    checked_choice,
    checked_count,
    checked_flag,
    checked_number,
    first_few,
)
from pose2id.io.images import COLORS
from pose2id.io.rows import Rows, as_container
from pose2id.io.whole_files import new_file

logger = logging.getLogger(__name__)
RERANK = ("k-reciprocal", "camera")
_UNKNOWN, _ABSENT = -1, -2  # no camera; a camera that no image of the gallery has
UNKNOWN = "unknown"
_MAX_ID = 2**63 - 1
_NOBODY = 0.99  # score from which on only copies pass
_ALWAYS = 64  # galleries of fewer images are refitted at each change: it costs little, and lists are short


class SearchResult(NamedTuple):
    """What a search found, row by row for each query, nearest first.

    Attributes:
        distances: (Q, k) float32, in the container of the queries: squared Euclidean distances of unit features in
            [0, 4], or re-ranked ones in [0, 1]; infinite where the gallery has fewer images.
        ids: (Q, k) int64, -1 for none; or strings and None, as an object array.
        labels: (Q, k) object array: labels as they were added, None for none.
    """

    distances: Any
    ids: NDArray[Any]
    labels: NDArray[Any]


@dataclass
class _Content:
    """Images and what is known of them by place; replaced whole by a refit."""

    state: State | None = None
    ids: list[Any] = field(default_factory=list)  # None where an image has gone
    labels: list[Any] = field(default_factory=list)
    places: dict[Any, int] = field(default_factory=dict)


class Gallery:
    """A gallery that lives: images are added, removed and found one at a time, centralized as they come.

        gallery = Gallery(Centralizer())
        gallery.add(feats, ids=["anna-1", "ben-1"], camids=[0, 1], labels=["Anna", "Ben"])
        distances, ids, labels = gallery.search(query_feats, k=5, query_camids=[1])

    Features are those of `Centralizer.enhance` with camera_statistics="gallery", by the centralizer's method: each
    query meets the gallery alone, so that it gets alone what it gets in a batch. What methods take from the gallery as
    a whole (camera means, the map across cameras, evidence and scales of strangers) is frozen between refits; an image
    that comes or goes changes only what it touches. After `refit`, features are those of `enhance`.

    Any number of threads may search while one changes the gallery; changes wait for each other. A refit computes aside,
    and searches go on meanwhile.

    Args:
        centralizer: whose method, k1, k2, backend and max_memory are used, and whose extractor turns images into
            features. None: `Centralizer()`.
        dim: columns of a feature; None: those of the first that are added.
        metadata: facts about the gallery, such as the model's name: a mapping that JSON can hold, saved with it.
        refit_share: refit when so large a share of the gallery has changed (came, went or was updated) since the last
            refit; galleries of fewer than 64 images are refitted at each change. None: when `refit` is called. A camera
            that has lost so many images, or got its first few, that lists no longer do, asks for a refit, too.
        exact_up_to: galleries of more images, on the CPU, are searched approximately, from the next refit on: faiss's
            inverted lists find candidates, which are scored exactly (`recall`), unless they miss more than 5 % of the
            nearest. None: never.
    """

    def __init__(
        self,
        centralizer: Centralizer | None = None,
        *,
        dim: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        refit_share: float | None = 0.05,
        exact_up_to: int | None = EXACT_UP_TO,
    ) -> None:
        self.centralizer = Centralizer() if centralizer is None else centralizer
        if not isinstance(self.centralizer, Centralizer):
            raise TypeError(f"centralizer must be a pose2id.Centralizer, got {type(centralizer).__name__}.")
        if self.centralizer.neighbors is not None:
            raise ValueError("centralizer must be without neighbors=: a gallery has a search of its own.")
        self._dim = None if dim is None else checked_count(dim, "dim")
        self.metadata = dict(metadata or {})
        _check_metadata(self.metadata)
        self.refit_share = None if refit_share is None else checked_number(refit_share, "refit_share", 0, 1e6)
        self.exact_up_to = None if exact_up_to is None else checked_count(exact_up_to, "exact_up_to")
        self._content = _Content()
        self._words: dict[str, int] = {}  # cameras whose names are no numbers
        self._next = 0  # id
        self._like: Any = None  # an array or tensor as the first features
        self._changing = threading.RLock()
        self._lock = SharedLock()

    def __len__(self) -> int:
        """How many images there are."""
        return len(self._content.places)

    def __contains__(self, id: Any) -> bool:  # noqa: A002 - as in add
        """Whether an image has this id."""
        return id in self._content.places

    @property
    def dim(self) -> int | None:
        """Columns of a feature; None while nothing has said."""
        return self._dim

    @property
    def ids(self) -> NDArray[Any]:
        """All ids, in the order in which images came."""
        with self._lock.reading():
            return self._as_ids(list(self._content.places))

    @property
    def evidence(self) -> Evidence | None:
        """Whether people repeat, at the last refit; None where the method does not ask."""
        state = self._content.state
        return None if state is None else state.fitted.evidence

    @property
    def reason(self) -> str:
        """Which method centralizes the gallery, and why, in a sentence."""
        state = self._content.state
        return "empty" if state is None else state.fitted.reason

    @property
    def recall(self) -> float:
        """Which share of the ten nearest the search finds, measured on 200 images at the last refit; 1 where exact."""
        state = self._content.state
        return 1.0 if state is None or state.images.index is None else state.images.index.recall

    def __repr__(self) -> str:
        """How many images, and how they are centralized."""
        return f"Gallery({len(self)} images, dim={self._dim}, {self.reason.partition('. ')[0]})"

    def __getstate__(self) -> Any:
        """A gallery has locks, and threads that count on them."""
        raise TypeError("A Gallery cannot be pickled or copied. Save it, and load it where it is wanted.")

    def add(
        self,
        features: Any,
        ids: Any = None,
        camids: Any = None,
        labels: Any = None,
        *,
        group_by: Any = None,
        quality: Any = None,
    ) -> NDArray[Any]:
        """Add images, or tracks of images.

        Args:
            features: (N, D) float16 to float64 features, raw or normalised, numpy array or torch tensor; kept as
                float32. N may be 0, and [] is no image.
            ids: N integers of at least 0, or N strings, that no other image has; None: the next integers.
            camids: (N,) cameras: integers, whole floats or strings; -1 or None, or None for all: unknown. One integer
                or string is the camera of all.
            labels: N names or numbers, of people for example, or one for all; returned by `search`, never used to
                centralize.
            group_by: (N,) track ids, integers or strings, or one for all: the frames of a track become one image, with
                one id, camera and label; tracks come in the order of their first frames. The image's feature is a
                weighted mean, in which frames that are nearly copies count once.
            quality: (N,) at least 0, weights of frames in their track.

        Returns:
            The ids of the images that were added, one a track with `group_by`.

        Raises:
            ValueError: an id that exists, rows that are zero or not finite, or another number of columns; nothing is
                added then.
        """
        rows = self._rows(features, "features")
        labels = _listed(labels, "labels", rows.n)
        raw, tracks = self._pooled(rows, group_by, quality)
        labels = labels if tracks is None else tracks.one_each(labels, "labels")
        with self._changing:
            names = self._new_ids(ids, len(raw), "image" if tracks is None else "track")
            if len(raw):
                self._check_columns(raw.shape[1], "features")  # another thread may have been the first
            cameras = self._cameras(camids, "camids", rows.n, tracks, new=True)  # new names stay: nothing else may fail
            if len(raw):
                self._like = rows.empty(0) if self._like is None else self._like
                self._put(raw, names, cameras, labels or [None] * len(raw))
                self._next = max([self._next - 1, *(name for name in names if isinstance(name, int))]) + 1
            return self._as_ids(names)

    def add_images(
        self,
        images: Any,
        ids: Any = None,
        camids: Any = None,
        labels: Any = None,
        *,
        colors: str = "rgb",
        group_by: Any = None,
        quality: Any = None,
        side_inputs: Mapping[str, Any] | None = None,
    ) -> NDArray[Any]:
        """Add crops: their features by the centralizer's extractor, as `add` takes them.

        Args:
            images: as in `Extractor.__call__`, or [] for none.
            ids: as in `add`, and so are camids, labels, group_by and quality.
            camids: (N,) cameras.
            labels: N names or numbers.
            colors: "rgb" or "bgr", the order of the colours of arrays, as in `Extractor.__call__`.
            group_by: (N,) track ids.
            quality: (N,) weights of frames.
            side_inputs: keywords for the model, as in `Extractor.__call__`.

        Returns:
            The ids of the images that were added.
        """
        features = self._extracted(images, colors, side_inputs or {})
        return self.add(features, ids, camids, labels, group_by=group_by, quality=quality)

    def search_images(
        self,
        images: Any,
        k: int = 10,
        *,
        colors: str = "rgb",
        side_inputs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> SearchResult:
        """Search for the people on crops.

        Args:
            images: as in `add_images`.
            k: as in `search`.
            colors: as in `add_images`.
            side_inputs: as in `add_images`.
            **options: of `search`.
        """
        return self.search(self._extracted(images, colors, side_inputs or {}), k, **options)

    def _extracted(self, images: Any, colors: str, side_inputs: Mapping[str, Any]) -> Any:
        checked_choice(colors, "colors", COLORS)
        if hasattr(images, "__len__") and not isinstance(images, (str, bytes)) and not len(images):
            return []
        return self.centralizer.extract(images, colors=colors, progress=False, **side_inputs)

    def remove(self, ids: Any) -> None:
        """Take images out.

        Raises:
            KeyError: an id that the gallery does not have; nothing is removed then.
            ValueError: the method needs cameras, and all images that would be left are of unknown ones; likewise.
        """
        with self._changing:
            places = self._places(ids)
            content, state = self._content, self._content.state
            if state is None or not len(places):
                return
            if len(places) == len(content.places):
                with self._lock.writing():
                    self._content = _Content()
                return
            self._check_cameras_stay(state, places, None)
            if self._due(len(places)):
                kept = sorted(set(content.places.values()) - set(places.tolist()))
                self._refit(torch.tensor(kept, device="cpu"))
                return
            with self._whole(places):
                state.remove(places.to(state.images.raw.device))
                for place in places.tolist():
                    del content.places[content.ids[place]]
                    content.ids[place] = content.labels[place] = None
            self._refit_if_short()

    def update(
        self,
        ids: Any,
        features: Any = None,
        camids: Any = None,
        labels: Any = None,
        *,
        group_by: Any = None,
        quality: Any = None,
    ) -> None:
        """Give images new features, cameras or labels; what is not given stays.

        Args:
            ids: of N images, each once; with `group_by` of T tracks, in the order of their first frames.
            features: (N, D) as in `add`.
            camids: (N,) cameras as in `add`.
            labels: N labels as in `add`.
            group_by: as in `add`, of the rows of features, camids and labels.
            quality: as in `add`.

        Raises:
            KeyError: an id that the gallery does not have; nothing changes then.
            ValueError: as in `remove`; likewise.
        """
        names = _checked_ids(ids)
        if features is None:
            if group_by is not None or quality is not None:
                raise ValueError("features must be given with group_by or quality: these are of their rows.")
            raw, tracks, n = None, None, len(names)
        else:
            rows = self._rows(features, "features")
            (raw, tracks), n = self._pooled(rows, group_by, quality), rows.n
        listed = _listed(labels, "labels", n)
        listed = listed if tracks is None else tracks.one_each(listed, "labels")
        with self._changing:
            places = self._places(names)
            if raw is not None and len(places) != len(raw):
                what = "row per id" if tracks is None else "track per id"
                raise ValueError(f"features must hold one {what}, {len(places)}, got {len(raw)}.")
            cameras = None if camids is None else self._cameras(camids, "camids", n, tracks, new=True)
            state = self._content.state
            if state is None or not len(places):
                return
            if cameras is not None:
                self._check_cameras_stay(state, places, cameras)
            if raw is not None or cameras is not None:
                self._move(state, places.to(state.images.raw.device), raw, cameras)
            if listed is not None:
                with self._lock.writing():
                    content = self._content
                    for name, label in zip(names, listed, strict=True):
                        content.labels[content.places[name]] = label

    def _move(self, state: State, places: Tensor, raw: Tensor | None, cameras: Tensor | None) -> None:
        """New features and cameras of images, or either."""
        raw = state.images.raw[places] if raw is None else raw.to(places.device)
        cameras = state.images.cameras[places] if cameras is None else cameras.to(places.device)
        if self._due(len(places)):
            self._refit(None, updated=(places, raw, cameras))
            return
        with self._whole(places):
            state.remove(places)
            state.insert(raw, cameras, places)
            state.changes -= len(places)  # one change, not two
        self._refit_if_short()

    @contextmanager
    def _whole(self, touched: Tensor) -> Iterator[None]:
        """Change the state alone; a change that is cut short, by Ctrl-C for example, is undone by a refit."""
        content = self._content
        assert content.state is not None
        images, touched = content.state.images, touched.to(content.state.images.raw.device)
        raw, cameras = images.raw[touched], images.cameras[touched]
        with self._lock.writing():
            try:
                yield
            except BaseException:
                images.raw[touched], images.cameras[touched] = raw, cameras
                places = list(content.places.values())
                known = ([values[place] for place in places] for values in (content.ids, content.labels))
                self._content = self._made(images.raw[places], images.cameras[places], *known)
                raise

    def search(
        self,
        query_feats: Any,
        k: int = 10,
        *,
        query_camids: Any = None,
        rerank: str | None = None,
        exclude_camera: bool = False,
        threshold: float | Threshold | None = None,
        group_by: Any = None,
        quality: Any = None,
    ) -> SearchResult:
        """The k nearest images of each query, by centralized features; equal distances by who came first.

        Args:
            query_feats: (Q, D) features as in `add`; Q may be 0.
            k: how many images, at least 1.
            query_camids: (Q,) cameras as in `add`, or one for all; the gallery need not know them.
            rerank: return re-ranked distances, in their order: "k-reciprocal" of the features as they came (10 and 3
                neighbours, weight 0.3; harms where people appear once), "camera" (CA-Jaccard) of centralized ones.
                Computed among the nearest 300 images, or 4 k if that is more (and, with exclude_camera, the nearest 4 k
                of other cameras), for each query alone: as over the whole gallery, where the lists of those that are
                returned lie among them. None: centralized features alone.
            exclude_camera: leave out images of the query's own camera, which must be known.
            threshold: what `calibrate` returns, or a score in [0, 1] of centralized features
                (`pose2id.gallery.unknown`): a query below it is nobody that the gallery knows, so that all its ids are
                those of none (-1 or None) and its labels "unknown"; distances stay.
            group_by: (Q,) track ids: one query a track, in the order of first frames, as in `add`.
            quality: (Q,) as in `add`.

        Raises:
            ValueError: a query of unknown camera with exclude_camera, or with rerank="camera".

        Returns:
            A `SearchResult`, a named tuple (distances, ids, labels).
        """
        rows = self._rows(query_feats, "query_feats")
        k, exclude_camera = checked_count(k, "k"), checked_flag(exclude_camera, "exclude_camera")
        how = None if rerank is None else checked_choice(rerank, "rerank", RERANK)
        limit = threshold if threshold is None or isinstance(threshold, Threshold) else _score(threshold)
        raw, tracks = self._pooled(rows, group_by, quality)
        cameras = self._cameras(query_camids, "query_camids", rows.n, tracks, new=False)
        _check_known(cameras, "query_camids", exclude_camera)
        if how == "camera" and bool((cameras == _UNKNOWN).any()):
            raise ValueError("query_camids must name a camera for each query with rerank='camera'.")
        with self._lock.reading():
            places, distances, known = self._searched(raw, cameras, k, how, exclude_camera, limit)
            content = self._content
            flat = places.masked_fill(~known[:, None], -1).flatten().tolist()
            ids = [content.ids[place] if place >= 0 else None for place in flat]
            labels = [content.labels[place] if place >= 0 else None for place in flat]
            for query in torch.nonzero(~known).flatten().tolist():
                labels[query * k : (query + 1) * k] = [UNKNOWN] * k
            found = self._as_ids(ids).reshape(places.shape), _objects(labels).reshape(places.shape)
        return SearchResult(as_container(distances, rows.empty(0)), *found)

    def features(self, ids: Any = None, *, raw: bool = False) -> Any:
        """Features of images.

        Args:
            ids: of images, in any order; None: all, in the order of `ids`.
            raw: as they came, instead of centralized.

        Returns:
            (N, D) float32 in the container of the features that were added first, centralized ones L2-normalised.

        Raises:
            KeyError: an id that the gallery does not have.
        """
        checked_flag(raw, "raw")
        with self._lock.reading():
            state = self._content.state
            places = self._chosen(ids)
            if state is None:
                nothing = torch.empty((0, self._dim or 0), dtype=torch.float32, device="cpu")
                return nothing.numpy() if self._like is None else as_container(nothing, self._like)
            places = places.to(state.images.raw.device)
            found = state.images.raw[places] if raw else state.features(places)
            return as_container(found, self._like)

    def labels(self, ids: Any = None) -> NDArray[Any]:
        """Labels of images: (N,) object array, None for none; of all, in the order of `ids`, or of some.

        Raises:
            KeyError: an id that the gallery does not have.
        """
        with self._lock.reading():
            return _objects([self._content.labels[place] for place in self._chosen(ids).tolist()])

    def camids(self, ids: Any = None) -> NDArray[Any]:
        """Cameras of images: (N,) object array of integers and strings, None for unknown; as `labels`.

        Raises:
            KeyError: an id that the gallery does not have.
        """
        with self._lock.reading():
            content, words = self._content, {number: word for word, number in dict(self._words).items()}  # others add
            places = self._chosen(ids)
            numbers = [] if content.state is None else content.state.images.cameras[places].tolist()
            return _objects([None if number < 0 else words.get(number, number) for number in numbers])

    def refit(self) -> None:
        """Take camera means, maps, evidence and scales from the gallery as it is now. Searches go on meanwhile."""
        with self._changing:
            if self._content.state is not None:
                self._refit(None)

    def calibrate(
        self,
        genuine: Any = None,
        impostor: Any = None,
        *,
        genuine_camids: Any = None,
        impostor_camids: Any = None,
        genuine_group_by: Any = None,
        impostor_group_by: Any = None,
        fpr: float = 0.01,
        exclude_camera: bool = False,
    ) -> Threshold:
        """A threshold for `search`, below which a query is nobody that the gallery knows.

        With queries of strangers (`impostor`), the least threshold that a share `fpr` of them reaches. Without any, a
        threshold from how far apart the gallery's own images are: no label is used, and neighbours are not added
        before the decision, which costs hits; for what each is worth see docs/live-gallery.md. Calibrate again when the
        gallery has changed much.

        Args:
            genuine: (Q, D) features of queries of people who are in the gallery, for `Threshold.tpr`.
            impostor: (Q, D) features of queries of people who are not.
            genuine_camids: (Q,) their cameras, as in `search`.
            impostor_camids: (Q,) likewise.
            genuine_group_by: (Q,) their track ids, as in `search`: queries are tracks, if those that are to come are.
            impostor_group_by: (Q,) likewise.
            fpr: the wanted share of strangers who are taken for somebody, in (0, 1).
            exclude_camera: as in the searches that are to come.

        Raises:
            ValueError: genuine without impostor, or, without both, a gallery of fewer than 48 images.
        """
        if not 0 < (fpr := checked_number(fpr, "fpr", 0, 1)) < 1:
            raise ValueError(f"fpr must be above 0 and below 1, got {fpr:g}.")
        if impostor is not None:
            options: dict[str, Any] = {"group_by": impostor_group_by, "exclude_camera": exclude_camera}
            if len(self) < 2:
                raise ValueError(f"the gallery must hold at least two images to calibrate, got {len(self)}.")
            against = self._scores(impostor, "impostor", impostor_camids, **options)
            if not len(against):
                raise ValueError("impostor must hold at least one query, got none.")
            options["group_by"] = genuine_group_by
            of_known = None if genuine is None else self._scores(genuine, "genuine", genuine_camids, **options)
            return from_impostors(against, of_known, fpr)
        if genuine is not None:
            raise ValueError("impostor must be given with genuine: strangers set the threshold.")
        with self._lock.reading():
            state = self._content.state
            if state is None or len(self) < LEAST:
                raise ValueError(f"the gallery must hold {LEAST} images to calibrate without labels, got {len(self)}.")
            threshold = from_spacings(state.spacings(), len(self), fpr)
        if threshold.score > _NOBODY:
            logger.warning(
                "threshold %.4f: hardly any query will pass. Most images have more than ten near copies: pool tracks "
                "(group_by), or calibrate with strangers (impostor).",
                threshold.score,
            )
        return threshold

    def scores(
        self,
        query_feats: Any,
        *,
        query_camids: Any = None,
        exclude_camera: bool = False,
        centralized: bool = True,
        group_by: Any = None,
        quality: Any = None,
    ) -> Any:
        """How near queries are to the gallery's people: the scores that thresholds are compared with.

        1 - d_1 / d_11, of Euclidean distances to the nearest and the eleventh image (`pose2id.gallery.unknown`).

        Args:
            query_feats: (Q, D) as in `search`, and so are query_camids, exclude_camera, group_by and quality.
            query_camids: (Q,) cameras.
            exclude_camera: leave out images of the query's own camera.
            centralized: of centralized features, as thresholds that `calibrate` finds with `impostor`; False: of
                features before neighbours are added, as those that it finds without.
            group_by: (Q,) track ids.
            quality: (Q,) weights of frames.

        Returns:
            (Q,) float64 in [0, 1], in the container of the queries; 0 in a gallery of fewer than two images.
        """
        options: dict[str, Any] = {"group_by": group_by, "quality": quality, "exclude_camera": exclude_camera}
        found = self._scores(query_feats, "query_feats", query_camids, centralized=centralized, **options)
        return as_container(found, query_feats if hasattr(query_feats, "dtype") else np.empty(0))

    def _scores(
        self,
        feats: Any,
        name: str,
        camids: Any,
        *,
        exclude_camera: bool,
        centralized: bool = True,
        group_by: Any = None,
        quality: Any = None,
    ) -> Tensor:
        rows = self._rows(feats, name)
        checked_flag(exclude_camera, "exclude_camera")
        checked_flag(centralized, "centralized")
        raw, tracks = self._pooled(rows, group_by, quality)
        of_cameras = "query_camids" if name == "query_feats" else f"{name}_camids"
        cameras = self._cameras(camids, of_cameras, rows.n, tracks, new=False)
        _check_known(cameras, of_cameras, exclude_camera)
        with self._lock.reading():
            state = self._content.state
            if state is None:
                return torch.zeros(len(raw), dtype=torch.float64, device="cpu")
            device = state.images.raw.device
            asked = state.asking(raw.to(device), cameras.to(device))
            found = [asking.scores(centralized=centralized, exclude=exclude_camera) for _, asking in asked]
            return torch.cat(found).cpu() if found else torch.zeros(0, dtype=torch.float64, device="cpu")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the gallery to a .safetensors file, which appears whole or not at all; an older gallery is replaced.

        Searches go on meanwhile, changes wait. The extractor is not saved.

        Raises:
            FileExistsError: the file is not a gallery.
            TypeError, ValueError: metadata that JSON cannot hold.
        """
        target = new_file(path, overwrite=True, suffixes=(".safetensors",))
        if target.exists() and not is_gallery(target):
            raise FileExistsError(f"{path} is not a gallery, and is left alone. Choose another name.")
        with self._changing:
            content, given = self._content, self.centralizer
            facts = {
                "method": given.method,
                "k1": given.k1,
                "k2": given.k2,
                "dim": self._dim,
                "refit_share": self.refit_share,
                "exact_up_to": self.exact_up_to,
                "next": self._next,
                "tensors": None if self._like is None else isinstance(self._like, Tensor),
                "metadata": self.metadata,
            }
            _check_metadata(self.metadata)  # before any work
            names = {"ids": content.ids, "labels": content.labels, "cameras": self._words}
            write(target, content.state, facts, names)

    @staticmethod
    def load(path: str | os.PathLike[str], centralizer: Centralizer | None = None, *, mmap: bool = False) -> Gallery:
        """Read what `save` wrote, on the CPU.

        Args:
            path: of the file.
            centralizer: as in `Gallery`, of the same method; None: one with the saved method and no extractor.
            mmap: leave arrays in the file: several processes share its pages. It is opened at once, however large, but
                where it is searched approximately (`exact_up_to`): inverted lists are made anew. Changes stay in
                memory, and take the memory of the whole gallery as soon as it grows.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, another kind of file or of a later version, or the centralizer has another
                method. With mmap only the file's length and header are checked, not the checksums of arrays.
        """
        state, facts, names = read(Path(path), mmap=checked_flag(mmap, "mmap"))
        saved = {name: facts[name] for name in ("method", "k1", "k2")}
        if centralizer is None:
            of_nfc = {"k1": facts["k1"], "k2": facts["k2"]} if facts["method"] == "nfc" else {}
            centralizer = Centralizer(method=facts["method"], **of_nfc)
        elif saved != (own := {name: getattr(centralizer, name, None) for name in saved}):
            raise ValueError(f"centralizer must have the gallery's method, {saved}, got {own}.")
        options = {name: facts[name] for name in ("dim", "metadata", "refit_share", "exact_up_to")}
        gallery = Gallery(centralizer, **options)
        places = {name: place for place, name in enumerate(names["ids"]) if name is not None}
        gallery._content = _Content(state, names["ids"], names["labels"], places)
        gallery._words, gallery._next = names["cameras"], facts["next"]
        if facts["tensors"] is not None:
            empty = np.empty((0, facts["dim"] or 1), dtype=np.float32)
            gallery._like = torch.from_numpy(empty) if facts["tensors"] else empty
        return gallery

    def _check_cameras_stay(self, state: State, places: Tensor, cameras: Tensor | None) -> None:
        """Raise a ValueError where no refit could follow."""
        if (method := self.centralizer.method) in ("cameras", "centring"):
            stay = state.images.alive & (state.images.cameras[: state.images.n] >= 0)
            stay[places.to(stay.device)] = False
            if not bool(stay.any()) and not (cameras is not None and bool((cameras >= 0).any())):
                raise ValueError(f"ids must leave an image of a known camera for method={method!r}, or none at all.")

    def _put(self, raw: Tensor, names: list[Any], cameras: Tensor, labels: list[Any]) -> None:
        content, state = self._content, self._content.state
        if state is None:
            self._replace(raw, cameras.to(raw.device), names, labels)
            return
        raw, cameras = raw.to(state.images.raw.device), cameras.to(state.images.raw.device)
        if self._due(len(raw)):
            self._refit(None, added=(raw, cameras, names, labels))
            return
        with self._whole(cameras[:0]):
            state.insert(raw, cameras)
            content.places.update(zip(names, range(len(content.ids), state.images.n), strict=True))
            content.ids += names
            content.labels += labels
        self._refit_if_short()

    def _due(self, changes: int) -> bool:
        """Whether so many more changes ask for a refit."""
        state = self._content.state
        if state is None or self.refit_share is None:
            return False
        return state.fitted.n < _ALWAYS or state.changes + changes > self.refit_share * state.fitted.n

    def _refit_if_short(self) -> None:
        state = self._content.state
        if state is not None and not state.linked.can_stay():
            self._refit(None)

    def _refit(
        self,
        kept: Tensor | None,
        updated: tuple[Tensor, Tensor, Tensor] | None = None,
        added: tuple[Tensor, Tensor, list[Any], list[Any]] | None = None,
    ) -> None:
        """A new state of images at the places `kept`, with new features, and of further ones."""
        content = self._content
        assert content.state is not None
        images = content.state.images
        places = torch.nonzero(images.alive).flatten() if kept is None else kept.to(images.raw.device)
        raw, cameras = images.raw[places], images.cameras[places]
        if updated is not None:
            at = torch.searchsorted(places, updated[0])  # ascending
            raw[at], cameras[at] = updated[1:]
        ids, labels = ([values[place] for place in places.tolist()] for values in (content.ids, content.labels))
        if added is not None:
            raw, cameras = torch.cat([raw, added[0]]), torch.cat([cameras, added[1]])
            ids, labels = ids + added[2], labels + added[3]
        self._replace(raw, cameras, ids, labels)

    def _replace(self, raw: Tensor, cameras: Tensor, ids: list[Any], labels: list[Any]) -> None:
        made = self._made(raw, cameras, ids, labels)
        with self._lock.writing():
            self._content, self._dim = made, raw.shape[1]

    def _made(self, raw: Tensor, cameras: Tensor, ids: list[Any], labels: list[Any]) -> _Content:
        """Images at once."""
        given = self.centralizer
        settings = Settings(given.method, given.k1, given.k2, given.backend, given.max_memory, self.exact_up_to)
        state = Fit(raw, cameras, settings).run()
        logger.info("gallery of %d: %s", len(ids), state.fitted.reason)
        return _Content(state, ids, labels, dict(zip(ids, range(len(ids)), strict=True)))

    def _searched(
        self, raw: Tensor, cameras: Tensor, k: int, how: str | None, exclude: bool, limit: Threshold | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Places and distances of the nearest images, and which queries are somebody that the gallery knows."""
        state = self._content.state
        places = torch.full((len(raw), k), -1, dtype=torch.int64, device="cpu")
        distances = torch.full((len(raw), k), torch.inf, dtype=torch.float32, device="cpu")
        known = torch.full((len(raw),), limit is None, device="cpu")
        if state is None:
            return places, distances, known
        device = state.images.raw.device
        raw, cameras = raw.to(device), cameras.to(device)
        places, distances, known = places.to(device), distances.to(device), known.to(device)
        for block, asking in state.asking(raw, cameras):
            if how is None:
                places[block], distances[block] = asking.nearest(k, exclude=exclude)
            else:
                places[block], distances[block] = asking.reranked(how, k, exclude=exclude)
            if limit is not None:
                known[block] = asking.scores(centralized=limit.centralized, exclude=exclude) >= limit.score
        return places, distances, known

    def _rows(self, features: Any, name: str) -> Rows:
        """Checked features; an empty sequence is none."""
        if not isinstance(features, (np.ndarray, Tensor)) and isinstance(features, Sequence) and not len(features):
            features = np.empty((0, self._dim or 1), dtype=np.float32)
        elif getattr(features, "shape", None) == (0,):
            features = features.reshape(0, self._dim or 1)
        rows = Rows(features, name, normalize=True)
        if rows.n:
            self._check_columns(rows.dim, name)
        zero = torch.nonzero(rows.norms < torch.finfo(torch.float32).tiny).flatten().tolist()
        if zero:
            raise ValueError(
                f"{name} must not hold zero rows, which resemble nothing (row {first_few(zero)}). Drop them."
            )
        return rows

    def _check_columns(self, dim: int, name: str) -> None:
        if self._dim is not None and dim != self._dim:
            raise ValueError(f"{name} must have the gallery's {self._dim} columns, got {dim}.")

    def _pooled(self, rows: Rows, group_by: Any, quality: Any) -> tuple[Tensor, Tracks | None]:
        """(N, D) float32 features, or those of tracks."""
        if group_by is None:
            if quality is not None:
                raise ValueError("quality must be None without group_by: it weighs the frames of a track.")
            return _float32(rows), None
        tracks = Tracks(group_by, rows.n)
        return pooled(rows, tracks, quality), tracks

    def _cameras(self, camids: Any, name: str, n: int, tracks: Tracks | None, *, new: bool) -> Tensor:
        """(N,) int64 numbers of cameras, or of tracks, which are the same in every call."""
        camids = for_all(camids, n)
        numbers = camera_numbers({name: (camids, n)})[0]
        if bool((numbers < _UNKNOWN).any()):
            raise ValueError(f"{name} must be at least 0, or -1 for unknown, got {int(numbers.min())}.")
        values = [] if camids is None else list(camids)
        if tracks is not None:
            numbers = torch.tensor(tracks.one_each(numbers.tolist(), name), dtype=torch.int64, device="cpu")
            values = [values[row] for row in tracks.first.tolist()] if values else values
        for row in torch.nonzero(numbers >= FIRST_WORD).flatten().tolist():
            word = str(values[row]).strip()
            known = self._words.get(word, _ABSENT)
            if known == _ABSENT and new:
                known = self._words.setdefault(word, FIRST_WORD + len(self._words))
            numbers[row] = known
        return numbers

    def _new_ids(self, ids: Any, n: int, what: str) -> list[Any]:
        """Ids of n new images."""
        known = self._content.places
        of_gallery = list(islice(known, 1))
        if ids is None:
            if n and of_gallery and isinstance(of_gallery[0], str):
                raise ValueError("ids must be given: those that the gallery has are strings.")
            if self._next + n > _MAX_ID + 1:
                raise ValueError(
                    f"ids must be given: the next integers, from {self._next} on, do not fit into 64 bits."
                )
            return list(range(self._next, self._next + n))
        names = _checked_ids(ids)
        if len(names) != n:
            raise ValueError(f"ids must hold one id per {what}, {n}, got {len(names)}.")
        kinds = {type(name) for name in (*names, *of_gallery)}
        if len(kinds) > 1:
            raise TypeError("ids must all be integers, or all strings, as those that the gallery has.")
        copies = [name for name, count in Counter(names).items() if count > 1]
        twice = [name for name in names if name in known] or copies
        if twice:
            raise ValueError(f"ids must be new, each once, got {first_few(twice)}. Use update() for new features.")
        return names

    def _places(self, ids: Any) -> Tensor:
        names, known = _checked_ids(ids), self._content.places
        absent = [name for name in names if name not in known]
        if absent:
            raise KeyError(f"ids must be in the gallery, which has no {first_few(absent)}.")
        if len(set(names)) < len(names):
            raise ValueError("ids must name each image once.")
        return torch.tensor([known[name] for name in names], dtype=torch.int64, device="cpu")

    def _chosen(self, ids: Any) -> Tensor:
        """Places of some images, or of all, in the order of `ids`."""
        return self._places(list(self._content.places) if ids is None else ids)

    def _as_ids(self, ids: list[Any]) -> NDArray[Any]:
        """Ids as an array: int64 with -1 for None, or objects."""
        if any(isinstance(name, str) for name in (*ids, *islice(self._content.places, 1))):
            return _objects(ids)
        return np.array([-1 if name is None else name for name in ids], dtype=np.int64)


def _check_known(cameras: Tensor, name: str, exclude: bool) -> None:
    unknown = torch.nonzero(cameras == _UNKNOWN).flatten().tolist() if exclude else []
    if unknown:
        raise ValueError(
            f"{name} must name a camera for each query with exclude_camera=True, got none at row {first_few(unknown)}."
        )


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    for key, value in metadata.items():
        if not isinstance(key, str):
            raise TypeError(f"metadata must have strings as keys, got {key!r}.")
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"metadata must hold what JSON can, got {type(value).__name__} for {key!r} ({error})."
            ) from error


def _score(threshold: Any) -> Threshold:
    return Threshold(checked_number(threshold, "threshold", 0, 1))


def _float32(rows: Rows) -> Tensor:
    """(N, D) float32 features as they came."""
    return rows.as_given(torch.float32)


def _objects(values: list[Any]) -> NDArray[Any]:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _listed(values: Any, name: str, n: int) -> list[Any] | None:
    if values is None:
        return None
    values = for_all(values, n)
    if isinstance(values, bytes) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name} must be a sequence with one per row, or one string or integer, got {values!r}.")
    given = as_numpy(values).tolist() if isinstance(values, Tensor) else list(values)
    listed = [value.item() if isinstance(value, np.generic) else value for value in given]
    if len(listed) != n:
        raise ValueError(f"{name} must hold one per row, {n}, got {len(listed)}.")
    wrong = [value for value in listed if not isinstance(value, (str, int, float, NoneType))]
    if wrong:
        raise TypeError(f"{name} must hold names or numbers, got {first_few(type(x).__name__ for x in wrong)}.")
    return listed


def _checked_ids(ids: Any) -> list[Any]:
    """Ids as Python's integers or strings."""
    if isinstance(ids, (int, str, np.integer)):
        ids = [ids]
    if isinstance(ids, bytes) or not np.iterable(ids):
        raise TypeError(f"ids must be a sequence of integers or strings, got {ids!r}. Put it into a list.")
    if getattr(ids, "ndim", 1) != 1:
        raise ValueError(f"ids must have one dimension, got shape {tuple(getattr(ids, 'shape', ()))}.")
    values = as_numpy(ids).tolist() if isinstance(ids, Tensor) else [x.item() if hasattr(x, "item") else x for x in ids]
    wrong = [x for x in values if isinstance(x, bool) or not isinstance(x, (int, str))]
    if wrong:
        raise TypeError(f"ids must be integers or strings, got {first_few(map(repr, wrong))}.")
    negative = [x for x in values if isinstance(x, int) and not 0 <= x <= _MAX_ID]
    if negative:
        raise ValueError(f"ids must be at least 0 and fit into 64 bits, got {first_few(negative)}.")
    return values
