"""A gallery as one file: safetensors, so that nothing in it is executed, written whole or not at all."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pose2id.centralization.cameras import Centres
from pose2id.centralization.guard import Evidence, Strangers
from pose2id.gallery.columns import Columns
from pose2id.gallery.engines import Images, inverted
from pose2id.gallery.methods import Contrasting, Guarded, Linked, Mutual, Plain
from pose2id.gallery.state import Fitted, State
from pose2id.io.whole_files import whole_file

FORMAT, VERSION = "pose2id gallery", 1
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
    torch.uint8: "U8",
}
_PIECE = 32 << 20  # bytes that are written at a time
_NAMES = "names"  # the array that holds JSON
_UNSIGNED = b'"crc32": "00000000"'  # in the header, where its own checksum will be


def is_gallery(path: Path) -> bool:
    """Whether a file says that it is a gallery."""
    try:
        return _opened(path, arrays=False)[0].get("format") == FORMAT
    except (FileNotFoundError, ValueError):  # a folder, or anything else
        return False


def write(path: Path, state: State | None, facts: Mapping[str, Any], names: Mapping[str, Any]) -> None:
    """Write a state, with facts for the header and names of images, which may be many.

    Raises:
        OSError: it cannot be written.
    """
    tensors, of_state = ({}, None) if state is None else _taken_apart(state)
    packed = json.dumps(names).encode()
    tensors[_NAMES] = torch.from_numpy(np.frombuffer(packed, dtype=np.uint8).copy())
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # each array is aligned
    arrays = {name: tensor.cpu().contiguous().numpy() for name, tensor in tensors.items()}
    about = {**facts, "format": FORMAT, "version": VERSION, "state": of_state}
    about["crc32"] = {name: _crc32(array) for name, array in arrays.items()}
    header: dict[str, Any] = {"__metadata__": {"crc32": "00000000", "pose2id": json.dumps(about)}}
    start = 0
    for name, tensor in tensors.items():
        stop = start + arrays[name].nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    text = text.replace(_UNSIGNED, _signed(zlib.crc32(text)), 1)
    with whole_file(path) as unfinished, unfinished.open("xb") as file:
        # By hand, because the library copies all arrays first.
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            for piece in _pieces(array):
                file.write(piece)


def read(path: Path, *, mmap: bool) -> tuple[State | None, dict[str, Any], dict[str, Any]]:
    """What `write` wrote: state, facts and names. With mmap arrays stay in the file until they are written to.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, another kind of file, or of a later version. With mmap, arrays but those
            of names are not checked.
    """
    facts, tensors, header = _opened(path, arrays=True)
    if facts.get("format") != FORMAT:
        raise ValueError(f"{path} must be a gallery, written by Gallery.save, got {facts.get('format')!r}.")
    if facts.get("version") != VERSION:
        given = f"got version {facts.get('version')!r}"
        raise ValueError(f"{path} must be of version {VERSION}, {given}. Read it with the pose2id that wrote it.")
    try:
        _check_header(header)
        if not mmap:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        checked = {_NAMES: tensors[_NAMES]} if mmap else tensors  # names are read at once in any case
        wrong = [name for name, tensor in checked.items() if _crc32(tensor.numpy()) != facts["crc32"][name]]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} changed since they were written")
        names = json.loads(tensors.pop(_NAMES).numpy().tobytes())
        state = None if facts["state"] is None else _put_together(tensors, facts["state"])
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"{path} is damaged ({error}). Take an older copy.") from error
    return state, facts, names


def _opened(path: Path, *, arrays: bool) -> tuple[dict[str, Any], dict[str, Tensor], bytes]:
    """Facts, arrays if they are asked for, and the header, all of one file, though others may replace it meanwhile."""
    from safetensors import safe_open  # noqa: PLC0415 - slow to import

    if not path.is_file():
        raise FileNotFoundError(f"There is no gallery {path}.")
    while True:
        failed, facts, tensors, header = None, {}, {}, b""
        # While it is held open, no other file can get its inode.
        with path.open("rb") as held:
            try:
                with safe_open(path, "pt") as file:
                    facts = json.loads((file.metadata() or {}).get("pose2id", "{}"))
                    if arrays:
                        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
                size = os.fstat(held.fileno()).st_size
                header = held.read(min(int.from_bytes(held.read(8), "little"), size))
            except Exception as error:  # a damaged file can fail in any way
                failed = error
            # The library opens a file by its name, and more than once.
            if not os.path.samestat(os.fstat(held.fileno()), path.stat()):
                continue
        if failed is not None:
            raise ValueError(f"{path} is damaged, or not a gallery ({failed}).") from failed
        return (facts if isinstance(facts, dict) else {}), tensors, header


def _signed(checksum: int) -> bytes:
    return f'"crc32": "{checksum:08x}"'.encode()


def _check_header(header: bytes) -> None:
    """Raise a ValueError if the header is not as it was written."""
    start = header.index(_UNSIGNED[:10])
    written = header[start : start + len(_UNSIGNED)]
    if written != _signed(zlib.crc32(header.replace(written, _UNSIGNED, 1))):
        raise ValueError("the header changed since it was written")


def _pieces(array: Any) -> Iterator[memoryview]:
    flat = memoryview(array.reshape(-1).view(np.uint8))
    return (flat[start : start + _PIECE] for start in range(0, len(flat), _PIECE))


def _crc32(array: Any) -> int:
    value = 0
    for piece in _pieces(np.ascontiguousarray(array)):
        value = zlib.crc32(piece, value)
    return value


def _taken_apart(state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arrays and numbers of a state."""
    linked, fitted, images = state.linked, state.fitted, state.images
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {
        "kind": type(linked).__name__,
        "indexed": images.index is not None,
        "changes": state.changes,
        "reason": fitted.reason,
        "n": fitted.n,
        "evidence": None if fitted.evidence is None else vars(fitted.evidence),
    }
    for prefix, columns in _columns(images, linked).items():
        tensors |= {f"{prefix}.{name}": tensor for name, tensor in columns.arrays(images.n).items()}
    if fitted.centres is not None:
        tensors |= {f"centres.{name}": tensor for name, tensor in vars(fitted.centres).items()}
    if fitted.link_map is not None:
        tensors["link_map"] = fitted.link_map
    if isinstance(linked, Mutual):
        facts |= {"k1": linked.k1, "k2": linked.k2}
    if isinstance(linked, Guarded):
        known = vars(linked.strangers)
        tensors |= {f"strangers.{name}": value for name, value in known.items() if isinstance(value, Tensor)}
        facts["strangers"] = {name: value for name, value in known.items() if not isinstance(value, Tensor)}
        facts["by_camera"] = linked.by_camera
    if isinstance(linked, Contrasting):
        tensors |= {"contrast.names": linked.names, "contrast.numbers": linked.numbers}
        facts |= {"shared": linked.shared, "num_cameras": linked.num_cameras}
    return tensors, facts


