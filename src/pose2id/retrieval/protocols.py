"""Protocols: which images are queries and gallery in each trial, which are dropped for a query, what is averaged.

| protocol | trials | dropped for a query | CMC by |
|---|---|---|---|
| `MARKET1501` (MSMT17, MARS, VeRi-776 too) | 1 | gallery images of its identity and camera, pid -1 | image |
| `CUHK03` (new protocol, Zhong et al. 2017) | 1 | the same | image |
| `OCCLUDED_REID` (Zhuo et al. 2018) | 1 | pid -1; cameras play no part | image |
| `sysu_mm01` (Wu et al. 2017) | 10, galleries drawn | camera 2 for a query of camera 3 | identity |
| `regdb` (Nguyen et al. 2017) | 10, given | nothing | image |
| `vehicleid` (Liu et al. 2016) | 10, galleries drawn | nothing | image |
| `LEAVE_ONE_OUT` | 1 | the image itself | image |

A method must be applied inside a trial, to the images of that trial: `evaluate(..., way=...)` does.
"""

from __future__ import annotations

import inspect
import os
import random
import re
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pose2id.io.checks import checked_choice, checked_count, checked_flag, checked_labels, first_few, labels_together
from pose2id.io.rows import FeatureArray, Rows
from pose2id.retrieval.evaluation import (
    JUNK_PID,
    EvaluationResult,
    RankingProtocol,
    checked_matrix,
    feature_distances,
    mean_of,
    measured,
    measured_matrix,
)

Way = Callable[[Any, Any, Any, Any], Any]
NAMES = ("market1501", "cuhk03", "occluded-reid", "sysu-mm01", "regdb", "vehicleid", "leave-one-out")
MODES = {"all": (1, 2, 4, 5), "indoor": (1, 2)}  # of SYSU-MM01: the gallery's cameras
SAMPLERS = ("seeded", "official")
_SYSU_NAME = re.compile(r"cam(\d)/(\d{4})/(\d{4})\.\w+$")


@dataclass(frozen=True, eq=False)
class Trial:
    """One draw of queries and gallery.

    Attributes:
        query: (Q',) int64, rows of the query set, in order.
        gallery: (G',) int64, rows of the gallery set.
        whole: they are all rows.
    """

    query: NDArray[np.int64]
    gallery: NDArray[np.int64]
    whole: bool = False

    def of(self, pair: tuple[Any, Any]) -> tuple[Any, Any]:
        """Of both sets' arrays (or lists, or None) the trial's rows; those of a whole trial are no copies."""
        query, gallery = (_taken(x, at, self.whole) for x, at in zip(pair, (self.query, self.gallery), strict=True))
        return query, gallery


def _taken(values: Any, rows: NDArray[np.int64], whole: bool) -> Any:
    if values is None or whole:
        return values
    if isinstance(values, (np.ndarray, Tensor)):
        return values[rows]
    # By position: pandas objects would go by their own labels.
    return np.asarray(values)[rows] if hasattr(values, "__array__") else [values[i] for i in rows]


def _equal(qf: Any, gf: Any) -> bool:
    same = torch.equal if isinstance(qf, Tensor) and isinstance(gf, Tensor) else np.array_equal
    return bool(same(qf, gf))


def _copied(values: Any) -> Any:
    return values.detach().clone() if isinstance(values, torch.Tensor) else copy(values)


