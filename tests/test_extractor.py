from __future__ import annotations

import collections
import copy
import functools
import itertools
import struct
import threading
import types
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn

from pose2id import Centralizer, Extractor
from pose2id.extractor import PRESETS, Preprocess
from pose2id.io.images import load_image


class TinyModel(nn.Module):
    """Mean colours through a linear layer; dropout shows training mode, in-place normalisation shows shared input."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(5)

    def forward(self, images, cam_label=None):
        images.sub_(0.5)
        features = self.frozen(self.linear(self.dropout(images.mean((2, 3)))))
        return features if cam_label is None else features + cam_label[:, None]


class Lazy:
    """Items read one by one, as a data set's are."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


@pytest.fixture
def pictures(rng):
    return [rng.integers(0, 256, (16, 8, 3), dtype=np.uint8) for _ in range(7)]


def by_hand(model, pictures, preset="transreid"):
    batch = torch.stack([PRESETS[preset](Image.fromarray(picture)) for picture in pictures])
    model.eval()
    with torch.no_grad():
        features = model(batch)
    return nn.functional.normalize(features)


def test_pictures_of_every_kind_give_the_same_features(pictures, tmp_path):
    model = TinyModel().eval()
    expected = by_hand(model, pictures)
    centralizer = Centralizer(model, transform="transreid", batch_size=3)
    paths = []
    for index, picture in enumerate(pictures):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(picture).save(paths[-1])
    tensors = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    for images in (
        pictures,
        np.stack(pictures),
        [Image.fromarray(picture) for picture in pictures],
        paths,
        [str(path) for path in paths],
        tensors,
        list(tensors),
    ):
        found = centralizer.extract(images)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(7))


class Seen(nn.Module):
    """Tells of what dtype its batches are; its parameters are of the given dtypes."""

    def __init__(self, *dtypes):
        super().__init__()
        for i, dtype in enumerate(dtypes):
            self.register_parameter(f"p{i}", nn.Parameter(torch.zeros(2).to(dtype), requires_grad=False))
        self.seen = set()

    def forward(self, images):
        self.seen.add(images.dtype)
        return images.float().mean((2, 3))

    def embed(self, images):
        return self(images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_batches_have_the_dtype_of_the_parameters(dtype, pictures):
    tensors = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    for quantised in ([], [torch.int8], [torch.float8_e4m3fn]):
        model = Seen(*quantised, dtype)
        for extractor in (model, model.embed, functools.partial(model), functools.partial(model.embed)):
            Centralizer(extractor, transform="transreid").extract(pictures)
            for given in (tensors, tensors.half(), tensors.double()):
                Centralizer(extractor, flip=True).extract(given)
        assert model.seen == {dtype}


def test_a_batch_in_one_of_several_dtypes_stays(pictures):
    tensors = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    for kind, seen in ((torch.float16, torch.float16), (torch.float32, torch.float32), (torch.float64, torch.float32)):
        model = Seen(torch.float32, torch.float16)
        Centralizer(model).extract(tensors.to(kind))
        assert model.seen == {seen}


@pytest.mark.parametrize("dtypes", [[], [torch.int8], [torch.float8_e4m3fn]])
def test_batches_of_other_callables_are_as_they_come(dtypes, pictures):
    tensors = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    for kind in (torch.float16, torch.float64):
        without, hidden = Seen(*dtypes), Seen(torch.float32)
        for extractor in (without, lambda batch, model=hidden: model(batch)):
            Centralizer(extractor).extract(tensors.to(kind))
        assert without.seen == hidden.seen == {kind}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision(dtype, pictures):
    model = TinyModel().eval()
    expected = by_hand(model, pictures)
    found = Centralizer(model.to(dtype), transform="transreid").extract(pictures)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=8 * torch.finfo(dtype).eps, rtol=0)


def test_a_module_of_buffers_runs_where_they_are():
    class Buffers(Seen):
        def forward(self, images):
            self.seen.add(images.device.type)
            return torch.ones(len(images), 2)

    model = Buffers()
    model.register_buffer("mean", torch.ones(2, device="meta"))
    Extractor(model)(torch.ones(2, 3, 4, 4))
    assert model.seen == {"meta"}
    model.register_parameter("weight", nn.Parameter(torch.ones(2)))
    Extractor(model)(torch.ones(2, 3, 4, 4))
    assert model.seen == {"meta", "cpu"}


