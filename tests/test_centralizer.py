from __future__ import annotations

import io
import json
import os
import weakref
from collections import Counter
from functools import partialmethod

import numpy as np
import pytest
import reference
import tiny
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from reference import parts as literal
from test_part_distances import BAD_VISIBILITY, VISIBILITY, visibility
from torch import nn
from tqdm import tqdm

from pose2id import (
    Centralizer,
    Extractor,
    GeneratedPictures,
    PictureFolder,
    Sampling,
    extractor,
    fuse,
    generation_diagnostics,
    nfc,
    poses,
)
from pose2id.centralization import nfc as centralization
from pose2id.io import decoding
from pose2id.io.decoding import decoding_once
from pose2id.io.images import checked_images, content_key, load_image
from pose2id.neighbors import search as neighbors

# Random features: nobody repeats.
pytestmark = pytest.mark.filterwarnings("ignore:method='nfc' may harm here")


def test_sets_are_centralized_apart(rng, backend):
    q, g = rng.standard_normal((20, 6)), rng.standard_normal((50, 6))
    before = q.copy(), g.copy()
    new_q, new_g = Centralizer(k1=3, k2=2, backend=backend).enhance(q, g)
    np.testing.assert_allclose(new_q, reference.nfc(q, 3, 2), atol=1e-12)
    np.testing.assert_allclose(new_g, reference.nfc(g, 3, 2), atol=1e-12)
    np.testing.assert_array_equal(q, before[0])
    np.testing.assert_array_equal(g, before[1])
    np.testing.assert_allclose(np.linalg.norm(new_g, axis=1), 1)


def test_jointly_means_in_the_union(rng):
    q, g = rng.standard_normal((20, 6)), rng.standard_normal((50, 6))
    new_q, new_g = Centralizer(method="nfc").enhance(q, g, joint=True)
    both = reference.nfc(np.concatenate([q, g]), 2, 2)
    np.testing.assert_allclose(np.concatenate([new_q, new_g]), both, atol=1e-12)
    assert np.abs(new_q - Centralizer(method="nfc").enhance(q, g)[0]).max() > 0.1


@pytest.mark.parametrize("joint", [True, False])
def test_each_set_comes_back_in_its_container(joint, rng):
    q = torch.from_numpy(rng.standard_normal((20, 6))).half()
    g = rng.standard_normal((50, 6)).astype(np.float64)
    new_q, new_g = Centralizer(method="nfc").enhance(q, g, joint=joint)
    assert isinstance(new_q, torch.Tensor)
    assert new_q.dtype == torch.float16
    assert type(new_g) is np.ndarray
    assert new_g.dtype == np.float64


def test_settings_reach_the_search(monkeypatch, rng):
    seen = []
    search = neighbors.search
    monkeypatch.setattr(centralization, "search", lambda *arguments: seen.append(arguments[1:]) or search(*arguments))
    q, g = rng.standard_normal((9, 3)), rng.standard_normal((9, 3))
    for joint in (True, False):
        Centralizer(k1=3, backend="torch", max_memory=1 << 21).enhance(q, g, joint=joint)
    assert seen == [(3, "torch", 1 << 21)] * 3


class TestEnhanceParts:
    @pytest.mark.parametrize("seen", VISIBILITY)
    @pytest.mark.parametrize("joint", [True, False])
    def test_equals_the_literal_algorithm(self, joint, seen, rng):
        q, g = rng.standard_normal((15, 3, 6)).astype(np.float32), rng.standard_normal((40, 3, 6))
        (v, weights_q), (u, weights_g) = (visibility(seen, x.shape[:2], rng) for x in (q, g))
        found = Centralizer(k1=3).enhance(torch.from_numpy(q), g, joint=joint, query_visibility=v, gallery_visibility=u)
        assert isinstance(found[0], torch.Tensor)
        assert [x.shape for x in found] == [q.shape, g.shape]
        assert found[1].dtype == np.float64
        if joint:
            both = literal.nfc(np.concatenate([q, g]), np.concatenate([weights_q, weights_g]), 3, 2)
            expected = both[:15], both[15:]
        else:
            expected = literal.nfc(q, weights_q, 3, 2), literal.nfc(g, weights_g, 3, 2)
        np.testing.assert_allclose(found[0].numpy(), expected[0], atol=1e-6)
        np.testing.assert_allclose(found[1], expected[1], atol=1e-12)

    @pytest.mark.parametrize("joint", [True, False])
    def test_visibility_of_one_side_alone(self, joint, rng):
        q, g, u = rng.standard_normal((9, 2, 4)), rng.standard_normal((20, 2, 4)), rng.random((20, 2)) < 0.6
        alone = Centralizer(method="nfc").enhance(q, g, joint=joint, gallery_visibility=u)
        both = Centralizer(method="nfc").enhance(
            q, g, joint=joint, gallery_visibility=u, query_visibility=np.ones((9, 2))
        )
        for x, y in zip(alone, both, strict=True):
            np.testing.assert_array_equal(x, y)

    def test_flattened_on_request(self, rng):
        q, g = rng.standard_normal((9, 2, 4)), rng.standard_normal((20, 2, 4))
        centralizer = Centralizer(method="nfc", part_distance="flattened")
        np.testing.assert_array_equal(centralizer.enhance(q, g)[1], nfc(g, part_distance="flattened"))
        assert "part_distance='flattened'" in repr(centralizer)
        with pytest.raises(ValueError, match="gallery_visibility must be None with part_distance='flattened'"):
            centralizer.enhance(q, g, gallery_visibility=np.ones((20, 2)))

    @pytest.mark.parametrize("container", ["torch", "numpy"])
    @pytest.mark.parametrize("seen", ["bool", "float"])
    def test_what_a_part_based_model_returns_goes_in_directly(self, seen, container, images):
        class PartModel(nn.Module):
            """As BPBReID: the foreground and P parts, and how visible they are."""

            def forward(self, batch):
                parts = torch.stack([batch.mean((2, 3)), *(stripe.mean((2, 3)) for stripe in batch.chunk(4, 2))], 1)
                shown = parts.mean(2) if seen == "float" else parts.mean(2) > 0.48
                outputs = parts.float(), shown.float() if seen == "float" else shown
                return tuple(x.numpy() for x in outputs) if container == "numpy" else outputs

        centralizer = centralizer_of(PartModel(), num_poses=2)
        q, v = centralizer.extract(images[:4], return_visibility=True)
        g, u = centralizer(images[4:], return_visibility=True)
        assert tuple(g.shape) == (7, 5, 3)
        published = Centralizer(method="nfc")
        new_q, new_g = published.enhance(q, g, query_visibility=v, gallery_visibility=u)
        assert type(new_g) is type(g)
        expected = literal.nfc(np.asarray(g), np.asarray(u), 2, 2)
        np.testing.assert_allclose(np.asarray(new_g), expected, atol=1e-6)
        np.testing.assert_allclose(np.asarray(new_q), literal.nfc(np.asarray(q), np.asarray(v), 2, 2), atol=1e-6)

    @pytest.mark.parametrize(("given", "error", "message"), BAD_VISIBILITY)
    @pytest.mark.parametrize("name", ["query_visibility", "gallery_visibility"])
    @pytest.mark.parametrize("joint", [True, False])
    def test_bad_visibility(self, joint, name, given, error, message):
        x = np.ones((3, 2, 4))
        with pytest.raises(error, match=f"{name} {message}"):
            Centralizer(method="nfc").enhance(x, x, joint=joint, **{name: given})

    def test_whole_features_have_none(self):
        with pytest.raises(ValueError, match="query_visibility must be None for whole features"):
            Centralizer(method="nfc").enhance(ONES, ONES, query_visibility=np.ones((2, 1)))