def _columns(images: Images, linked: Linked) -> dict[str, Columns]:
    lists: dict[str, Columns] = {f"lists{at}": lists for at, lists in enumerate(linked.every_list())}
    return {"images": images, "linked": linked, **lists}


def _put_together(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> State:
    """The state that `_taken_apart` took apart."""
    under = {prefix: _under(tensors, prefix) for prefix in ("images", "linked", "centres", "strangers", "contrast")}
    images = Images(**under["images"])
    linked: Linked
    if facts["kind"] == "Plain":
        linked = Plain(images)
    elif facts["kind"] == "Mutual":
        linked = Mutual(images, facts["k1"], facts["k2"])
    elif facts["kind"] == "Guarded":
        of_strangers: dict[str, Any] = {**under["strangers"], **facts["strangers"]}
        linked = Guarded(images, Strangers(**of_strangers), by_camera=facts["by_camera"])
    else:
        linked = Contrasting(images, **under["contrast"], shared=facts["shared"], num_cameras=facts["num_cameras"])
    for prefix, columns in _columns(images, linked).items():
        for name in columns.columns:
            value, like = tensors[f"{prefix}.{name}"], getattr(columns, name)
            if value.shape != like.shape or value.dtype != like.dtype:
                raise ValueError(f"{prefix}.{name} is {tuple(value.shape)}, not {tuple(like.shape)}")
            setattr(columns, name, value)
    centres = Centres(**under["centres"]) if under["centres"] else None
    found = None if facts["evidence"] is None else Evidence(**facts["evidence"])
    state = State(linked, Fitted(centres, tensors.get("link_map"), found, facts["reason"], facts["n"]))
    state.changes = facts["changes"]
    if facts["indexed"]:  # made again: quicker than to check what another library reads
        images.index = inverted(images.compared, None if centres is None else images.cameras)
        if images.index is not None:
            gone = torch.nonzero(~images.alive).flatten()
            images.index.remove(gone, images.cameras[gone])
    for lists in linked.every_list():
        lists.count()
    return state


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}
