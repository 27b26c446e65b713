"""examples/make_tiny_weights.py from end to end, in its real sizes, for a step of each stage."""

from __future__ import annotations

import pytest

pytest.importorskip("accelerate")
import make_tiny_weights as script

from pose2id import IdentityGenerator
from pose2id.training.table import read_table

WORDS = "--people 2 --encoder-steps 1 --vae-steps 1 --steps 1 --batch-size 2"


def run(out, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["script", "--out", str(out), *WORDS.split(), *words])
        for name, value in {"validation_steps": 1, "validate_every": 0, "reference_variants": 1}.items():
            patch.setitem(script.TRAINING, name, value)
        script.main()


def test_every_stage(tmp_path, monkeypatch):
    (tmp_path / "people.part" / "images").mkdir(parents=True)  # of a start that was killed while it drew
    (tmp_path / "people.part" / "images" / "0001_c1_0.png").write_bytes(b"half")
    run(tmp_path)
    assert len(read_table(tmp_path / "people" / "table.csv")) == 24
    generator = IdentityGenerator.from_pretrained(tmp_path / "weights", device="cpu")
    shipped = IdentityGenerator.from_pretrained("tiny", device="cpu")
    assert generator.license == shipped.license == "mit"
    for name, part in shipped.parts.items():
        found = generator.parts[name].state_dict()
        assert {key: tensor.shape for key, tensor in found.items()} == {
            key: tensor.shape for key, tensor in part.state_dict().items()
        }
        assert part.config.keys() == generator.parts[name].config.keys()

    def never(*_, **__):
        raise AssertionError

    for name in ("train_identity_encoder", "train_vae"):
        monkeypatch.setattr(script.pretraining, name, never)
    monkeypatch.setattr(script, "write_people", never)
    run(tmp_path)
    with pytest.raises(SystemExit, match=r"settings\.json has other settings than these: people, vae_steps\."):
        run(tmp_path, "--people", "3", "--vae-steps", "2")
