"""A model by its name: your own object, timm, transformers, ONNX Runtime, OpenVINO, torchreid.

None of these packages is needed unless it is named. Mean and std are never guessed: they come with the model (timm,
transformers, torchreid) or are given as `transform`.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from pose2id.extractor import PRESETS, Extractor, Preprocess
from pose2id.io.checks import checked_choice, first_few, require_modules

Transform = Callable[[Image.Image], Tensor]
_FORMS = "module:callable, timm:NAME, hf:NAME, onnx:FILE, openvino:FILE or torchreid:NAME[:WEIGHTS]"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to extract features.

    Attributes:
        extractor: the model with its transform.
        digest: hexadecimal SHA-256 of what decides its features: weights, structure, the classes' code, transform,
            mirroring, versions; not what these classes call elsewhere. None where too little is known, as of a plain
            function or a transform that is neither a `Preprocess` nor a processor; features are then not used again.
        name: as it was asked for.
    """

    extractor: Extractor
    digest: str | None
    name: str


def load(
    spec: str,
    *,
    transform: str | Transform | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    flip: bool = False,
) -> LoadedModel:
    """Load a model by its name.

    "module:callable": an object of a module (the current folder is looked through, too): an `Extractor`, or with
    `transform` a torch module or a function of a batch, or a function without arguments that makes one of them.
    "timm:NAME": `timm.create_model(NAME, pretrained=True, num_classes=0)`, with its own size, mean and std; the whole
    image is resized, nothing is cut off.
    "hf:NAME": `transformers.AutoModel` with its image processor as transform.
    "onnx:FILE", "openvino:FILE": with `transform`, in the file's own size where that is fixed.
    "torchreid:NAME[:WEIGHTS]": torchreid's `FeatureExtractor`, with its own transform.

    Args:
        spec: one of the above.
        transform: a preset's name (`pose2id.extractor.PRESETS`) or a callable, in place of the model's own.
        batch_size: images per call; of an ONNX file with a fixed batch that one.
        device: where torch computes; None: CUDA where there is one (timm, transformers, torchreid), or where the
            object of a module lies.
        flip: add the features of mirrored images.

    Raises:
        ImportError: the package is not installed.
        ValueError: an unknown form, or no transform.
    """
    check_name(spec, transform)
    kind, _, name = spec.partition(":")
    if isinstance(transform, str):
        transform = PRESETS[transform]
    loaders = {
        "timm": _timm,
        "hf": _transformers,
        "onnx": _onnx,
        "openvino": _openvino,
        "torchreid": _torchreid,
    }
    loader = loaders.get(kind, _object)
    found = loader(name if kind in loaders else spec, transform, {"batch_size": batch_size, "flip": flip}, device)
    return LoadedModel(found, digest_of(found), spec)


def check_name(spec: str, transform: Any = None) -> None:
    """Raise ValueError, as `load` would, for what is no name of a model, or none of a preset."""
    if not spec.partition(":")[2]:
        raise ValueError(f"model must be {_FORMS}, got {spec!r}.")
    if isinstance(transform, str):
        checked_choice(transform, "transform", tuple(PRESETS))


class OnnxModel:
    """An ONNX file as a model: a float batch (B, 3, H, W) to the first output, (B, D).

    Args:
        source: the file, or an `onnxruntime.InferenceSession`.

    Attributes:
        batch_size: the only one it takes, or None.
        size: (height, width) that it takes, or None.
        path: the file, or None.
    """

    def __init__(self, source: Any) -> None:
        self.path = Path(source) if isinstance(source, (str, os.PathLike)) else None
        if self.path is not None:
            require_modules("ONNX models need ONNX Runtime", "onnxruntime", "onnxruntime")
            import onnxruntime  # noqa: PLC0415 - optional

            source = onnxruntime.InferenceSession(
                os.fspath(_file(self.path)), providers=onnxruntime.get_available_providers()
            )
        self.session = source
        (first, *others) = source.get_inputs()
        if others:
            names = ", ".join(other.name for other in others)
            raise ValueError(f"model must have one input, a batch of images, got {names} besides {first.name}.")
        self._input, self._dtype = first.name, np.float16 if first.type == "tensor(float16)" else np.float32
        self.batch_size, self.size = _fixed(first.shape)

    def __call__(self, batch: Tensor) -> NDArray[Any]:
        """Features of a batch."""
        images = batch.detach().cpu().numpy().astype(self._dtype, copy=False)
        return _flat(self.session.run(None, {self._input: images})[0])