def test_fuse_has_the_centralizers_eta(rng):
    f, g = rng.standard_normal((5, 4)), rng.standard_normal((5, 2, 4))
    centralizer = Centralizer(eta=0.25)
    np.testing.assert_array_equal(centralizer.fuse(f, g), fuse(f, g, 0.25))
    np.testing.assert_array_equal(centralizer.fuse(f, g, eta=2), fuse(f, g, 2))


def test_extract_needs_an_extractor():
    with pytest.raises(ValueError, match="extractor must be given"):
        Centralizer().extract([1])


class FakeGenerator:
    """Mixes an image with each pose's colour; knows what it was asked for, and which of its pictures are alive."""

    def __init__(self):
        self.asked, self.given, self.made = [], 0, []

    def generate_iter(self, images, poses, *, progress=True, strength=0.5, **options):
        self.asked.append({"images": images, "poses": poses, "progress": progress, **options})

        def stream():
            for image in images:
                pictures = [self.picture(image, pose, strength) for pose in poses]
                self.made += map(weakref.ref, pictures)
                self.given += 1
                yield pictures
                del pictures

        return stream()

    def alive(self):
        return sum(picture() is not None for picture in self.made)

    @staticmethod
    def picture(image, pose, strength=0.5):
        colour = load_image(pose, "pose").getpixel((0, 0)) if not isinstance(pose, poses.Pose) else colour_of(pose)
        pixels = np.asarray(load_image(image, "image"), np.float64)
        return Image.fromarray(np.rint((1 - strength) * pixels + strength * np.array(colour)).astype(np.uint8))


def colour_of(pose):
    return tuple(bytes.fromhex(pose.key[:6]))


DRAWINGS = [Image.new("RGB", (1, 1), colour) for colour in ((200, 0, 30), (0, 90, 0), (7, 7, 250), (40, 20, 10))]


def to_tensor(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).double() / 255


def corners(picture):
    """(5, 3): mean colour, and those of the four corners."""
    x = np.asarray(picture, np.float64) / 255
    return np.stack([x.mean((0, 1)), x[0, 0], x[0, -1], x[-1, 0], x[-1, -1]])


class Model(nn.Module):
    """`corners` of a batch, in parts or flat; writes into its batch; keeps what it was called with."""

    def __init__(self, output=lambda parts: parts.flatten(1), side=0):
        super().__init__()
        self.output, self.side, self.batches = output, side, []
        self.dropout = nn.Dropout()

    def forward(self, batch, **side):
        self.batches.append(len(batch))
        assert not self.dropout.training
        assert not torch.is_grad_enabled()
        x = self.dropout(batch)
        parts = torch.stack([x.mean((2, 3)), x[..., 0, 0], x[..., 0, -1], x[..., -1, 0], x[..., -1, -1]], dim=1)
        batch.fill_(float("nan"))
        for value in side.values():
            parts = parts + torch.as_tensor(value)[:, None, None]
        return self.output(parts)


@pytest.fixture
def images(rng):
    return [Image.fromarray(rng.integers(0, 256, (8, 4, 3), dtype=np.uint8)) for _ in range(11)]


@pytest.fixture
def pictures(images):
    return [[FakeGenerator.picture(image, pose) for pose in DRAWINGS] for image in images]


def centralizer_of(model, **settings):
    given = {"transform": to_tensor, "generator": FakeGenerator(), "poses": DRAWINGS, "num_poses": 4, **settings}
    return Centralizer(model, **given)


def flat(picture, i, m):
    return corners(picture).ravel()


