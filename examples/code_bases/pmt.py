"""PMT: centralized features inside each of the ten trials of its `test.py`, which is a script: two lines to change.

    from pmt import plug_in                                                         # with this file beside it

    distmat = plug_in(query_feat, gall_feat, query_cam, gall_cam)                   # SYSU-MM01
    distmat = plug_in(query_feat, gall_feat)                                        # RegDB, visible to thermal
    distmat = plug_in(gall_feat, query_feat)                                        # RegDB, thermal to visible

in place of `distmat = -np.matmul(query_feat, np.transpose(gall_feat))`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pose2id import Centralizer, Extractor


def plug_in(
    query_feat: NDArray[np.floating],
    gall_feat: NDArray[np.floating],
    query_cam: Any = None,
    gall_cam: Any = None,
    centralizer: Centralizer | None = None,
) -> NDArray[np.floating]:
    """PMT's distances (Q, G), minus the cosine, of centralized features of one trial; float64 in, float64 out."""
    cameras = {"query_camids": query_cam, "gallery_camids": gall_cam}
    qf, gf = (centralizer or Centralizer()).enhance(query_feat, gall_feat, **cameras)
    return -np.matmul(qf, np.transpose(gf))


def extractor_of(model: nn.Module) -> Extractor:
    """The model, for pictures or paths; its features are L2-normalised already, and eq. 9 takes them so."""
    return Extractor(model, transform="pmt")
