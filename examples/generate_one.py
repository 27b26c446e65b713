"""One person in the 8 standard poses: a contact sheet of the reference, the poses and the pictures.

python examples/generate_one.py person.jpg sheet.png
python examples/generate_one.py          # a drawn pedestrian, to sheet.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from pose2id import IdentityGenerator
from pose2id.datasets import SyntheticPedestrians
from pose2id.ipg.files import contact_sheet
from pose2id.poses import draw, standard


def main() -> None:
    """Load, generate, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", help="image of one person, cropped")
    parser.add_argument("sheet", nargs="?", default="sheet.png", help="picture to write (%(default)s)")
    parser.add_argument("--weights", default="yuanc3/Pose2ID", help="directory or repository (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="fewer are faster and worse (%(default)s)")
    args = parser.parse_args()

    if args.image is None:
        person = Image.fromarray(SyntheticPedestrians(1)[0].image)
    else:
        with Image.open(args.image) as opened:
            person = opened.convert("RGB")
    if Path(args.sheet).exists():
        parser.error(f"{args.sheet} exists")

    generator = IdentityGenerator.from_pretrained(args.weights)
    (pictures,) = generator.generate([person], num_inference_steps=args.steps)
    contact_sheet(person, [draw(pose) for pose in standard()], pictures).save(args.sheet)
    print(f"wrote {args.sheet}: the reference, the poses, and the person in them")


if __name__ == "__main__":
    main()
