"""BPBReID and KPR: centralized parts, with their visibility, in `_evaluate` of the part-based engine, without an edit.

In the folder of the code base, its own script and its arguments:

python .../bpbreid.py torchreid/scripts/main.py --config-file configs/bpbreid/bpbreid_occ_reid_test.yaml
python .../bpbreid.py main.py --config-file configs/kpr/solider/kpr_occ_reid_test.yaml
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from pose2id import Centralizer, Extractor


def plug_in(engine: type[Any], centralizer: Centralizer | None = None) -> type[Any]:
    """Change an engine class: its `_evaluate` gets centralized parts (N, P, D); its own distance then compares them.

    Cameras are left out: they are for features without parts.
    """
    enhance, published = (centralizer or Centralizer()).enhance, engine._evaluate

    def evaluate(
        self: Any,
        epoch: Any,
        dataset_name: str = "",
        query_loader: Any = None,
        gallery_loader: Any = None,
        **options: Any,
    ) -> Any:
        # (features, pids, camids, visibility or None, ...), as `_evaluate` asks for them.
        query, gallery = (self._feature_extraction(loader) for loader in (query_loader, gallery_loader))
        seen = {"query_visibility": query[3], "gallery_visibility": gallery[3]}
        qf, gf = enhance(query[0], gallery[0], **seen)
        found = iter([(qf, *query[1:]), (gf, *gallery[1:])])
        self._feature_extraction = lambda _: next(found)
        try:
            return published(self, epoch, dataset_name, query_loader, gallery_loader, **options)
        finally:
            del self._feature_extraction

    engine._evaluate = evaluate
    return engine


class Parts(nn.Module):
    """A BPBReID or KPR model that returns (parts (B, P, D), visibility (B, P)) of the six things that it makes.

    Args:
        model: the model.
        embeddings: which embeddings are parts, as in the configuration's `test_embeddings`.
    """

    def __init__(self, model: nn.Module, embeddings: Sequence[str] = ("bn_foreg", "parts")) -> None:
        super().__init__()
        self.model, self.embeddings = model, tuple(embeddings)

    def forward(self, images: Tensor, **prompts: Any) -> tuple[Tensor, Tensor]:
        """Prompts are the model's: `external_parts_masks` (BPBReID), `prompt_masks` and `target_masks` (KPR)."""
        embeddings, visibility = self.model(images, **prompts)[:2]
        parts = [_in_parts(embeddings[name], 3) for name in self.embeddings]
        # An embedding after its batch normalisation is as visible as before.
        shown = [_in_parts(visibility[name.removeprefix("bn_")], 2) for name in self.embeddings]
        return torch.cat(parts, dim=1), torch.cat(shown, dim=1)


def _in_parts(values: Tensor, ndim: int) -> Tensor:
    """Whole-body values as one more part."""
    return values if values.ndim == ndim else values.unsqueeze(1)


def extractor_of(
    model: nn.Module, preset: str = "bpbreid", embeddings: Sequence[str] = ("bn_foreg", "parts")
) -> Extractor:
    """The model, for pictures or paths; presets "bpbreid", "kpr-solider", "kpr-imagenet".

    KPR's prompts are heatmaps, `prompt_masks=` (N, K + 2, H, W) with the images. A generated image is in another pose
    than its original, so that it must not get its prompt: `generated_inputs={"prompt_masks": None}` leaves generated
    images unprompted. Their poses are known: `pose_inputs={"prompt_masks": function}` of `GeneratedPictures` prompts
    with the heatmaps (K + 2, H, W) that your function makes, with KPR's own code, of `pose.to_coco(size=...)`.
    """
    return Extractor(Parts(model, embeddings), transform=preset)


def main() -> None:
    """Run a script of the code base with the plug."""
    sys.path.insert(0, "")
    sys.argv = sys.argv[1:]
    plug_in(import_module("torchreid.engine.image.part_based_engine").ImagePartBasedEngine)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
