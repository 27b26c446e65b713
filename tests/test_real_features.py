"""Figures on real features; an independent evaluator measured the expected ones (CUHK03, camera pair P1, detected)."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from conftest import SHARED
from PIL import Image

from pose2id import Centralizer, evaluate, evaluate_rank, k_reciprocal

# mAP and Rank-1 in percent: baseline, NFC, re-ranking, NFC + re-ranking.
EXPECTED = {
    ("val100", "osnet_msmt17"): [(24.30, 22.11), (28.56, 23.62), (32.66, 27.14), (32.48, 27.64)],
    ("val100", "osnet_market1501"): [(11.26, 10.55), (13.76, 11.56), (14.52, 10.55), (14.28, 10.55)],
    ("val100", "osnet_lda256"): [(48.70, 48.24), (52.32, 46.73), (62.47, 57.79), (58.95, 52.26)],
    ("val100", "mobilenetv2_imagenet"): [(1.62, 0.00), (1.58, 0.50), (1.55, 0.50), (1.73, 1.01)],
    ("843", "osnet_msmt17"): [(8.52, 7.19), (10.05, 7.43), (12.66, 9.93), (11.50, 8.03)],
}


@pytest.mark.parametrize(("name", "model"), EXPECTED)
def test_the_table_of_an_independent_evaluator(name, model, real_features):
    data = real_features(name)
    is_query = data["is_query"].astype(bool)
    features = data[f"feat_{model}"]
    q, g = features[is_query], features[~is_query]
    labels = [data[key][mask] for key in ("pids", "camids") for mask in (is_query, ~is_query)]
    new_q, new_g = Centralizer(method="nfc").enhance(q.astype(np.float32), g.astype(np.float32))
    found = [
        evaluate(q, g, *labels),
        evaluate(new_q, new_g, *labels),
        evaluate_rank(k_reciprocal(q, g), *labels),
        evaluate_rank(k_reciprocal(new_q, new_g), *labels),
    ]
    figures = [(100 * result.mAP, 100 * result.rank(1)) for result in found]
    expected = EXPECTED[name, model]
    np.testing.assert_allclose(figures[:3], expected[:3], atol=0.0051 + 0.01)
    # NFC makes both of a mutual pair one and the same vector: their order in a list is a tie, which each evaluator
    # breaks in its own way.
    np.testing.assert_allclose(figures[3], expected[3], atol=0.1)


def test_a_real_model_on_real_pictures(real_features):
    """OSNet through ONNX as the extractor. Its recorded features are of larger crops: alike, not equal."""
    onnxruntime = pytest.importorskip("onnxruntime")
    data = real_features("val100")
    folder = SHARED / "data"
    with zipfile.ZipFile(folder / "images" / "cuhk03_p1_det_val100_64x128.zip") as archive:
        pictures = [Image.open(io.BytesIO(archive.read(name))) for name in sorted(archive.namelist())[:120]]
    session = onnxruntime.InferenceSession(folder / "models" / "osnet_x0_25_msmt17.onnx")
    (tensor,) = session.get_inputs()
    model = Centralizer(lambda batch: session.run(None, {tensor.name: batch.numpy()})[0], transform="torchreid")
    found = model.extract(pictures)
    recorded = data["feat_osnet_msmt17"][:120].astype(np.float32)
    recorded /= np.linalg.norm(recorded, axis=1, keepdims=True)
    cosines = found @ recorded.T
    own = np.diag(cosines)
    assert own.mean() > 0.96
    # Each picture's own record is the nearest for nearly all of them: order, colours and sizes are right.
    assert (cosines.argmax(1) == np.arange(120)).mean() > 0.85
