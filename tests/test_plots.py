from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pose2id.plots import RIGHT, WRONG, feature_maps, new_figure, number_curves, pose_sheet, ranked_list


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


def test_a_sheet_has_a_row_a_person_under_the_poses():
    def picture(value, size=(16, 32)):
        return Image.new("RGB", size, (value, value, value))

    axes = new_figure(4, 4).subplots()
    references, drawings = [picture(10), picture(20)], [picture(0), picture(1), picture(2)]
    pictures = [[picture(10 * row + column, size=(32, 64)) for column in (1, 2, 3)] for row in (1, 2)]
    pose_sheet(axes, references, drawings, pictures, title="a title")
    canvas = axes.images[0].get_array()[..., 0]
    middles = [16 + row * 34 for row in range(3)]
    assert [[canvas[y, x] for x in (8, 30, 48, 66)] for y in middles] == [
        [255, 0, 1, 2],
        [10, 11, 12, 13],
        [20, 21, 22, 23],
    ]
    assert canvas.shape == (3 * 34 - 2, 16 + 6 + 3 * 18 - 2)
    assert axes.get_title(loc="left") == "a title"


def test_curves_tell_their_first_and_last_value_in_percent():
    axes = new_figure(4, 4).subplots()
    number_curves(axes, {"IPG": [0.5, 0.25, 0.75], "both": [0.1, 0.2]}, title="a title")
    first, second = axes.lines
    assert first.get_xydata().tolist() == [[0, 50], [1, 25], [2, 75]]
    assert second.get_ydata().tolist() == [10, 20]
    assert [text.get_text() for text in axes.texts] == ["50.0", "75.0", "10.0", "20.0"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["IPG", "both"]
    assert axes.get_title() == "a title"
