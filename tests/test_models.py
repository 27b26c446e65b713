"""Models by their names: real ones where their packages are installed, else stand-ins with their signatures."""

from __future__ import annotations

import sys
import types
import zipfile

import numpy as np
import onnx_files
import pytest
import torch
from conftest import SHARED
from PIL import Image
from torch import nn

from pose2id import Extractor, models
from pose2id.extractor import PRESETS, Preprocess


@pytest.fixture
def images(rng):
    return [Image.fromarray(rng.integers(0, 256, (40, 20, 3), dtype=np.uint8)) for _ in range(5)]


OBJECTS = """
import torch
from torch import nn
from pose2id import Extractor

class Stripes(nn.Module):
    def forward(self, batch):
        return batch.unflatten(2, (4, -1)).mean((3, 4)).flatten(1)

model = Stripes()
extractor = Extractor(model, transform="transreid", batch_size=2)
number = 3

def plain(batch):
    return model(batch)

def factory():
    return Stripes()

def extractor_factory():
    return extractor

class Space:
    inner = Stripes()
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(OBJECTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "my_models"
    sys.modules.pop("my_models", None)


@pytest.mark.parametrize("name", ["model", "plain", "factory", "Space.inner"])
def test_objects_of_a_module(name, module, images):
    found = models.load(f"{module}:{name}", transform="torchreid", batch_size=3)
    import my_models  # noqa: PLC0415 - made by the test

    expected = Extractor(my_models.model, transform="torchreid")(images, progress=False)
    torch.testing.assert_close(found.extractor(images, progress=False), expected)
    assert found.extractor.batch_size == 3
    assert found.name == f"{module}:{name}"
    assert (found.digest is None) == (name == "plain")


@pytest.mark.parametrize("name", ["extractor", "extractor_factory"])
def test_extractors_of_a_module(name, module):
    found = models.load(f"{module}:{name}")
    import my_models  # noqa: PLC0415

    assert found.extractor is my_models.extractor
    assert found.digest == models.digest_of(my_models.extractor)
    with pytest.raises(ValueError, match="transform and flip must be given to the Extractor"):
        models.load(f"{module}:{name}", transform="torchreid")


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("resnet", {}, "model must be module:callable, timm:NAME"),
        ("no_such_module:model", {}, "there is no module 'no_such_module'"),
        ("my_models:none", {}, "my_models, which has no 'none'"),
        ("my_models:number", {"transform": "torchreid"}, "my_models:number is int"),
        ("my_models:model", {}, "transform must be given: size, mean and std of my_models:model are unknown"),
        ("my_models:model", {"transform": "none"}, "transform must be one of"),
    ],
)
def test_models_that_are_none(spec, options, message, module):
    with pytest.raises(ValueError, match=message):
        models.load(spec, **options)


def test_a_module_that_breaks_says_so_itself(module, tmp_path):
    (tmp_path / "breaks.py").write_text("import no_such_package\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        models.load("breaks:model", transform="torchreid")


class TestOnnx:
    @pytest.fixture
    def file(self, tmp_path):
        pytest.importorskip("onnxruntime", reason="needs onnxruntime")
        (tmp_path / "stripes.onnx").write_bytes(onnx_files.stripes(size=(64, 32)))
        return tmp_path / "stripes.onnx"

    def test_is_read_in_its_own_size(self, file, images):
        found = models.load(f"onnx:{file}", transform="torchreid")
        preset = PRESETS["torchreid"]
        assert found.extractor.transform == Preprocess((64, 32), preset.mean, preset.std)
        batch = torch.stack([found.extractor.transform(image) for image in images])
        expected = batch.unflatten(2, (8, -1)).mean((3, 4)).flatten(1)
        np.testing.assert_allclose(found.extractor(images, normalize=False, progress=False), expected, atol=1e-5)

    def test_a_fixed_batch_is_filled_up(self, file, images, tmp_path):
        (tmp_path / "fixed.onnx").write_bytes(onnx_files.stripes(batch=2, size=(64, 32)))
        fixed = models.load(f"onnx:{tmp_path / 'fixed.onnx'}", transform="torchreid", batch_size=50)
        assert (fixed.extractor.batch_size, fixed.extractor.pad_last_batch) == (2, True)
        free = models.load(f"onnx:{file}", transform="torchreid")
        found, expected = (model.extractor(images, progress=False) for model in (fixed, free))
        np.testing.assert_allclose(found, expected, atol=1e-6)

    def test_a_session_is_taken_too(self, file, images):
        import onnxruntime  # noqa: PLC0415

        model = models.OnnxModel(onnxruntime.InferenceSession(file))
        assert (model.batch_size, model.size, model.path) == (None, (64, 32), None)
        transform = Preprocess((64, 32), (0, 0, 0), (1, 1, 1))
        assert Extractor(model, transform=transform)(images, progress=False).shape == (5, 24)
        assert models.digest_of(Extractor(model, transform=transform)) is None

    def test_the_digest_goes_by_the_file(self, file, tmp_path):
        before = models.load(f"onnx:{file}", transform="torchreid").digest
        (tmp_path / "other.onnx").write_bytes(file.read_bytes())
        assert models.load(f"onnx:{tmp_path / 'other.onnx'}", transform="torchreid").digest == before
        assert models.load(f"onnx:{file}", transform="transreid").digest != before
        (tmp_path / "other.onnx").write_bytes(onnx_files.stripes(size=(64, 32), count=4))
        assert models.load(f"onnx:{tmp_path / 'other.onnx'}", transform="torchreid").digest != before

    def test_bad_files(self, file, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"there is no none\.onnx"):
            models.load("onnx:none.onnx", transform="torchreid")
        with pytest.raises(ValueError, match="transform must be given"):
            models.load(f"onnx:{file}")

    def test_without_the_package(self, file, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(ImportError, match="ONNX models need ONNX Runtime: pip install onnxruntime"):
            models.load(f"onnx:{file}", transform="torchreid")


def test_openvino_reads_the_same_file(tmp_path, images):
    pytest.importorskip("openvino", reason="needs openvino: `make test` has it in .models")
    (tmp_path / "stripes.onnx").write_bytes(onnx_files.stripes(size=(64, 32)))
    (tmp_path / "fixed.onnx").write_bytes(onnx_files.stripes(batch=2, size=(64, 32)))
    onnx = models.load(f"onnx:{tmp_path / 'stripes.onnx'}", transform="torchreid")
    for name in ("stripes", "fixed"):
        found = models.load(f"openvino:{tmp_path / name}.onnx", transform="torchreid", batch_size=3)
        assert found.extractor.batch_size == (3 if name == "stripes" else 2)
        assert found.digest is not None
        features = found.extractor(images, normalize=False, progress=False)
        np.testing.assert_allclose(features, onnx.extractor(images, normalize=False, progress=False), atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_transformers_with_its_processor(kind, tmp_path, images):
    transformers = pytest.importorskip("transformers", reason="needs transformers: `make test` has it in .models")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    shape = {"image_size": 32, "patch_size": 16}
    if kind == "vit":
        model = transformers.ViTModel(transformers.ViTConfig(**sizes, **shape)).eval()
        processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    else:
        text = {**sizes, "vocab_size": 10, "max_position_embeddings": 8}
        config = transformers.CLIPConfig(text_config=text, vision_config={**sizes, **shape}, projection_dim=12)
        model = transformers.CLIPModel(config).eval()
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    found = models.load(f"hf:{tmp_path}", batch_size=2)
    pixels = torch.stack([torch.as_tensor(np.array(processor(image)["pixel_values"][0])) for image in images])
    with torch.no_grad():
        output = model(pixels).pooler_output if kind == "vit" else model.get_image_features(pixels)
    expected = getattr(output, "pooler_output", output)
    features = found.extractor(images, normalize=False, progress=False)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert found.digest == models.load(f"hf:{tmp_path}").digest
    assert models.load(f"hf:{tmp_path}", transform="transreid").digest != found.digest


def test_weights_that_are_missing_are_not_drawn_at_random(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers: `make test` has it in .models")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=16)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model must have all its weights, and .* lacks pooler\.dense"):
        models.load(f"hf:{tmp_path}", transform="transreid")


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, batch):
        return self.layer(batch.mean((2, 3)))


def test_timm_with_its_own_configuration(monkeypatch, images):
    """A stand-in of the functions' signatures: timm imports torchvision, of which there is no build here."""
    asked = {}
    timm = types.ModuleType("timm")

    def create_model(model_name, pretrained=False, **kwargs):
        asked.update(kwargs, name=model_name, pretrained=pretrained)
        return Linear()

    def resolve_model_data_config(model, args=None, pretrained_cfg=None, use_test_size=False, verbose=False):
        mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
        config = {"input_size": (3, 48, 32), "interpolation": "bicubic", "crop_pct": 0.9}
        return {**config, "mean": mean, "std": std}

    timm.create_model = create_model
    timm.data = types.SimpleNamespace(resolve_model_data_config=resolve_model_data_config)
    monkeypatch.setitem(sys.modules, "timm", timm)
    found = models.load("timm:vit_small", device="cpu")
    assert asked == {"name": "vit_small", "pretrained": True, "num_classes": 0}
    assert found.extractor.transform == Preprocess((48, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic")
    assert found.extractor(images, progress=False).shape == (5, 4)
    assert found.digest is not None


@pytest.mark.parametrize("place", ["torchreid.utils", "torchreid.reid.utils"])
def test_torchreid_reads_files_itself(place, monkeypatch, images, tmp_path):
    """A stand-in of FeatureExtractor's signature, in both places where versions have it."""
    asked = {}

    class FeatureExtractor:
        __module__ = "torchreid.utils.feature_extractor"

        def __init__(
            self,
            model_name="",
            model_path="",
            image_size=(256, 128),
            pixel_mean=(0.485, 0.456, 0.406),
            pixel_std=(0.229, 0.224, 0.225),
            pixel_norm=True,
            device="cuda",
            verbose=True,
        ):
            asked.update(model_name=model_name, model_path=model_path, device=device)
            self.model = Linear()

        def __call__(self, input):  # noqa: A002
            with torch.no_grad():
                return torch.stack([torch.as_tensor(np.array(Image.open(x))).float().mean((0, 1)) for x in input])

    names = place.split(".")
    for i in range(len(names)):
        monkeypatch.setitem(sys.modules, ".".join(names[: i + 1]), types.ModuleType(names[i]))
    sys.modules[place].FeatureExtractor = FeatureExtractor
    with pytest.raises(FileNotFoundError, match=r"there is no .*wieghts\.pth"):
        models.load(f"torchreid:osnet_x1_0:{tmp_path / 'wieghts.pth'}", device="cpu")
    weights = tmp_path / "weights.pth"
    weights.touch()
    found = models.load(f"torchreid:osnet_x1_0:{weights}", device="cpu")
    assert asked == {"model_name": "osnet_x1_0", "model_path": str(weights), "device": "cpu"}
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    assert found.extractor(paths, progress=False).shape == (5, 3)
    assert found.digest is not None
    with pytest.raises(ValueError, match="transform must be left out with torchreid"):
        models.load("torchreid:osnet_x1_0", transform="torchreid")


@pytest.mark.parametrize(
    ("spec", "package"), [("timm:a", "timm"), ("hf:a", "transformers"), ("openvino:a", "openvino")]
)
def test_packages_that_are_missing_are_named(spec, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        models.load(spec, transform="torchreid")


@pytest.mark.skipif(not (SHARED / "data" / "images").is_dir(), reason="needs the real crops of ../shared/data")
def test_a_real_model_on_real_crops(tmp_path):
    """OSNet's features of CUHK03 crops are near those on record, which were made of larger crops."""
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    data = np.load(SHARED / "data" / "cuhk03_p1_det_val100.npz")
    with zipfile.ZipFile(SHARED / "data" / "images" / "cuhk03_p1_det_val100_64x128.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))[:40]
        archive.extractall(tmp_path, names)
    model = models.load(f"onnx:{SHARED / 'data' / 'models' / 'osnet_x0_25_msmt17.onnx'}", transform="torchreid")
    found = model.extractor([tmp_path / name for name in names], progress=False)
    recorded = data["feat_osnet_msmt17"].astype(np.float32)
    recorded /= np.linalg.norm(recorded, axis=1, keepdims=True)
    nearest = (found @ recorded.T).max(1)
    assert np.median(nearest) > 0.9
