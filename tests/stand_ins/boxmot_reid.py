"""boxmot: a backend (crops of a blue-first frame to L2-normalised features), and `ReID`, which takes crops alone."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image


class Backend:
    device, half, input_shape = torch.device("cpu"), False, (8, 4)

    @staticmethod
    def inference_preprocess(x):
        return x

    @staticmethod
    def of_crops(crops):
        pixels = [np.array(Image.fromarray(crop[:, :, ::-1]).resize((4, 8)), np.float32) / 255 for crop in crops]
        features = np.stack([x.mean((0, 1)).repeat(2) + x[0].reshape(-1)[:6] for x in pixels]) - 0.8
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    def get_features(self, xyxys, img):
        if not np.size(xyxys):
            return np.array([])
        return self.of_crops([img[y1:y2, x1:x2] for x1, y1, x2, y2 in np.asarray(xyxys).astype(int)])


class ReID:
    def __init__(self, model):
        self.model = model

    def __call__(self, inputs, boxes=None):
        if boxes is not None and not len(boxes):
            empty = torch.empty((0, 3, *self.model.input_shape), dtype=torch.float16 if self.model.half else None)
            return np.empty((len(self.model.inference_preprocess(empty.to(self.model.device))), 0), np.float32)
        if boxes is not None:
            return self.model.get_features(boxes, inputs)
        assert all(isinstance(crop, np.ndarray) and crop.dtype == np.uint8 for crop in inputs)
        return self.model.of_crops(inputs)
