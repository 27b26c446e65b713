from __future__ import annotations

import numpy as np
import pytest

from pose2id.plots import RIGHT, WRONG, feature_maps, new_figure, ranked_list


def test_right_answers_are_framed_green_and_wrong_ones_red():
    pictures = [np.full((32, 16, 3), 7, np.uint8)] * 2
    axes = new_figure(4, 2).subplots()
    ranked_list(axes, pictures[0], pictures, [True, False], title="a title")
    canvas = axes.images[0].get_array()
    frames = [tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in (RIGHT, WRONG)]
    columns = [np.flatnonzero((canvas[0] == frame).all(1)) for frame in frames]
    assert columns[0].max() < columns[1].min()
    assert axes.get_title(loc="left") == "a title"


def test_maps_draw_every_chosen_image_once(rng):
    axes = new_figure(6, 3).subplots(1, 2)
    pids = np.array([1] * 9 + [2] * 8 + [3] * 7 + [0] * 5 + [-1] * 5)
    features = rng.standard_normal((34, 6))
    feature_maps(axes, {"before": features, "after": features * 2}, pids, num_identities=2)
    first, second = (ax.collections[0].get_offsets() for ax in axes)
    np.testing.assert_allclose(first, second, atol=1e-2)  # the same directions
    other = new_figure(3, 3).subplots()
    feature_maps([other], {"other": rng.standard_normal((34, 6))}, pids, num_identities=2)
    assert np.abs(other.collections[0].get_offsets() - first).max() > 1
    assert [len(ax.collections[0].get_offsets()) for ax in axes] == [17, 17]
    assert [ax.get_title() for ax in axes] == ["before", "after"]


def test_maps_need_images():
    with pytest.raises(ValueError, match="at least 3 images"):
        feature_maps([new_figure(3, 3).subplots()], {"x": np.ones((4, 2))}, [0, 0, -1, 1])
