"""The table on features of a real model: baseline, published NFC, the safe default "auto", re-ranking of both kinds.

With --grid also what other k1, k2 would do to NFC.

    python examples/real_features.py features.npz --features feat_osnet_msmt17 --grid

The file holds one array (N, D) of features for all images (several models' arrays may stand side by side), with pids,
camids and is_query, (N,) integers and booleans: `np.savez("features.npz", feat=feat, pids=pids, ...)`. For files with
query_feats and gallery_feats use `pose2id evaluate` instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from pose2id import evaluate, nfc, nfc_diagnostics
from pose2id.io.feature_files import FeatureFile
from pose2id.report import compare, table


def load(path: str, name: str | None) -> tuple[str, FeatureFile]:
    """Split one array of features into query and gallery."""
    if not Path(path).is_file():
        raise SystemExit(f"There is no file {path}.")
    with np.load(path, allow_pickle=False) as file:
        names = [key for key in file.files if file[key].ndim == 2 and file[key].dtype.kind == "f"]
        if name is None and len(names) == 1:
            name = names[0]
        if name not in names:
            raise SystemExit(f"--features must be one of {', '.join(names)}")
        features, query = file[name], file["is_query"].astype(bool)
        labels = [file[key][mask].astype(np.int64) for key in ("pids", "camids") for mask in (query, ~query)]
    return name, FeatureFile(features[query], features[~query], *labels)


def main() -> None:
    """Print the table, the diagnostics of the gallery and, with --grid, those of other parameters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--features", help="name of the array of features")
    parser.add_argument("--grid", action="store_true", help="also k1, k2 in 1, 2, 3, 4, 6")
    args = parser.parse_args()
    name, content = load(args.path, args.features)
    print(f"{args.path}, {name}: {len(content.query_feats)} queries, {len(content.gallery_feats)} gallery images\n")
    print(table(compare(content)), "\n")
    labels = content.q_pids, content.g_pids, content.q_camids, content.g_camids
    print(f"gallery: {nfc_diagnostics(content.gallery_feats, camids=content.g_camids)}")
    for k in (1, 2, 3, 4, 6) if args.grid else ():
        result = evaluate(*(nfc(x, k, k) for x in (content.query_feats, content.gallery_feats)), *labels)
        print(f"\ngallery: {nfc_diagnostics(content.gallery_feats, k, k, camids=content.g_camids)}")
        print(f"NFC on query and gallery: {result}")


if __name__ == "__main__":
    main()
