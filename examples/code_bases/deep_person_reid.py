"""torchreid (deep-person-reid): centralized features in `Engine._evaluate`, without an edit; its extractor and tuples.

In the folder of the code base, its own script and its arguments:

python .../deep_person_reid.py scripts/main.py --config-file configs/im_r50_softmax_256x128_amsgrad.yaml
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pose2id import Centralizer, Extractor


def plug_in(engine: type[Any], centralizer: Centralizer | None = None) -> type[Any]:
    """Change an `Engine` class: its `_evaluate` gets centralized features of query and gallery; cameras are used."""
    enhance, published = (centralizer or Centralizer()).enhance, engine._evaluate

    def evaluate(
        self: Any, dataset_name: str = "", query_loader: Any = None, gallery_loader: Any = None, **options: Any
    ) -> Any:
        query, gallery = (_extracted(self, loader) for loader in (query_loader, gallery_loader))
        cameras: dict[str, Any] = {"query_camids": query["camid"], "gallery_camids": gallery["camid"]}
        query["img"], gallery["img"] = enhance(query["img"], gallery["img"], **cameras)
        # The published evaluation, of loaders that hold features in the place of images.
        self.extract_features = lambda features: features
        try:
            return published(self, dataset_name, [query], [gallery], **options)
        finally:
            del self.extract_features

    engine._evaluate = evaluate
    return engine


@torch.no_grad()
def _extracted(engine: Any, loader: Any) -> dict[str, Tensor]:
    """One batch of all features (N, D), identities and cameras, in the engine's own form."""
    found = []
    for batch in loader:
        images, pids, camids = engine.parse_data_for_eval(batch)
        features = engine.extract_features(images.cuda() if engine.use_gpu else images)
        found.append((features.cpu(), pids, camids))
    return dict(zip(("img", "pid", "camid"), map(torch.cat, zip(*found, strict=True)), strict=True))


def extractor_of(feature_extractor: Callable[..., Tensor]) -> Extractor:
    """`torchreid.utils.FeatureExtractor(...)`: it takes paths and arrays, and has its own preprocessing."""
    return Extractor(feature_extractor, inputs="images")


def columns(data: Sequence[tuple[Any, ...]]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Paths, identities and cameras of torchreid's tuples (path, pid, camid) or (path, pid, camid, dsetid)."""
    paths, pids, camids = list(zip(*data, strict=True))[:3]
    return list(paths), np.array(pids), np.array(camids)


def main() -> None:
    """Run a script of the code base with the plug."""
    sys.path.insert(0, "")
    sys.argv = sys.argv[1:]
    plug_in(import_module("torchreid.engine").Engine)  # its subclasses have no `_evaluate` of their own
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
