from __future__ import annotations

import pickle
import zipfile

import numpy as np
import pytest
from scipy.io import savemat

from pose2id import evaluate
from pose2id.io import feature_files
from pose2id.io.feature_files import FeatureFile, load_features, save_features


@pytest.fixture
def features(rng):
    return FeatureFile(
        rng.standard_normal((4, 3)).astype(np.float32),
        rng.standard_normal((6, 3)).astype(np.float32),
        np.array([1, 2, 3, 1]),
        np.array([1, 2, 3, -1, 0, 1]),
        np.array([1, 1, 1, 1]),
        np.array([2, 2, 2, 2, 2, 2]),
        {"names": np.array(["a", "b"]), "extra": np.arange(3)},
    )


def same(found, expected):
    for name in ("query_feats", "gallery_feats", "q_pids", "g_pids", "q_camids", "g_camids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
        assert getattr(found, name).dtype == getattr(expected, name).dtype


@pytest.mark.parametrize("suffix", [".npz", ".mat"])
def test_round_trip_keeps_everything(suffix, features, tmp_path):
    path = tmp_path / f"features{suffix}"
    save_features(features, path)
    found = load_features(path)
    same(found, features)
    np.testing.assert_array_equal(np.ravel(found.others["extra"]), [0, 1, 2])
    assert [item.strip() for item in np.ravel(found.others["names"])] == ["a", "b"]
    assert sorted(item.name for item in tmp_path.iterdir()) == [path.name]


def test_the_layout_that_the_field_shares(features, tmp_path):
    savemat(
        tmp_path / "pytorch_result.mat",
        {
            "query_f": features.query_feats,
            "query_label": features.q_pids.astype(float),  # doubles, in a row
            "query_cam": features.q_camids[:, None],
            "gallery_f": features.gallery_feats,
            "gallery_label": features.g_pids,
            "gallery_cam": features.g_camids,
        },
    )
    same(load_features(tmp_path / "pytorch_result.mat"), features)


def test_labels_are_optional(features, tmp_path):
    np.savez(tmp_path / "f.npz", query_feats=features.query_feats, gallery_feats=features.gallery_feats)
    found = load_features(tmp_path / "f.npz")
    assert found.q_pids is None
    assert found.g_camids is None


def test_an_existing_file_is_kept_unless_told(features, tmp_path):
    path = tmp_path / "f.npz"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="exists"):
        save_features(features, path)
    assert path.read_bytes() == b"precious"
    save_features(features, path, overwrite=True)
    same(load_features(path), features)


def test_a_failed_write_leaves_nothing_behind(features, tmp_path, monkeypatch):
    path = tmp_path / "f.npz"
    path.write_bytes(b"precious")

    def full(member, *_, **__):
        member.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.raises(OSError, match=r"f\.npz cannot be written: disk full"):
        save_features(features, path, overwrite=True)
    assert path.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [path]


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("code in a file was run",))


def test_pickles_are_refused_and_never_run(features, tmp_path):
    bomb = np.empty(1, dtype=object)
    bomb[0] = Bomb()
    np.savez(tmp_path / "f.npz", query_feats=features.query_feats, gallery_feats=features.gallery_feats, x=bomb)
    with pytest.raises(ValueError, match=r"x of .* cannot be read.*refused"):
        load_features(tmp_path / "f.npz")
    (tmp_path / "g.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"damaged, or not an \.npz"):
        load_features(tmp_path / "g.npz")
    (tmp_path / "h.mat").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="cannot be read"):
        load_features(tmp_path / "h.mat")


def written(path, features, *more):
    """A feature file with further members (name, content)."""
    save_features(features, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, content in more:
            archive.writestr(name, content)


def npy(header):
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


HUGE = npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}\n")
NESTED = npy(b"(" * 5000 + b"\n")


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.npy", HUGE, "x of .* cannot be read"),
        ("x.npy", NESTED, "x of .* cannot be read"),
        ("query_feats.npy", HUGE, "must hold each array once, got query_feats more than once"),
        ("extra", b"", "must hold each array once, got extra more than once"),
    ],
    ids=["huge", "nested", "twice", "twice by another name"],
)
def test_hostile_members_are_named(features, tmp_path, name, content, message):
    written(tmp_path / "f.npz", features, (name, content))
    with pytest.raises(ValueError, match=message):
        load_features(tmp_path / "f.npz")


def test_encrypted_members_are_named(features, tmp_path):
    path = tmp_path / "f.npz"
    save_features(features, path)
    content = bytearray(path.read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flags of the first member, in both its headers
        content[content.index(mark) + at] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"query_feats of .* cannot be read .*encrypted"):
        load_features(path)


def test_bombs_are_not_unpacked(features, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "_BOMB_BYTES", 1 << 20)
    written(tmp_path / "f.npz", features, ("x.npy", bytes(2 << 20)))
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(ValueError, match=r"must hold features, which hardly pack, got 0\.0021 GB packed into"):
        load_features(tmp_path / "f.npz")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_said_to_be_damaged(share, features, tmp_path):
    path = tmp_path / "f.npz"
    save_features(features, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="damaged"):
        load_features(path)


def test_a_mat_file_that_crashes_its_reader(tmp_path):
    path = tmp_path / "f.mat"
    savemat(path, {"query_f": np.ones((2, 3)), "gallery_f": np.ones((2, 3))})
    content = bytearray(path.read_bytes())
    content[145] = 9  # "complex", without imaginary parts: scipy 1.17 reads beyond its memory
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"f\.mat cannot be read \(.*Save it in MATLAB with -v7, or as \.npz"):
        load_features(path)


