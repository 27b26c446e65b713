"""SAAI: centralized features inside each trial of `eval_sysu`, without an edit.

In the folder of the code base, its own script and its arguments:

python .../saai.py test.py --cfg configs/SYSU.yml --checkpoint model.pth
"""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from pose2id import Centralizer, Extractor

VISIBLE, INFRARED = (1, 2, 4, 5), (3, 6)  # SYSU-MM01's cameras


def plug_in(module: Any, centralizer: Centralizer | None = None) -> None:
    """Change `utils.eval_sysu` or `utils.eval_regdb`: its distances, AIM's too, are of centralized features.

    It calls them once in each trial, with the trial's gallery, so that no image that the protocol hides is used.
    """
    enhance = (centralizer or Centralizer()).enhance
    distance, aim = module.pairwise_distance, module.AIM

    def pairwise_distance(query_features: Tensor, gallery_features: Tensor) -> Tensor:
        found: Tensor = distance(*enhance(query_features, gallery_features))
        return found

    def affinity(qf: Tensor, gf: Tensor, k1: int, k2: int) -> Tensor:
        found: Tensor = aim(*enhance(qf, gf), k1, k2)
        return found

    module.pairwise_distance, module.AIM = pairwise_distance, affinity


def extractor_of(model: nn.Module) -> Extractor:
    """The model, for pictures or paths with `cam_ids=` (N,), which choose the BN neck: 3 and 6 are infrared.

    The generator paints in colour. For its pictures of infrared people, name a visible camera:
    `centralizer(paths, cam_ids=cams, generated_inputs={"cam_ids": torch.ones_like(cams)})`, one for each image, since
    the model compares them with its batch.
    """
    return Extractor(model, transform="saai")


def main() -> None:
    """Run a script of the code base with the plug."""
    sys.path.insert(0, "")
    sys.argv = sys.argv[1:]
    for name in ("utils.eval_sysu", "utils.eval_regdb"):
        plug_in(import_module(name))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
