"""A mid-size IPG from random weights on real crops (CUHK03, camera pair 1), measured on people it has never seen.

python examples/train_real_pedestrians.py --data ../shared/data --out out/real

The stages, each of which leaves files in OUT; started again, the script goes on where it was stopped:

1. crops and a table of the 743 training people, with their keypoints (people/train, people/train.csv);
2. what the ReID model makes of the 100 test people's crops (originals.npz); with --baseline that is all;
3. an identity encoder and a VAE (encoder.pt, vae.pt), then the UNets, tokens and pose encoder (run);
4. 8 pictures of every test crop, with contact sheets (evaluation-20-steps/generated), their features, and the tables
   (evaluation-20-steps/results.txt and .json). stages.jsonl has time and GPU memory of each stage.

The default size is meant for one data-centre GPU; it has not been measured on one. --size small has the networks of
the tiny weights, which a CPU trains in an hour or two (docs/results.md). Beside pose2id[train] it needs onnxruntime.

The data are images of real people. They are no part of this project and must not be redistributed; neither must what
is made of them: OUT is for looking at, and hides from git. Every setting was decided before anything was measured; eta
is not chosen on the test people, three values are reported. So is a control of each: the mean of everybody's generated
features in place of a person's own. It carries no identity, yet changes the scores; only a gain above it is due to the
images.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import make_tiny_weights as tiny
import numpy as np
import onnxruntime
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from pose2id import Centralizer, IdentityGenerator, generation_diagnostics
from pose2id.demo import pretraining
from pose2id.io.feature_files import FeatureFile
from pose2id.io.images import load_image
from pose2id.ipg import TransReID
from pose2id.ipg.batch import SHEETS, generate_files, stacked
from pose2id.poses import Pose
from pose2id.poses.skeleton import HIGHEST, LOWEST, THRESHOLD
from pose2id.report import Row, by_number, compare, number_table, records, table
from pose2id.training import run as training
from pose2id.training import start as starting
from pose2id.training.table import PersonImage, read_table, write_table

IMAGE_SIZE = (128, 64)


@dataclass(frozen=True)
class Size:
    """Networks, and how they are trained.

    Attributes:
        encoder: of `TransReID`.
        encoder_training: of `pretraining.train_identity_encoder`.
        vae: of `diffusers.AutoencoderKL`.
        vae_training: of `pretraining.train_vae`.
        unet: of `diffusers.UNet2DConditionModel`.
        rest: of `starting.fresh`.
        training: of `training.train`.
    """

    encoder: dict[str, Any]
    encoder_training: dict[str, Any]
    vae: dict[str, Any]
    vae_training: dict[str, Any]
    unet: dict[str, Any]
    rest: dict[str, Any]
    training: dict[str, Any]


SIZES = {
    "mid": Size(
        encoder={"image_size": IMAGE_SIZE, "patch_size": 8, "stride": 8, "dim": 384, "depth": 8, "heads": 6},
        encoder_training={"people_per_batch": 16, "images_per_person": 4, "learning_rate": 4e-4, "steps": 10_000},
        vae={
            "latent_channels": 8,
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "block_out_channels": [64, 128, 256, 256],
        },
        vae_training={"batch_size": 32, "learning_rate": 3e-4, "steps": 15_000},
        unet={
            "sample_size": 16,
            "in_channels": 8,
            "out_channels": 8,
            "block_out_channels": [192, 320, 448],
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "cross_attention_dim": 384,
            "attention_head_dim": 8,
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        },
        rest={"num_tokens": 8, "pose_channels": [16, 32, 64, 128]},
        training={
            "steps": 20_000,
            "batch_size": 128,
            "learning_rate": 2e-4,
            "warmup_steps": 1000,
            "schedule": "cosine",
            "optimizer": "adamw",
            "snr_gamma": 5.0,
            "ema": 0.9995,
            "cache": True,
            "reference_variants": 8,
            "checkpoint_every": 2000,
            "validate_every": 2000,
        },
    ),
    "small": Size(
        encoder=tiny.ENCODER,
        encoder_training={"people_per_batch": 16, "steps": 2500},
        vae=tiny.VAE,
        vae_training={"steps": 1800},
        unet=tiny.UNET,
        rest=tiny.REST,
        training={**tiny.TRAINING, "steps": 4000, "batch_size": 16},
    ),
}
GUIDANCE = 2.0  # the best for the tiny weights on the drawn people of seed 0 (docs/results.md)
ETAS = (2.0, 1.0, 0.25)  # published for Market1501, Occluded-ReID, SYSU-MM01; none is chosen
CUDA_PICTURES = 128  # generated at a time on a GPU
OVERVIEW = 12  # people on the sheet to look at first

TRAIN_CROPS, TRAIN_POSES = "images/cuhk03_p1_det_train743_64x128.zip", "cuhk03_p1_det_train743_poses.npz"
TEST_CROPS, TEST_LABELS = "images/cuhk03_p1_det_val100_64x128.zip", "cuhk03_p1_det_val100.npz"
MODEL, RECORDED = "models/osnet_x0_25_msmt17.onnx", "feat_osnet_msmt17"
CROP = re.compile(r"([0-9]{4})_c([0-9])_([0-9]{2,3})\.jpg")  # identity, camera, number among the identity's crops
LARGEST = 1 << 20  # bytes of a crop; they have 3,000


def main() -> None:
    """Run the stages that are not done yet."""
    args = arguments()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pose2id").setLevel(logging.INFO)
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / ".gitignore").write_text("*\n", encoding="utf-8")

    with stage("baseline", args):
        people = test_people(args)
        model = reid_model(args.data / MODEL)
        originals = kept(args.out / "originals.npz", people.names, lambda: extracted(model, people))
        baseline = [
            *compared("recorded features (of larger crops)", people.file(people.recorded)),
            *compared("features of the crops", people.file(originals)),
        ]
    print(f"{people}\n{table(baseline)}\n")
    if args.baseline:
        return

    size = chosen_size(args)
    tiny.check_settings(args.out / "settings.json", {"people": args.people, **asdict(size)})
    with stage("table", args):
        images = training_table(args)
        check_unseen(images, people)
    weights = args.out / "run" / "weights"
    if not weights.exists():
        train(images, size, args)
    folder = args.out / f"evaluation-{args.sampler_steps}-steps"
    with stage("generation", args):
        generate(weights, people, folder, args)
    with stage("features of generated pictures", args):
        centralizer = Centralizer(model, transform="torchreid", generated=folder / "generated")
        generated = kept(folder / "features.npz", people.names, lambda: centralizer.extract_generated(people.paths))
    report(people, baseline, originals, generated, folder)


def arguments() -> argparse.Namespace:
    """The command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/real"), help="directory (%(default)s)")
    parser.add_argument("--baseline", action="store_true", help="measure the ReID model on the test crops, and stop")
    parser.add_argument("--people", type=count, help="the first so many training people (all)")
    parser.add_argument("--test-people", type=count, help="the first so many test people (all)")
    parser.add_argument("--size", choices=SIZES, default="mid", help="of the networks (%(default)s)")
    parser.add_argument("--encoder-steps", type=count, help="of the identity encoder (the size's)")
    parser.add_argument("--vae-steps", type=count, help="(the size's)")
    parser.add_argument("--steps", type=count, help="of IPG (the size's)")
    parser.add_argument("--batch-size", type=count, help="of IPG (the size's)")
    parser.add_argument("--sampler-steps", type=count, default=20, help="of generation (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu", help="(%(default)s)")
    parser.add_argument("--workers", type=int, default=8 if cuda else 0, help="that load images (%(default)s)")
    args = parser.parse_args()
    needed = (TRAIN_CROPS, TRAIN_POSES, TEST_CROPS, TEST_LABELS, MODEL)
    missing = [name for name in needed if not (args.data / name).is_file()]
    if missing:
        parser.error(f"--data must be the folder of the data, and {args.data} has no {', '.join(missing)}")
    return args


