"""Arrays with one entry for each image of a gallery, which grow together."""

from __future__ import annotations

from torch import Tensor

_SLACK = 16  # a gallery that grows keeps a sixteenth of its size free


class Columns:
    """Tensors with images along their first axis, by attribute; `columns` names them."""

    columns: tuple[str, ...] = ()

    def grow(self, capacity: int) -> None:
        """Make room for so many images."""
        for name in self.columns:
            old: Tensor = getattr(self, name)
            if len(old) < capacity:
                new = old.new_zeros((capacity, *old.shape[1:]))
                new[: len(old)] = old
                setattr(self, name, new)

    def arrays(self, n: int) -> dict[str, Tensor]:
        """The entries of the first n images, by name."""
        return {name: getattr(self, name)[:n] for name in self.columns}


def roomier(capacity: int, wanted: int) -> int:
    """The next capacity of columns that must hold `wanted` images."""
    return capacity if wanted <= capacity else wanted + wanted // _SLACK
