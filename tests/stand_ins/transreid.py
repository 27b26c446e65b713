"""TransReID, CLIP-ReID and SOLIDER-REID: `utils.metrics`, and what their models take and return."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from stand_ins import ranked


def eval_func(distmat, q_pids, g_pids, q_camids, g_camids, max_rank=50):
    precision, cmc = ranked(distmat, q_pids, g_pids, q_camids, g_camids)
    return cmc[:max_rank].astype(np.float32), np.mean(precision)


class R1_mAP_eval:  # noqa: N801
    def __init__(self, num_query, max_rank=50, feat_norm=True, reranking=False):
        self.num_query, self.max_rank, self.feat_norm, self.reranking = num_query, max_rank, feat_norm, reranking

    def reset(self):
        self.feats, self.pids, self.camids = [], [], []

    def update(self, output):
        feat, pid, camid = output
        self.feats.append(feat.cpu())
        self.pids.extend(np.asarray(pid))
        self.camids.extend(np.asarray(camid))

    def compute(self):
        feats = torch.cat(self.feats)
        if self.feat_norm:
            feats = nn.functional.normalize(feats)
        q, pids, camids = self.num_query, np.asarray(self.pids), np.asarray(self.camids)
        qf, gf = feats[:q], feats[q:]
        distmat = (torch.cdist(qf.double(), gf.double()) ** 2).float().numpy()
        cmc, mean = eval_func(distmat, pids[:q], pids[q:], camids[:q], camids[q:])
        return cmc, mean, distmat, self.pids, self.camids, qf, gf


class _Network(nn.Module):
    def __init__(self, dim=12, cameras=4):
        super().__init__()
        self.convolution = nn.Conv2d(3, dim, 8, stride=8)
        self.cameras = nn.Parameter(torch.randn(cameras, 1, dim))

    def tokens(self, x):
        return self.convolution(x).flatten(2).transpose(1, 2)


class TransReID(_Network):
    """With SIE_CAMERA: labels index the embeddings, so that there is no None."""

    def forward(self, x, label=None, cam_label=None, view_label=None):
        assert not self.training
        return (self.tokens(x) + self.cameras[cam_label]).mean(1)


class CLIPReID(_Network):
    """With SIE-OLP: None is no camera."""

    def forward(self, x=None, label=None, get_image=False, get_text=False, cam_label=None, view_label=None):
        assert not self.training
        tokens = self.tokens(x)
        return (tokens if cam_label is None else tokens + self.cameras[cam_label]).mean(1)


class SOLIDER(_Network):
    def forward(self, x, label=None, cam_label=None, view_label=None):
        assert not self.training
        maps = self.convolution(x)
        return maps.mean((2, 3)), [maps]
