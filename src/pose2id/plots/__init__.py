"""Figures of what centralization does, the paper's among them. Needs the extra: pip install "pose2id[plots]"."""

from pose2id.plots.axes import (
    RIGHT,
    WRONG,
    feature_maps,
    new_figure,
    number_curves,
    pose_sheet,
    ranked_list,
    require_plots,
)

__all__ = [
    "RIGHT",
    "WRONG",
    "feature_maps",
    "new_figure",
    "number_curves",
    "pose_sheet",
    "ranked_list",
    "require_plots",
]
