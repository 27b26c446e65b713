"""torchreid: `Engine` with its loaders' batches, and `FeatureExtractor`."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import nn

from stand_ins import ranked


class Engine:
    def __init__(self, model, use_gpu=False):
        self.model, self.use_gpu = model, use_gpu

    def test(self, loaders, **options):
        self.model.eval()
        return self._evaluate(
            dataset_name="market1501", query_loader=loaders["query"], gallery_loader=loaders["gallery"], **options
        )

    @torch.no_grad()
    def _evaluate(
        self,
        dataset_name="",
        query_loader=None,
        gallery_loader=None,
        dist_metric="euclidean",
        normalize_feature=False,
        visrank=False,
        visrank_topk=10,
        save_dir="",
        use_metric_cuhk03=False,
        ranks=(1, 5, 10, 20),
        rerank=False,
    ):
        def _feature_extraction(data_loader):
            f_, pids_, camids_ = [], [], []
            for data in data_loader:
                imgs, pids, camids = self.parse_data_for_eval(data)
                f_.append(self.extract_features(imgs).cpu())
                pids_.extend(pids.tolist())
                camids_.extend(camids.tolist())
            return torch.cat(f_), np.asarray(pids_), np.asarray(camids_)

        (qf, q_pids, q_camids), (gf, g_pids, g_camids) = map(_feature_extraction, (query_loader, gallery_loader))
        if normalize_feature:
            qf, gf = nn.functional.normalize(qf), nn.functional.normalize(gf)
        distmat = torch.cdist(qf.double(), gf.double()) ** 2
        precision, cmc = ranked(distmat, q_pids, g_pids, q_camids, g_camids)
        return cmc[0], np.mean(precision)

    def extract_features(self, input):  # noqa: A002
        return self.model(input)

    def parse_data_for_eval(self, data):
        return data["img"], data["pid"], data["camid"]


class FeatureExtractor:
    def __init__(self, model, image_size=(256, 128)):
        self.model, self.image_size = model.eval(), image_size

    def __call__(self, input):  # noqa: A002
        assert isinstance(input, list)
        images = []
        for element in input:
            assert isinstance(element, (str, np.ndarray))
            image = Image.open(element).convert("RGB") if isinstance(element, str) else Image.fromarray(element)
            pixels = np.array(image.resize(self.image_size[::-1], Image.Resampling.BILINEAR), np.float32)
            images.append(torch.from_numpy(pixels / 255).permute(2, 0, 1))
        with torch.no_grad():
            return self.model(torch.stack(images))
