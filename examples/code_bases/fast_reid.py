"""fast-reid: centralized features in `ReidEvaluator.evaluate`, without an edit.

In the folder of the code base, its own script and its arguments:

python .../fast_reid.py tools/train_net.py --eval-only --config-file configs/Market1501/mgn_R50-ibn.yml
"""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from pose2id import Centralizer, Extractor


def plug_in(evaluator: type[Any], centralizer: Centralizer | None = None) -> type[Any]:
    """`ReidEvaluator` whose features are centralized before query expansion and distances; cameras are used."""
    enhance = (centralizer or Centralizer()).enhance

    class CentralizedEvaluator(evaluator):  # type: ignore[misc]
        def evaluate(self) -> Any:
            if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                # Each has some of the images; they meet within `evaluate`.
                raise RuntimeError("Evaluate in one process: --num-gpus 1.")
            given, q = self._predictions, self._num_query
            whole = {name: torch.cat([batch[name] for batch in given]) for name in ("feats", "pids", "camids")}
            feats, camids = whole["feats"], whole["camids"]
            sides = enhance(feats[:q], feats[q:], query_camids=camids[:q], gallery_camids=camids[q:])
            self._predictions = [{**whole, "feats": torch.cat(sides)}]
            try:
                return super().evaluate()
            finally:
                self._predictions = given

    return CentralizedEvaluator


class OfBatches(nn.Module):
    """A fast-reid model that takes a batch of pixels in 0..255 by itself, not in a dict."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        """Features (B, D), as the model makes them. The model normalises the batch in place, which nobody needs."""
        return self.model({"images": images})


def extractor_of(model: nn.Module) -> Extractor:
    """The model (of `DefaultPredictor(cfg)`: its `.model`), for pictures or paths."""
    return Extractor(OfBatches(model), transform="fast-reid")


def main() -> None:
    """Run a script of the code base with the plug."""
    sys.path.insert(0, "")
    sys.argv = sys.argv[1:]
    # `DefaultTrainer.build_evaluator` takes it from there.
    defaults: Any = import_module("fastreid.engine.defaults")
    defaults.ReidEvaluator = plug_in(defaults.ReidEvaluator)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
