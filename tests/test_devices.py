"""A caller's tensors on the GPU, on the CPU or on both: results are those of the CPU, and lie where they should."""

from __future__ import annotations

import dataclasses
import inspect
import runpy

import numpy as np
import pytest
import tiny
import torch
from conftest import COMPILES, ROOT
from PIL import Image
from torch import Tensor, nn

import pose2id
from pose2id import CameraModel, Centralizer, Extractor, GeneratedPictures
from pose2id.cli import main
from pose2id.demo import write_people
from pose2id.demo.people import SyntheticPedestrians
from pose2id.extractor import Preprocess
from pose2id.ipg import IdentityGenerator
from pose2id.neighbors.search import exact_neighbors
from pose2id.poses import nearest_to_mean, standard
from pose2id.retrieval import protocols
from pose2id.retrieval.verification import open_set_rank, verification_rank
from pose2id.training import clean

Q, G, P, D, M = 20, 90, 4, 16, 3
# Random features: nobody repeats.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:method='nfc' may harm here")]


@pytest.fixture(autouse=True)
def _true_float32():
    # Convolutions in TensorFloat-32, PyTorch's default, keep three digits.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def people(rng):
    """Features of a few people each, from which every input is made, and what belongs to them: on the CPU."""
    centres = rng.standard_normal((12, P * D))
    pids = rng.integers(1, 12, Q + G)
    rows = torch.from_numpy(centres[pids] + 0.7 * rng.standard_normal((Q + G, P * D)))
    generated = rows[:, None] + 0.5 * torch.from_numpy(rng.standard_normal((Q + G, M, P * D)))
    shown = torch.from_numpy(rng.random((Q + G, P)))
    shown[:, 0] = 1
    labels = {"pids": torch.from_numpy(pids), "camids": torch.from_numpy(rng.integers(0, 3, Q + G))}
    shown_generated = torch.from_numpy(rng.random((Q, M, P)))
    distances = torch.cdist(rows, rows)
    return {
        "feats": {
            "q": rows[:Q],
            "g": rows[Q:],
            "q_parts": rows[:Q].view(Q, P, D),
            "g_parts": rows[Q:].view(G, P, D),
            "q_generated": generated[:Q],
            "q_part_generated": generated[:Q].view(Q, M, P, D),
            "qg": distances[:Q, Q:],
            "qq": distances[:Q, :Q],
            "gg": distances[Q:, Q:],
        },
        "rest": {
            "labels": [labels["pids"][:Q], labels["pids"][Q:], labels["camids"][:Q], labels["camids"][Q:]],
            "visible": [shown[:Q], shown[Q:]],
            "shown_generated": shown_generated,
        },
    }


# f: features and distances; r: what belongs to them, labels and visibility.
def live(feats, q_camids, g_camids, **options):
    """Distances to a gallery that got its images in three steps, and its features."""
    gallery, n = pose2id.Gallery(refit_share=None), len(feats["g"])
    for some in (slice(0, n - 6), slice(n - 6, n - 5), slice(n - 5, n)):
        gallery.add(feats["g"][some], camids=None if g_camids is None else g_camids[some])
    gallery.remove([3])
    gallery.update([5], feats["g"][6:7])
    gallery.calibrate(impostor=feats["q"])
    found = gallery.search(feats["q"], 4, query_camids=q_camids, **options)
    return found.distances, gallery.features(), gallery.scores(feats["q"], query_camids=q_camids)