class TestFusedImages:
    @pytest.mark.parametrize("batch_size", [1, 3, 4, 64])
    @pytest.mark.parametrize(("eta", "num_poses"), [(2.0, 4), (0.25, 3), (1.0, 1), (2.0, 0)])
    def test_equals_equation_9(self, eta, num_poses, batch_size, images, pictures):
        model = Model().train()
        centralizer = centralizer_of(model, eta=eta, num_poses=num_poses, batch_size=batch_size)
        expected = reference.fuse_images(flat, images, [of_one[:num_poses] for of_one in pictures], eta)
        found = centralizer(images)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
        np.testing.assert_allclose(found.norm(dim=1), 1)
        assert max(model.batches) <= batch_size
        assert sum(model.batches) == 11 * (1 + num_poses)
        assert model.training
        assert model.dropout.training

    def test_batches_are_full_and_mix_images(self, images):
        model = Model()
        centralizer_of(model, batch_size=6, num_poses=3)(images)
        assert model.batches == [6, 6, 6, 6, 5, 6, 6, 3]

    def test_the_same_as_its_steps(self, images):
        centralizer = centralizer_of(Model(), batch_size=5)
        raw, generated = centralizer.extract(images, normalize=False), centralizer.extract_generated(images)
        assert generated.shape == (11, 4, 15)
        torch.testing.assert_close(centralizer(images), centralizer.fuse(raw, generated), rtol=0, atol=1e-14)
        assert centralizer.diagnose(images) == generation_diagnostics(raw, generated)

    def test_what_the_generator_is_asked_for(self, images):
        centralizer = centralizer_of(Model(), num_poses=2, generate_options={"seed": 7, "strength": 0.1})
        found = centralizer(images)
        asked = centralizer.pictures.generator.asked
        assert asked == [{"images": images, "poses": tuple(DRAWINGS[:2]), "progress": False, "seed": 7}]
        pictures = [[FakeGenerator.picture(image, pose, 0.1) for pose in DRAWINGS[:2]] for image in images]
        np.testing.assert_allclose(found.numpy(), reference.fuse_images(flat, images, pictures, 2), atol=1e-12)

    def test_the_standard_poses(self, images):
        centralizer = Centralizer(Model(), transform=to_tensor, generator=FakeGenerator())
        centralizer(images[:2])
        assert centralizer.pictures.generator.asked[0]["poses"] == poses.standard()

    def test_pictures_are_generated_when_due_and_let_go(self, images):
        generator, seen = FakeGenerator(), []

        def extractor(batch):
            seen.append((generator.given, generator.alive()))
            return batch.mean((2, 3))

        centralizer_of(extractor, generator=generator, batch_size=3)(images * 4)
        for call, (given, alive) in enumerate(seen):
            # Four batches of generated images follow each batch of originals.
            block, batch = divmod(call, 5)
            assert given <= 3 * block + (3 * batch + 3) // 4
            assert alive <= 3 + 2 * 4
        assert generator.given == 44

    @pytest.mark.parametrize("kind", ["float16", "float32", "bfloat16", "numpy", "tuple", "dict"])
    def test_ways_to_return_features(self, kind, images, pictures):
        def output(parts):
            features = parts.flatten(1)
            if kind in ("tuple", "dict"):
                return (features, [parts]) if kind == "tuple" else {"features": features}
            return features.numpy() if kind == "numpy" else features.to(getattr(torch, kind))

        found = centralizer_of(Model(output), batch_size=3)(images)
        expected = reference.fuse_images(flat, images, pictures, 2)
        if kind == "numpy":
            assert type(found) is np.ndarray
        elif kind in ("float16", "float32", "bfloat16"):
            assert found.dtype == getattr(torch, kind)
        tolerance = {"bfloat16": 1e-2, "float16": 1e-3}.get(kind, 1e-6)
        np.testing.assert_allclose(torch.as_tensor(found).double(), expected, atol=tolerance)

    @pytest.mark.parametrize("kind", ["bool", "weights", "none"])
    @pytest.mark.parametrize("container", [tuple, dict])
    def test_parts(self, kind, container, images, pictures):
        def seen_in(brightness):
            return brightness > 0.4 if kind == "bool" else brightness

        def output(parts):
            visible = None if kind == "none" else seen_in(parts.mean(2))
            return (parts, visible, "more") if container is tuple else {"features": parts, "visibility": visible}

        f = np.array([corners(image) for image in images])
        g = np.array([[corners(picture) for picture in of_one] for of_one in pictures])
        weights = np.ones(g.shape[:3]) if kind == "none" else seen_in(g.mean(3))
        assert kind != "bool" or (~weights).all(1).any()  # parts that no generated image shows
        centralizer = centralizer_of(Model(output), batch_size=3)
        found, visibility = centralizer(images, return_visibility=True)
        np.testing.assert_allclose(found.numpy(), reference.fuse_parts(f, g, 2, weights), atol=1e-12)
        if kind == "none":
            assert visibility is None
        else:
            np.testing.assert_allclose(visibility.double().numpy(), seen_in(f.mean(2)), atol=1e-12)
        generated, visible = centralizer.extract_generated(images, return_visibility=True)
        assert generated.shape == (11, 4, 5, 3)
        raw = centralizer.extract(images, normalize=False)
        torch.testing.assert_close(centralizer.fuse(raw, generated, visibility=visible), found, rtol=0, atol=1e-14)
        assert centralizer.diagnose(images) == generation_diagnostics(raw, generated)

    def test_a_buffer_that_the_model_reuses(self, images, pictures):
        buffer = torch.empty(3, 15, dtype=torch.float64)

        def output(parts):
            buffer[: len(parts)] = parts.flatten(1)
            return buffer[: len(parts)]

        found = centralizer_of(Model(output), batch_size=3)(images)
        np.testing.assert_allclose(found.numpy(), reference.fuse_images(flat, images, pictures, 2), atol=1e-12)

    def test_extractors_that_read_images_themselves(self, images, pictures, tmp_path):
        paths = [tmp_path / f"{i}.png" for i in range(11)]
        for image, path in zip(images, paths, strict=True):
            image.save(path)
        kinds = []

        def extractor(batch):
            kinds.append({type(item) for item in batch})
            arrays = [np.asarray(Image.open(x)) if isinstance(x, str) else x for x in batch]
            assert all(array.dtype == np.uint8 and array.shape == (8, 4, 3) for array in arrays)
            return np.stack([corners(array).ravel() for array in arrays])

        centralizer = centralizer_of(extractor, transform=None, inputs="images", batch_size=11)
        found = centralizer(paths)
        np.testing.assert_allclose(found, reference.fuse_images(flat, images, pictures, 2), atol=1e-12)
        assert kinds == [{str}] + 4 * [{np.ndarray}]

    def test_one_bar_counts_all_images(self, images, monkeypatch):
        bars = []

        class Bar(tqdm):
            def __init__(self, **settings):
                super().__init__(**{**settings, "disable": False, "file": io.StringIO()})
                bars.append(self)

        monkeypatch.setattr(extractor, "tqdm", Bar)
        centralizer = centralizer_of(Model(), batch_size=3)
        for method in (centralizer, centralizer.extract_generated, centralizer.diagnose, centralizer.extract):
            method(images)
        assert [(bar.n, bar.total) for bar in bars] == [(55, 55), (44, 44), (55, 55), (11, 11)]

    def test_all_kinds_of_images(self, images):
        expected = centralizer_of(Model())(images)
        arrays = np.stack([np.asarray(image) for image in images])
        for given in (list(arrays), arrays, torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255):
            torch.testing.assert_close(centralizer_of(Model())(given), expected)


class TestColours:
    """Blue first, as OpenCV has images, is the same as red first once it is said."""

    @pytest.fixture
    def arrays(self, images):
        return [np.asarray(image) for image in images]

    @pytest.fixture(params=["list", "array", "tensor"])
    def blue_first(self, request, arrays):
        if request.param == "list":
            return [array[..., ::-1] for array in arrays]
        stacked = np.stack(arrays)[..., ::-1].copy()
        return stacked if request.param == "array" else torch.from_numpy(stacked).permute(0, 3, 1, 2) / 255

    @pytest.mark.parametrize("options", [{}, {"flip": True}, {"num_poses": 0}])
    def test_every_call(self, options, arrays, blue_first):
        centralizer = centralizer_of(Model(), batch_size=3, **options)
        expected = centralizer(arrays)
        torch.testing.assert_close(centralizer(blue_first, colors="bgr"), expected, rtol=0, atol=0)
        assert (centralizer(blue_first) - expected).abs().max() > 0.01
        torch.testing.assert_close(centralizer.extract(blue_first, colors="bgr"), centralizer.extract(arrays))
        if centralizer.pictures.num_poses:
            generated = centralizer.extract_generated(arrays)
            found = centralizer.extract_generated(blue_first, colors="bgr")
            torch.testing.assert_close(found, generated, rtol=0, atol=0)
            assert centralizer.diagnose(blue_first, colors="bgr") == centralizer.diagnose(arrays)

    def test_a_source_gets_red_first_and_its_pictures_stay(self, arrays, pictures, blue_first):
        given = []

        def source(images):
            given.append(images)
            return [[np.asarray(picture) for picture in of_one] for of_one in pictures]

        found = Centralizer(Model(), source, transform=to_tensor, batch_size=4)(blue_first, colors="bgr")
        np.testing.assert_allclose(found.numpy(), reference.fuse_images(flat, arrays, pictures, 2), rtol=0, atol=1e-12)
        (images,) = given
        assert len(images) == 11
        for some in (
            images,
            [images[i] for i in range(11)],
            [*images[:4], *images[4:]],
            [images[i] for i in range(-11, 0)],
        ):
            for image, array in zip(some, arrays, strict=True):
                assert type(image) is type(blue_first[0])
                np.testing.assert_array_equal(np.asarray(load_image(image, "image")), array)
                torch.as_tensor(image)  # of no array with negative strides

    def test_of_a_lazy_sequence_each_image_is_read_when_due(self, arrays):
        read = []

        class Lazy:
            def __len__(self):
                return len(arrays)

            def __getitem__(self, i):
                read.append(i)
                return arrays[i][..., ::-1]

        assert len(list(zip(arrays, checked_images(Lazy(), colors="bgr"), strict=True))) == 11
        read.clear()
        centralizer = centralizer_of(lambda batch: seen.append(len(read)) or batch.mean((2, 3)), batch_size=3)
        seen = []
        centralizer.extract(Lazy(), colors="bgr")
        assert seen == [3, 6, 9, 11]

    def test_pictures_in_a_folder(self, images, tmp_path):
        """A list may hold files only, which know their colours: the notes of their pictures are found, and fit."""
        paths = [tmp_path / f"{i}.png" for i in range(3)]
        for path, image in zip(paths, images, strict=False):
            image.save(path)
            note = PngInfo()
            note.add_text("pose2id", json.dumps({"image": content_key(image), "pose": "any"}))
            (tmp_path / "made" / "pose1").mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / "made" / "pose1" / path.name, pnginfo=note)
        centralizer = Centralizer(Model(), PictureFolder(tmp_path / "made"), transform=to_tensor, eta=3.0)
        found = centralizer(paths, colors="bgr")
        expected = reference.fuse_images(flat, images[:3], [[image] for image in images[:3]], 3.0)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
        images[5].save(paths[1])
        with pytest.raises(ValueError, match=r"pictures must be of images\[1\].*was made from another image"):
            centralizer(paths, colors="bgr")
        with pytest.raises(TypeError, match=r"images\[0\] must be a path, whose pictures have its name, got ndarray"):
            centralizer([np.asarray(images[0])], colors="bgr")

    def test_the_generator_itself(self, images):
        options = {"num_inference_steps": 1, "seed": 3}
        centralizer = Centralizer(
            Model(), transform="transreid", generator=tiny.generator(), num_poses=1, generate_options=options
        )
        arrays = [np.asarray(image.resize((32, 64))) for image in images[:2]]
        blue_first = [array[..., ::-1] for array in arrays]
        expected = centralizer(arrays)
        torch.testing.assert_close(centralizer(blue_first, colors="bgr"), expected, rtol=0, atol=0)
        assert (centralizer(blue_first) - expected).abs().max() > 1e-3

    @pytest.mark.parametrize("call", ["__call__", "extract", "extract_generated", "diagnose"])
    def test_refused(self, call, arrays):
        centralizer = centralizer_of(Model())
        with pytest.raises(ValueError, match="colors must be one of 'rgb', 'bgr', got 'BGR'"):
            getattr(centralizer, call)(arrays, colors="BGR")
        with pytest.raises(ValueError, match=r"images\[1\] must hold pixels, got an empty image"):
            getattr(centralizer, call)([arrays[0], arrays[1][:0]], colors="bgr")

    def test_refused_as_an_option_of_the_generator(self):
        with pytest.raises(
            ValueError, match=r"colors must be left out: the generator gets RGB.*\(images, colors='bgr'\)"
        ):
            GeneratedPictures(FakeGenerator(), colors="bgr")


