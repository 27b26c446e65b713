"""Where pose2id goes in an evaluation that you already have: between the features and the distances.

python examples/existing_pipeline.py
"""

from __future__ import annotations

import numpy as np

from pose2id import Centralizer, evaluate, evaluate_rank, evidence, k_reciprocal
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
    print("before:              ", evaluate(qf, gf, *labels))

    # The one new line. Features stay as they are where nothing says that people appear more than once.
    new_q, new_g = Centralizer().enhance(qf, gf)
    print("after:               ", evaluate(new_q, new_g, *labels))

    # Camera ids, where you have them, help more than anything else.
    cameras = {"query_camids": people.camids[q], "gallery_camids": people.camids[g]}
    new_q, new_g = Centralizer().enhance(qf, gf, **cameras)
    print("after, with cameras: ", evaluate(new_q, new_g, *labels))

    # Re-ranking, of the features as your model made them.
    print("re-ranked, cameras:  ", evaluate_rank(Centralizer().rerank(qf, gf, **cameras), *labels))

    # What was published: NFC, and k-reciprocal re-ranking. Both harm where people appear once.
    print("published NFC:       ", evaluate(*Centralizer(method="nfc").enhance(qf, gf), *labels))
    print("published re-ranking:", evaluate_rank(k_reciprocal(qf, gf), *labels))

    print(evidence(gf))


if __name__ == "__main__":
    main()
