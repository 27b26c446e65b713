"""The threads that torch and faiss compute with, which a forked process does not have."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

import torch

_OF_ONE_THREAD = 1 << 15
_used = threading.local()  # OpenMP keeps threads for each thread that asks for them


def use_threads(device: torch.device, entries: int | None = None) -> None:
    """To be called before torch or faiss compute: in a forked process, what follows may never return.

    `entries` are those of tensors that are taken one by one, of which torch computes a few in one thread.

    Raises:
        RuntimeError: the process was forked from one whose threads had computed before.
    """
    if device.type != "cpu" or torch.get_num_threads() == 1 or (entries is not None and entries <= _OF_ONE_THREAD):
        return
    if getattr(_used, "process", os.getpid()) != os.getpid() and _are_lost():
        remedy = "Start processes with the method 'spawn', or call torch.set_num_threads(1) in this one first"
        raise RuntimeError(f"this process was forked after its parent had computed in several threads. {remedy}.")
    _used.process = os.getpid()


def _are_lost() -> bool:
    """Whether OpenMP is GNU's: others start new threads in a forked process."""
    with suppress(OSError):
        return "libgomp" in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    return False