class TestSideInputs:
    @pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 64])
    @pytest.mark.parametrize("kind", [torch.tensor, np.array, list, tuple])
    def test_go_with_their_image_and_its_generated_images(self, kind, batch_size, images, pictures, rng):
        order = rng.permutation(11)
        cams = rng.permutation(11) * 10.0
        seen = []

        def extractor(batch, cams, mode, pair):
            assert type(cams) is type(given)
            assert (mode, pair) == ("test", (1, 2))
            for x, cam in zip(batch, cams, strict=True):
                seen.append((tuple(corners((x * 255).permute(1, 2, 0)).ravel().round(6)), float(cam)))
            if not isinstance(cams, (list, tuple)):
                cams[:] = 0  # a model that writes into its side input
            return batch.mean((2, 3))

        given = kind(cams[order].tolist())
        centralizer_of(extractor, batch_size=batch_size)(
            [images[i] for i in order], cams=given, mode="test", pair=(1, 2)
        )
        assert list(given) == list(cams[order])
        wanted = [(picture, cams[i]) for i in range(11) for picture in (images[i], *pictures[i])]
        known = {tuple(corners(picture).ravel().round(6)): cam for picture, cam in wanted}
        assert len(known) == 55
        assert len(seen) == 55
        assert dict(seen) == known

    def test_change_the_fused_features_as_they_should(self, images, pictures):
        cams, views = np.arange(11) / 7, torch.linspace(-1, 1, 11)
        found = centralizer_of(Model(), batch_size=3)(images, cams=cams, views=views)

        def feature(picture, i, m):
            return corners(picture).ravel() + cams[i] + float(views[i])

        np.testing.assert_allclose(found.numpy(), reference.fuse_images(feature, images, pictures, 2), atol=1e-6)

    def test_constants_of_a_blocks_length_stay_constant(self, images):
        """A tuple is per image if its length is that of all images, not if it is that of some block."""
        seen = set()

        def extractor(batch, four, twelve):
            seen.add((four, twelve))
            return batch.mean((2, 3))

        four, twelve = ("a",) * 4, tuple(range(12))
        centralizer_of(extractor, batch_size=3)(images, four=four, twelve=twelve)
        assert seen == {(four, twelve)}

    def test_of_another_length(self, images):
        centralizer = centralizer_of(Model())
        with pytest.raises(ValueError, match="cams must have one entry for each of the 11 images, got 44"):
            centralizer(images, cams=list(range(44)))
        assert centralizer.extractor.model.batches == []
        assert centralizer.pictures.generator.asked == []

    @pytest.mark.parametrize("batch_size", [1, 3, 64])
    @pytest.mark.parametrize("given", ["torch", "numpy", "list", "nothing"])
    def test_of_the_pose_drawn(self, given, batch_size, images):
        standard = poses.standard()
        own = np.arange(22, dtype=np.float32).reshape(11, 2)
        of_pose = {pose.key: np.array([100.0 + m, -m]) for m, pose in enumerate(standard)}
        seen = []

        def extractor(batch, cams, keypoints=None):
            if keypoints is None:
                keypoints = [None] * len(batch)
            elif given in ("torch", "numpy"):
                assert isinstance(keypoints, torch.Tensor if given == "torch" else np.ndarray)
                assert "float32" in str(keypoints.dtype)
            for x, cam, value in zip(batch, cams.tolist(), keypoints, strict=True):
                key = tuple((x * 255).round().flatten().int().tolist())
                seen.append((key, cam, None if value is None else tuple(map(float, value))))
            return batch.mean((2, 3))

        values = {"torch": torch.from_numpy(own), "numpy": own, "list": own.tolist()}
        centralizer = Centralizer(
            extractor,
            transform=to_tensor,
            generator=FakeGenerator(),
            num_poses=3,
            batch_size=batch_size,
            pose_inputs={"keypoints": lambda pose: of_pose[pose.key]},
        )
        side = {} if given == "nothing" else {"keypoints": values[given]}
        centralizer(images, cams=np.arange(11), **side)
        wanted = []
        for i, image in enumerate(images):
            key = tuple(to_tensor(image).mul(255).round().flatten().int().tolist())
            wanted.append((key, i, None if given == "nothing" else tuple(own[i].tolist())))
            for pose in standard[:3]:
                key = tuple(to_tensor(FakeGenerator.picture(image, pose)).mul(255).round().flatten().int().tolist())
                wanted.append((key, i, tuple(of_pose[pose.key].tolist())))
        assert sorted(seen, key=str) == sorted(wanted, key=str)

    @pytest.mark.parametrize(("value", "kind"), [(torch.ones(2), torch.Tensor), (np.ones(2), np.ndarray), ("a", list)])
    def test_of_the_pose_alone_keep_their_container(self, value, kind, images):
        seen = []

        def extractor(batch, prompt=None):
            seen.append(prompt)
            return batch.mean((2, 3))

        settings = {"generator": FakeGenerator(), "num_poses": 2, "batch_size": 22}
        Centralizer(extractor, transform=to_tensor, pose_inputs={"prompt": lambda pose: value}, **settings)(images)
        assert seen[0] is None
        assert type(seen[1]) is kind
        assert len(seen[1]) == 22

    @pytest.mark.parametrize("like", [None, torch.zeros(11, 2), torch.zeros(11, 2).bfloat16(), np.zeros((11, 2))])
    def test_of_the_pose_in_bfloat16(self, like, images):
        seen = []

        def extractor(batch, xy=None):
            seen.append(xy)
            return batch.mean((2, 3))

        value = torch.tensor([0.3, 7.0]).bfloat16()
        settings = {"generator": FakeGenerator(), "num_poses": 2, "batch_size": 22}
        centralizer = Centralizer(extractor, transform=to_tensor, pose_inputs={"xy": lambda pose: value}, **settings)
        centralizer(images, **({} if like is None else {"xy": like}))
        assert seen[1].dtype == (torch.bfloat16 if like is None else like.dtype)
        assert seen[1].tolist() == [value.tolist()] * 22

    @pytest.mark.parametrize("infrared", [torch.full((11,), 3), range(3, 14)])
    def test_of_a_modality_that_generated_images_do_not_share(self, infrared, images):
        seen = []

        def extractor(batch, cam_ids):
            seen.append(list(map(int, cam_ids)))
            return batch.mean((2, 3))

        settings = {"transform": to_tensor, "generator": FakeGenerator(), "num_poses": 2, "batch_size": 100}
        Centralizer(extractor, pose_inputs={"cam_ids": lambda pose: 1}, **settings)(images, cam_ids=infrared)
        assert seen == [list(infrared), [1] * 22]

    def test_of_poses_with_other_shapes(self, images):
        settings = {"transform": to_tensor, "generator": FakeGenerator(), "num_poses": 2}
        centralizer = Centralizer(Model(), pose_inputs={"xy": lambda pose: np.ones(3)}, **settings)
        with pytest.raises(ValueError, match=r"pose_inputs\['xy'\] must give values of shape \(2,\), as for the orig"):
            centralizer(images, xy=np.ones((11, 2)))
        sizes = iter([1, 2])
        centralizer = Centralizer(Model(), pose_inputs={"xy": lambda pose: np.ones(next(sizes))}, **settings)
        with pytest.raises(ValueError, match=r"shape \(1,\), as for the other poses, got \(2,\) for pose 2"):
            centralizer(images)

    @pytest.mark.parametrize("like", [np.zeros((11, 2), np.int64), torch.zeros((11, 2), dtype=torch.int32)])
    def test_that_integers_cannot_hold(self, like, images):
        settings = {"transform": to_tensor, "generator": FakeGenerator(), "num_poses": 2}
        model = lambda batch, xy: batch.mean((2, 3))  # noqa: E731
        whole, half = (
            Centralizer(model, pose_inputs={"xy": lambda pose, v=v: np.full(2, v)}, **settings) for v in (2.0, 0.5)
        )
        whole(images, xy=like)
        with pytest.raises(ValueError, match=r"pose_inputs\['xy'\] must give whole numbers"):
            half(images, xy=like)


