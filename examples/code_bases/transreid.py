"""TransReID, CLIP-ReID and SOLIDER-REID: centralized features in `R1_mAP_eval.compute`, without an edit.

In the folder of the code base, its own test script and its arguments:

python .../transreid.py test.py --config_file configs/Market/vit_transreid_stride.yml
python .../transreid.py test_clipreid.py --config_file configs/person/vit_clipreid.yml
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pose2id import Centralizer, Extractor

# Modules that import R1_mAP_eval and do_inference: TransReID's and SOLIDER's one, CLIP-ReID's three.
PROCESSORS = (
    "processor.processor",
    "processor.processor_clipreid_stage1",
    "processor.processor_clipreid_stage2",
)


def plug_in(evaluator: type[Any], centralizer: Centralizer | None = None) -> type[Any]:
    """`R1_mAP_eval` whose query and gallery features are centralized before its distances; cameras are used."""
    enhance = (centralizer or Centralizer()).enhance

    class CentralizedEvaluator(evaluator):  # type: ignore[misc]
        def compute(self) -> Any:
            given, (qf, gf), cameras = self.feats, *_sides(self)
            self.feats = [torch.cat(enhance(qf, gf, **cameras))]
            try:
                return super().compute()
            finally:
                self.feats = given

    return CentralizedEvaluator


def plug_in_reranking(
    evaluator: type[Any], eval_func: Callable[..., Any], centralizer: Centralizer | None = None
) -> type[Any]:
    """`R1_mAP_eval` that ranks by `Centralizer.rerank`; `eval_func` is the one of its module, `utils.metrics`."""
    rerank = (centralizer or Centralizer()).rerank

    class RerankedEvaluator(evaluator):  # type: ignore[misc]
        def compute(self) -> Any:
            (qf, gf), cameras = _sides(self)
            distances = rerank(qf, gf, **cameras).numpy()
            q, pids, camids = self.num_query, np.asarray(self.pids), np.asarray(self.camids)
            cmc, mean = eval_func(distances, pids[:q], pids[q:], camids[:q], camids[q:])
            return cmc, mean, distances, self.pids, self.camids, qf, gf

    return RerankedEvaluator


def _sides(evaluator: Any) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """Features of query and gallery as the model made them, and their cameras."""
    q, feats, camids = evaluator.num_query, torch.cat(evaluator.feats), np.asarray(evaluator.camids)
    return (feats[:q], feats[q:]), {"query_camids": camids[:q], "gallery_camids": camids[q:]}


def extractor_of(model: nn.Module, preset: str = "transreid") -> Extractor:
    """The model, for pictures or paths; presets "transreid", "clip-reid", "solider-reid" (which returns a tuple).

    Camera-aware weights want `cam_label=` with the images, 0-based. For generated images
    `generated_inputs={"cam_label": None}` is "no camera" to CLIP-ReID; TransReID indexes its embeddings by the label,
    so that None would add all cameras to the wrong axis: give 0 there, as the published demo does.
    """
    return Extractor(model, transform=preset)


def main() -> None:
    """Run a script of the code base with the plug."""
    sys.path.insert(0, "")
    sys.argv = sys.argv[1:]
    for name in PROCESSORS:
        try:
            processor = import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
        else:
            processor.R1_mAP_eval = plug_in(processor.R1_mAP_eval)  # type: ignore[attr-defined]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