CALLS = {
    "aqe": lambda f, r: pose2id.aqe(f["q"], f["g"], qe_times=2),
    "centre_cameras": lambda f, r: pose2id.centre_cameras(f["q"], f["g"], *r["labels"][2:]),
    "clean": lambda f, r: clean(f["g"], r["labels"][1]).distances,
    "clean, pooled": lambda f, r: clean(f["g"], r["labels"][1], covariance="pooled").distances,
    "clean, ledoit-wolf": lambda f, r: clean(f["g"], r["labels"][1], covariance="ledoit-wolf").distances,
    "database_augmentation": lambda f, r: pose2id.database_augmentation(f["g"], qe_times=2),
    "Gallery": lambda f, r: live(f, None, None),
    "Gallery, cameras": lambda f, r: live(f, *r["labels"][2:]),
    "Gallery, re-ranked": lambda f, r: live(f, *r["labels"][2:], rerank="camera"),
    "evaluate": lambda f, r: pose2id.evaluate(f["q"], f["g"], *r["labels"]),
    "evaluate, parts": lambda f, r: pose2id.evaluate(
        f["q_parts"], f["g_parts"], *r["labels"], q_visibility=r["visible"][0], g_visibility=r["visible"][1]
    ),
    "evaluate, leave-one-out": lambda f, r: protocols.LEAVE_ONE_OUT.evaluate(f["g"], f["g"], *[r["labels"][1]] * 2),
    "evaluate, VehicleID": lambda f, r: protocols.vehicleid(num_trials=2).evaluate(
        f["g"], f["g"], *[r["labels"][1]] * 2, way=lambda q, g, *cameras: (q * 2, g)
    ),
    "evaluate, SYSU-MM01": lambda f, r: protocols.sysu_mm01(num_trials=2).evaluate(
        f["q"], f["g"], *r["labels"][:2], 3 + 3 * (r["labels"][2] % 2), 1 + r["labels"][3] % 2
    ),
    "evaluate_rank": lambda f, r: pose2id.evaluate_rank(f["qg"], *r["labels"]),
    "evidence": lambda f, r: pose2id.evidence(f["g"], r["labels"][3]),
    "exact_neighbors": lambda f, r: exact_neighbors(f["q"], f["g"], 5),
    "fuse": lambda f, r: pose2id.fuse(f["q"], f["q_generated"]),
    "fuse, parts": lambda f, r: pose2id.fuse(f["q_parts"], f["q_part_generated"], visibility=r["shown_generated"]),
    "generation_diagnostics": lambda f, r: pose2id.generation_diagnostics(f["q"], f["q_generated"]),
    "graph_propagation": lambda f, r: pose2id.graph_propagation(f["q"], f["g"], *r["labels"][2:]),
    "id2_score": lambda f, r: pose2id.id2_score(f["g"], r["labels"][1]),
    "identity_density": lambda f, r: pose2id.identity_density(f["g"], r["labels"][1], convention="printed"),
    "k_reciprocal": lambda f, r: pose2id.k_reciprocal(f["q"], f["g"], k1=8, k2=3),
    "k_reciprocal, nearest": lambda f, r: pose2id.k_reciprocal(f["q"], f["g"], k1=8, k2=3, topk=7),
    "k_reciprocal, cameras": lambda f, r: pose2id.k_reciprocal(
        f["q"], f["g"], q_camids=r["labels"][2], g_camids=r["labels"][3], topk=7
    ),
    "link_map": lambda f, r: pose2id.link_map(f["g"], r["labels"][3]),
    "link_weights": lambda f, r: tuple(pose2id.link_weights(f["q"], r["labels"][2], f["g"], r["labels"][3])),
    "nearest_to_mean": lambda f, r: nearest_to_mean(f["g"], r["labels"][1], [standard()[0]] * G),
    "nearest_neighbors": lambda f, r: pose2id.nearest_neighbors(f["g"], 5),
    "nfc": lambda f, r: pose2id.nfc(f["g"], 3, 2),
    "nfc, parts": lambda f, r: pose2id.nfc(f["g_parts"], visibility=r["visible"][1]),
    "nfc_diagnostics": lambda f, r: pose2id.nfc_diagnostics(f["g"], camids=r["labels"][3]),
    "part_distances": lambda f, r: pose2id.part_distances(f["q_parts"], f["g_parts"], *r["visible"]),
    "pool": lambda f, r: protocols.pool(f["g"], r["labels"][1]),
    "pool, parts": lambda f, r: protocols.pool(f["g_parts"], r["labels"][1], pids=r["labels"][1]),
    "query_expansion": lambda f, r: pose2id.query_expansion(f["q"], f["g"], qe_times=2),
    "re_ranking": lambda f, r: pose2id.re_ranking(f["qg"], f["qq"], f["gg"], k1=8, k2=3),
    "verification": lambda f, r: pose2id.verification(f["q"], f["g"], *r["labels"], rates=(0.05,), replicates=5),
    "verification, parts": lambda f, r: pose2id.verification(
        f["q_parts"], f["g_parts"], *r["labels"], rates=(), replicates=2
    ),
    "verification_rank": lambda f, r: verification_rank(f["qg"], *r["labels"], rates=(0.05,), replicates=5),
    "open_set": lambda f, r: pose2id.open_set(f["q"], f["g"], r["labels"][0] % 9, r["labels"][1] % 9 % 5, rates=(0.1,)),
    "open_set_rank": lambda f, r: open_set_rank(f["qg"], r["labels"][0] % 9, r["labels"][1] % 9 % 5, rates=(0.1,)),
    "Centralizer.enhance": lambda f, r: Centralizer().enhance(f["q"], f["g"]),
    "Centralizer.enhance, cameras": lambda f, r: Centralizer().enhance(
        f["q"], f["g"], query_camids=r["labels"][2], gallery_camids=r["labels"][3]
    ),
    "Centralizer.enhance, guarded": lambda f, r: Centralizer(method="guarded").enhance(
        f["q"], f["g"], query_camids=r["labels"][2], gallery_camids=r["labels"][3], camera_statistics="gallery"
    ),
    "Centralizer.enhance, camera model": lambda f, r: Centralizer(method="cameras").enhance(
        f["q"],
        f["g"],
        query_camids=r["labels"][2],
        gallery_camids=r["labels"][3],
        camera_model=CameraModel.fit(f["g"], r["labels"][3]),
    ),
    "Centralizer.enhance, guarded parts": lambda f, r: Centralizer().enhance(
        f["q_parts"], f["g_parts"], query_visibility=r["visible"][0], gallery_visibility=r["visible"][1]
    ),
    "Centralizer.rerank": lambda f, r: Centralizer().rerank(
        f["q"], f["g"], query_camids=r["labels"][2], gallery_camids=r["labels"][3], topk=7
    ),
    "Centralizer.rerank, no cameras": lambda f, r: Centralizer().rerank(f["q"], f["g"]),
    "Centralizer.rerank, few images": lambda f, r: Centralizer().rerank(f["q"], f["g"][:12], topk=7),
    "Centralizer.enhance, joint": lambda f, r: Centralizer(k1=2).enhance(f["q"], f["g"], joint=True),
    "Centralizer.enhance, parts": lambda f, r: Centralizer(k1=2).enhance(
        f["q_parts"], f["g_parts"], joint=True, query_visibility=r["visible"][0], gallery_visibility=r["visible"][1]
    ),
    "Centralizer.fuse": lambda f, r: Centralizer(eta=0.5).fuse(f["q"], f["q_generated"]),
}
FIGURES = ("evaluate", "generation_d", "id", "nfc_d", "verification", "open_set")
# What returns features or distances, rather than figures.
ARRAYS = [name for name in CALLS if not name.startswith(FIGURES)]