def count(text: str) -> int:
    """A number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


@contextmanager
def stage(name: str, args: argparse.Namespace) -> Iterator[None]:
    """Tell, and keep in stages.jsonl, how long something took, and how much of a GPU's memory."""
    cuda = args.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    yield
    line = {
        "stage": name,
        "seconds": round(time.perf_counter() - start, 1),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
    }
    with (args.out / "stages.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print("{stage}: {seconds} s on {device}".format(**line), flush=True)


def unzip(archive: Path, folder: Path) -> list[Path]:
    """The crops of an archive as files of a folder, ordered by name; an archive of anything else is refused."""
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.part")
        with zipfile.ZipFile(archive) as file:
            members = file.infolist()
            strange = [m.filename for m in members if not CROP.fullmatch(m.filename) or m.file_size > LARGEST]
            if strange:
                raise SystemExit(f"{archive} must hold crops, PID_cCAM_IDX.jpg of up to 1 MiB, and has {strange[0]!r}.")
            unfinished.mkdir(parents=True, exist_ok=True)
            for member in members:
                (unfinished / member.filename).write_bytes(file.read(member))
        unfinished.rename(folder)
    return sorted(folder.iterdir())


def training_table(args: argparse.Namespace) -> list[PersonImage]:
    """The training crops with identity, camera and keypoints; written at the first time."""
    path = args.out / "people" / "train.csv"
    if path.exists():
        return read_table(path)
    crops = unzip(args.data / TRAIN_CROPS, path.with_suffix(""))
    with np.load(args.data / TRAIN_POSES) as file:
        poses = dict(zip(file["names"].tolist(), map(pose_of, file["keypoints"]), strict=True))
    images = []
    for crop in crops:
        identity, camera, number = CROP.fullmatch(crop.name).groups()
        images.append(PersonImage(crop, identity, camera, poses[f"{identity}_{number}.jpg"]))
    chosen = set(sorted({image.identity for image in images})[: args.people])
    images = [image for image in images if image.identity in chosen]
    write_table(images, path)
    return images


def check_unseen(images: Sequence[PersonImage], people: TestPeople) -> None:
    """See that the people who are tested are not among those who are trained on; nor is any of their crops."""
    identities = {image.identity for image in images} & {f"{pid:04d}" for pid in people.pids}
    contents = {hashlib.sha256(image.path.read_bytes()).digest() for image in images}
    crops = [path.name for path in people.paths if hashlib.sha256(path.read_bytes()).digest() in contents]
    if identities or crops:
        raise SystemExit(f"test people must not be trained on, and {min(identities or crops)} is. Part them anew.")


def pose_of(keypoints: NDArray[np.float16]) -> Pose | None:
    """The pose of (18, 3) keypoints: x, y, visibility; None: nobody was found, or nothing of them is visible."""
    x_y, visibility = keypoints[:, :2].astype(np.float64), keypoints[:, 2:]
    # NaN compares false. A limb guessed far beyond the border is none.
    visible = (visibility >= THRESHOLD) & ((x_y >= LOWEST) & (x_y <= HIGHEST)).all(axis=1, keepdims=True)
    return Pose(np.where(visible, x_y, np.nan)) if visible.any() else None


@dataclass(frozen=True)
class TestPeople:
    """The test crops in the order of their labels.

    Attributes:
        paths: of the crops.
        pids, camids: (N,) integers.
        is_query: (N,) bool.
        recorded: (N, D) the ReID model's features that came with the labels, float16.
    """

    paths: list[Path]
    pids: NDArray[np.int64]
    camids: NDArray[np.int64]
    is_query: NDArray[np.bool_]
    recorded: NDArray[np.float16]

    @property
    def names(self) -> list[str]:
        """Of the crops."""
        return [path.name for path in self.paths]

    def pair(self, values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Those of the queries, and of the gallery."""
        return values[self.is_query], values[~self.is_query]

    def file(self, features: NDArray[Any]) -> FeatureFile:
        """Features with their labels."""
        return FeatureFile(*self.pair(features), *self.pair(self.pids), *self.pair(self.camids))

    def one_each(self) -> NDArray[np.int64]:
        """The first query of each person."""
        queries = np.flatnonzero(self.is_query)
        return queries[np.unique(self.pids[queries], return_index=True)[1]]

    def __str__(self) -> str:
        queries = int(self.is_query.sum())
        return f"{len(np.unique(self.pids))} test people: {queries} queries, {len(self.pids) - queries} gallery images"


def test_people(args: argparse.Namespace) -> TestPeople:
    """The test crops and their labels."""
    folder = args.out / "people" / "test"
    unzip(args.data / TEST_CROPS, folder)
    with np.load(args.data / TEST_LABELS) as file:
        names, recorded, is_query = file["names"].tolist(), file[RECORDED], file["is_query"].astype(bool)
        pids, camids = file["pids"].astype(np.int64), file["camids"].astype(np.int64)
    # detected_val/0000_04.jpg is crop 04 of the first of these people; cameras are counted from 0.
    numbers = [re.fullmatch(r".*_([0-9]+)\.jpg", name).group(1) for name in names]
    paths = [folder / f"{p:04d}_c{c + 1}_{n}.jpg" for p, c, n in zip(pids, camids, numbers, strict=True)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise SystemExit(f"{args.data / TEST_CROPS} must hold a crop for each label, and has no {missing[0]}.")
    chosen = np.flatnonzero(np.isin(pids, np.unique(pids)[: args.test_people]))
    return TestPeople([paths[i] for i in chosen], pids[chosen], camids[chosen], is_query[chosen], recorded[chosen])


def reid_model(path: Path) -> Callable[[torch.Tensor], NDArray[np.float32]]:
    """The ReID model that is given: from a batch (B, 3, 256, 128) to features (B, D)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda batch: session.run(None, {name: batch.numpy()})[0]


def extracted(model: Any, people: TestPeople) -> NDArray[np.float32]:
    """(N, D) raw features of the crops themselves."""
    return Centralizer(model, transform="torchreid").extract(people.paths, normalize=False)


def kept(path: Path, names: list[str], make: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
    """Features of these crops: from the file if it has them, else computed and written there."""
    if path.exists():
        with np.load(path) as file:
            if file["names"].tolist() == names:
                return file["features"]
    features = make()
    unfinished = path.with_name(f"{path.stem}.part.npz")
    np.savez(unfinished, features=features, names=names)
    unfinished.replace(path)
    return features


def compared(name: str, features: FeatureFile, **options: Any) -> list[Row]:
    """Rows of `pose2id.report.compare` that are the paper's, under a name."""
    rows = compare(features, **options)
    return [replace(row, name=f"{name}: {row.name}") for row in rows if not re.search("auto|rerank", row.name)]


def chosen_size(args: argparse.Namespace) -> Size:
    """The size, with the steps and the batch that the command line asks for."""
    size = SIZES[args.size]

    def changed(training: dict[str, Any], **given: int | None) -> dict[str, Any]:
        return {**training, **{name: value for name, value in given.items() if value is not None}}

    return replace(
        size,
        encoder_training=changed(size.encoder_training, steps=args.encoder_steps),
        vae_training=changed(size.vae_training, steps=args.vae_steps),
        training=changed(size.training, steps=args.steps, batch_size=args.batch_size),
    )


def train(images: Sequence[PersonImage], size: Size, args: argparse.Namespace) -> None:
    """The two frozen parts, then the others."""
    paths, pids = [image.path for image in images], [int(image.identity) for image in images]

    def train_encoder() -> TransReID:
        people = min(size.encoder_training["people_per_batch"], len(set(pids)))
        options = {**size.encoder_training, "people_per_batch": people, "device": args.device}
        return pretraining.train_identity_encoder(paths, pids, config=size.encoder, **options)

    def train_vae() -> AutoencoderKL:
        options = {**size.vae_training, "device": args.device}
        return pretraining.train_vae(paths, image_size=IMAGE_SIZE, config=size.vae, **options)

    with stage("identity encoder", args):
        encoder = tiny.once(args.out / "encoder.pt", train_encoder, lambda config: TransReID(**config))
    with stage("VAE", args):
        vae = tiny.once(args.out / "vae.pt", train_vae, AutoencoderKL.from_config)
    generator = starting.fresh(
        identity_encoder=encoder, vae=vae, unet=size.unet, image_size=IMAGE_SIZE, round_bank=False, **size.rest
    )
    for name, part in generator.parts.items():
        print(f"{name:<18} {sum(parameter.numel() for parameter in part.parameters()):>12,} parameters")
    with stage("training", args):
        result = training.train(
            generator,
            images,
            args.out / "run",
            device=args.device,
            mixed_precision="bf16" if args.device == "cuda" else "no",
            workers=args.workers,
            clean=False,  # the figures in docs are of everything
            poses="all",
            **size.training,
        )
    print(result)


def generate(weights: Path, people: TestPeople, folder: Path, args: argparse.Namespace) -> None:
    """8 pictures of each test crop, its contact sheet, and one sheet of the first few people."""
    written = generate_files(
        IdentityGenerator.from_pretrained(weights, dtype=torch.float32, device=args.device),
        people.paths,
        folder / "generated",
        grid=True,
        num_inference_steps=args.sampler_steps,
        guidance_scale=GUIDANCE,
        batch_size=CUDA_PICTURES if args.device == "cuda" else "auto",
        size=None,
    )
    print(written)
    names = [people.paths[i].with_suffix(".png").name for i in people.one_each()[:OVERVIEW]]
    sheets = [load_image(folder / "generated" / SHEETS / name, "contact sheet") for name in names]
    stacked(sheets).save(folder / "overview.png")


def report(
    people: TestPeople,
    baseline: Sequence[Row],
    originals: NDArray[np.float32],
    generated: NDArray[np.float32],
    folder: Path,
) -> None:
    """Print and write everything that is measured."""
    features, pair = people.file(originals), people.pair(generated)
    nobody = people.pair(np.broadcast_to(generated.mean(axis=0), generated.shape))
    rows, curves = list(baseline), {}
    for eta in ETAS:
        centralizer = Centralizer(eta=eta)
        for name, pictures in ((f"eta {eta:g}", pair), (f"control, eta {eta:g}", nobody)):
            found = compared(name, features, centralizer=centralizer, generated=pictures)
            rows += [row for row in found if "IPG" in row.name]
        by_name = by_number(features, pair, centralizer=centralizer)
        curves |= {f"eta {eta:g}: {name}": curve for name, curve in by_name.items()}
    one_each = people.one_each()
    diagnostics = generation_diagnostics(originals[one_each], generated[one_each])
    text = (
        f"{people}\n\n{table(rows)}\n\nby number of generated images:\n{number_table(curves)}\n\n"
        f"one query of each person: {diagnostics}\n"
    )
    (folder / "results.txt").write_text(text, encoding="utf-8")
    content = {"people": str(people), "rows": records(rows), "by_number": curves, "diagnostics": vars(diagnostics)}
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
