"""BPBReID and KPR: the part-based engine, and models that return six things."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from stand_ins import ranked


class ImagePartBasedEngine:
    def __init__(self, model, test_embeddings, mask_filtering_testing=True):
        self.model, self.test_embeddings, self.mask_filtering_testing = model, test_embeddings, mask_filtering_testing

    def _feature_extraction(self, data_loader):
        f_, pids_, camids_, visibility_, masks_ = [], [], [], [], []
        for data in data_loader:
            embeddings, visibility, _, _, _, masks = self.model(data["image"])
            parts = [embeddings[name] for name in self.test_embeddings]
            shown = [visibility[name.replace("bn_", "")] for name in self.test_embeddings]
            f_.append(torch.cat([x if x.ndim == 3 else x[:, None] for x in parts], 1).data.cpu())
            visibility_.append(torch.cat([x if x.ndim == 2 else x[:, None] for x in shown], 1).cpu())
            masks_.append(masks["parts"])
            pids_.extend(data["pid"])
            camids_.extend(data["camid"])
        shown = torch.cat(visibility_) if self.mask_filtering_testing else None
        return torch.cat(f_), np.asarray(pids_), np.asarray(camids_), shown, torch.cat(masks_), None, {}

    def normalize(self, features):
        return nn.functional.normalize(features, p=2, dim=-1)

    @torch.no_grad()
    def _evaluate(
        self,
        epoch,
        dataset_name="",
        query_loader=None,
        gallery_loader=None,
        dist_metric="euclidean",
        normalize_feature=False,
        visrank=False,
        visrank_topk=10,
        visrank_q_idx_list=(),
        visrank_count=10,
        save_dir="",
        use_metric_cuhk03=False,
        ranks=(1, 5, 10, 20),
        rerank=False,
        save_features=False,
    ):
        qf, q_pids, q_camids, q_shown, *_ = self._feature_extraction(query_loader)
        gf, g_pids, g_camids, g_shown, *_ = self._feature_extraction(gallery_loader)
        if normalize_feature:
            qf, gf = self.normalize(qf), self.normalize(gf)
        distmat = distances(qf, gf, q_shown, g_shown)
        precision, cmc = ranked(distmat, q_pids, g_pids, q_camids, g_camids)
        return cmc, np.mean(precision), 0.0, 0.0


def distances(qf, gf, q_shown, g_shown):
    """The mean, over the parts that both show, of Euclidean distances; the largest and 1 where there is none."""
    q_shown = torch.ones(qf.shape[:2], dtype=torch.bool) if q_shown is None else q_shown
    g_shown = torch.ones(gf.shape[:2], dtype=torch.bool) if g_shown is None else g_shown
    found, far = torch.full((len(qf), len(gf)), torch.nan), 0.0
    for i in range(len(qf)):
        for j in range(len(gf)):
            both = q_shown[i] & g_shown[j]
            if both.any():
                of_parts = (qf[i, both].double() - gf[j, both].double()).norm(dim=-1)
                found[i, j] = of_parts.mean()
                far = max(far, float(of_parts.max()))
    return torch.where(found.isnan(), far + 1, found)


class _SixThings(nn.Module):
    def __init__(self, parts=3, dim=8):
        super().__init__()
        self.backbone = nn.Conv2d(3, dim, 8, stride=8)
        self.attention = nn.Conv2d(dim, parts + 1, 1)
        self.bn = nn.BatchNorm1d(dim)

    def outputs(self, maps):
        assert not self.training
        shares = self.attention(maps).softmax(1)
        parts = torch.einsum("bchw,bkhw->bkc", maps, shares[:, 1:])
        foreground = torch.einsum("bchw,bhw->bc", maps, shares[:, 1:].amax(1))
        shown = torch.nn.functional.one_hot(shares.argmax(1), shares.shape[1]).amax((1, 2)).bool()[:, 1:]
        embeddings = {"globl": maps.mean((2, 3)), "foreg": foreground, "parts": parts, "bn_foreg": self.bn(foreground)}
        visibility = {"globl": torch.ones(len(maps)).bool(), "foreg": shown.any(1), "parts": shown}
        return embeddings, visibility, {}, shares, maps, {"parts": shares[:, 1:], "foreg": shares[:, 1:].amax(1)}


class BPBReID(_SixThings):
    def forward(self, images, external_parts_masks=None):
        maps = self.backbone(images)
        return self.outputs(maps if external_parts_masks is None else maps * external_parts_masks)


class KPR(_SixThings):
    def forward(self, images, target_masks=None, prompt_masks=None, keypoints_xyc=None, cam_label=None, **kwargs):
        prompt = torch.zeros(len(images), 1, 1, 1) if prompt_masks is None else prompt_masks.mean((1, 2, 3))
        return self.outputs(self.backbone(images) + prompt.reshape(-1, 1, 1, 1))