def changed(inputs, change):
    """The same inputs, each array changed."""
    if isinstance(inputs, dict):
        return {name: changed(value, change) for name, value in inputs.items()}
    return [changed(value, change) for value in inputs] if isinstance(inputs, list) else change(inputs)


def on(device, dtype=None):
    def move(array):
        return array.to(device, dtype if dtype is not None and array.is_floating_point() else None)

    return move


def parts_of(result):
    """What a result is made of: arrays and numbers, by name."""
    if dataclasses.is_dataclass(result):
        named = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    elif isinstance(result, tuple):
        named = dict(enumerate(result))
    else:
        return {"": result}
    return {f"{name} {below}": part for name, value in named.items() for below, part in parts_of(value).items()}


def check(found, expected, device, tolerance):
    """Everything equal, and tensors where they should be."""
    found, expected = parts_of(found), parts_of(expected)
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        given = found[name]
        assert type(given) is type(wanted)
        if isinstance(given, Tensor):
            assert given.device.type == device
            assert given.dtype == wanted.dtype
            torch.testing.assert_close(given.cpu(), wanted, atol=tolerance, rtol=tolerance, equal_nan=True)
        elif wanted is not None:
            np.testing.assert_allclose(given, wanted, atol=tolerance, rtol=tolerance)


def test_every_function_is_here():
    functions = {name for name in pose2id.__all__ if inspect.isfunction(getattr(pose2id, name))}
    assert functions <= CALLS.keys()