class TestGeneratedInputs:
    """Side inputs of generated images in place of their originals'."""

    CALLS = ("__call__", "extract_generated", "diagnose")

    @staticmethod
    def of_calls(call, images, given, batch_size, **side_inputs):
        """[(corner of the picture, cams, views)], for originals and generated images, in order of the calls."""
        seen = []

        def extractor(batch, cams=None, views=None):
            seen.append(([float(x[0, 0, 0]) for x in batch], cams, views))
            return batch.mean((2, 3))

        centralizer = centralizer_of(extractor, num_poses=2, batch_size=batch_size)
        getattr(centralizer, call)(images, generated_inputs=given, **side_inputs)
        of_original = {float(to_tensor(image)[0, 0, 0]) for image in images}
        return [(all(x in of_original for x in corner), cams, views) for corner, cams, views in seen]

    @pytest.fixture
    def images(self):
        # Of colours that no generated image has.
        return [Image.new("RGB", (4, 8), (2 * i, 255, 3)) for i in range(11)]

    @pytest.mark.parametrize("call", CALLS)
    @pytest.mark.parametrize("constant", [None, 0, torch.tensor(4), "none", (1, 2)])
    def test_a_constant_goes_to_all_generated_images(self, constant, call, images):
        cams, views = torch.arange(11), np.arange(11) + 20
        seen = self.of_calls(call, images, {"cams": constant}, 4, cams=cams, views=views)
        originals = [(list(map(int, x)), list(v)) for original, x, v in seen if original]
        generated = [(x, list(v)) for original, x, v in seen if not original]
        wanted = [] if call == "extract_generated" else list(range(11))
        assert [cam for x, _ in originals for cam in x] == wanted
        assert [view for _, v in originals for view in v] == [20 + cam for cam in wanted]
        assert all(x is constant for x, _ in generated)
        # The others are their original's.
        assert [view for _, v in generated for view in v] == [20 + i for i in range(11) for _ in range(2)]

    @pytest.mark.parametrize("call", CALLS)
    @pytest.mark.parametrize("values", [torch.arange(11) + 50, np.arange(11) + 50, list(range(50, 61))])
    def test_one_for_each_image_goes_to_its_generated_images(self, values, call, images):
        seen = self.of_calls(call, images, {"cams": values}, 5, cams=np.arange(11))
        assert all(type(x) is type(values) for original, x, _ in seen if not original)
        found = [int(cam) for original, x, _ in seen if not original for cam in x]
        assert found == [50 + i for i in range(11) for _ in range(2)]

    def test_for_generated_images_alone(self, images):
        seen = self.of_calls("__call__", images, {"views": 1}, 64)
        assert seen == [(True, None, None), (False, None, 1)]

    @pytest.mark.parametrize("nothing", [None, {}])
    def test_nothing_in_their_place(self, nothing, images):
        seen = self.of_calls("__call__", images, nothing, 64, cams=np.arange(11))
        assert list(seen[1][1]) == [i for i in range(11) for _ in range(2)]

    def test_equals_equation_9(self, images):
        def model(batch, cams=None):
            parts = batch.mean((2, 3))
            return parts if cams is None else parts + cams[:, None]

        def feature(picture, i, m):
            return corners(picture)[0] + (i if m is None else 0)

        pictures = [[FakeGenerator.picture(image, pose) for pose in DRAWINGS] for image in images]
        found = centralizer_of(model)(images, cams=torch.arange(11), generated_inputs={"cams": None})
        np.testing.assert_allclose(found.numpy(), reference.fuse_images(feature, images, pictures, 2), atol=1e-12)

    @pytest.mark.parametrize("call", CALLS)
    def test_errors(self, call, images):
        centralizer = centralizer_of(lambda batch, cams=None: batch.mean((2, 3)))
        for bad in (["cams"], 3, {3: None}):
            with pytest.raises(TypeError, match="generated_inputs must map keywords of the model to values, got"):
                getattr(centralizer, call)(images, generated_inputs=bad)
        with pytest.raises(
            ValueError, match=r"generated_inputs\['cams'\] must have one entry for each of the 11 images"
        ):
            getattr(centralizer, call)(images, generated_inputs={"cams": np.arange(44)})
        posed = centralizer_of(lambda batch, xy: batch.mean((2, 3)), poses="standard", pose_inputs={"xy": lambda _: 1})
        with pytest.raises(ValueError, match="generated_inputs must not hold 'xy', which pose_inputs give"):
            getattr(posed, call)(images, xy=np.zeros(11), generated_inputs={"xy": None})


