"""fast-reid: `ReidEvaluator`, and a model that normalises the caller's tensor in place."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import nn

from stand_ins import ranked


class ReidEvaluator:
    def __init__(self, cfg, num_query, output_dir=None):
        self.cfg, self._num_query, self._output_dir = cfg, num_query, output_dir
        self._predictions = []

    def reset(self):
        self._predictions = []

    def process(self, inputs, outputs):
        prediction = {"feats": outputs.to("cpu", torch.float32), "pids": inputs["targets"], "camids": inputs["camids"]}
        self._predictions.append(prediction)

    def evaluate(self):
        features, pids, camids = (
            torch.cat([prediction[name] for prediction in self._predictions]) for name in ("feats", "pids", "camids")
        )
        q = self._num_query
        if self.cfg.TEST.METRIC == "cosine":
            features = nn.functional.normalize(features)
        dist = (1 - features[:q] @ features[q:].T).numpy()
        pids, camids = pids.numpy(), camids.numpy()
        precision, cmc = ranked(dist, pids[:q], pids[q:], camids[:q], camids[q:])
        results = OrderedDict((f"Rank-{r}", cmc[r - 1] * 100) for r in (1, 5, 10))
        results["mAP"] = np.mean(precision) * 100
        return results


class Baseline(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 12, 8, stride=8)
        self.register_buffer("pixel_mean", torch.tensor([123.675, 116.28, 103.53]).view(1, -1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor([58.395, 57.12, 57.375]).view(1, -1, 1, 1), False)

    def forward(self, batched_inputs):
        assert not self.training
        images = batched_inputs["images"]
        images.sub_(self.pixel_mean).div_(self.pixel_std)
        return self.backbone(images).mean((2, 3))
