"""Drawings on axes of your own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pose2id.io.checks import require_modules
from pose2id.plots.content import map_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RIGHT, WRONG = "#1a9850", "#d73027"


def require_plots() -> None:
    """Raise an ImportError with the pip command unless matplotlib and scikit-learn can be imported."""
    require_modules('Plots need the extra "plots"', '"pose2id[plots]"', "matplotlib", "sklearn")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, drawn without a display and without touching pyplot's state."""
    require_plots()
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def ranked_list(
    axes: Axes,
    query: NDArray[np.uint8],
    gallery: Sequence[NDArray[np.uint8]],
    right: Sequence[bool | None] | NDArray[np.bool_],
    *,
    captions: Sequence[str] | None = None,
    title: str = "",
) -> None:
    """Draw a query and its ranked list in one row: right matches framed green, wrong ones in dashes of red.

    Args:
        axes: where to draw.
        query: (H, W, 3) uint8 RGB.
        gallery: ranked pictures of the same size, nearest first.
        right: for each, whether it shows the query's identity; None: it does not count (junk), and is greyed.
        captions: for each, text below.
        title: text above.
    """
    height, width = query.shape[:2]
    border, gap = max(2, width // 16), width // 8
    cell = width + 2 * border + gap
    canvas = np.full((height + 2 * border, cell * (len(gallery) + 1) + gap, 3), 255, dtype=np.uint8)
    canvas[border:-border, border : border + width] = query
    for place, (picture, is_right) in enumerate(zip(gallery, right, strict=True), 1):
        left = gap + place * cell
        canvas[:, left : left + width + 2 * border] = _framed(picture, is_right, border)
        if captions is not None:
            at = left + border + width / 2
            below: dict[str, Any] = {"xytext": (0, -9), "textcoords": "offset points", "ha": "center"}
            axes.annotate(captions[place - 1], (at, len(canvas)), fontsize=6, annotation_clip=False, **below)
    _show(axes, canvas, title)


def _framed(picture: NDArray[np.uint8], right: bool | None, border: int) -> NDArray[np.uint8]:
    framed = np.full((picture.shape[0] + 2 * border, picture.shape[1] + 2 * border, 3), 255, dtype=np.uint8)
    if right is None:
        grey = picture.mean(axis=2, keepdims=True)
        framed[border:-border, border:-border] = 128 + grey / 2
        return framed
    framed[:] = [int((RIGHT if right else WRONG)[i : i + 2], 16) for i in (1, 3, 5)]
    if not right:  # dashed: colour is not all that tells them apart
        rows, columns = np.indices(framed.shape[:2])
        framed[(rows + columns) // (4 * border) % 2 == 1] = 255
    framed[border:-border, border:-border] = picture
    return framed


def pose_sheet(
    axes: Axes,
    references: Sequence[Image.Image],
    drawings: Sequence[Image.Image] | None,
    pictures: Sequence[Sequence[Image.Image]],
    *,
    title: str = "",
) -> None:
    """Draw one row per person, the reference and the pictures generated from it, under their poses.

    Args:
        axes: where to draw.
        references: RGB pictures; all others are shown in the size of the first.
        drawings: M drawn poses, RGB; None: there is no row of them.
        pictures: for each reference its M RGB pictures.
        title: text above.
    """
    width, height = references[0].size
    gap = max(2, width // 16)
    # A wider gap sets what was given apart from what was generated.
    lefts = [0, *(width + 3 * gap + column * (width + gap) for column in range(len(pictures[0])))]
    rows: list[list[Image.Image | None]] = [] if drawings is None else [[None, *drawings]]
    rows += [[reference, *others] for reference, others in zip(references, pictures, strict=True)]
    canvas = Image.new("RGB", (lefts[-1] + width, (height + gap) * len(rows) - gap), "white")
    for row, contents in enumerate(rows):
        for left, content in zip(lefts, contents, strict=True):
            if content is not None:
                canvas.paste(content.resize((width, height), Image.Resampling.BICUBIC), (left, row * (height + gap)))
    _show(axes, canvas, title)


def _show(axes: Axes, canvas: Any, title: str) -> None:
    axes.imshow(canvas, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize=9, loc="left")


def number_curves(axes: Axes, curves: Mapping[str, Sequence[float]], *, title: str = "") -> None:
    """Draw mAP against the number of generated images, one line per name, with its first and last value.

    Args:
        axes: where to draw.
        curves: name to fractions in [0, 1], for 0, 1, 2, ... generated images, as of `pose2id.report.by_number`.
        title: text above.
    """
    for name, values in curves.items():
        percent = [100 * value for value in values]
        (line,) = axes.plot(range(len(percent)), percent, marker="o", markersize=4, label=name)
        for number in (0, len(percent) - 1):
            at: dict[str, Any] = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
            text = f"{percent[number]:.1f}"
            axes.annotate(text, (number, percent[number]), fontsize=8, color=line.get_color(), **at)
    axes.set_xlabel("generated images per query and gallery image", fontsize=8)
    axes.set_ylabel("mAP in %", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.margins(x=0.08, y=0.15)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=9)


def feature_maps(
    axes: Sequence[Axes], features: Mapping[str, Any], pids: Any, *, num_identities: int = 10, seed: int = 0
) -> None:
    """Draw feature sets of the same images as t-SNE maps, one colour per identity.

    Args:
        axes: one for each set.
        features: title to (N, D) features; L2-normalised here.
        pids: (N,) identities of the rows, as in `pose2id.evaluate`.
        num_identities: draw the identities with the most images, at least 1; never -1 and 0.
        seed: of the t-SNE.

    Raises:
        ImportError: the extra is not installed.
    """
    require_plots()
    for ax, (title, values) in zip(axes, features.items(), strict=True):
        at, identity = map_of(values, pids, name=f"features[{title!r}]", num_identities=num_identities, seed=seed)
        ax.scatter(at[:, 0], at[:, 1], c=identity, cmap="tab10", s=14)
        ax.set_title(title, fontsize=9)
        ax.set(xticks=[], yticks=[])