class OpenVinoModel:
    """An OpenVINO or ONNX file as a model, compiled for the CPU: a float batch (B, 3, H, W) to the first output.

    Args:
        source: the .xml or .onnx file, or an `openvino.CompiledModel`.

    Attributes:
        batch_size: the only one it takes, or None.
        size: (height, width) that it takes, or None.
        path: the file, or None.
    """

    def __init__(self, source: Any) -> None:
        self.path = Path(source) if isinstance(source, (str, os.PathLike)) else None
        if self.path is not None:
            require_modules("OpenVINO models need OpenVINO", "openvino", "openvino")
            import openvino  # noqa: PLC0415 - optional

            source = openvino.Core().compile_model(os.fspath(_file(self.path)), "CPU")
        self.compiled = source
        dimensions = source.inputs[0].get_partial_shape()
        self.batch_size, self.size = _fixed([d.get_length() if d.is_static else None for d in dimensions])

    def __call__(self, batch: Tensor) -> NDArray[Any]:
        """Features of a batch."""
        found = self.compiled([batch.detach().cpu().float().numpy()])[self.compiled.outputs[0]]
        return _flat(np.array(found))  # its buffer is used again


def processor_transform(processor: Any) -> Transform:
    """An image processor of transformers as a transform: RGB picture to float tensor (3, H, W)."""
    return _Processor(processor)


class _Processor:
    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> Tensor:
        pixels: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels

    def __repr__(self) -> str:
        return f"{type(self.processor).__name__} {self.processor.to_json_string()}"


def digest_of(extractor: Extractor) -> str | None:
    """`LoadedModel.digest` of an extractor."""
    weights = _weights(extractor.model)
    settings = repr(extractor.transform)
    # Of other transforms not all is known: they may hold functions, or say less of themselves than they do.
    if weights is None or not isinstance(extractor.transform, (Preprocess, _Processor, type(None))):
        return None
    digest = hashlib.sha256(f"{settings} {extractor.inputs} {extractor.flip} {torch.__version__}".encode())
    for piece in weights:
        digest.update(piece)
    return digest.hexdigest()


def _weights(model: Any) -> Iterable[bytes] | None:
    """What decides a model's features, or None."""
    if isinstance(model, (OnnxModel, OpenVinoModel)) and model.path is not None:
        # OpenVINO keeps the weights in .bin, large ONNX files in a file of data.
        beside = (f"{model.path.name}.data", f"{model.path.name}_data")
        files = [model.path, model.path.with_suffix(".bin"), *map(model.path.with_name, beside)]
        return (file.read_bytes() for file in files if file.is_file())
    module = getattr(model, "model", None) if type(model).__module__.startswith("torchreid") else model
    owner = getattr(module, "__self__", module)  # of a bound method
    if not isinstance(owner, nn.Module):
        return None
    return chain([getattr(module, "__qualname__", "").encode()], _of_module(owner))


def _of_module(module: nn.Module) -> Iterable[bytes]:
    yield repr(module).encode()  # strides, slopes, and what else has no weights
    for name, part in module.named_modules():
        plain = {key: value for key, value in vars(part).items() if isinstance(value, (str, int, float, tuple))}
        yield f"{name} {sorted(plain.items())!r}".encode()
    for kind in dict.fromkeys(kind for part in module.modules() for kind in type(part).__mro__[:-1]):
        yield f"{kind.__module__}.{kind.__qualname__}".encode()
        if not kind.__module__.startswith("torch."):
            try:
                yield inspect.getsource(kind).encode()
            except (OSError, TypeError):  # typed at a prompt
                continue
    for name, tensor in [*module.state_dict().items(), *module.named_buffers()]:
        if isinstance(tensor, Tensor):
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _object(spec: str, transform: Transform | None, options: dict[str, Any], device: Any) -> Extractor:
    found = _imported(spec)
    if not isinstance(found, (Extractor, nn.Module)) and callable(found) and _takes_nothing(found):
        found = found()
    if isinstance(found, Extractor):
        if transform is not None or options["flip"]:
            raise ValueError(f"transform and flip must be given to the Extractor {spec} itself.")
        return found
    if not callable(found):
        raise ValueError(f"model must be callable, and {spec} is {type(found).__name__}.")
    if device is not None and isinstance(found, nn.Module):
        found.to(device)
    return Extractor(found, transform=_given(transform, spec), device=device, **options)