@pytest.mark.parametrize("places", [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")], ids="-".join)
@pytest.mark.parametrize("name", CALLS)
def test_features_and_labels_may_be_apart(name, places, rng):
    inputs = people(rng)
    expected = CALLS[name](inputs["feats"], inputs["rest"])
    feats, rest = changed(inputs["feats"], on(places[0])), changed(inputs["rest"], on(places[1]))
    before = changed(feats, torch.clone)
    check(CALLS[name](feats, rest), expected, places[0], 1e-6)
    for key, array in feats.items():
        assert torch.equal(array, before[key])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_every_precision(name, dtype, rng):
    inputs = people(rng)
    feats = changed(inputs["feats"], on("cpu", dtype))
    expected = CALLS[name](feats, inputs["rest"])
    found = CALLS[name](changed(feats, on("cuda")), inputs["rest"])
    # Features are rounded to the dtype that they came in; in between it is float32 at least, in re-ranking at most.
    tolerance = 2 * torch.finfo(dtype).eps if name in ARRAYS else 0
    double = dtype == torch.float64 and not name.startswith(("k_reciprocal", "Centralizer.rerank", "Gallery"))
    check(found, expected, "cuda", max(tolerance, 1e-12 if double else 1e-5))


def column_by_column(array):
    return array.transpose(0, -1).contiguous().transpose(0, -1)


def every_other(array):
    wide = torch.zeros(2 * array.shape[0], *array.shape[1:], dtype=array.dtype, device=array.device)
    wide[::2] = array
    return wide[::2]


def expanded_from_a_row(array):
    """All rows one: memory of a single row."""
    return array[:1].expand(array.shape)


@pytest.mark.parametrize("layout", [column_by_column, every_other, expanded_from_a_row])
@pytest.mark.parametrize("name", CALLS)
def test_every_layout(name, layout, rng):
    inputs = people(rng)
    feats = changed(inputs["feats"], layout)
    expected = CALLS[name](changed(feats, torch.Tensor.contiguous), inputs["rest"])
    found = CALLS[name](changed(inputs["feats"], lambda array: layout(array.cuda())), inputs["rest"])
    check(found, expected, "cuda", 1e-6)


@pytest.fixture
def gpu_by_default():
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("place", ["cuda", "cpu", "numpy"])
@pytest.mark.parametrize("name", CALLS)
def test_another_default_device(name, place, rng, gpu_by_default):
    with torch.device("cpu"):
        inputs = people(rng)
        if place == "numpy":
            inputs = changed(inputs, torch.Tensor.numpy)
        expected = CALLS[name](inputs["feats"], inputs["rest"])
    moved = inputs if place == "numpy" else changed(inputs, on(place))
    check(CALLS[name](moved["feats"], moved["rest"]), expected, place, 1e-6)
    assert torch.empty(0).is_cuda


PAIRS = {
    "aqe": ("q", "g"),
    "evaluate": ("q", "g"),
    "exact_neighbors": ("q", "g"),
    "graph_propagation": ("q", "g"),
    "k_reciprocal": ("q", "g"),
    "part_distances": ("q_parts", "g_parts"),
    "query_expansion": ("q", "g"),
    "Centralizer.enhance": ("q", "g"),
}


@pytest.mark.parametrize("other", ["cpu", "numpy"])
@pytest.mark.parametrize("name", PAIRS)
def test_features_of_one_call_on_two_devices(name, other, rng):
    inputs = people(rng)
    query, gallery = PAIRS[name]
    feats = {**inputs["feats"], query: inputs["feats"][query].cuda()}
    if other == "numpy":
        feats[gallery] = feats[gallery].numpy()
    with pytest.raises(ValueError, match=r"must be on one device, got cuda:0 and cpu"):
        CALLS[name](feats, inputs["rest"])


@pytest.mark.parametrize("fitted", ["cpu", "cuda"])
@pytest.mark.parametrize("used", ["cpu", "cuda"])
def test_a_camera_model_on_another_device(fitted, used, rng, tmp_path):
    """Fitted on one device, kept in a file, and used for a live query on another."""
    inputs = people(rng)
    feats, cameras = inputs["feats"], inputs["rest"]["labels"][2:]
    CameraModel.fit(feats["g"].to(fitted), cameras[1].to(fitted)).save(tmp_path / "cameras.safetensors")
    model = CameraModel.load(tmp_path / "cameras.safetensors")
    options = {"query_camids": cameras[0][:1], "gallery_camids": cameras[1].to(used), "camera_model": model}
    for method in ("auto", "guarded", "cameras", "centring"):
        found = Centralizer(method=method).enhance(feats["q"][:1].to(used), feats["g"].to(used), **options)
        sides = {"query_camids": cameras[0], "gallery_camids": cameras[1], "camera_statistics": "gallery"}
        expected = Centralizer(method=method).enhance(feats["q"], feats["g"], **sides)
        check(found, (expected[0][:1], expected[1]), used, 1e-9)


@pytest.mark.parametrize("places", [("cuda", "cpu"), ("cpu", "cuda")], ids="-".join)
def test_generated_features_may_be_elsewhere(places, rng):
    feats = people(rng)["feats"]
    for call in (pose2id.fuse, pose2id.generation_diagnostics):
        expected = call(feats["q"], feats["q_generated"])
        check(call(feats["q"].to(places[0]), feats["q_generated"].to(places[1])), expected, places[0], 1e-12)


BOUNDED = {
    "database_augmentation": lambda x, y, **memory: pose2id.database_augmentation(y, **memory),
    "exact_neighbors": lambda x, y, **memory: exact_neighbors(x, y, 5, **memory)[0],
    "nearest_neighbors": lambda x, y, **memory: pose2id.nearest_neighbors(y, 5, **memory),
    "nfc": lambda x, y, **memory: pose2id.nfc(y, **memory),
    "nfc, parts": lambda x, y, **memory: pose2id.nfc(y.view(len(y), 8, -1), **memory),
    "nfc_diagnostics": lambda x, y, **memory: pose2id.nfc_diagnostics(y, **memory),
    "evaluate": lambda x, y, **memory: pose2id.evaluate(x, y, range(len(x)), [i % 50 for i in range(len(y))], **memory),
    "part_distances": lambda x, y, **memory: pose2id.part_distances(
        x.view(len(x), 8, -1), y.view(len(y), 8, -1), **memory
    ),
}


LEAST_MEMORY = {"nfc_diagnostics": 32 << 20}  # the evidence has lists of 51 neighbours, and more of their size


@pytest.mark.parametrize("max_memory", [6 << 20, 48 << 20])
@pytest.mark.parametrize("name", BOUNDED)
def test_max_memory_is_kept_on_the_device(name, max_memory):
    max_memory = max(max_memory, LEAST_MEMORY.get(name, 0))
    drawn = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 512, generator=drawn).cuda() for n in (60, 3000))
    BOUNDED[name](x, y, max_memory=max_memory)  # what a library keeps for itself from its first call on
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = BOUNDED[name](x, y, max_memory=max_memory)
    own = result.nbytes if isinstance(result, Tensor) else 0
    assert torch.cuda.max_memory_allocated() - before - own <= max_memory


