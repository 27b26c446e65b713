"""Data sets in miniature, with the real naming schemes; the images are empty files, since readers open none."""

from __future__ import annotations

import numpy as np
from scipy.io import savemat

IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def images_below(root):
    return {str(path) for path in root.rglob("*") if path.suffix.lower() in IMAGES}


def market1501(root):
    return touch(
        root,
        "bounding_box_train/0002_c1s1_000451_03.jpg",
        "bounding_box_train/0002_c2s1_000451_03.JPG",
        "bounding_box_train/0007_c6s3_077392_04.jpg",
        "query/0001_c1s1_001051_00.jpg",
        "query/0001_c2s1_000301_00.jpg",
        "query/0003_c3s3_064744_00.jpg",
        "bounding_box_test/-1_c1s1_000401_03.jpg",
        "bounding_box_test/-1_c5s2_000401_03.jpg",
        "bounding_box_test/0000_c1s1_000151_01.jpg",
        "bounding_box_test/0001_c1s1_001051_03.jpg",
        "bounding_box_test/0003_c4s6_015641_05.jpg",
        "bounding_box_test/Thumbs.db",
        "bounding_box_test/.DS_Store",
        "query/desktop.ini",
        "query/readme.txt",
        "gt_bbox/0001_c1s1_001051_00.jpg",
        "readme.txt",
    )


def msmt17(root, masked=True):
    train, test = ("mask_train_v2", "mask_test_v2") if masked else ("train", "test")
    lists = {
        "train": [("0000/0000_000_01_0303morning_0015_0.jpg", 0), ("0001/0001_003_12_0303noon_0015_1.jpg", 1)],
        "val": [("0000/0000_001_02_0303morning_0016_0.jpg", 0)],
        "query": [("0000/0000_000_14_0302morning_0100_0.jpg", 0), ("0005/0005_001_15_0302noon_0100_0.jpg", 5)],
        "gallery": [("0000/0000_002_01_0302morning_0101_0.jpg", 0), ("0005/0005_004_06_0302noon_0101_1.jpg", 5)],
    }
    for name, lines in lists.items():
        write(root / f"list_{name}.txt", *(f"{image} {pid}" for image, pid in lines))
        touch(root / (train if name in ("train", "val") else test), *(image for image, _ in lines))
    return root


def cuhk03_mat(root):
    """The images as written from cuhk-03.mat, with both kinds of boxes, beside the new protocol."""
    names = [
        f"{pair}_{person:03d}_{1 if i < 2 else 2}_{i + 1:02d}.png"
        for pair, person in ((1, 1), (1, 2), (5, 3))
        for i in range(4)
    ]
    pids, cameras = np.repeat([1, 2, 3], 4), np.tile([1, 1, 2, 2], 3)
    for boxes in ("detected", "labeled"):
        # Of the labeled boxes the last one is missing.
        kept = names if boxes == "detected" else names[:-1]
        touch(root / f"images_{boxes}", *kept)
        gallery = [2, 4, 6, 8, 10, 12][: 6 - (boxes == "labeled")]
        content = {
            "filelist": np.array(kept, dtype=object)[:, None],
            "labels": pids[: len(kept), None].astype(np.uint16),
            "camId": cameras[: len(kept), None].astype(np.uint8),
            "train_idx": np.array([[1], [3]], dtype=np.uint16),
            "query_idx": np.array([[5], [7], [9], [11]], dtype=np.uint16),
            "gallery_idx": np.array(gallery, dtype=np.uint16)[:, None],
        }
        savemat(root / f"cuhk03_new_protocol_config_{boxes}.mat", content)
    return root


def cuhk03_boxes(root):
    for boxes in ("detected", "labeled"):
        touch(
            root / boxes,
            "bounding_box_train/0004_c1_33.png",
            "query/0001_c1_1.png",
            "query/0001_c2_6.png",
            "bounding_box_test/0001_c1_2.png",
            "bounding_box_test/0001_c2_7.png",
            *(["bounding_box_test/0001_c2_8.png"] if boxes == "detected" else []),
        )
    return root


