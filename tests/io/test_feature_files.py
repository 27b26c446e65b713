from __future__ import annotations

import pickle
import sys
import zipfile

import h5py
import numpy as np
import pytest
import torch
from conftest import SHARED, real_sides
from scipy.io import savemat

from pose2id import evaluate
from pose2id.io import array_files
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
    monkeypatch.setattr(array_files, "_BOMB_BYTES", 1 << 20)
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
        (
            {"gallery_feats": np.ones((2, 3))},
            "must hold query_feats, or features with is_query or num_query; it holds gallery_feats",
        ),
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
    with pytest.raises(ValueError, match=r"end in \.npz, \.mat, \.pt or \.pth"):
        load_features(tmp_path / "f.pkl")
    with pytest.raises(ValueError, match=r"end in \.npz or \.mat"):
        save_features(features, tmp_path / "f.csv")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        save_features(features, tmp_path / "no" / "f.npz")


def one_array(features, **others):
    """Both sets in one array, the gallery's images first and last."""
    order = np.array([4, 5, 0, 6, 1, 2, 7, 3, 8, 9])  # rows 0 to 3 are queries
    both = np.concatenate([features.query_feats, features.gallery_feats])[order]
    pids, camids = (
        np.concatenate([getattr(features, f"q_{name}"), getattr(features, f"g_{name}")])[order]
        for name in ("pids", "camids")
    )
    return {"features": both, "pids": pids, "camids": camids, "is_query": order < 4, **others}


def write(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".mat":
        savemat(path, arrays)
    else:
        torch.save({name: torch.as_tensor(value) for name, value in arrays.items()}, path)


@pytest.mark.parametrize("suffix", [".npz", ".mat", ".pt", ".pth"])
def test_one_array_with_flags(suffix, features, tmp_path):
    path = tmp_path / f"f{suffix}"
    write(path, one_array(features))
    found = load_features(path)
    same(found, features)
    assert set(found.others) == {"is_query"}


@pytest.mark.parametrize("number", [4, 4.0, [4], [[4]]])
def test_one_array_whose_first_rows_are_queries(number, features, tmp_path):
    both = np.concatenate([features.query_feats, features.gallery_feats])
    pids = np.concatenate([features.q_pids, features.g_pids])
    np.savez(tmp_path / "f.npz", feats=both, pids=pids, num_query=number)
    found = load_features(tmp_path / "f.npz")
    np.testing.assert_array_equal(found.query_feats, features.query_feats)
    np.testing.assert_array_equal(found.gallery_feats, features.gallery_feats)
    np.testing.assert_array_equal(found.g_pids, features.g_pids)
    assert found.q_camids is None


def test_one_of_several_arrays_is_chosen_by_name(features, tmp_path):
    arrays = one_array(features)
    arrays["osnet"], arrays["vit"] = arrays.pop("features"), np.ones((10, 2), np.float16)
    np.savez(tmp_path / "f.npz", **arrays)
    same(load_features(tmp_path / "f.npz", name="osnet"), features)
    with pytest.raises(ValueError, match=r"name must tell which features of .*f.npz to take: osnet, vit"):
        load_features(tmp_path / "f.npz")
    with pytest.raises(ValueError, match="must hold swin; it holds pids, camids, is_query, osnet, vit"):
        load_features(tmp_path / "f.npz", name="swin")


def test_what_one_array_became_is_written_as_two(features, tmp_path):
    np.savez(tmp_path / "f.npz", **one_array(features, names=np.array(list("abcdefghij"))))
    save_features(load_features(tmp_path / "f.npz"), tmp_path / "g.npz")
    found = load_features(tmp_path / "g.npz")
    same(found, features)
    assert set(found.others) == {"is_query", "names"}


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"is_query": np.zeros(10, bool)}, "is_query of .* must have queries and gallery images, got 0 of 10"),
        ({"is_query": np.ones(9, bool)}, r"is_query of .* must be \(10,\) booleans, got bool of shape \(9,\)"),
        ({"is_query": np.arange(10)}, r"is_query of .* must be \(10,\) booleans, got int64"),
        ({"pids": np.ones(9, int)}, r"pids of .* must have shape \(10,\), got \(9,\)"),
        ({"features": np.full((10, 3), np.nan)}, "must be finite"),
    ],
)
def test_bad_flags_are_named(others, message, features, tmp_path):
    np.savez(tmp_path / "f.npz", **{**one_array(features), **others})
    with pytest.raises(ValueError, match=message):
        load_features(tmp_path / "f.npz")


@pytest.mark.parametrize("number", [0, 10, -1, 2.5, [1, 2]])
def test_bad_numbers_of_queries(number, tmp_path):
    np.savez(tmp_path / "f.npz", features=np.ones((10, 3)), num_query=number)
    with pytest.raises(ValueError, match=r"num_query of .* must be one number in 1\.\.9"):
        load_features(tmp_path / "f.npz")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["npz", "one array", None])
