"""Where pose2id goes in an evaluation that you already have: between the features and the distances.

python examples/existing_pipeline.py
"""

from __future__ import annotations

import numpy as np

from pose2id import Centralizer, evaluate, evaluate_rank, k_reciprocal, nfc_diagnostics
from pose2id.demo.people import SyntheticPedestrians
from pose2id.demo.stripes import colour_stripes


def main() -> None:
    """Evaluate drawn pedestrians (no real people) with and without centralization."""
    people = SyntheticPedestrians(30)
    q, g = people.query_gallery()

    # Your model's features and labels: any (N, D) numpy arrays or torch tensors.
    features = colour_stripes(np.stack([sample.image for sample in people]))
    qf, gf = features[q], features[g]
    labels = people.pids[q], people.pids[g], people.camids[q], people.camids[g]
    print("before:          ", evaluate(qf, gf, *labels))

    print("re-ranking:      ", evaluate_rank(k_reciprocal(qf, gf), *labels))

    # The one new line.
    q_nfc, g_nfc = Centralizer(k1=2, k2=2).enhance(qf, gf)
    print("NFC:             ", evaluate(q_nfc, g_nfc, *labels))

    # Whatever comes next goes on as before, k-reciprocal re-ranking for example.
    print("NFC + re-ranking:", evaluate_rank(k_reciprocal(q_nfc, g_nfc), *labels))

    print(nfc_diagnostics(features[g], camids=people.camids[g]))


if __name__ == "__main__":
    main()