class TestFlip:
    @staticmethod
    def both(picture, i, m):
        return corners(picture).ravel() + corners(np.asarray(picture)[:, ::-1]).ravel()

    def test_adds_the_feature_of_the_mirrored_image(self, images, pictures):
        model = Model()
        centralizer = centralizer_of(model, flip=True, batch_size=3)
        expected = reference.fuse_images(self.both, images, pictures, 2)
        np.testing.assert_allclose(centralizer(images).numpy(), expected, atol=1e-12)
        raw = [self.both(image, 0, None) for image in images]
        np.testing.assert_allclose(centralizer.extract(images, normalize=False).numpy(), raw, atol=1e-12)
        assert max(model.batches) == 3
        assert np.abs(expected - reference.fuse_images(flat, images, pictures, 2)).max() > 0.01

    def test_side_inputs_and_reused_buffers(self, images, pictures):
        buffer = torch.empty(3, 15, dtype=torch.float64)

        def output(parts):
            buffer[: len(parts)] = parts.flatten(1)
            return buffer[: len(parts)]

        model = Model(output)

        def extractor(batch, cams):
            found = model.eval()(batch, cams=cams)
            cams[:] = 1000
            return found

        def feature(picture, i, m):
            return self.both(picture, i, m) + 2 * i

        centralizer = centralizer_of(extractor, flip=True, batch_size=3)
        expected = reference.fuse_images(feature, images, pictures, 2)
        np.testing.assert_allclose(centralizer(images, cams=np.arange(11)).numpy(), expected, atol=1e-12)

    def test_parts_keep_the_visibility_of_the_image_itself(self, images):
        centralizer = centralizer_of(Model(lambda parts: (parts, parts.mean(2))), flip=True, batch_size=3)
        visibility = centralizer(images, return_visibility=True)[1]
        np.testing.assert_allclose(visibility.numpy(), [corners(image).mean(1) for image in images])

    def test_extractors_that_read_images_themselves(self, images, pictures, tmp_path):
        paths = [tmp_path / f"{i}.png" for i in range(11)]
        for image, path in zip(images, paths, strict=True):
            image.save(path)

        def extractor(batch):
            return np.stack([corners(Image.open(x) if isinstance(x, str) else x).ravel() for x in batch])

        centralizer = centralizer_of(extractor, flip=True, transform=None, inputs="images", batch_size=2)
        expected = reference.fuse_images(self.both, images, pictures, 2)
        np.testing.assert_allclose(centralizer(paths), expected, atol=1e-12)


class TestParts:
    """An extractor and a source of pictures, each made by itself."""

    def test_give_what_their_shortcuts_give(self, images):
        options = {"batch_size": 3, "device": "cpu", "flip": True}
        source = GeneratedPictures(FakeGenerator(), DRAWINGS, 3, strength=0.1, seed=7)
        centralizer = Centralizer(Extractor(Model(), transform=to_tensor, **options), source, eta=0.5)
        shortcut = Centralizer(
            Model(),
            transform=to_tensor,
            generator=FakeGenerator(),
            poses=DRAWINGS,
            num_poses=3,
            generate_options={"strength": 0.1, "seed": 7},
            eta=0.5,
            **options,
        )
        cams = np.arange(11)
        for found, expected in (
            (centralizer(images, cams=cams), shortcut(images, cams=cams)),
            (centralizer.extract(images), shortcut.extract(images)),
            (centralizer.extract_generated(images, cams=cams), shortcut.extract_generated(images, cams=cams)),
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert centralizer.diagnose(images) == shortcut.diagnose(images)
        assert source.generator.asked[0] == {
            "images": images,
            "poses": tuple(DRAWINGS[:3]),
            "progress": False,
            "seed": 7,
        }

    def test_settings_of_sampling_by_name(self):
        source = GeneratedPictures(FakeGenerator(), sampling=Sampling(5, 2.0, 3, (64, 32)), batch_size=4)
        list(source([]))
        wanted = {"num_inference_steps": 5, "guidance_scale": 2.0, "seed": 3, "size": (64, 32), "batch_size": 4}
        assert source.generator.asked[0].items() >= wanted.items()
        both = GeneratedPictures(FakeGenerator(), sampling=Sampling(seed=3), seed=4)  # as for `generate_iter`
        assert both.options["seed"] == 4
        for wrong in ({"seed": 3}, 20):
            with pytest.raises(TypeError, match=r"sampling must be a pose2id\.Sampling, got"):
                GeneratedPictures(FakeGenerator(), sampling=wrong)

    def test_poses_of_a_generator_are_known(self, tmp_path):
        with pytest.raises(ValueError, match="poses must be 'standard' or a sequence of poses, got None"):
            GeneratedPictures(FakeGenerator(), None)
        assert PictureFolder(".").poses == (None,) * 8
        for m in range(3):
            (tmp_path / f"pose{m + 1}").mkdir()
        assert PictureFolder(tmp_path).num_poses == 3
        assert PictureFolder(".", pose_inputs={"xy": len}).poses == poses.standard()

    def test_options_may_be_called_generator(self):
        source = GeneratedPictures(FakeGenerator(), generator=torch.Generator())
        list(source([]))
        assert isinstance(source.generator.asked[0]["generator"], torch.Generator)

    @pytest.mark.parametrize("batch_size", [1, 4, 64])
    def test_a_callable_of_ones_own(self, batch_size, images, pictures):
        centralizer = Centralizer(
            Extractor(Model(), transform=to_tensor, batch_size=batch_size), lambda given: pictures
        )
        expected = reference.fuse_images(flat, images, pictures, 2)
        np.testing.assert_allclose(centralizer(images).numpy(), expected, atol=1e-12)
        assert centralizer.extract_generated(images).shape == (11, 4, 15)
        assert repr(centralizer).startswith("Centralizer(Extractor(Model, inputs='batch', ")

    def test_tensors_as_pictures_need_no_transform(self, images, pictures):
        originals = torch.stack([to_tensor(image) for image in images])
        generated = torch.stack([torch.stack([to_tensor(picture) for picture in of_one]) for of_one in pictures])
        found = Centralizer(Model(), lambda given: generated)(originals)
        np.testing.assert_allclose(found.numpy(), reference.fuse_images(flat, images, pictures, 2), atol=1e-12)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda pictures: pictures[:-1], "pictures must be given of every image, got those of 10 of 11 images"),
            (
                lambda pictures: [*pictures[:2], pictures[2][:3], *pictures[3:]],
                r"4 of every image, got 3 of images\[2\]",
            ),
            (lambda pictures: [], "pictures must be at least 1 of every image"),
            (lambda pictures: [[]], "pictures must be at least 1 of every image"),
            (lambda pictures: [*pictures, pictures[0]], "pictures must be given once .* more than those of 11 images"),
        ],
    )
    def test_a_callable_that_does_not_deliver(self, change, message, images, pictures):
        with pytest.raises(ValueError, match=message):
            Centralizer(Model(), lambda given: change(pictures), transform=to_tensor)(images)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"transform": "pmt"}, ValueError, "transform must be given with a model, or to the Extractor itself"),
            ({"extractor": None, "flip": True}, ValueError, "flip must be given with a model"),
            ({"generator": FakeGenerator()}, ValueError, "generator must be given to the source of pictures itself"),
            (
                {"pictures": None, "num_poses": 3},
                ValueError,
                "num_poses needs exactly one source",
            ),
            ({"extractor": Extractor(len)}, ValueError, "transform must be given with generated pictures"),
            (
                {
                    "extractor": Extractor(len, flip=True, inputs="images"),
                    "pictures": GeneratedPictures(FakeGenerator(), pose_inputs={"xy": len}),
                },
                ValueError,
                "flip must be False with pose_inputs",
            ),
        ],
    )
    def test_what_does_not_go_together(self, arguments, error, message):
        parts = {"extractor": Extractor(len, transform=to_tensor), "pictures": GeneratedPictures(FakeGenerator())}
        with pytest.raises(error, match=message):
            Centralizer(**{**parts, **arguments})

    def test_none_is_as_if_not_given(self, images):
        none = dict.fromkeys(["transform", "device", "generator", "generated", "num_poses", "generate_options"])
        parts = Extractor(Model(), transform=to_tensor), GeneratedPictures(FakeGenerator(), DRAWINGS)
        torch.testing.assert_close(Centralizer(*parts, **none)(images), centralizer_of(Model())(images))


