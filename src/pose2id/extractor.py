"""From images to features through your own ReID model, which is called as it is and left as it was.

What reaches the model is a fresh float batch (B, 3, H, W) on its own device, or the images themselves for models that
read paths. Mean and std are never guessed: you pass a transform, or name a preset.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from pose2id.io.checks import (
    checked_choice,
    checked_count,
    checked_device,
    checked_flag,
    checked_flags,
    checked_size,
    first_few,
)
from pose2id.io.images import checked_images, load_image
from pose2id.io.rows import FLOAT_DTYPES, Rows, blocks

INPUTS = ("batch", "images")
_NAMES = ("features", "embeddings", "pooler_output")  # of a model's output, before its position in a tuple
_PARTS_NDIM = 3
_INTERPOLATIONS = ("bilinear", "bicubic", "lanczos")


class FeatureModel(Protocol):
    """A ReID model: any callable that maps images to features, a torch module for one.

    It gets a float tensor (B, 3, H, W), or with `inputs="images"` a list of paths or (H, W, 3) uint8 RGB arrays, and
    the batch's share of the side inputs. It returns features (B, D) or parts (B, P, D): a tensor or numpy array; in a
    dict, object or named tuple, what it calls "features", "embeddings" or "pooler_output", in this order; or the first
    element of a tuple. Visibility (B, P) of parts stands under "visibility", or follows the parts in the tuple.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Features of a batch of images, the only positional argument, with the side inputs as keywords."""


@dataclass(frozen=True)
class Preprocess:
    """A transform: RGB picture to float32 tensor (3, H, W), resized, scaled to [0, 1], then (x - mean) / std.

    Attributes:
        size: (height, width) in pixels.
        mean: per channel, RGB order, of values in [0, 1].
        std: per channel, RGB order.
        interpolation: "bilinear", "bicubic" or "lanczos", antialiased as Pillow does it.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        checked_size(self.size)
        if len(self.mean) != 3 or len(self.std) != 3 or 0 in self.std:
            raise ValueError(f"mean and std must have 3 values, with no std of 0, got {self.mean} and {self.std}.")
        checked_choice(self.interpolation, "interpolation", _INTERPOLATIONS)

    def __call__(self, image: Image.Image) -> Tensor:
        """The (3, H, W) float32 tensor of an RGB picture."""
        height, width = self.size
        resized = image.convert("RGB").resize((width, height), Image.Resampling[self.interpolation.upper()])
        pixels = torch.from_numpy(np.array(resized, dtype=np.float32)).permute(2, 0, 1) / 255
        # Of the CPU, whatever torch's default device is.
        mean, std = (torch.tensor(values, device="cpu")[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std


_HALF = (0.5, 0.5, 0.5)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

PRESETS: Mapping[str, Preprocess] = {
    "transreid": Preprocess((256, 128), _HALF, _HALF),
    "clip-reid": Preprocess((256, 128), _HALF, _HALF),
    "solider-reid": Preprocess((384, 128), _HALF, _HALF),
    "bpbreid": Preprocess((384, 128), *_IMAGENET),
    "kpr-solider": Preprocess((384, 128), _HALF, _HALF),
    "kpr-imagenet": Preprocess((256, 128), *_IMAGENET),
    "saai": Preprocess((288, 144), *_IMAGENET),
    "pmt": Preprocess((256, 128), *_IMAGENET, "lanczos"),
    "torchreid": Preprocess((256, 128), *_IMAGENET),
    # fast-reid normalises inside the model and takes 0..255.
    "fast-reid": Preprocess((256, 128), (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255), "bicubic"),
}


class Extractor:
    """Your ReID model, and how images reach it.

        extractor = Extractor(my_model, transform="transreid")
        query_feats = extractor(query_images, cam_label=cams)

    Args:
        model: see `FeatureModel`. A torch module, or a bound method of one, runs without gradients in eval mode, on the
            device it is on; after the last of its users, in several threads too, its mode is restored. Of a model
            inside a lambda nothing is known: call its eval() yourself, and pass `device`.
        transform: RGB picture to (3, H, W) float tensor: a callable, a `Preprocess`, or a preset's name (`PRESETS`).
            None: images are float tensors that the model takes as they are.
        inputs: "batch", or "images" for a model that takes a list of paths or (H, W, 3) uint8 RGB arrays.
        batch_size: images per call of the model.
        device: where batches go; None: where the module's parameters are (a frozen one's constants), or its buffers if
            it has none, else the CPU.
            The model is never moved. A batch whose dtype none of a module's parameters has is cast to that of the
            first; any other callable, and a frozen TorchScript module, gets what the transform returns.
        flip: the feature is f(x) + f(mirror(x)), with the image mirrored left to right: a second call with the same
            side inputs. Tensors are mirrored after the transform; for `inputs="images"` files are read for it.
        pad_last_batch: fill a batch of fewer images up with its last one, whose further features are dropped: for a
            model that takes exactly batch_size images, as ONNX and torch.export make them by default.
    """

    def __init__(
        self,
        model: FeatureModel,
        *,
        transform: Callable[[Image.Image], Tensor] | str | None = None,
        inputs: str = "batch",
        batch_size: int = 64,
        device: torch.device | str | None = None,
        flip: bool = False,
        pad_last_batch: bool = False,
    ) -> None:
        if not callable(model):
            named = f" For a model by name: pose2id.models.load({model!r}).extractor." if isinstance(model, str) else ""
            raise TypeError(f"model must be callable, got {type(model).__name__}.{named}")
        self.model = model
        self.inputs = checked_choice(inputs, "inputs", INPUTS)
        if isinstance(transform, str):
            transform = PRESETS[checked_choice(transform, "transform", tuple(PRESETS))]
        if transform is not None and not callable(transform):
            raise TypeError(f"transform must be callable, a preset's name or None, got {type(transform).__name__}.")
        if inputs == "images" and transform is not None:
            raise ValueError("transform must be None with inputs='images': such a model does its own preprocessing.")
        self.transform = transform
        self.batch_size = checked_count(batch_size, "batch_size")
        self.device = None if device is None else checked_device(device)
        self.flip = checked_flag(flip, "flip")
        self.pad_last_batch = checked_flag(pad_last_batch, "pad_last_batch")

    def __call__(
        self,
        images: Any,
        *,
        normalize: bool = True,
        colors: str = "rgb",
        progress: bool = True,
        return_visibility: bool = False,
        **side_inputs: Any,
    ) -> Any:
        """Features of images, in order.

        Args:
            images: sequence of paths, PIL pictures, (H, W, 3) uint8 RGB arrays or (3, H, W) float tensors in [0, 1], or
                one array of them; without a transform, tensors that the model takes as they are. Pictures in any 8-bit
                mode become RGB, EXIF rotation is applied.
            normalize: L2-normalise each feature, or each part's. False gives the raw outputs, which `fuse` wants.
            colors: order of the channels in arrays and tensors: "rgb", or "bgr" as OpenCV has them; the model gets RGB
                either way. Paths and PIL pictures carry their own order. Must be "rgb" where the model takes tensors as
                they are.
            progress: show a bar on a terminal.
            return_visibility: also return the visibility (N, P) that came with part features, or None.
            **side_inputs: keywords for the model (`cam_label=cams`). What has one entry per image, and is no mapping or
                string, is sliced with the batch: tensors (which also go to its device), arrays, pandas objects, lists
                and tuples in their container, other sequences as lists. Tensors, arrays and lists must have that
                length; anything else is passed on as it is. Bind other constants with functools.partial.

        Returns:
            (N, D) features, or (N, P, D) parts, in the container, dtype and on the device that the model returns.

        Raises:
            TypeError, ValueError: bad or unreadable images (named), non-finite outputs.
        """
        checked_flags(normalize=normalize, progress=progress, return_visibility=return_visibility)
        given = self.checked(images, side_inputs, colors)
        with self.at_work(len(images), progress) as run:
            features, visibility = run.next_features(given, len(images))
        if normalize:
            rows = Rows(features, "extractor output", normalize=True, parts=True)
            for block in rows.blocks():  # where they lie: the array is new
                rows.write(features, block, rows.read(block))
        return (features, visibility) if return_visibility else features

    def checked(self, images: Any, side_inputs: Mapping[str, Any], colors: str) -> Images:
        """Images to extract features from, after the checks that need no model."""
        given = Images(images, side_inputs, colors)
        if colors != "rgb" and self.transform is None and self.inputs == "batch":
            rule = "be 'rgb' without a transform: the model takes its tensors as they are"
            raise ValueError(f"colors must {rule}, got {colors!r}. Reverse them before, or pass transform=.")
        return given

    @contextmanager
    def at_work(self, total: int, progress: bool) -> Iterator[Extraction]:
        """The model in eval mode and without gradients, and one bar for so many images."""
        home, dtypes = _computes_in(self.model)
        with _evaluating(self.model), tqdm(total=total, unit="img", disable=None if progress else True) as bar:
            yield Extraction(self, home if self.device is None else self.device, dtypes, bar)

    def __repr__(self) -> str:
        """The model's class, and what is not as by default."""
        flags = "".join(f", {name}=True" for name in ("flip", "pad_last_batch") if getattr(self, name))
        return f"Extractor({type(self.model).__name__}, inputs={self.inputs!r}, batch_size={self.batch_size}{flags})"


class Images:
    """Images in order, RGB, each with its name and its side inputs; they are taken once."""

    each: tuple[int, ...] = ()  # (M,) for M pictures of each image
    taken: int = 0

    def __init__(self, images: Any, side_inputs: Mapping[str, Any], colors: str) -> None:
        self.items = checked_images(images, colors=colors)
        self.side_inputs = SideInputs(side_inputs, len(self.items))
        self.stream = iter(self.items)

    def name(self, row: int) -> str:
        """What errors call an image."""
        return f"images[{row}]"

    def keywords(self, rows: Sequence[int], device: torch.device) -> dict[str, Any]:
        """The side inputs of some images."""
        return self.side_inputs.take(rows, device)


class SideInputs:
    """Keywords for a model: those with one entry for each of n rows follow the rows, the others stay as they are.

    Errors call a keyword `called.format(keyword)`.
    """

    def __init__(self, values: Mapping[str, Any], n: int, called: str = "{}") -> None:
        self._values = dict(values)
        self._per_row = {name for name, value in values.items() if _is_per_image(value, called.format(name), n)}

    def take(self, rows: Iterable[int], device: torch.device) -> dict[str, Any]:
        """The keywords of some rows, in that order, repeats too: always fresh, since models may write into them."""
        index = list(rows)
        return {name: _taken(v, index, device) if name in self._per_row else v for name, v in self._values.items()}

    def get(self, name: str) -> Any:
        """The value with one entry per row, or None if there is none of that name."""
        return self._values[name] if name in self._per_row else None


@dataclass
class Extraction:
    """An extractor at work: its batches, on one device, and the one form that all its outputs must have."""

    extractor: Extractor
    device: torch.device
    dtypes: list[torch.dtype]
    bar: tqdm
    _form: list[str] = field(default_factory=list)

    def next_features(self, images: Images, n: int) -> tuple[Any, Any]:
        """Raw features (n, ...) and visibility, or None, of the next n images; (n, M, ...) of M pictures of each."""
        rows = range(images.taken, images.taken + n * math.prod(images.each))
        images.taken = rows.stop
        outputs: list[Any] = [None, None]
        finite: Any = None
        for some in blocks(len(rows), self.extractor.batch_size):
            # A padded batch has more.
            of_batch = [x if x is None else x[: len(rows[some])] for x in self._of_batch(images, rows[some])]
            outputs = [stored(*pair, some, len(rows)) for pair in zip(outputs, of_batch, strict=True)]
            finite = stored(finite, _finite_rows(of_batch[0]), some, len(rows))
            self.bar.update(len(rows[some]))
        # Checked last: reading the flags waits for the GPU.
        bad = [row for row, fine in zip(rows, finite.tolist(), strict=True) if not fine]
        if bad:
            shown = f"{len(bad)} of {len(rows)} features hold NaN or infinity ({first_few(map(images.name, bad))})"
            raise ValueError(f"extractor output must be finite; {shown}.")
        features, visibility = (x if x is None else x.reshape(n, *images.each, *x.shape[1:]) for x in outputs)
        return features, visibility

    def _of_batch(self, images: Images, rows: Sequence[int]) -> tuple[Any, Any]:
        extractor = self.extractor
        items = [next(images.stream) for _ in rows]
        if extractor.pad_last_batch:
            missing = extractor.batch_size - len(rows)
            rows, items = [*rows, *[rows[-1]] * missing], items + items[-1:] * missing
        names = [images.name(row) for row in rows]
        batch: Any
        if extractor.inputs == "batch":
            batch = _batch(items, names, extractor.transform)
            fits = not self.dtypes or batch.dtype in self.dtypes
            batch = batch.to(self.device, None if fits else self.dtypes[0])
        else:
            batch = [_native(item, called) for item, called in zip(items, names, strict=True)]
        if not extractor.flip:
            return self._called(batch, images.keywords(rows, self.device), names)
        # First, and copied: a call may write into its batch, and into the features it has returned before.
        mirrored = self._called(_mirrored(batch, names), images.keywords(rows, self.device), names)[0]
        mirrored = stored(None, mirrored, slice(0, len(rows)), len(rows))
        features, visibility = self._called(batch, images.keywords(rows, self.device), names)
        return features + mirrored, visibility

    def _called(self, batch: Any, keywords: dict[str, Any], names: list[str]) -> tuple[Any, Any]:
        outputs = _unpack(self.extractor.model(batch, **keywords), len(names))
        forms = [_form(output) for output in outputs]
        self._form = self._form or forms
        for found, first in zip(forms, self._form, strict=True):
            if found != first:
                given = f"{found} from {names[0]} on, after {first}"
                raise ValueError(f"extractor must return one form of output, got {given}.")
        return outputs


def _batch(items: list[Any], names: list[str], transform: Callable[[Image.Image], Tensor] | None) -> Tensor:
    tensors: list[Tensor] = []
    for item, name in zip(items, names, strict=True):
        if transform is not None:
            tensor = transform(load_image(item, name))
        else:
            tensor = torch.as_tensor(item) if isinstance(item, np.ndarray) else item
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise TypeError(f"{name} must be a float tensor (3, H, W), got {type(item).__name__}. Pass transform=.")
        shape = tuple(getattr(tensor, "shape", ()))
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or len(shape) != 3 or 0 in shape:
            given = f"{getattr(tensor, 'dtype', type(tensor).__name__)} of shape {shape}"
            raise ValueError(f"{name} must give a (3, H, W) float tensor, got {given}. Check the transform.")
        if tensors and tensor.shape != tensors[0].shape:
            first = tuple(tensors[0].shape)
            raise ValueError(f"{name} must have the size of its batch, {first}, got {shape}. Resize in the transform.")
        tensors.append(tensor)
    # Stacked into new memory: some models normalise their input in place.
    return torch.stack(tensors)


def _native(item: Any, name: str) -> Any:
    return os.fspath(item) if isinstance(item, (str, os.PathLike)) else np.array(load_image(item, name))


def _mirrored(batch: Any, names: list[str]) -> Any:
    """Images mirrored left to right, in new memory; paths become arrays."""
    if isinstance(batch, Tensor):
        return batch.flip(-1)
    return [np.array(load_image(item, name))[:, ::-1].copy() for item, name in zip(batch, names, strict=True)]


def _finite_rows(features: Any) -> Any:
    """(B,) booleans, in the features' container."""
    if isinstance(features, np.ndarray):
        return np.isfinite(features).reshape(len(features), -1).all(1)
    return torch.isfinite(features).flatten(1).all(1)


def _computes_in(model: Any) -> tuple[torch.device, list[torch.dtype]]:
    """Where the module behind a model is, and the dtypes of its parameters, that of the first one first."""
    module = _module_of(model)
    parameters: list[Tensor] = [] if module is None else list(module.parameters()) or _frozen(module)
    own = parameters or ([] if module is None else list(module.buffers()))
    device = own[0].device if own else torch.device("cpu")
    # Parameters may be quantised to dtypes that no batch comes in: integers, 8-bit floats.
    dtypes = dict.fromkeys(parameter.dtype for parameter in parameters)
    return device, [dtype for dtype in dtypes if dtype in FLOAT_DTYPES]


def _frozen(module: nn.Module) -> list[Tensor]:
    """The constants that `torch.jit.freeze` makes of parameters."""
    found = []
    for part in module.modules():
        if isinstance(part, torch.jit.ScriptModule) and part._c._has_method("forward"):
            graph: Any = part.inlined_graph  # its nodes live as long
            for node in graph.findAllNodes("prim::Constant"):
                if node.hasAttribute("value") and node.kindOf("value") == "t":
                    found.append(node.t("value"))
    return [tensor for tensor in found if tensor.ndim and tensor.is_floating_point()]


def _module_of(model: Any) -> nn.Module | None:
    """The torch module behind a model: itself, or the one whose bound method it is; constants may be bound."""
    while isinstance(model, functools.partial):
        model = model.func
    owner = getattr(model, "__self__", model)
    return owner if isinstance(owner, nn.Module) else None


_lock = threading.RLock()
_users: dict[int, list[int]] = {}  # id of a module in use: how many use it, whether it was in training mode before


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    module = _module_of(model)
    # One by one: parts of a model may be frozen in eval mode on purpose, or be in another thread's model too.
    parts = [] if module is None else list(module.modules())
    try:
        with _lock:
            new = [part for part in parts if id(part) not in _users]
            for part in parts:  # a frozen ScriptModule has no `training`
                _users.setdefault(id(part), [0, getattr(part, "training", False)])[0] += 1
            if module is not None and new:
                try:
                    module.eval()
                except NotImplementedError:  # of a part from torch.export, whose mode is fixed: the others have theirs
                    for part in parts:
                        part.training = False
        with torch.no_grad():
            yield
    finally:
        with _lock:
            for part in parts:
                _users[id(part)][0] -= 1
                if not _users[id(part)][0] and _users.pop(id(part))[1]:
                    part.training = True


def _is_per_image(value: Any, name: str, n: int) -> bool:
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__getitem__"):
        return False
    try:
        length = len(value)
    except TypeError:  # scalars as arrays of no dimension, classes
        return False
    if length != n and (isinstance(value, (list, range)) or hasattr(value, "ndim")):
        rule = f"have one entry for each of the {n} images, got {length}"
        raise ValueError(f"{name} must {rule}. Bind constants with functools.partial.")
    return length == n


def _taken(value: Any, rows: Sequence[int], device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value[torch.tensor(rows, device=value.device)].to(device)
    if isinstance(value, np.ndarray):
        return value[np.asarray(rows)]
    if hasattr(value, "iloc"):  # of pandas, whose own [] takes labels: the batch's count from 0
        return value.iloc[rows].reset_index(drop=True)
    taken = [value[i] for i in rows]
    return tuple(taken) if isinstance(value, tuple) else taken


def _unpack(output: Any, count: int) -> tuple[Any, Any]:
    """Features and visibility, or None, of what a model returned."""
    named = output if isinstance(output, Mapping) else {n: getattr(output, n, None) for n in (*_NAMES, "visibility")}
    own = [output] if isinstance(output, (np.ndarray, Tensor)) else [named.get(name) for name in _NAMES]
    features, visibility = next((value for value in own if value is not None), None), named.get("visibility")
    if isinstance(output, Sequence) and len(output) > 0:
        features = output[0] if features is None else features
        if getattr(features, "ndim", 0) != _PARTS_NDIM:
            visibility = None
        elif visibility is None and features is output[0] and len(output) > 1:
            visibility = output[1] if getattr(output[1], "shape", None) == features.shape[:2] else None
    if isinstance(features, np.ndarray):
        floating = features.dtype.kind == "f"
    elif isinstance(features, Tensor):
        floating = features.is_floating_point() and features.layout == torch.strided
    else:
        given = f"keys {list(output)}" if isinstance(output, Mapping) else type(output).__name__
        wanted = f"features as a tensor or array, first in a tuple, or by the name {' or '.join(_NAMES)}"
        raise TypeError(f"extractor must return {wanted}, got {given}.")
    if not floating:
        raise TypeError(f"extractor output must be dense, of dtype float16 to float64, got {features.dtype}.")
    if features.ndim not in (2, _PARTS_NDIM) or len(features) != count or 0 in features.shape:
        wanted = f"features (B, D) or parts (B, P, D) with B = {count}"
        raise ValueError(f"extractor must return {wanted}, got shape {tuple(features.shape)}.")
    shape = tuple(features.shape[:2])
    if visibility is not None and tuple(visibility.shape) != shape:
        raise ValueError(f"extractor must return visibility of shape (B, P) = {shape}, got {tuple(visibility.shape)}.")
    return features, visibility


def stored(whole: Any, part: Any, block: slice, n: int) -> Any:
    """Copy a block of rows into the array of all n, which the first one makes: a model may reuse its buffer."""
    if part is None:
        return None
    if whole is None:
        shape = (n, *part.shape[1:])
        whole = np.empty(shape, part.dtype) if isinstance(part, np.ndarray) else part.new_empty(shape)
    whole[block] = part
    return whole


def _form(output: Any) -> str:
    if output is None:
        return "no visibility"
    return f"{type(output).__name__} of {output.dtype}, shape (B, {', '.join(map(str, output.shape[1:]))})"