@dataclass(frozen=True)
class EvaluationProtocol:
    """A protocol; those of the field are constants and functions of this module.

    Attributes:
        name: of `NAMES`.
        rule: makes a `RankingProtocol` of (Q, G, q_pids, g_pids, q_camids, g_camids): matches, and what is dropped.
        draws: rows of queries and gallery for each trial, of (q_pids, g_pids, q_camids, g_camids, g_names) as int64
            labels; None: all of them, once.
        num_trials: how many trials.
        leave_one_out: query and gallery are the same images: row i of one is row i of the other.
        one_set: the same is given as both sides, as of leave_one_out.
    """

    name: str
    rule: Callable[..., RankingProtocol] = RankingProtocol
    draws: Callable[..., Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]] | None = None
    num_trials: int = 1
    leave_one_out: bool = False
    one_set: bool = False

    def check_features(self, qf: Any, gf: Any) -> None:
        """Raise if features of two sets are given where both sides must be the same images."""
        if self.one_set and qf is not gf and not _equal(qf, gf):
            raise ValueError(f"qf and gf must be of the same images for protocol {self.name!r}, and are not equal.")

    def trials(
        self, q_pids: Any, g_pids: Any, q_camids: Any = None, g_camids: Any = None, *, g_names: Any = None
    ) -> tuple[Trial, ...]:
        """The trials of sets with these labels.

        Args:
            q_pids: (Q,) identities, as in `pose2id.evaluate`, and so are the other labels.
            g_pids: (G,) identities.
            q_camids: (Q,) cameras; None where the protocol needs none.
            g_camids: (G,) cameras.
            g_names: G paths of the gallery's files, for the official sampler of SYSU-MM01.
        """
        q, g = len(q_pids), len(g_pids)
        if self.leave_one_out and q != g:
            raise ValueError(f"q_pids and g_pids must be of the same images for leave-one-out, got {q} and {g}.")
        if self.draws is None:
            return (Trial(np.arange(q), np.arange(g), whole=True),)
        pids = labels_together({"q_pids": (q_pids, q), "g_pids": (g_pids, g)})
        camids = [None if x is None else checked_labels(x, name, n) for x, name, n in _sides(q_camids, g_camids, q, g)]
        return tuple(Trial(*rows) for rows in self.draws(*pids, *camids, g_names))

    def measure(
        self,
        found: Any,
        q_pids: Any,
        g_pids: Any,
        q_camids: Any = None,
        g_camids: Any = None,
        *,
        metric: str = "cosine",
        max_rank: int = 50,
    ) -> EvaluationResult:
        """One trial: features of both sides (a pair) or distances (Q', G'), with that trial's labels."""
        labels = q_pids, g_pids, q_camids, g_camids
        if isinstance(found, (tuple, list)):
            distances, q, g = feature_distances(*found, metric=metric)
            return measured(distances, self.rule(q, g, *labels), max_rank)
        matrix = checked_matrix(found)
        return measured_matrix(matrix, self.rule(*matrix.shape, *labels), max_rank)

    def evaluate(
        self,
        qf: Any,
        gf: Any,
        q_pids: Any,
        g_pids: Any,
        q_camids: Any = None,
        g_camids: Any = None,
        *,
        g_names: Any = None,
        way: Way | None = None,
        metric: str = "cosine",
        max_rank: int = 50,
    ) -> EvaluationResult:
        """mAP, CMC and mINP, the means over the trials.

        Args:
            qf: (Q, D) query features, or (Q, P, D) of parts, as in `pose2id.evaluate`.
            gf: (G, D) or (G, P, D) gallery features.
            q_pids: (Q,) identities.
            g_pids: (G,) identities.
            q_camids: (Q,) cameras.
            g_camids: (G,) cameras.
            g_names: as in `trials`.
            way: what is done to each trial's features: a function of (qf, gf, q_camids, g_camids) of that trial, copies
                that it may write into, which returns a pair of features or a matrix of distances. None: nothing.
            metric: "cosine" or "euclidean", of features.
            max_rank: length of the CMC curve.
        """
        labels, results = ((q_pids, g_pids), (q_camids, g_camids)), []
        self.check_features(qf, gf)
        for name, rows, pids in (("qf", qf, q_pids), ("gf", gf, g_pids)):
            if len(rows) != len(pids):
                raise ValueError(f"{name} must have one row for each of the {len(pids)} labels, got {len(rows)}.")
        for trial in self.trials(*labels[0], *labels[1], g_names=g_names):
            pids, camids, found = trial.of(labels[0]), trial.of(labels[1]), trial.of((qf, gf))
            if way is not None:
                # Published code writes into what it is given; the caller's arrays and the next trial's stay.
                found = way(*(_copied(x) if trial.whole else x for x in (*found, *camids)))
            results.append(self.measure(found, *pids, *camids, metric=metric, max_rank=max_rank))
        return mean_of(results)


def _sides(query: Any, gallery: Any, q: int, g: int) -> list[tuple[Any, str, int]]:
    return [(query, "q_camids", q), (gallery, "g_camids", g)]


def _without_cameras(q: int, g: int, q_pids: Any, g_pids: Any, *_: Any) -> RankingProtocol:
    return RankingProtocol(q, g, q_pids, g_pids, None, None)