class TestDecoding:
    @pytest.fixture
    def paths(self, images, tmp_path):
        for i, image in enumerate(images):
            image.resize((32, 64)).save(tmp_path / f"{i}.png")
        return [tmp_path / f"{i}.png" for i in range(len(images))]

    @pytest.fixture
    def opened(self, monkeypatch):
        counts, original = Counter(), Image.open
        monkeypatch.setattr(Image, "open", lambda path: counts.update([str(path)]) or original(path))
        return counts

    @pytest.mark.parametrize("make", [FakeGenerator, tiny.generator])
    @pytest.mark.parametrize("batch_size", [3, 64])
    def test_of_each_file_once(self, batch_size, make, paths, opened):
        options = {"generate_options": {"num_inference_steps": 1}, "num_poses": 2, "batch_size": batch_size}
        centralizer = Centralizer(Model(), transform="transreid", generator=make(), **options)
        found = centralizer(paths)
        assert opened == {str(path): 1 for path in paths}
        torch.testing.assert_close(found, centralizer([Image.open(path) for path in paths]))
        load_image(paths[0], "afterwards")
        assert opened[str(paths[0])] == 3

    def test_gives_every_reader_a_picture_of_its_own(self, paths):
        with decoding_once():
            load_image(paths[0], "first").paste("red", (0, 0, 9, 9))
            second = load_image(paths[0], "second")
        assert second.tobytes() == load_image(paths[0], "third").tobytes()

    def test_knows_a_file_that_was_written_anew(self, images, tmp_path):
        scratch = tmp_path / "scratch.png"

        def source(given):
            for shade in range(len(given)):
                Image.new("RGB", (8, 8), (80 * shade,) * 3).save(scratch)
                os.utime(scratch, ns=(shade, shade))  # times of quick writes may be equal
                yield [scratch]

        centralizer = Centralizer(Model(), source, transform=to_tensor, batch_size=1)
        found = centralizer.extract_generated(images[:3])
        shades = [Image.new("RGB", (8, 8), (80 * shade,) * 3) for shade in range(3)]
        torch.testing.assert_close(found[:, 0], centralizer.extract(shades, normalize=False))

    def test_keeps_no_more_than_its_share(self, paths, opened, monkeypatch):
        monkeypatch.setattr(decoding._Kept, "__init__", partialmethod(decoding._Kept.__init__, free=2 * 3 * 32 * 64))
        with decoding_once():
            for i in (0, 1, 0, 1, 2, 1, 0):
                load_image(paths[i], "x")
        assert opened == {str(paths[0]): 2, str(paths[1]): 1, str(paths[2]): 1}


def test_with_the_generator_itself(images):
    generator, images = tiny.generator(), [image.resize((32, 64)) for image in images[:4]]
    options = {"num_inference_steps": 1, "seed": 3}
    centralizer = Centralizer(
        Model(), transform="transreid", generator=generator, num_poses=2, batch_size=3, generate_options=options
    )
    made = generator.generate(images, poses.standard()[:2], progress=False, **options)
    raw = centralizer.extract(images, normalize=False)
    generated = torch.stack([centralizer.extract(pictures, normalize=False) for pictures in made])
    torch.testing.assert_close(centralizer(images), fuse(raw, generated, 2.0), atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("in_parts", [False, True])
def test_fused_where_the_model_is(in_parts, images):
    def model_on(device):
        model = Model(
            (lambda parts: (parts, parts[..., 0].sigmoid())) if in_parts else (lambda parts: parts.flatten(1))
        )
        model.register_parameter("where", nn.Parameter(torch.zeros(1, dtype=torch.float64, device=device)))
        return model

    cams = torch.arange(11.0)
    model = model_on("cuda")
    expected = centralizer_of(model_on("cpu"), batch_size=4)(images, cams=cams, return_visibility=True)
    found = centralizer_of(model, batch_size=4)(images, cams=cams, return_visibility=True)
    # Of a model inside a lambda nothing is known: the device must be given.
    hidden = centralizer_of(lambda batch, cams: model.eval()(batch, cams=cams), batch_size=4, device="cuda")
    assert hidden(images, cams=cams).is_cuda
    torch.testing.assert_close(hidden(images, cams=cams), found[0], atol=0, rtol=0)
    for given, wanted in zip(found, expected, strict=True):
        assert (given is None) == (wanted is None)
        if wanted is not None:
            assert given.is_cuda
            torch.testing.assert_close(given.cpu(), wanted, atol=1e-12, rtol=0)


class TestFailures:
    def test_a_model_that_fails_is_left_as_it_was(self, images):
        model = Model(lambda parts: 1 / 0).train()
        with pytest.raises(ZeroDivisionError) as caught:
            centralizer_of(model)(images)
        assert model.dropout.training
        assert torch.is_grad_enabled()
        assert caught.value

    def test_features_that_are_not_finite_are_named(self, images):
        calls = []

        def extractor(batch):
            calls.append(len(batch))
            features = batch.mean((2, 3))
            if len(calls) == 3:
                features[1] = float("nan")
            return features

        with pytest.raises(ValueError, match=r"1 of 12 features hold NaN.*\(generated image 1 of images\[1\]\)"):
            centralizer_of(extractor, batch_size=3)(images)

    def test_features_that_are_no_floats(self, images):
        with pytest.raises(TypeError, match="extractor output must be dense, of dtype"):
            centralizer_of(lambda batch: batch.mean((2, 3)).int())(images)

    def test_generated_features_of_another_form(self, images):
        def extractor(batch):
            return batch.mean((2, 3)) if batch.shape[0] == 11 else batch.mean((2, 3)).float()

        with pytest.raises(ValueError, match=r"one form of output.*float32.*from generated image 1 of images\[0\] on"):
            centralizer_of(extractor, batch_size=13)(images)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda pictures: pictures[:-1], r"pictures must be 4 of every image, got 3 of images\[0\]"),
            (iter, r"pictures of images\[0\] must be a sequence.*got list_iterator"),
            (lambda pictures: None, "pictures must be given of every image, got those of 0 of 11 images"),
            (lambda pictures: ["missing.png"] * 4, r"generated image 1 of images\[0\] cannot be read"),
        ],
    )
    def test_generators_that_do_not_deliver(self, change, message, images):
        class Broken(FakeGenerator):
            def generate_iter(self, *arguments, **options):
                changed = (change(pictures) for pictures in super(Broken, self).generate_iter(*arguments, **options))
                return (pictures for pictures in changed if pictures is not None)

        with pytest.raises((TypeError, ValueError), match=message):
            centralizer_of(Model(), generator=Broken())(images)

    def test_without_anything_to_generate_with(self, images):
        centralizer = Centralizer(Model(), transform=to_tensor)
        for method in (centralizer, centralizer.extract_generated, centralizer.diagnose):
            with pytest.raises(ValueError, match=r"pictures must be given.*IdentityGenerator"):
                method(images)
        with pytest.raises(ValueError, match="extractor must be given"):
            Centralizer(generator=FakeGenerator())(images)

    def test_without_poses(self, images):
        centralizer = centralizer_of(Model(), num_poses=0)
        for method in (centralizer.extract_generated, centralizer.diagnose):
            with pytest.raises(ValueError, match="pictures must be at least 1 of every image"):
                method(images)

    def test_one_image_has_no_others_to_compare_with(self, images):
        with pytest.raises(ValueError, match="must hold at least 2 images"):
            centralizer_of(Model()).diagnose(images[:1])