@pytest.mark.parametrize(("suffix", "name"), [(".mat", "query_f"), (".npz", "g_pids")])
def test_no_other_array_takes_the_place_of_features(suffix, name, features, tmp_path):
    stray = FeatureFile(features.query_feats, features.gallery_feats, others={name: np.zeros(3)})
    with pytest.raises(ValueError, match=f"{name} in the file's other arrays"):
        save_features(stray, tmp_path / f"f{suffix}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "right", "suffix"),
    [
        ("query_camids", "q_camids", ".npz"),
        ("gallery_pids", "g_pids", ".npz"),
        ("gallery_camids", "gallery_cam", ".mat"),
    ],
)
def test_labels_by_the_name_of_an_argument(name, right, suffix, features, tmp_path):
    unlabelled = FeatureFile(features.query_feats, features.gallery_feats, others={name: np.zeros(3)})
    path = tmp_path / f"f{suffix}"
    save_features(unlabelled, path)
    with pytest.raises(ValueError, match=f"must call its labels {right}, got {name}, which would be ignored"):
        load_features(path)


def test_other_members_of_any_name_are_kept(features, tmp_path):
    path = tmp_path / "f.npz"
    np.savez(path, query_feats=features.query_feats, gallery_feats=features.gallery_feats)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("readme.txt", b"who made this")
    content = load_features(path)
    content.others["file"] = np.arange(2)
    save_features(content, tmp_path / "g.npz")
    found = load_features(tmp_path / "g.npz")
    assert found.others["readme.txt"] == b"who made this"
    assert found.others["file"].tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"readme\.txt cannot be names in a \.mat file"):
        save_features(content, tmp_path / "g.mat")


def test_half_precision_in_mat(features, tmp_path):
    half = features.with_features(features.query_feats.astype(np.float16), features.gallery_feats.astype(np.float16))
    save_features(half, tmp_path / "f.mat")
    found = load_features(tmp_path / "f.mat").query_feats
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, half.query_feats)


def test_a_link_stays_and_its_target_is_replaced(features, tmp_path):
    (tmp_path / "target.npz").write_bytes(b"old")
    (tmp_path / "link.npz").symlink_to(tmp_path / "target.npz")
    save_features(features, tmp_path / "link.npz", overwrite=True)
    assert (tmp_path / "link.npz").is_symlink()
    same(load_features(tmp_path / "target.npz"), features)


@pytest.mark.parametrize("label", [np.inf, np.nan, 3e30, 1.5])
def test_labels_that_are_no_integers(label, features, tmp_path):
    savemat(tmp_path / "f.mat", {"query_f": np.ones((1, 2)), "gallery_f": np.ones((1, 2)), "query_label": label})
    with pytest.raises(TypeError, match=r"query_label of .* must hold integers"):
        load_features(tmp_path / "f.mat")


@pytest.mark.parametrize("ending", [".npz", ".mat"])
def test_labels_that_are_strings_stay(ending, features, tmp_path):
    words = FeatureFile(np.eye(2, 3), np.eye(3), q_pids=np.array(["b", "cc"]), g_pids=np.array(["a", "b", "cc"]))
    save_features(words, tmp_path / f"f{ending}")
    again = load_features(tmp_path / f"f{ending}")
    assert evaluate(again.query_feats, again.gallery_feats, again.q_pids, again.g_pids).mAP == pytest.approx(5 / 12)
    assert [label.strip() for label in again.q_pids] == ["b", "cc"]


def test_endings_in_capitals(features, tmp_path):
    save_features(features, tmp_path / "F.NPZ")
    same(load_features(tmp_path / "F.NPZ"), features)


def test_matlab_cells_are_not_pickled_into_npz(features, tmp_path):
    cells = np.empty((1, 2), dtype=object)
    cells[0] = ["a.jpg", "long name.jpg"]
    others = FeatureFile(features.query_feats, features.gallery_feats, others={"files": cells})
    save_features(others, tmp_path / "f.mat")
    with pytest.raises(ValueError, match=r"files cannot be written to \.npz"):
        save_features(load_features(tmp_path / "f.mat"), tmp_path / "f.npz")
    assert not (tmp_path / "f.npz").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"gallery_feats": np.ones((2, 3))}, "must hold query_feats; it holds gallery_feats"),
        ({"query_feats": np.ones((2, 3)), "gallery_feats": np.ones((2, 4))}, "same number of columns"),
        ({"query_feats": np.ones(3), "gallery_feats": np.ones((2, 3))}, r"query_feats of .* must have shape \(N, D\)"),
        ({"query_feats": np.full((1, 3), np.nan), "gallery_feats": np.ones((2, 3))}, "must be finite"),
        (
            {"query_feats": np.ones((1, 3)), "gallery_feats": np.ones((2, 3)), "g_pids": np.ones(3, int)},
            r"g_pids of .* must have shape \(2,\)",
        ),
    ],
)
def test_bad_content_is_named(arrays, message, tmp_path):
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_features(tmp_path / "f.npz")


def test_bad_paths(features, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no feature file"):
        load_features(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"end in \.npz or \.mat"):
        load_features(tmp_path / "f.pkl")
    with pytest.raises(ValueError, match=r"end in \.npz or \.mat"):
        save_features(features, tmp_path / "f.csv")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        save_features(features, tmp_path / "no" / "f.npz")