def test_pairs_of_files(form, dtype, features, tmp_path):
    sides = [torch.from_numpy(x).to(dtype) for x in (features.query_feats, features.gallery_feats)]
    for side, x in zip("qg", sides, strict=True):
        torch.save(x, tmp_path / f"{side}.pt")
        np.save(tmp_path / f"{side}.npy", x.float().numpy())
    labels = {name: getattr(features, name) for name in ("q_pids", "g_pids", "q_camids", "g_camids")}
    if form == "one array":
        labels = {name: np.concatenate([labels[f"q_{name}"], labels[f"g_{name}"]]) for name in ("pids", "camids")} | {
            "num_query": 4
        }
    if form:
        np.savez(tmp_path / "labels.npz", **labels)
    for suffix in ("pt", "npy"):
        given = {"labels": tmp_path / "labels.npz"} if form else {}
        found = load_features(tmp_path / f"q.{suffix}", tmp_path / f"g.{suffix}", **given)
        np.testing.assert_array_equal(found.query_feats, sides[0].float().numpy())
        np.testing.assert_array_equal(found.gallery_feats, sides[1].float().numpy())
        for name in ("q_pids", "g_pids", "q_camids", "g_camids"):
            np.testing.assert_array_equal(getattr(found, name), getattr(features, name) if form else None)


def test_npy_files_of_a_pair_stay_on_disk(features, tmp_path):
    np.save(tmp_path / "q.npy", features.query_feats)
    found = load_features(tmp_path / "q.npy", tmp_path / "q.npy")
    assert isinstance(found.query_feats, np.memmap)


def test_bad_pairs(features, tmp_path):
    np.save(tmp_path / "q.npy", features.query_feats)
    torch.save({"query_feats": torch.ones(2, 3)}, tmp_path / "dict.pt")
    np.savez(tmp_path / "labels.npz", ids=features.q_pids)
    with pytest.raises(ValueError, match=r"q\.npy must end in \.npz"):
        load_features(tmp_path / "q.npy")
    with pytest.raises(ValueError, match=r"f\.npz must end in \.npy, \.pt or \.pth"):
        load_features(tmp_path / "q.npy", tmp_path / "f.npz")
    with pytest.raises(FileNotFoundError, match=r"no feature file .*g\.npy"):
        load_features(tmp_path / "q.npy", tmp_path / "g.npy")
    with pytest.raises(ValueError, match=r"dict\.pt must hold one tensor, got dict"):
        load_features(tmp_path / "q.npy", tmp_path / "dict.pt")
    with pytest.raises(ValueError, match=r"labels\.npz must hold q_pids, g_pids, q_camids, g_camids, got ids"):
        load_features(tmp_path / "q.npy", tmp_path / "q.npy", labels=tmp_path / "labels.npz")
    with pytest.raises(ValueError, match="labels must come with two files"):
        load_features(tmp_path / "labels.npz", labels=tmp_path / "labels.npz")


class _Runs:
    def __reduce__(self):
        return print, ("ran",)


def test_tensor_files_never_run_code(features, tmp_path, capsys):
    torch.save({"query_feats": _Runs(), "gallery_feats": torch.ones(2, 3)}, tmp_path / "f.pt")
    with pytest.raises(ValueError, match=r"f\.pt cannot be read as tensors"):
        load_features(tmp_path / "f.pt")
    (tmp_path / "f.npy").write_bytes(pickle.dumps(_Runs()))
    with pytest.raises(ValueError, match=r"f\.npy is damaged, or not an \.npy file"):
        load_features(tmp_path / "f.npy", tmp_path / "f.npy")
    assert "ran" not in capsys.readouterr().out


def mat73(path, arrays):
    """As MATLAB writes it: HDF5 behind a header of text, columns before rows."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, value in arrays.items():
            file.create_dataset(name, data=np.atleast_2d(value).T)
        text = file.create_dataset("note", data=np.array([[104], [105]], np.uint16))
        text.attrs["MATLAB_class"] = np.bytes_("char")
        file.create_group("#refs#")
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(116) + bytes(8) + b"\x00\x02IM")


def test_matlab_7_3(features, tmp_path):
    names = {"query_f": "query_feats", "gallery_f": "gallery_feats", "query_label": "q_pids", "gallery_label": "g_pids"}
    names |= {"query_cam": "q_camids", "gallery_cam": "g_camids"}
    mat73(tmp_path / "f.mat", {key: getattr(features, name).astype(float) for key, name in names.items()})
    found = load_features(tmp_path / "f.mat")
    np.testing.assert_allclose(found.query_feats, features.query_feats)
    np.testing.assert_allclose(found.gallery_feats, features.gallery_feats)
    for name in ("q_pids", "g_pids", "q_camids", "g_camids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(features, name))
    assert found.others == {}
    whole = (tmp_path / "f.mat").read_bytes()
    (tmp_path / "f.mat").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"f\.mat cannot be read"):
        load_features(tmp_path / "f.mat")


def test_matlab_7_3_without_h5py(features, tmp_path, monkeypatch):
    mat73(tmp_path / "f.mat", {"query_f": features.query_feats, "gallery_f": features.gallery_feats})
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r'f\.mat is of MATLAB 7\.3, which needs the extra "mat": pip install'):
        load_features(tmp_path / "f.mat")


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs the real features of ../shared/data")
def test_real_features_of_several_models():
    path = SHARED / "data" / "cuhk03_p1_det_val100.npz"
    found = load_features(path, name="feat_osnet_msmt17")
    query, gallery, *labels = real_sides("cuhk03_p1_det_val100", "osnet_msmt17")
    np.testing.assert_array_equal(found.query_feats, query)
    np.testing.assert_array_equal(found.gallery_feats, gallery)
    for name, expected in zip(("q_pids", "g_pids", "q_camids", "g_camids"), labels, strict=True):
        np.testing.assert_array_equal(getattr(found, name), expected)