GENERATED = {"generator": FakeGenerator(), "transform": to_tensor}
ONES = np.ones((2, 3))


@pytest.mark.parametrize(
    ("q", "g", "error", "message"),
    [
        (None, ONES, TypeError, "query_feats must be a numpy array"),
        (ONES, "x", TypeError, "gallery_feats must be a numpy array"),
        (np.ones(3), ONES, ValueError, r"query_feats must have shape \(N, D\)"),
        (ONES, np.ones((2, 4)), ValueError, "query_feats and gallery_feats must have the same number of columns"),
        (ONES, np.ones((2, 3, 1)), ValueError, "query_feats and gallery_feats must have the same parts"),
        (np.ones((0, 3)), ONES, ValueError, "query_feats must hold at least one row"),
        (ONES, np.ones((0, 3)), ValueError, "gallery_feats must hold at least one row"),
        (ONES, np.array([[1, np.nan, 3]]), ValueError, "gallery_feats must be finite.*row 0"),
    ],
)
def test_bad_features(q, g, error, message):
    with pytest.raises(error, match=message):
        Centralizer(method="nfc").enhance(q, g)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k1": 0}, ValueError, "k1 must be at least 1"),
        ({"k2": "2"}, TypeError, "k2 must be an integer"),
        ({"part_distance": "mean"}, ValueError, "part_distance must be one of 'visible', 'flattened'"),
        ({"eta": -1}, ValueError, "eta must be in"),
        ({"extractor": 3}, TypeError, "model must be callable, got int"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"backend": "annoy"}, ValueError, "backend must be one of"),
        ({"inputs": "paths"}, ValueError, "inputs must be one of"),
        ({"max_memory": 5}, ValueError, "max_memory must be at least"),
        ({"transform": "resnet"}, ValueError, "transform must be one of"),
        ({"transform": 3}, TypeError, "transform must be callable"),
        ({"transform": "pmt", "inputs": "images"}, ValueError, "transform must be None"),
        ({"device": "gpu"}, ValueError, "device must be a torch device"),
        ({"num_poses": -1, **GENERATED}, ValueError, "num_poses must be at least 0"),
        ({"num_poses": -1, "generated": "."}, ValueError, "num_poses must be at least 0"),
        ({"generate_options": {"seed": 3}}, ValueError, "generate_options needs exactly one source"),
        ({"num_poses": 2.0, **GENERATED}, TypeError, "num_poses must be an integer"),
        ({"num_poses": 9, **GENERATED}, ValueError, "num_poses must be at most 8, the number of poses, got 9"),
        (
            {"poses": DRAWINGS, "num_poses": 8, **GENERATED},
            ValueError,
            "num_poses must be at most 4, the number of poses, got 8",
        ),
        ({"poses": "mine", **GENERATED}, ValueError, "poses must be 'standard' or a sequence of poses, got 'mine'"),
        ({"poses": 3, **GENERATED}, ValueError, "poses must be 'standard' or a sequence"),
        ({"flip": 1}, TypeError, "flip must be True or False"),
        ({"generator": nfc}, TypeError, r"generator must have a method generate_iter.*got function"),
        ({"generator": FakeGenerator}, TypeError, "generator must .* be an object, got the class FakeGenerator"),
        ({"generated": "."}, ValueError, r"transform must be given with generated pictures.*inputs='images'"),
        ({"generator": FakeGenerator()}, ValueError, r"transform must be given with generated.*inputs='images'"),
        ({"generated": ".", **GENERATED}, ValueError, "needs exactly one source: generator= or generated="),
        ({"pose_inputs": [1], **GENERATED}, TypeError, "pose_inputs must map"),
        ({"pose_inputs": {"xy": 3}, **GENERATED}, TypeError, r"pose_inputs must map .* to functions .*'xy': 3"),
        ({"pose_inputs": {"xy": len}, "flip": True, **GENERATED}, ValueError, "flip must be False with pose_inputs"),
        (
            {"pose_inputs": {"xy": len}, "poses": DRAWINGS, "num_poses": 1, **GENERATED},
            TypeError,
            r"poses\[0\] must be a Pose with pose_inputs",
        ),
        ({"generate_options": 3, **GENERATED}, TypeError, "must be a mapping, not int"),
        ({"generate_options": {"seed": 3}, "generated": "."}, TypeError, "unexpected keyword .*'generate_options'"),
        ({"sampler": 3}, TypeError, "unexpected keyword argument 'sampler'. It knows method, k1, .*transform, "),
        ({"transfrom": None}, TypeError, "unexpected keyword argument 'transfrom'"),
        ({"pictures": "folder"}, TypeError, r"pictures must be callable.* PictureFolder\(directory\), got str"),
        ({"pictures": print, "num_poses": 4}, ValueError, "num_poses must be given to the source of pictures itself"),
        ({"poses": [], **GENERATED}, ValueError, "poses must hold at least one pose, got none"),
        ({"generated": ""}, ValueError, "directory must exist, got ''"),
        (
            {"generate_options": {"setps": 3}, "generator": tiny.generator()},
            TypeError,
            "sampling has no setting 'setps'",
        ),
    ],
)
def test_bad_parameters_are_refused_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        Centralizer(**{"extractor": nfc, **arguments})


def test_repr_names_what_matters():
    assert repr(Centralizer(k1=3)) == "Centralizer(method='nfc', k1=3, k2=2, eta=2, backend='auto')"
    assert repr(Centralizer(nfc)).startswith("Centralizer(Extractor(function, ")
    assert ", GeneratedPictures(FakeGenerator, num_poses=8), method='auto', eta=2" in repr(
        Centralizer(nfc, **GENERATED)
    )
    assert ", PictureFolder('.', num_poses=8), method='auto', eta=2" in repr(
        Centralizer(nfc, transform="pmt", generated=".")
    )


def test_all_of_ones_own_poses_are_used():
    assert Centralizer(nfc, poses=DRAWINGS, **GENERATED).pictures.num_poses == 4
    assert Centralizer(nfc, poses=DRAWINGS, num_poses=3, **GENERATED).pictures.num_poses == 3
    assert Centralizer(nfc, **GENERATED).pictures.num_poses == 8
