from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pose2id.plots import (
    RIGHT,
    WRONG,
    distance_distributions,
    feature_maps,
    generated_sheet,
    identity_maps,
    new_figure,
    number_curves,
    parameter_curves,
    pose_sheet,
    ranked_list,
    ranked_lists,
)


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


@pytest.fixture
def sets(rng):
    """Features of 8 people before and after, labels with junk, and images of three sizes in three forms."""
    centres = rng.standard_normal((9, 6))
    q_pids, g_pids = np.repeat(np.arange(1, 9), 2), np.repeat(np.arange(1, 9), 4)
    labels = q_pids, g_pids, np.tile([1, 2], 8), np.tile([1, 2, 3, 4], 8)
    before, after = (
        tuple(centres[pids] + noise * rng.standard_normal((len(pids), 6)) for pids in (q_pids, g_pids))
        for noise in (0.9, 0.2)
    )
    images = [
        [Image.new("RGB", (50, 20), (i, 0, 0)) for i in range(16)],
        [np.full((30, 10, 3), i, np.uint8) if i % 2 else torch.full((3, 20, 10), i / 100) for i in range(32)],
    ]
    return before, after, labels, images


def test_distributions_are_those_of_all_pairs_that_count(sets):
    before, after, labels, _ = sets
    figure = distance_distributions(before, after, labels, names=("plain", "ours"))
    assert [axes.get_title() for axes in figure.axes] == ["plain", "ours"]
    for axes, pair in zip(figure.axes, (before, after), strict=True):
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in pair]
        distances = np.linalg.norm(unit[0][:, None] - unit[1][None], axis=2)
        same = labels[0][:, None] == labels[1]
        dropped = same & (labels[2][:, None] == labels[3])
        for patch, chosen in zip(axes.patches[::2], (same & ~dropped, ~same), strict=True):
            values, edges, _ = patch.get_data()
            np.testing.assert_allclose(values, np.histogram(distances[chosen], edges)[0] / chosen.sum(), atol=1e-9)
        (threshold,) = axes.lines
        at = threshold.get_xdata()[0]
        missed, accepted = (distances[same & ~dropped] > at).mean(), (distances[~same] <= at).mean()
        assert abs(missed - accepted) <= 1 / (same & ~dropped).sum()
    sampled = distance_distributions(before, after, labels, max_queries=3)
    assert sampled.axes[0].get_title() == "as they are (3 of 16 queries)"


def test_identity_maps_tell_identities_apart_by_colour_and_shape(sets):
    before, after, labels, _ = sets
    features = {name: np.concatenate(pair) for name, pair in (("plain", before), ("ours", after))}
    figure = identity_maps(features, np.concatenate(labels[:2]), num_identities=3)
    for axes in figure.axes:
        assert [len(dots.get_offsets()) for dots in axes.collections] == [6, 6, 6]
        assert len({tuple(dots.get_facecolor()[0]) for dots in axes.collections}) == 3
        assert len({dots.get_paths()[0].vertices.tobytes() for dots in axes.collections}) == 3
    (own,) = identity_maps({"one": features["ours"]}, np.concatenate(labels[:2]), num_identities=1).axes
    assert own.get_title() == "one"
    with pytest.raises(ValueError, match="at least one set"):
        identity_maps({}, labels[0])


def test_curves_have_a_panel_for_each_parameter():
    panels = {"k1": {"a": ([1, 2], [0.5, 0.6]), "b": ([1, 2], [0.4, 0.3])}, "eta": {"a": ([0, 1, 4], [0.1, 0.2, 0.3])}}
    figure = parameter_curves(panels)
    assert [axes.get_xlabel() for axes in figure.axes] == ["k1", "eta"]
    first, second = figure.axes[0].lines
    np.testing.assert_allclose(first.get_xydata(), [[1, 50], [2, 60]])
    assert first.get_linestyle() != second.get_linestyle()
    with pytest.raises(ValueError, match="at least one panel"):
        parameter_curves({})


def test_sheets_keep_the_shape_of_images_of_any_size(tmp_path):
    Image.new("RGB", (40, 10), (200, 0, 0)).save(tmp_path / "wide.png")
    given = [np.full((64, 32, 3), 9, np.uint8), torch.zeros(3, 16, 8)]
    figure = generated_sheet([tmp_path / "wide.png"], [given], size=(64, 32), title="a title")
    canvas = figure.axes[0].images[0].get_array()
    assert canvas.shape[0] == 64
    red = canvas[:, :32, 0] == 200
    assert (red[:, 16].sum(), red[32].sum()) == (8, 32)  # 40 x 10 as 32 x 8
    assert canvas[0, 2].tolist() == [235] * 3
    assert canvas[32, 60].tolist() == [9] * 3
    posed = generated_sheet([given[0]], [given], poses=given, size=(64, 32)).axes[0].images[0].get_array()
    assert posed.shape[0] == 2 * 64 + 2
    with pytest.raises(ValueError, match="generated must hold M images"):
        generated_sheet([given[0]] * 2, [given, given[:1]])


def test_ranked_lists_are_those_of_both_features(sets):
    before, after, labels, images = sets
    figure = ranked_lists(before, after, labels, images, [3, 0], length=5, size=(32, 16))
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "query 3, as they are",
        "query 3, centralized",
        "query 0, as they are",
        "query 0, centralized",
    ]
    for number, axes in enumerate(figure.axes):
        query, pair = (3, 3, 0, 0)[number], (before, after)[number % 2]
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in pair]
        distances = np.linalg.norm(unit[1] - unit[0][query], axis=1)
        dropped = (labels[1] == labels[0][query]) & (labels[3] == labels[2][query])
        wanted, rank = [], 0
        for i in np.argsort(distances):
            rank += not dropped[i]
            wanted.append(f"{'junk' if dropped[i] else rank}: {distances[i]:.2f}")
            if rank == 5:
                break
        assert [text.get_text() for text in axes.texts] == wanted
    # The one image of the query's identity and camera is greyed, and framed in no colour.
    assert sum("junk" in text.get_text() for text in figure.axes[1].texts) == 1
    canvas = figure.axes[1].images[0].get_array()
    cell = 16 + 2 * 2 + 2
    for place, text in enumerate(figure.axes[1].texts, 1):
        frame = canvas[:, 2 + place * cell : 2 + place * cell + 20]
        colours = {tuple(pixel) for pixel in frame[0].tolist()}
        right, wrong = (tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in (RIGHT, WRONG))
        if "junk" in text.get_text():
            assert colours == {(255, 255, 255)}
            assert frame[2:-2, 2:-2].min() >= 128
        else:
            assert colours in ({right}, {wrong, (255, 255, 255)})  # solid, or dashed
    with pytest.raises(ValueError, match="at least one row"):
        ranked_lists(before, after, labels, images, [])
