"""Make the tiny weights that come with the package, from nothing: drawn people, identity encoder, VAE, IPG.

python examples/make_tiny_weights.py --out out/tiny

Started again, it goes on where it was stopped: finished stages are kept, and training goes on from its last checkpoint.
`IdentityGenerator.from_pretrained("out/tiny/weights")` loads the result.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from pose2id import IdentityGenerator
from pose2id.demo import pretraining
from pose2id.demo.people import SyntheticPedestrians, write_people
from pose2id.ipg import TransReID
from pose2id.training import run as training
from pose2id.training import start as starting
from pose2id.training.table import read_table

IMAGE_SIZE = (128, 64)
ENCODER = {"image_size": IMAGE_SIZE, "patch_size": 16, "stride": 16, "dim": 96, "depth": 4, "heads": 4}
VAE = {
    "latent_channels": 8,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "block_out_channels": [16, 32, 32, 48],
}
UNET = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": [48, 64, 80],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
REST = {"num_tokens": 4, "pose_channels": [8, 16, 32, 64]}
TRAINING = {
    "learning_rate": 5e-4,
    "warmup_steps": 200,
    "schedule": "cosine",
    "optimizer": "adamw",
    "snr_gamma": 5.0,
    "ema": 0.998,
    "cache": True,
    "reference_variants": 2,
    "checkpoint_every": 500,
    "validate_every": 500,
    "validation_steps": 10,
}


def main() -> None:
    """Run the stages that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/tiny"), help="directory (%(default)s)")
    parser.add_argument("--people", type=int, default=1000, help="drawn, by 12 cameras once each (%(default)s)")
    parser.add_argument("--encoder-steps", type=int, default=4500, help="of the identity encoder (%(default)s)")
    parser.add_argument("--vae-steps", type=int, default=2200, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=6500, help="of IPG (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="of IPG (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    kept = ("people", "encoder_steps", "vae_steps", "steps", "batch_size")
    check_settings(out / "settings.json", {name: getattr(args, name) for name in kept})

    people = out / "people"
    if not people.exists():
        unfinished = out / "people.part"
        shutil.rmtree(unfinished, ignore_errors=True)
        write_people(SyntheticPedestrians(args.people, num_cameras=12, images_per_camera=1, seed=1000), unfinished)
        unfinished.rename(people)
    images = read_table(people / "table.csv")
    paths, pids = [image.path for image in images], [int(image.identity) for image in images]

    def train_encoder() -> TransReID:
        return pretraining.train_identity_encoder(
            paths, pids, config=ENCODER, steps=args.encoder_steps, people_per_batch=min(16, args.people)
        )

    def train_vae() -> AutoencoderKL:
        return pretraining.train_vae(paths, image_size=IMAGE_SIZE, config=VAE, steps=args.vae_steps)

    generator = starting.fresh(
        identity_encoder=once(out / "encoder.pt", train_encoder, lambda config: TransReID(**config)),
        vae=once(out / "vae.pt", train_vae, AutoencoderKL.from_config),
        unet=UNET,
        image_size=IMAGE_SIZE,
        round_bank=False,
        license="mit",
        **REST,
    )
    # All that was drawn is trained on: nobody has a wrong name, and the published figures are of such weights.
    given = {"steps": args.steps, "batch_size": args.batch_size, "clean": False, "poses": "all", **TRAINING}
    result = training.train(generator, images, out / "run", **given)
    print(result)
    if not (out / "weights").exists():
        IdentityGenerator.from_pretrained(result.weights, dtype=torch.float16).save_pretrained(out / "weights")


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """See that a directory was begun with these settings; else its stages would not belong together."""
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(path)
    began = json.loads(path.read_text(encoding="utf-8"))
    differing = [name for name in settings if began.get(name) != settings[name]]
    if differing:
        raise SystemExit(f"{path} has other settings than these: {', '.join(differing)}. Choose another --out.")


def once(path: Path, make: Callable[[], Any], build: Callable[[Any], Any]) -> Any:
    """A trained part, on the CPU: from the file if it is there, else trained and written there first."""
    if not path.exists():
        part = make().cpu()
        unfinished = path.with_suffix(".part")
        torch.save({"config": dict(part.config), "state": part.state_dict()}, unfinished)
        unfinished.replace(path)
    content = torch.load(path, weights_only=True)
    part = build(content["config"])
    part.load_state_dict(content["state"])
    return part.eval().requires_grad_(False)


if __name__ == "__main__":
    main()
