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
from pose2id.plots.figures import (
    distance_distributions,
    generated_sheet,
    identity_maps,
    parameter_curves,
    ranked_lists,
)

__all__ = [
    "RIGHT",
    "WRONG",
    "distance_distributions",
    "feature_maps",
    "generated_sheet",
    "identity_maps",
    "new_figure",
    "number_curves",
    "parameter_curves",
    "pose_sheet",
    "ranked_list",
    "ranked_lists",
    "require_plots",
]