class Normed(nn.Module):
    """A small ReID model, whose first layer asks for its own dtype."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, images, scale=None):
        features = self.norm(self.conv(images)).mean((2, 3))
        return features if scale is None else features * scale[:, None].to(features.dtype)


@pytest.fixture
def pictures(rng):
    return [Image.fromarray(rng.integers(0, 256, (32, 16, 3), dtype=np.uint8)) for _ in range(5)]


class Mirrors:
    """In place of a generator: the pictures of an image are the image itself, and it mirrored."""

    def generate_iter(self, images, poses, *, progress, **options):
        for image in images:
            yield [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)][: len(poses)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("default", ["cpu", "cuda"])
def test_a_model_on_the_gpu_in_every_precision(dtype, default, pictures):
    model = Normed().to(dtype)
    scale = torch.linspace(1, 2, 5)
    options = {"transform": "transreid", "generator": Mirrors(), "poses": standard()[:2], "batch_size": 2, "flip": True}
    expected = Centralizer(model.float(), **options)(pictures, scale=scale)
    model.to(dtype).train().cuda()
    source = GeneratedPictures(options.pop("generator"), options.pop("poses"))
    centralizer = Centralizer(Extractor(model, **options), source)
    try:
        torch.set_default_device(default)
        found = centralizer(pictures, scale=scale)
        raw = centralizer.extract(pictures, normalize=False, scale=scale)
        generated = centralizer.extract_generated(pictures, scale=scale)
        diagnostics = centralizer.diagnose(pictures, scale=scale)
    finally:
        torch.set_default_device(None)
    assert found.is_cuda
    assert found.dtype == raw.dtype == generated.dtype == dtype
    assert model.training
    error = {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(found.cpu().float(), expected, atol=error, rtol=0)
    torch.testing.assert_close(centralizer.fuse(raw, generated), found, atol=error, rtol=0)
    assert diagnostics.own_cosine > 0.9


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_tensors_as_images(place, pictures):
    batch = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 for picture in pictures])
    model = Normed()
    expected = Centralizer(model).extract(batch)
    found = Extractor(model.cuda())(batch.to(place))
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=0)
    resized = Centralizer(model, transform="transreid").extract(batch.to(place))
    torch.testing.assert_close(resized, Centralizer(model, transform="transreid").extract(pictures))


def test_the_encoder_of_a_generator_as_the_model(pictures):
    generator = IdentityGenerator.from_pretrained("tiny")
    encoder = generator.identity_encoder
    assert next(encoder.parameters()).dtype == torch.float16
    transform = Preprocess(encoder.image_size, (0.5,) * 3, (0.5,) * 3)
    found = Centralizer(encoder, transform=transform).extract(pictures)
    assert found.is_cuda
    assert found.dtype == torch.float16
    full = IdentityGenerator.from_pretrained("tiny", dtype=torch.float32, device="cpu").identity_encoder
    expected = Centralizer(full, transform=transform).extract(pictures)
    torch.testing.assert_close(found.cpu().float(), expected, atol=1e-2, rtol=0)


STAGES = {
    "encode_identity": lambda generator, r: generator.encode_identity(r["identity_images"]),
    "encode_images": lambda generator, r: generator.encode_images(r["references"]),
    "encode_poses": lambda generator, r: generator.encode_poses(r["drawings"]),
    "decode": lambda generator, r: generator.decode(r["latents"][0]),
    "sample": lambda generator, r: generator.sample(
        r["identity_images"],
        r["references"],
        generator.encode_poses(r["drawings"]),
        r["latents"],
        num_inference_steps=2,
    ),
    "sample of poses elsewhere": lambda generator, r: generator.sample(
        r["identity_images"],
        r["references"],
        generator.encode_poses(r["drawings"]).cpu(),
        r["latents"],
        num_inference_steps=2,
    ),
}


@pytest.mark.parametrize("offload", [False, True], ids=["resident", "offloaded"])
@pytest.mark.parametrize("place", ["cpu", "cuda"])
@pytest.mark.parametrize("stage", STAGES)
def test_tensors_for_the_stages_of_generation(stage, place, offload, rng):
    generator = tiny.generator()
    inputs = {
        "identity_images": rng.random((1, 3, *generator.identity_encoder.image_size)),
        "references": rng.random((1, 3, *generator.image_size)),
        "drawings": rng.random((2, 3, *generator.image_size)),
        "latents": rng.standard_normal((1, 2, *generator.latent_shape)),
    }
    inputs = {name: torch.from_numpy(values).float() for name, values in inputs.items()}
    expected = STAGES[stage](generator, inputs)
    if offload:
        generator.enable_model_cpu_offload()
    else:
        generator.to("cuda")
    found = STAGES[stage](generator, changed(inputs, on(place)))
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected, atol=2e-3, rtol=1e-3)


def test_generation_with_another_default_device(pictures, gpu_by_default):
    options = {"num_inference_steps": 2, "output": "tensor", "progress": False}
    with torch.device("cpu"):
        expected = tiny.generator().generate(pictures[:2], standard()[:2], **options)
    # Built where modules are built by default; and what was built on the CPU stays there.
    found = tiny.generator().generate(pictures[:2], standard()[:2], **options)
    with torch.device("cpu"):
        on_cpu = tiny.generator()
    again = on_cpu.generate(pictures[:2], standard()[:2], **options)
    assert on_cpu.device.type == found.device.type == "cpu"
    torch.testing.assert_close(again, expected, atol=0, rtol=0)
    assert float((found - expected).abs().mean()) < 1 / 255
    loaded = IdentityGenerator.from_pretrained("tiny", device="cpu")
    given = loaded.generate(pictures[:1], standard()[:2], **options)
    with torch.device("cpu"):
        wanted = IdentityGenerator.from_pretrained("tiny", device="cpu").generate(
            pictures[:1], standard()[:2], **options
        )
    torch.testing.assert_close(given, wanted, atol=0, rtol=0)
    assert loaded.scheduler.alphas_cumprod.device.type == "cpu"
    assert {tensor.device.type for part in loaded.parts.values() for tensor in part.state_dict().values()} == {"cpu"}


def test_feature_maps(rng):
    from pose2id.plots import feature_maps, new_figure  # noqa: PLC0415 - an extra

    inputs = people(rng)
    offsets = []
    for place in ("cpu", "cuda"):
        axes = new_figure(4, 4).subplots()
        feature_maps([axes], {"gallery": inputs["feats"]["g"].to(place)}, inputs["rest"]["labels"][1].to(place))
        offsets.append(axes.collections[0].get_offsets())
    np.testing.assert_allclose(*offsets)


@pytest.fixture
def folder(tmp_path, monkeypatch, pictures):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "people").mkdir()
    pictures[0].save(tmp_path / "people" / "0.png")
    return tmp_path


@pytest.mark.parametrize(
    "more", [[], ["--dtype", "bfloat16"], ["--dtype", "float32", "--batch-size", "3"], ["--offload"]]
)
def test_generate(more, folder, capsys):
    command = ["generate", "people", "--out", "out", "--weights", "tiny", "--steps", "1", "--device", "cuda", *more]
    assert main([*command, "--dry-run"]) == 0
    assert "on cuda" in capsys.readouterr().out
    assert main(command) == 0
    assert main(command) == 0
    assert "8 were there already" in capsys.readouterr().out
    assert len(list((folder / "out").rglob("*.png"))) == 8


def test_train(folder, capsys):
    pytest.importorskip("accelerate")
    write_people(SyntheticPedestrians(3, num_cameras=1, images_per_camera=2), "cameras", progress=False)
    command = ["train", "cameras/table.csv", "--out", "run", "--weights", "tiny", "--steps", "2", "--batch-size", "2"]
    command += ["--validation-images", "2", "--validation-steps", "1", "--checkpoint-every", "1", "--device", "cuda"]
    assert main(command) == 0, capsys.readouterr().err
    assert "2 steps, loss" in capsys.readouterr().out
    assert (folder / "run" / "weights" / "pose2id.json").is_file()


@pytest.mark.parametrize(
    ("script", "words", "printed"),
    [
        ("neighbors", "exact --n 400 --dim 16 --k 2 --runs 1 --device cuda", "400"),
        (
            "generation",
            "--throughput --baseline --size tiny --poses 2 --steps 2 --runs 1 --batch 2 --device cuda",
            "fp16",
        ),
        ("training", "--tiny --steps 6 --device cuda", "samples/s"),
    ],
)
@pytest.mark.filterwarnings(*COMPILES)
def test_benchmarks(script, words, printed, folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"{script}.py", *words.split()])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"), run_name="__main__")
    assert printed in capsys.readouterr().out