class _WithoutItself(RankingProtocol):
    """The image itself is dropped, by its row: copies of it stay."""

    def of_query(self, query: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        matches, dropped = super().of_query(query)
        return matches[matches != query], np.union1d(dropped, query)


class _SysuMM01(RankingProtocol):
    """Cameras 2 and 3 stand in one place: for a query of camera 3 those of camera 2 are dropped, whoever they show."""

    collapses = True

    def __init__(self, q: int, g: int, q_pids: Any, g_pids: Any, q_camids: Any, g_camids: Any) -> None:
        super().__init__(q, g, q_pids, g_pids, q_camids, g_camids)
        self._cam2 = np.empty(0, np.int64) if self.g_camids is None else np.flatnonzero(self.g_camids == 2)

    def of_query(self, query: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        matches, dropped = super().of_query(query)
        if self.q_camids is None or self.q_camids[query] != 3:
            return matches, dropped
        return np.setdiff1d(matches, self._cam2), np.union1d(dropped, self._cam2)


MARKET1501 = EvaluationProtocol("market1501")
CUHK03 = EvaluationProtocol("cuhk03")
OCCLUDED_REID = EvaluationProtocol("occluded-reid", _without_cameras)


def leave_one_out(drop_same_camera: bool = False) -> EvaluationProtocol:
    """Query and gallery are the same images, row by row, and an image is dropped for itself; its copies stay.

    Args:
        drop_same_camera: whether images of the query's identity and camera are dropped, too. Otherwise cameras play no
            part, since without a split by camera most images would have no match.
    """
    rule = _WithoutItself if checked_flag(drop_same_camera, "drop_same_camera") else _without_itself
    return EvaluationProtocol("leave-one-out", rule, leave_one_out=True, one_set=True)


def _without_itself(q: int, g: int, q_pids: Any, g_pids: Any, *_: Any) -> RankingProtocol:
    return _WithoutItself(q, g, q_pids, g_pids, None, None)


LEAVE_ONE_OUT = leave_one_out()


def sysu_mm01(
    mode: str = "all",
    shots: int = 1,
    sampler: str = "seeded",
    permutation: str | os.PathLike[str] | NDArray[Any] | None = None,
    num_trials: int = 10,
) -> EvaluationProtocol:
    """SYSU-MM01 (Wu et al., 2017): infrared queries (cameras 3 and 6), visible galleries drawn in each trial.

    Two samplers are in use, and their figures differ. "official": the images that the data set's own file lists for
    each person, camera and trial. "seeded": trial t draws with Python's `random.Random(t)`, person by person, camera by
    camera, from the sorted files: one by `choice`, or several by `sample`; for one image as Ye et al.'s code does,
    whose users draw several in different ways.

    Args:
        mode: "all" (gallery of cameras 1, 2, 4, 5) or "indoor" (1, 2).
        shots: images of a person and camera in the gallery, 1 or 10; all where there are fewer.
        sampler: "seeded" or "official".
        permutation: for "official": the file `rand_perm_cam.mat`, or the array of that name in it.
        num_trials: at most 10 for "official".
    """
    cameras = MODES[checked_choice(mode, "mode", tuple(MODES))]
    checked_count(shots, "shots")
    checked_choice(sampler, "sampler", SAMPLERS)
    checked_count(num_trials, "num_trials")
    if (sampler == "official") != (permutation is not None):
        raise ValueError("permutation must be given for sampler='official', and for no other.")
    listed = None if permutation is None else _permutation(permutation)

    def draws(
        q_pids: NDArray[np.int64], g_pids: NDArray[np.int64], q_camids: Any, g_camids: Any, g_names: Any
    ) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        if g_camids is None or q_camids is None:
            raise ValueError("q_camids and g_camids must be given for SYSU-MM01: 3 and 6, and 1, 2, 4 and 5.")
        unknown = sorted({*np.unique(q_camids), *np.unique(g_camids)} - {1, 2, 3, 4, 5, 6})
        if unknown:
            raise ValueError(f"q_camids and g_camids must be 1 to 6 for SYSU-MM01, got {first_few(unknown)}.")
        groups = _groups(g_pids, g_camids, cameras, g_names)
        queries = np.flatnonzero(np.isin(q_camids, (3, 6)))
        if not len(queries) or not groups:
            raise ValueError(f"q_camids must hold 3 or 6, and g_camids {cameras}, for SYSU-MM01; one side has none.")
        if listed is not None:
            numbers = _numbers(g_names, len(g_pids))
            drawn = [_official(groups, numbers, listed, trial, shots) for trial in range(num_trials)]
        else:
            drawn = [_seeded(groups, trial, shots) for trial in range(num_trials)]
        return [(queries, np.sort(np.asarray(rows, dtype=np.int64))) for rows in drawn]

    return EvaluationProtocol("sysu-mm01", _SysuMM01, draws, num_trials)


_Groups = dict[tuple[int, int], list[int]]


def _groups(pids: NDArray[np.int64], camids: NDArray[np.int64], cameras: Sequence[int], names: Any) -> _Groups:
    """Rows of each person and camera, in the order of their files; person by person, camera by camera."""
    if names is not None and len(names) != len(pids):
        raise ValueError(f"g_names must be the gallery's {len(pids)} paths, got {len(names)}.")
    order = range(len(pids)) if names is None else sorted(range(len(pids)), key=lambda i: os.fspath(names[i]))
    groups: _Groups = {(pid, camera): [] for pid in np.unique(pids[pids != JUNK_PID]).tolist() for camera in cameras}
    for i in order:
        groups.get((int(pids[i]), int(camids[i])), []).append(i)
    return {key: rows for key, rows in groups.items() if rows}


def _seeded(groups: _Groups, trial: int, shots: int) -> list[int]:
    generator = random.Random(trial)
    drawn: list[int] = []
    for rows in groups.values():
        drawn += [generator.choice(rows)] if shots == 1 else generator.sample(rows, min(shots, len(rows)))
    return drawn


def _official(groups: _Groups, numbers: list[int], listed: NDArray[Any], trial: int, shots: int) -> list[int]:
    drawn: list[int] = []
    for (pid, camera), rows in groups.items():
        of_camera = np.asarray(listed[camera - 1, 0]).reshape(-1)
        if pid > len(of_camera):
            raise ValueError(f"permutation must list every person, got {len(of_camera)} in camera {camera}, not {pid}.")
        of_trials = np.atleast_2d(of_camera[pid - 1])
        if trial >= len(of_trials):
            raise ValueError(f"num_trials must be at most {len(of_trials)}, those of the permutation, got {trial + 1}.")
        chosen = {int(number) for number in of_trials[trial][:shots]}
        found = [row for row in rows if numbers[row] in chosen]
        if len(found) < min(len(chosen), shots):
            raise ValueError(f"g_names must have images {sorted(chosen)} of person {pid} in camera {camera}.")
        drawn += found
    return drawn


def _permutation(given: Any) -> NDArray[Any]:
    if isinstance(given, (str, os.PathLike)):
        from scipy.io import loadmat  # noqa: PLC0415 - slow to import

        if not Path(given).is_file():
            raise FileNotFoundError(f"permutation must be the data set's rand_perm_cam.mat; there is no {given}.")
        given = loadmat(given).get("rand_perm_cam")
    if not isinstance(given, np.ndarray) or given.dtype != object or given.size < 6:
        raise ValueError("permutation must hold rand_perm_cam, a cell for each of 6 cameras.")
    return given.reshape(-1, 1)


def _numbers(names: Any, count: int) -> list[int]:
    """The images' numbers in their files' names."""
    if names is None or len(names) != count:
        raise ValueError(f"g_names must be the gallery's {count} paths for sampler='official'.")
    found = [_SYSU_NAME.search(Path(name).as_posix()) for name in names]
    bad = [names[i] for i, match in enumerate(found) if match is None]
    if bad:
        raise ValueError(f"g_names must end like cam1/0006/0001.jpg, got {first_few(bad)}.")
    return [int(match[3]) for match in found if match is not None]


def regdb(trials: Sequence[tuple[Any, Any]]) -> EvaluationProtocol:
    """RegDB (Nguyen et al., 2017): given trials, without cameras.

    Args:
        trials: rows of queries and gallery of each trial, as in `pose2id.datasets.Dataset.trials`.
    """
    given = [tuple(np.asarray(side) for side in trial) for trial in trials]
    if any(side.dtype.kind not in "iu" for trial in given for side in trial if side.size):
        raise TypeError("trials must hold row numbers, integers. Take numpy.flatnonzero of a mask.")
    rows = [tuple(side.astype(np.int64) for side in trial) for trial in given]
    if not rows:
        raise ValueError("trials must hold at least one trial, got none.")

    def draws(q_pids: Any, g_pids: Any, *_: Any) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        for query, gallery in rows:
            for name, side, n in (("queries", query, len(q_pids)), ("gallery", gallery, len(g_pids))):
                if not len(side) or side.min() < 0 or side.max() >= n:
                    raise ValueError(f"trials must hold rows of the {name}, 0 to {n - 1}; one has others, or none.")
        return [(query, gallery) for query, gallery in rows]

    return EvaluationProtocol("regdb", _without_cameras, draws, len(rows))


def vehicleid(seed: int = 0, num_trials: int = 10) -> EvaluationProtocol:
    """VehicleID (Liu et al., 2016): in each trial one image of each identity is the gallery, all others are queries.

    Queries and gallery are given as the same images, row by row; trial t draws with `numpy.random.default_rng([seed,
    t])`, identity by identity in order. An identity with one image is in the gallery alone.

    Args:
        seed: of the draws.
        num_trials: the field takes 10.
    """
    checked_count(seed, "seed", least=0)
    checked_count(num_trials, "num_trials")

    def draws(q_pids: Any, g_pids: Any, *_: Any) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        if not np.array_equal(q_pids, g_pids):
            raise ValueError("q_pids and g_pids must be of the same images for VehicleID, which draws the gallery.")
        if len(np.unique(g_pids)) == len(g_pids):
            raise ValueError("g_pids must have an identity with two images for VehicleID, got one image of each.")
        found = []
        for trial in range(num_trials):
            generator = np.random.default_rng([seed, trial])
            gallery = np.array([generator.choice(np.flatnonzero(g_pids == pid)) for pid in np.unique(g_pids)])
            found.append((np.setdiff1d(np.arange(len(g_pids)), gallery), np.sort(gallery)))
        return found

    return EvaluationProtocol("vehicleid", _without_cameras, draws, num_trials, one_set=True)


def by_name(name: str, **options: Any) -> EvaluationProtocol:
    """A protocol by its name; options are those of the functions of this module.

    Args:
        name: of `NAMES`.
        **options: as of `sysu_mm01`, `regdb`, `vehicleid` or `leave_one_out`.
    """
    checked_choice(name, "protocol", NAMES)
    made: dict[str, Callable[..., EvaluationProtocol]] = {
        "sysu-mm01": sysu_mm01,
        "regdb": regdb,
        "vehicleid": vehicleid,
        "leave-one-out": leave_one_out,
    }
    known_options = inspect.signature(made[name]).parameters if name in made else {}
    for option in options.keys() - known_options:
        raise ValueError(f"{option} must be left out: protocol {name!r} has no such option.")
    for option, parameter in known_options.items():
        if parameter.default is parameter.empty and option not in options:
            raise ValueError(f"{option} must be given: protocol {name!r} needs it.")
    if name in made:
        return made[name](**options)
    known = (MARKET1501, CUHK03, OCCLUDED_REID)
    return next(protocol for protocol in known if protocol.name == name)


def pool(
    features: FeatureArray, groups: Any, *, pids: Any = None, camids: Any = None
) -> tuple[FeatureArray, NDArray[np.int64]]:
    """Features of tracklets: the mean of their images' raw features, as the field does on MARS (Zheng et al., 2016).

    The means are not normalised; `evaluate` does that. MARS is then measured by `MARKET1501`.

    Args:
        features: (N, D) or (N, P, D) raw features of images, numpy array or torch tensor.
        groups: (N,) which tracklet each image is of, labels as in `pose2id.evaluate`.
        pids: (N,) identities, where their agreement within each tracklet is to be checked.
        camids: (N,) cameras, where theirs is.

    Returns:
        (T, D) or (T, P, D) means, in the features' container, dtype and device; and (T,) int64 the row of each
        tracklet's first image, whose labels are the tracklet's; in the order of those rows.

    Raises:
        ValueError: a tracklet with images of two identities, or cameras.
    """
    rows = Rows(features, "features", parts=True)
    labels = checked_labels(groups, "groups", rows.n)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    place = np.argsort(np.argsort(first))[inverse]
    first = np.sort(first)
    for name, given in (("pids", pids), ("camids", camids)):
        if given is not None:
            of_image = checked_labels(given, name, rows.n)
            mixed = np.unique(place[of_image != of_image[first][place]])
            if len(mixed):
                raise ValueError(f"{name} must be one for each group; they differ in that of row {first[mixed[0]]}.")
    sums = torch.zeros((len(first), rows.dim), dtype=torch.float64, device=rows.device)
    index = torch.from_numpy(place).to(rows.device)
    for block in rows.blocks():
        sums.index_add_(0, index[block], rows.read(block, torch.float64))
    means = rows.empty(len(first))
    sizes = torch.from_numpy(np.bincount(place)).to(rows.device)
    rows.write(means, slice(0, len(first)), sums / sizes[:, None])
    return cast("FeatureArray", means), first