@pytest.fixture(scope="module")
def modules():
    """A model, and the same without a mode of its own, within a module that has one."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its own parts
        half = torch.jit.script(copy.deepcopy(model).bfloat16())
        frozen = torch.jit.freeze(torch.jit.script(model))
        exported = torch.export.export(model, (torch.ones(2, 3, 8, 4),)).module()
    return {"model": model, "script": half, "frozen": frozen, "exported": exported}


@pytest.mark.parametrize("kind", ["script", "frozen", "exported"])
def test_modules_that_torch_has_compiled(kind, modules, rng):
    images = torch.from_numpy(rng.random((5, 3, 8, 4), np.float32))
    expected = Extractor(modules["model"])(images)
    inside = nn.Sequential(nn.Dropout(0.5), modules[kind])
    modes = [getattr(part, "training", False) for part in modules[kind].modules()]
    for model in (modules[kind], inside):
        found = Extractor(model, batch_size=2, pad_last_batch=True)(images)
        torch.testing.assert_close(found.float(), expected, atol=0.02 if kind == "script" else 1e-5, rtol=0)
    assert inside.training
    assert inside[0].training
    assert [getattr(part, "training", False) for part in modules[kind].modules()] == modes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_frozen_modules_get_batches_of_their_constants(dtype, device, modules, rng):
    images = torch.from_numpy(rng.random((5, 3, 8, 4), np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its own parts
        scripted = torch.jit.script(copy.deepcopy(modules["model"]).to(device, dtype))
        frozen = torch.jit.freeze(scripted)
    assert not list(frozen.parameters())
    for model in (frozen, nn.Sequential(nn.Identity(), frozen)):
        found = Extractor(model)(images)
        assert (found.dtype, found.device.type) == (dtype, device)
        torch.testing.assert_close(found.cpu().float(), Extractor(modules["model"])(images), atol=0.02, rtol=0)


@pytest.mark.parametrize("arguments", [{}, {"flip": True}, {"inputs": "images"}, {"inputs": "images", "flip": True}])
def test_the_last_batch_padded(arguments, pictures):
    def extractor(batch, cams):
        assert len(batch) == len(cams) == size
        batch = (
            batch if isinstance(batch, torch.Tensor) else torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2) / 255
        )
        parts = batch.reshape(len(batch), 3, 4, -1).mean(3)
        return parts + torch.tensor(cams)[:, None, None], parts.mean(2)

    options = {"transform": None if "inputs" in arguments else "transreid", **arguments}
    size, cams = 7, [*range(7)]
    expected = Extractor(extractor, **options)(pictures, cams=cams, return_visibility=True)
    size = 4
    padded = Extractor(extractor, batch_size=4, pad_last_batch=True, **options)
    for found, whole in zip(padded(pictures, cams=cams, return_visibility=True), expected, strict=True):
        torch.testing.assert_close(found, whole)
    assert "pad_last_batch=True" in repr(padded)
    centralizer = Centralizer(padded, lambda images: [[image[:, ::-1]] * 3 for image in images])
    assert centralizer.extract_generated(pictures[:5], cams=cams[:5]).shape == (5, 3, 3, 4)


def test_without_a_transform_tensors_reach_the_model_as_they_are_and_unshared(rng):
    batch = torch.from_numpy(rng.standard_normal((5, 3, 4, 2))).float()
    before = batch.clone()
    model = TinyModel().eval()
    found = Centralizer(model, batch_size=2).extract(batch)
    assert torch.equal(batch, before)
    torch.testing.assert_close(found, nn.functional.normalize(model(before.clone())).detach())


def test_the_model_is_left_as_it_was(pictures):
    model = TinyModel().train()
    model.frozen.eval()
    Centralizer(model, transform="transreid").extract(pictures)
    assert model.training
    assert model.dropout.training
    assert not model.frozen.training

    def failing(images):
        raise RuntimeError("out of luck")

    model.linear.forward = failing
    with pytest.raises(RuntimeError, match="out of luck"):
        Centralizer(model, transform="transreid").extract(pictures)
    assert model.training
    assert model.dropout.training


def test_a_bound_method_runs_its_module_in_eval_mode(pictures):
    model = TinyModel().train()
    found = Centralizer(model.forward, transform="transreid").extract(pictures)
    assert model.dropout.training
    torch.testing.assert_close(found, by_hand(model, pictures))


def test_one_model_in_several_threads(pictures):
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.meet = nn.BatchNorm2d(3), None

        def forward(self, images):
            if self.meet:
                self.meet()  # all threads are inside, or the others have left
            return self.norm(images).mean((2, 3))

    model = nn.Sequential(Backbone(), nn.Identity()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole, part = (Extractor(user, transform="transreid", batch_size=1) for user in (model, model[0].forward))
    alone = whole(pictures)
    barrier, left = threading.Barrier(2), threading.Event()
    calls = threading.local()

    def meet():
        calls.n = getattr(calls, "n", 0) + 1
        if calls.n == 1:
            barrier.wait(10)
        elif calls.n == 2 and calls.longer:
            left.wait(10)

    model[0].meet = meet

    def run(extractor, images, longer):
        calls.longer = longer
        features = extractor(images, progress=False)
        if not longer:
            left.set()
        return features

    with ThreadPoolExecutor(2) as pool:
        short = pool.submit(run, whole, pictures[:1], False)
        long = pool.submit(run, part, pictures, True)
        assert torch.equal(long.result(), alone)
        assert torch.equal(short.result(), alone[:1])
    assert all(part.training for part in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_model_used_within_its_own_use(pictures):
    model = TinyModel().train()
    inner = Extractor(model, transform="transreid")

    def own(images):
        inner([Image.fromarray(picture) for picture in pictures])
        return [[image] for image in images]

    found = Centralizer(Extractor(model, transform="transreid", batch_size=2), own)(pictures)
    assert all(part.training for part in model.modules())
    torch.testing.assert_close(found, by_hand(model, pictures))


def test_raw_features_on_request(pictures):
    model = TinyModel().eval()
    centralizer = Centralizer(model, transform="transreid")
    raw = centralizer.extract(pictures, normalize=False)
    assert (raw.norm(dim=1) - 1).abs().min() > 1e-3
    torch.testing.assert_close(nn.functional.normalize(raw), centralizer.extract(pictures))


@pytest.mark.parametrize("kind", ["tuple", "dict", "numpy"])
def test_ways_to_return_features(kind, pictures):
    def extractor(images):
        features = images.mean((2, 3))
        if kind == "tuple":
            return features, [images]
        return {"features": features} if kind == "dict" else features.numpy()

    found = Centralizer(extractor, transform="transreid", batch_size=3).extract(pictures)
    expected = Centralizer(lambda images: images.mean((2, 3)), transform="transreid").extract(pictures)
    assert isinstance(found, np.ndarray if kind == "numpy" else torch.Tensor)
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_parts_with_visibility(kind, pictures):
    def extractor(images):
        parts = images.reshape(len(images), 3, 4, -1).mean(3)
        visible = parts.mean(2) > 0
        return (parts, visible, None) if kind == "tuple" else {"features": parts, "visibility": visible}

    centralizer = Centralizer(extractor, transform="transreid", batch_size=3)
    parts, visible = centralizer.extract(pictures, return_visibility=True)
    assert parts.shape == (7, 3, 4)
    assert visible.shape == (7, 3)
    assert visible.dtype == torch.bool
    torch.testing.assert_close(parts.norm(dim=2), torch.ones(7, 3))
    assert centralizer.extract(pictures).shape == (7, 3, 4)


def output_of(**fields):
    return collections.namedtuple("Output", fields)(**fields)


@pytest.mark.parametrize("form", [output_of, types.SimpleNamespace, dict])
@pytest.mark.parametrize("name", ["features", "embeddings", "pooler_output"])
def test_features_by_name_before_by_position(form, name, pictures):
    def extractor(images):
        means, others = images.mean((2, 3)), torch.ones(len(images), 9)
        later = {} if name == "pooler_output" else {"pooler_output": others}
        return form(logits=others, last_hidden_state=None, **later, **{name: means})

    expected = Centralizer(lambda images: images.mean((2, 3)), transform="transreid").extract(pictures)
    assert torch.equal(Centralizer(extractor, transform="transreid").extract(pictures), expected)


def test_visibility_by_name_before_by_position():
    parts, shown, logits = torch.rand(4, 3, 5), torch.rand(4, 3), torch.rand(4, 3)
    for output, expected in (
        (output_of(features=parts, logits=logits, visibility=shown), shown),
        (output_of(visibility=shown, logits=logits, features=parts), shown),
        (types.SimpleNamespace(embeddings=parts, visibility=shown), shown),
        (output_of(logits=logits, scores=logits, features=parts), None),
        (output_of(features=parts, shown=shown), shown),
        (output_of(x=parts, y=shown), shown),
        (output_of(features=parts[:, 0], visibility=shown), None),
        ((parts[:, 0], shown), None),
    ):
        found = Extractor(lambda images, output=output: output)(torch.ones(4, 3, 2, 2), return_visibility=True)[1]
        assert found is expected is None or torch.equal(found, expected)


def test_an_output_buffer_that_the_model_reuses(pictures):
    buffer = torch.empty(2, 3)

    def extractor(images):
        buffer[: len(images)] = images.mean((2, 3))
        return buffer[: len(images)]

    found = Centralizer(extractor, transform="transreid", batch_size=2).extract(pictures)
    expected = Centralizer(lambda images: images.mean((2, 3)), transform="transreid").extract(pictures)
    torch.testing.assert_close(found, expected)


def test_side_inputs_stay_with_their_image(rng):
    images = torch.arange(7.0).reshape(7, 1, 1, 1).expand(7, 3, 2, 2)
    order = rng.permutation(7)
    seen = []

    def extractor(batch, cams, names, arrays, mode, flag, views):
        values = batch[:, 0, 0, 0].tolist()
        for value, cam, name, array, view in zip(values, cams.tolist(), names, arrays, views, strict=True):
            seen.append((value, cam, name, int(array), mode, flag, view))
        cams.zero_()  # a model that writes into its side input
        arrays[:] = 0
        return torch.ones(len(batch), 2)

    cams, arrays = torch.from_numpy(order) * 10, order * 100
    Centralizer(extractor, batch_size=3).extract(
        images[order],
        cams=cams,
        names=[str(i) for i in order],
        arrays=arrays,
        mode=("a", 1),
        flag=None,
        views=tuple(order.tolist()),
    )
    assert seen == [(i, i * 10, str(i), i * 100, ("a", 1), None, i) for i in order]
    assert cams.tolist() == (order * 10).tolist()
    assert arrays.tolist() == (order * 100).tolist()


class Series:
    """As a pandas Series: [] takes labels, which are no positions here, and only iloc takes positions."""

    ndim = 1

    def __init__(self, values, labels):
        self.values, self.labels = list(values), list(labels)

    @property
    def iloc(self):
        return self.ByPosition(self)

    class ByPosition:
        def __init__(self, series):
            self.series = series

        def __getitem__(self, rows):
            return Series(*([of[i] for i in rows] for of in (self.series.values, self.series.labels)))

    def reset_index(self, *, drop):
        assert drop
        return Series(self.values, range(len(self)))

    def __len__(self):
        return len(self.values)

    def __getitem__(self, label):
        return self.values[self.labels.index(label)]


@pytest.mark.parametrize(
    ("cams", "of_two", "last"),
    [
        (Series([5, 6, 7], [2, 0, 1]), [5, 6], [7]),
        (range(5, 8), [5, 6], [7]),
        (Lazy([5, 6, 7]), [5, 6], [7]),
        (collections.deque([5, 6, 7]), [5, 6], [7]),
        ({1: 5, 2: 6, 3: 7}, {1: 5, 2: 6, 3: 7}, {1: 5, 2: 6, 3: 7}),
        ("abc", "abc", "abc"),
        (b"abc", b"abc", b"abc"),
        (np.float32(5), 5, 5),
        (np.array(5), 5, 5),
    ],
)
def test_whatever_has_an_entry_per_image_is_sliced(cams, of_two, last):
    seen = []
    Extractor(lambda x, cams: seen.append(cams) or torch.ones(len(x), 2), batch_size=2)(
        torch.ones(3, 3, 2, 2), cams=cams
    )
    if isinstance(cams, Series):  # of each batch, with labels that count from 0
        seen = [[batch[i] for i in range(len(batch))] for batch in seen]
    assert seen == [of_two, last]


def test_extractors_that_read_images_themselves(pictures, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(pictures[0]).save(path)

    def extractor(images):
        arrays = [np.asarray(Image.open(x)) if isinstance(x, str) else x for x in images]
        return np.stack([array.mean((0, 1)) for array in arrays]).astype(np.float64)

    images = [path, pictures[1], Image.fromarray(pictures[2])]
    found = Centralizer(extractor, inputs="images", batch_size=2).extract(images)
    expected = np.stack([picture.mean((0, 1)) for picture in pictures[:3]])
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True))
    assert found.dtype == np.float64


def test_an_extractor_by_itself(pictures):
    model, cams = TinyModel().train(), torch.arange(7.0)
    extractor = Extractor(model, transform="transreid", batch_size=3)
    found = extractor(pictures, cam_label=cams, progress=False)
    torch.testing.assert_close(found, Centralizer(model, transform="transreid").extract(pictures, cam_label=cams))
    torch.testing.assert_close(extractor(pictures), by_hand(model, pictures))
    raw, visibility = extractor(pictures, normalize=False, return_visibility=True)
    torch.testing.assert_close(nn.functional.normalize(raw), extractor(pictures))
    assert visibility is None
    assert repr(extractor) == "Extractor(TinyModel, inputs='batch', batch_size=3)"
    assert (
        repr(Extractor(len, inputs="images", flip=True))
        == "Extractor(builtin_function_or_method, inputs='images', batch_size=64, flip=True)"
    )


def test_preprocess_by_hand():
    picture = Image.new("RGB", (4, 8), (255, 0, 51))
    tensor = Preprocess((6, 3), (0.5, 0.5, 0.5), (0.5, 0.25, 0.1))(picture)
    assert tensor.shape == (3, 6, 3)
    torch.testing.assert_close(tensor[:, 0, 0], torch.tensor([1.0, -2.0, -3.0]))
    assert PRESETS["fast-reid"](picture)[0, 0, 0].item() == pytest.approx(255)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "YCbCr"])
def test_picture_modes_become_rgb(mode):
    picture = Image.new("RGB", (4, 8), (200, 200, 200)).convert(mode)
    assert load_image(picture, "x").mode == "RGB"
    assert np.abs(np.asarray(load_image(picture, "x")).mean() - (255 if mode == "1" else 200)) < 60


def grey_kinds():
    grey = np.random.default_rng(2).integers(0, 256, (8, 4), dtype=np.uint8)
    floats = torch.from_numpy(grey) / 255
    yield from (grey, grey[..., None], torch.from_numpy(grey), grey.T.copy().T, grey[:, :, None].astype(np.uint8))
    yield from (floats, floats[None], floats[None].numpy(), floats.double(), floats[None].expand(3, -1, -1))
    yield from (Image.fromarray(grey), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("transform", ["transreid", None])
def test_infrared_images_of_every_kind_are_three_equal_channels(transform):
    items = list(grey_kinds())
    expected = np.asarray(load_image(items[-1], "x"))
    assert expected.shape == (8, 4, 3)
    for item in items:
        assert np.array_equal(np.asarray(load_image(item, "x")), expected)
    how = {"inputs": "images"} if transform is None else {"transform": transform}
    model = (lambda batch: np.stack(batch).mean((1, 2), np.float64)) if transform is None else lambda x: x.mean((2, 3))
    for colors in ("rgb", "bgr"):  # grey is grey in either order
        features = np.asarray(Extractor(model, **how)(items, colors=colors))
        assert (features == features[0]).all()
    stacks = (np.stack([items[0]] * 2)[..., None], np.stack([items[-1]] * 2))
    first, second = (np.asarray(Extractor(model, **how)(stack)) for stack in stacks)
    assert np.array_equal(first, second)
    with pytest.raises(TypeError, match="sequence of images"):
        Extractor(model, **how)(items[0])


@pytest.mark.parametrize("wrong", [np.full((8, 4), 2.0), torch.full((1, 8, 4), -0.1), np.full((8, 4), np.nan)])
def test_grey_floats_out_of_range(wrong):
    with pytest.raises(ValueError, match=r"x must be a float image in \[0, 1\]"):
        load_image(wrong, "x")


def png_of_16_bits(channels):
    """Dark pixels, white in the lower 8 bits."""
    rows = np.full((2, 2 * channels), 255, ">u2")
    header = struct.pack(">IIBBBBB", 2, 2, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    for name, content in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")):
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return data


def tiff_of_16_bits(channels, order, parts):
    """The same; the colours one after another in each pixel, or in one plane each."""
    data = np.full(4 * channels, 255, f"{order}u2").tobytes()
    step = len(data) // parts
    fields = {256: [2], 257: [2], 258: [16] * channels, 259: [1], 262: [2], 273: range(8, 8 + len(data), step)}
    fields |= {277: [channels], 278: [2], 279: [step] * parts, 284: [min(parts, 2)]} | (
        {338: [2]} if channels == 4 else {}
    )
    entries = b""
    for tag, values in fields.items():
        content = np.array(values, f"{order}u4").tobytes()
        if len(content) > 4:
            data, content = data + content, struct.pack(f"{order}I", 8 + len(data))
        entries += struct.pack(f"{order}HHI", tag, 4, len(values)) + content
    header = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8 + len(data))
    return header + data + struct.pack(f"{order}H", len(fields)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("made", "form"),
    [
        *[(png_of_16_bits, (channels,)) for channels in (1, 2, 3, 4)],
        *[(tiff_of_16_bits, (n, order, parts)) for n in (3, 4) for order in "<>" for parts in (1, n)],
    ],
)
def test_colours_of_16_bits_are_refused(made, form, tmp_path):
    (tmp_path / "deep").write_bytes(made(*form))
    with Image.open(tmp_path / "deep") as picture:
        for item in (tmp_path / "deep", picture):
            with pytest.raises(ValueError, match=r"x.* must have 8 bits a channel, got mode '(RGBA?;16|I)"):
                load_image(item, "x")


def test_exif_rotation_is_applied(tmp_path):
    picture = Image.new("RGB", (4, 8))
    exif = picture.getexif()
    exif[0x0112] = 6  # rotated by a quarter
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg", "x").size == (8, 4)


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_made_upright_once(tmp_path, pictures, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pictures[0]).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as picture:
        expected = ImageOps.exif_transpose(picture)
        for item in (tmp_path / "a.png", picture):
            found = load_image(item, "x")
            assert found.size == expected.size
            assert found.tobytes() == expected.tobytes()
            assert load_image(found, "x").tobytes() == expected.tobytes()
        assert picture.getexif()[0x0112] == orientation


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of corrupt EXIF data
def test_what_is_wrong_in_exif_does_not_matter(tmp_path, pictures):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "a maker of cameras", 72.0
    exif.get_ifd(0x8769)[0x9003] = "2026:01:01 00:00:00"
    Image.fromarray(pictures[0]).save(tmp_path / "a.jpg", exif=exif)
    whole = (tmp_path / "a.jpg").read_bytes()
    size = load_image(tmp_path / "a.jpg", "x").size
    start = whole.index(b"Exif")
    for place, value in itertools.product(range(start, start + len(exif.tobytes())), (0, 1, 5, 13, 30)):
        damaged = bytearray(whole)
        damaged[place] = value
        (tmp_path / "b.jpg").write_bytes(damaged)
        assert load_image(tmp_path / "b.jpg", "x").size in (size, size[::-1])


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "at least one image"),
        ("a.jpg", TypeError, "Wrap it in"),
        (Image.new("RGB", (2, 2)), TypeError, "Wrap it in"),
        (np.zeros((4, 4, 3), np.uint8), TypeError, r"sequence of images, got ndarray of shape \(4, 4, 3\)"),
        (None, TypeError, "sequence of images"),
        ((x for x in "ab"), TypeError, r"list\(\)"),
        ([Image.new("RGB", (2, 2)), "missing.jpg"], ValueError, r"images\[1\] cannot be read.*missing.jpg"),
        ([np.zeros((4, 4), np.uint16)], TypeError, r"images\[0\] must be a path.*shape \(4, 4\), uint16"),
        ([torch.full((3, 4, 4), 200.0)], ValueError, r"images\[0\] must be a float image in \[0, 1\]"),
        ([torch.full((3, 4, 4), float("nan"))], ValueError, r"images\[0\]"),
        ([Image.new("I;16", (2, 2))], ValueError, r"images\[0\] must have 8 bits"),
        ([3], TypeError, r"images\[0\] must be a path.*got int"),
    ],
)
def test_bad_images(images, error, message):
    with pytest.raises(error, match=message):
        Centralizer(TinyModel(), transform="transreid").extract(images)


def kinds_of(pictures, path):
    """(images, the same with blue first) of every kind; a file and a PIL picture are the same in both."""
    tensors = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    Image.fromarray(pictures[0]).save(path)
    of_their_own = [path, str(path), Image.fromarray(pictures[1])]
    reversed_ = [np.ascontiguousarray(picture[..., ::-1]) for picture in pictures]
    return {
        "list": (pictures, reversed_),
        "views": (pictures, [picture[..., ::-1] for picture in pictures]),
        "tuple": (tuple(pictures), tuple(reversed_)),
        "lazy": (Lazy(pictures), Lazy(reversed_)),
        "array": (np.stack(pictures), np.stack(reversed_)),
        "tensor": (tensors, tensors.flip(1)),
        "float16 tensors": (list(tensors.half()), list(tensors.half().flip(1))),
        "float arrays": ([*tensors.numpy()], [*tensors.numpy()[:, ::-1]]),
        "uint8 tensors": ([torch.from_numpy(p) for p in pictures], [torch.from_numpy(p) for p in reversed_]),
        "mixed": ([*of_their_own, *pictures, tensors[0]], [*of_their_own, *reversed_, tensors[0].flip(0)]),
    }


COLOURS_OF = [{"transform": "transreid"}, {"inputs": "images"}]


def mean_colours(images):
    """Of a batch, or of images that a model reads itself."""
    if isinstance(images, torch.Tensor):
        return images.double().mean((2, 3))
    assert all(isinstance(image, str) or (image.dtype == np.uint8 and image.shape[2] == 3) for image in images)
    arrays = [np.asarray(Image.open(image)) if isinstance(image, str) else image for image in images]
    return torch.from_numpy(np.stack([array[:, :-1].mean((0, 1)) for array in arrays]))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("arguments", COLOURS_OF)
def test_blue_first(arguments, flip, pictures, tmp_path):
    extractor = Extractor(mean_colours, batch_size=3, flip=flip, **arguments)
    for kind, (images, blue_first) in kinds_of(pictures, tmp_path / "a.png").items():
        before = [copy.copy(blue_first[i]) for i in range(len(blue_first))]
        expected = extractor(images, normalize=False)
        assert torch.equal(extractor(images, normalize=False, colors="rgb"), expected), kind
        assert torch.equal(extractor(blue_first, normalize=False, colors="bgr"), expected), kind
        assert torch.equal(Centralizer(extractor).extract(blue_first, normalize=False, colors="bgr"), expected), kind
        assert (extractor(blue_first, normalize=False) - expected).abs().max() > 1e-3, kind
        for i, image in enumerate(before):
            if hasattr(image, "shape"):
                np.testing.assert_array_equal(np.asarray(blue_first[i]), np.asarray(image))


def test_blue_first_files_and_pictures_stay(pictures, tmp_path):
    Image.fromarray(pictures[0]).save(tmp_path / "a.png")
    images = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pictures[1])]
    for arguments in COLOURS_OF:
        extractor = Extractor(mean_colours, **arguments)
        assert torch.equal(extractor(images, colors="bgr"), extractor(images))


@pytest.mark.parametrize("images", [torch.rand(2, 3, 4, 4), [torch.rand(3, 4, 4)], [np.ones((3, 4, 4), np.float32)]])
def test_blue_first_tensors_that_the_model_takes_as_they_are_are_refused(images):
    model = Seen()
    sources = Extractor(model), Centralizer(model).extract
    own = Centralizer(model, lambda given: [[image] for image in given])
    for call in (*sources, own, own.extract_generated, own.diagnose):
        with pytest.raises(ValueError, match=r"colors must be 'rgb' without a transform.*got 'bgr'.*pass transform="):
            call(images, colors="bgr")
    assert not model.seen
    assert Extractor(model)(images, colors="rgb").shape[1] == 3


@pytest.mark.parametrize("colors", ["BGR", "gray", None, 3, ["bgr"]])
def test_other_colours_are_refused(colors, pictures):
    for arguments in (*COLOURS_OF, {}):
        with pytest.raises(ValueError, match="colors must be one of 'rgb', 'bgr', got"):
            Extractor(len, **arguments)(pictures, colors=colors)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.ones((4, 4, 4), np.uint8), TypeError, r"images\[0\] must be a path.*shape \(4, 4, 4\)"),
        (np.ones((4, 4), np.int16), TypeError, r"images\[0\] must be a path.*shape \(4, 4\), int16"),
        (np.ones((4, 4, 3)), TypeError, r"images\[0\] must be a path.*shape \(4, 4, 3\)"),
        (np.ones((4, 4, 3), np.int64), TypeError, r"images\[0\] must be a path"),
        (None, TypeError, r"images\[0\] must be a path.*got NoneType"),
        (torch.full((3, 4, 4), 200.0), ValueError, r"images\[0\] must be a float image in \[0, 1\]"),
        (torch.ones(3, 4, 4).to_sparse(), TypeError, r"images\[0\] must be dense"),
        (torch.ones(3, 4, 4, device="meta"), TypeError, r"images\[0\] must be dense"),
        (np.ma.masked_greater(np.ones((4, 4, 3), np.uint8), 0), TypeError, r"images\[0\] must not be masked"),
        (np.ones((0, 4, 3), np.uint8), ValueError, r"images\[0\] must hold pixels.*Leave empty crops out"),
        (np.ones((4, 0, 3), np.uint8), ValueError, r"images\[0\] must hold pixels"),
        (np.ones(0, np.uint8), ValueError, r"images\[0\] must hold pixels"),
        (torch.ones(3, 0, 4), ValueError, r"images\[0\] must hold pixels"),
    ],
)
def test_bad_images_with_blue_first(image, error, message):
    for images, arguments in itertools.product(([image], Lazy([image])), COLOURS_OF):
        for colors in ("bgr", "rgb"):
            with pytest.raises(error, match=message):
                Extractor(mean_colours, **arguments)(images, colors=colors)


EMPTY = {
    "array": (np.ones((8, 8, 3), np.uint8), np.ones((0, 8, 3), np.uint8)),
    "narrow": (np.ones((8, 8, 3), np.uint8), np.ones((8, 0, 3), np.uint8)),
    "tensor": (torch.ones(3, 8, 8), torch.ones(3, 8, 0)),
    "picture": (Image.new("RGB", (8, 8)), Image.new("RGB", (8, 0))),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_empty_crops_are_named(kind):
    images, model = list(EMPTY[kind]), Seen()
    settings = [{"transform": "transreid"}, {"inputs": "images"}, *([{}] if kind == "tensor" else [])]
    for given, arguments in itertools.product((images, Lazy(images)), settings):
        with pytest.raises(ValueError, match=r"images\[1\] must (hold pixels, got an empty image|give a \(3, H, W\))"):
            Extractor(model if "inputs" not in arguments else len, batch_size=2, **arguments)(given)
    with pytest.raises(ValueError, match=r"images\[0\] must"):
        Extractor(model, transform="transreid")(np.ones((2, 0, 8, 3), np.uint8))
    assert not model.seen


def test_extractors_run_without_gradients():
    seen = []
    Centralizer(lambda x: seen.append(torch.is_grad_enabled()) or x.mean((2, 3))).extract(torch.rand(2, 3, 4, 4))
    assert seen == [False]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.ones(3, 4, 4).to_sparse(), "images.0. must be dense.*sparse"),
        (torch.ones(3, 4, 4, device="meta"), "images.0. must be dense, with values"),
        (np.ma.masked_greater(np.ones((4, 4, 3), np.uint8), 0), "images.0. must not be masked"),
    ],
    ids=["sparse", "meta", "masked"],
)
def test_pictures_that_hold_not_every_value(image, message):
    with pytest.raises(TypeError, match=message):
        Extractor(lambda x: x.mean((2, 3)), transform="transreid")([image])


def test_bfloat16_pictures_go_through_a_transform(pictures):
    tensor = torch.from_numpy(pictures[0]).permute(2, 0, 1) / 255
    assert load_image(tensor.bfloat16(), "x").size == (8, 16)


def test_a_broken_file_is_named(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "whole.png")
    data = bytearray((tmp_path / "whole.png").read_bytes())
    data[40:48] = b"garbage!"
    (tmp_path / "broken.png").write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"images\[0\] cannot be read: .*broken\.png"):
        Centralizer(TinyModel(), transform="transreid").extract([tmp_path / "broken.png"])
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"images\[0\] cannot be read: .*broken\.jpg"):
        Centralizer(TinyModel(), transform="transreid").extract([tmp_path / "broken.jpg"])
    with pytest.raises(ValueError, match=r"images\[0\] cannot be read.*missing\.jpg"):
        Centralizer(TinyModel(), inputs="images").extract([tmp_path / "missing.jpg"])


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (lambda x: None, TypeError, "extractor must return features"),
        (lambda x: {"embedding": x}, TypeError, r"keys \['embedding'\]"),
        (lambda x: x.mean(), ValueError, "extractor must return features"),
        (lambda x: x.mean((2, 3))[:1], ValueError, "with B = 2"),
        (lambda x: x.mean((2, 3)) / 0, ValueError, "extractor output must be finite"),
        (lambda x: x.mean((2, 3)).int(), TypeError, "extractor output must be dense, of dtype"),
        (lambda x: torch.ones(len(x), len(x)), ValueError, r"one form of output.*from images\[2\]"),
        (
            lambda x: x.mean((2, 3)).to(torch.float64 if len(x) == 1 else torch.float32),
            ValueError,
            "one form of output",
        ),
        (lambda x: x.mean((2, 3)) if len(x) == 2 else x.mean((2, 3)).numpy(), ValueError, "one form of output"),
        (
            lambda x: (torch.ones(len(x), 2, 3), torch.ones(len(x), 2) if len(x) == 1 else None),
            ValueError,
            "no visibility",
        ),
        (lambda x: torch.ones(len(x), 2, 0), ValueError, r"got shape \(2, 2, 0\)"),
        (
            lambda x: {"features": torch.ones(len(x), 2, 3), "visibility": torch.ones(len(x), 3)},
            ValueError,
            "visibility of shape",
        ),
    ],
)
def test_bad_outputs(output, error, message):
    with pytest.raises(error, match=message):
        Centralizer(output, batch_size=2).extract(torch.ones(3, 3, 2, 2))


@pytest.mark.parametrize(
    ("arguments", "images", "error", "message"),
    [
        ({}, [np.zeros((4, 4, 3), np.uint8)], TypeError, r"images\[0\] must be a float tensor.*Pass transform="),
        ({}, [torch.ones(3, 4, 4), torch.ones(3, 5, 4)], ValueError, r"images\[1\] must have the size"),
        ({"transform": "resnet"}, [1], ValueError, "transform must be one of 'transreid'"),
        ({"transform": lambda x: 1}, [Image.new("RGB", (2, 2))], ValueError, r"images\[0\] must give a \(3, H, W\)"),
        ({"transform": "pmt", "inputs": "images"}, [1], ValueError, "transform must be None with inputs='images'"),
        ({"inputs": "paths"}, [1], ValueError, "inputs must be one of 'batch', 'images'"),
    ],
)
def test_bad_settings(arguments, images, error, message):
    with pytest.raises(error, match=message):
        Centralizer(TinyModel(), **arguments).extract(images)
    with pytest.raises(error, match=message):
        Extractor(TinyModel(), **arguments)(images)


@pytest.mark.parametrize("cams", [[1, 2], np.arange(8), torch.arange(1), range(8), Series([1], [0])])
def test_side_inputs_of_another_length(cams, pictures):
    with pytest.raises(ValueError, match=r"cam_label must have one entry for each of the 7 images.*functools\.partial"):
        Centralizer(TinyModel(), transform="transreid").extract(pictures, cam_label=cams)


@pytest.mark.parametrize("arguments", [{"size": (0, 3)}, {"std": (0.0, 1.0, 1.0)}, {"interpolation": "cubic"}])
def test_bad_preprocess(arguments):
    with pytest.raises(ValueError, match=r"size|std|interpolation"):
        Preprocess(**{"size": (2, 2), "mean": (0.0,) * 3, "std": (1.0,) * 3, **arguments})


@pytest.mark.gpu
def test_batches_go_where_the_model_is(pictures):
    model = TinyModel().eval()
    expected = by_hand(model, pictures)
    cams = torch.zeros(7)
    found = Centralizer(model.cuda(), transform="transreid").extract(pictures, cam_label=cams)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected)