def _imported(spec: str) -> Any:
    module_name, _, path = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.partition(".")[0]:
            raise
        raise ValueError(f"model must be {_FORMS}; there is no module {module_name!r}.") from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise ValueError(f"model must name something in {module_name}, which has no {path!r}.")
        found = getattr(found, name)
    return found


def _takes_nothing(function: Any) -> bool:
    try:
        return not inspect.signature(function).parameters
    except (TypeError, ValueError):  # of C
        return False


def _given(transform: Transform | None, spec: str) -> Transform:
    if transform is None:
        remedy = f"one of {', '.join(PRESETS)}, or make {spec} an Extractor"
        raise ValueError(f"transform must be given: size, mean and std of {spec} are unknown. Pass {remedy}.")
    return transform


def _timm(name: str, transform: Transform | None, options: dict[str, Any], device: Any) -> Extractor:
    require_modules("timm models need timm and torchvision", "timm", "timm")
    import timm  # noqa: PLC0415 - optional

    model = timm.create_model(name, pretrained=True, num_classes=0).to(_device(device))
    if transform is None:
        config = timm.data.resolve_model_data_config(model)
        height, width = config["input_size"][1:]
        # The whole image: timm's own transform would cut off heads and feet.
        transform = Preprocess((height, width), tuple(config["mean"]), tuple(config["std"]), config["interpolation"])
    return Extractor(model, transform=transform, **options)


def _transformers(name: str, transform: Transform | None, options: dict[str, Any], device: Any) -> Extractor:
    require_modules("Models of the Hub need transformers", "transformers", "transformers")
    import transformers  # noqa: PLC0415 - optional

    model, loaded = transformers.AutoModel.from_pretrained(name, output_loading_info=True)
    if loaded["missing_keys"]:  # they would be random
        shown = first_few(sorted(loaded["missing_keys"]))
        raise ValueError(
            f"model must have all its weights, and {name} lacks {shown}. Load it yourself: module:callable."
        )
    model.to(_device(device))
    if transform is None:
        transform = processor_transform(transformers.AutoImageProcessor.from_pretrained(name))
    # Models of images and text have a way for images alone.
    return Extractor(getattr(model, "get_image_features", model), transform=transform, **options)


def _onnx(name: str, transform: Transform | None, options: dict[str, Any], device: Any) -> Extractor:
    return _of_file(OnnxModel(name), f"onnx:{name}", transform, options)


def _openvino(name: str, transform: Transform | None, options: dict[str, Any], device: Any) -> Extractor:
    return _of_file(OpenVinoModel(name), f"openvino:{name}", transform, options)


def _of_file(
    model: OnnxModel | OpenVinoModel, spec: str, transform: Transform | None, options: dict[str, Any]
) -> Extractor:
    transform = _given(transform, spec)
    if isinstance(transform, Preprocess) and model.size is not None:
        transform = replace(transform, size=model.size)
    if model.batch_size is not None:
        options = {**options, "batch_size": model.batch_size, "pad_last_batch": True}
    return Extractor(model, transform=transform, device="cpu", **options)


def _torchreid(name: str, transform: Transform | None, options: dict[str, Any], device: Any) -> Extractor:
    if transform is not None:
        raise ValueError("transform must be left out with torchreid, whose FeatureExtractor has its own.")
    require_modules("torchreid models need torchreid", "torchreid", "torchreid")
    try:
        utils = import_module("torchreid.reid.utils")  # of later versions
    except ImportError:
        utils = import_module("torchreid.utils")
    architecture, _, weights = name.partition(":")
    if weights:  # torchreid would go on with others
        _file(Path(weights))
    extractor = utils.FeatureExtractor(
        model_name=architecture, model_path=weights, device=str(_device(device)), verbose=False
    )
    return Extractor(extractor, inputs="images", **options)


def _device(device: Any) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _file(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"model must be a file, and there is no {path}.")
    return path


def _fixed(shape: Any) -> tuple[int | None, tuple[int, int] | None]:
    """The batch size and the image's size that an input is fixed to."""
    if len(shape) != 4:
        raise ValueError(f"model must take images (B, 3, H, W), got an input of shape {list(shape)}.")
    batch, _, height, width = (value if isinstance(value, int) and value > 0 else None for value in shape)
    return batch, None if height is None or width is None else (height, width)


def _flat(output: NDArray[Any]) -> NDArray[Any]:
    """Features (B, D) of an output (B, D, 1, 1)."""
    return output.reshape(len(output), -1) if output.ndim == 4 and output.shape[2:] == (1, 1) else output