def mars(root):
    test = ["00-1C1T0001F001.jpg", "0000C2T0001F001.jpg", "0000C2T0001F002.jpg"]
    test += [f"0002C{camera}T000{camera}F00{frame}.jpg" for camera in (1, 2, 6) for frame in (1, 2)]
    train = ["0001C1T0001F001.jpg", "0001C1T0001F002.jpg", "0003C5T0001F001.jpg"]
    for side, names in (("test", test), ("train", train)):
        write(root / "info" / f"{side}_name.txt", *names)
        touch(root / f"bbox_{side}", *(f"{name[:4]}/{name}" for name in names))
    tracks = [[1, 1, -1, 1], [2, 3, 0, 2], [4, 5, 2, 1], [6, 7, 2, 2], [8, 9, 2, 6]]
    savemat(root / "info" / "tracks_test_info.mat", {"track_test_info": np.array(tracks, dtype=np.int32)})
    tracks = [[1, 2, 1, 1], [3, 3, 3, 5]]
    savemat(root / "info" / "tracks_train_info.mat", {"track_train_info": np.array(tracks, dtype=np.int32)})
    savemat(root / "info" / "query_IDX.mat", {"query_IDX": np.array([[3]], dtype=np.uint16)})
    return root


def occluded_reid(root):
    names = ("001/001_01.tif", "001/001_02.tif", "200/200_01.TIF")
    return touch(root, *(f"{side}_body_images/{name}" for side in ("occluded", "whole") for name in names))


def sysu_mm01(root):
    write(root / "exp" / "test_id.txt", "6,10,")
    write(root / "exp" / "train_id.txt", "1,2")
    write(root / "exp" / "val_id.txt", "4")
    for camera in range(1, 7):
        people = (1, 2, 4, 6, 10) if camera != 2 else (1, 10)
        touch(root / f"cam{camera}", *(f"{pid:04d}/{image:04d}.jpg" for pid in people for image in (1, 2)))
    return touch(root, "exp/rand_perm_cam.mat", "cam1/0333/0001.jpg")


def regdb(root, trials=2):
    """People 1 to 4, two images of each kind; each trial tests with two of them, whom its lists number anew."""

    def names(kind, pid):
        return [f"{kind.title()}/{pid}/male_back_{kind[0]}_{1000 * pid + i:05d}_{pid}.bmp" for i in (2, 1)]

    for kind in ("visible", "thermal"):
        touch(root, *(name for pid in range(1, 5) for name in names(kind, pid)))
        for trial in range(1, trials + 1):
            test = [(4, 1), (2, 3)][(trial - 1) % 2]
            train = [pid for pid in range(1, 5) if pid not in test]
            for side, people in (("test", test), ("train", train)):
                lines = [f"{name} {label}" for label, pid in enumerate(people) for name in names(kind, pid)]
                write(root / "idx" / f"{side}_{kind}_{trial}.txt", *lines)
    return root


def veri776(root):
    return touch(
        root,
        "image_train/0001_c001_00016450_0.jpg",
        "image_query/0002_c002_00030600_0.jpg",
        "image_query/0005_c020_00074605_0.jpg",
        "image_test/0002_c001_00030605_1.jpg",
        "image_test/0002_c002_00030600_0.jpg",
        "image_test/0005_c003_00079280_0.jpg",
        "name_query.txt",
        "gt_image.txt",
    )


def vehicleid(root):
    write(root / "train_test_split" / "train_list.txt", "0000009 100", "0000010 101")
    write(root / "train_test_split" / "test_list_800.txt", "0000002 7", "0000001 7", "0000003 8")
    write(root / "train_test_split" / "test_list_1600.txt", "0000002 7", "0000004 9")
    write(root / "train_test_split" / "test_list_2400.txt", "0000005 11")
    return touch(root / "image", *(f"{i:07d}.jpg" for i in (1, 2, 3, 4, 5, 9, 10))).parent


def folders(root):
    return touch(
        root, "anna/1.jpg", "anna/2.JPG", "anna/3.png", "ben/1.jpg", "ben/2.webp", "ben/Thumbs.db", ".cache/1.jpg"
    )
