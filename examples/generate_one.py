"""One person in the 8 standard poses: a contact sheet of the reference, the poses and the pictures.

python examples/generate_one.py person.jpg sheet.png
python examples/generate_one.py          # a drawn pedestrian, to sheet.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pose2id import IdentityGenerator
from pose2id.demo.people import SyntheticPedestrians
from pose2id.io.images import load_image
from pose2id.ipg.batch import contact_sheet, seconds_per_picture
from pose2id.poses import draw, standard


def main() -> None:
    """Load, generate, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", help="image of one person, cropped")
    parser.add_argument("sheet", nargs="?", default="sheet.png", help="picture to write (%(default)s)")
    parser.add_argument("--weights", default="yuanc3/Pose2ID", help="directory or repository (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="fewer are faster and worse (%(default)s)")
    args = parser.parse_args()

    sheet = Path(args.sheet)
    if sheet.exists() or not sheet.parent.is_dir() or sheet.suffix != ".png":
        parser.error(f"{sheet} must be a new .png file in a directory that is there")
    # Read by the library, which knows every mode and applies EXIF rotation.
    person = load_image(args.image or SyntheticPedestrians(1)[0].image, "image")

    generator = IdentityGenerator.from_pretrained(args.weights)
    minutes = 8 * seconds_per_picture(generator, person, num_inference_steps=args.steps) / 60
    print(f"8 pictures on {generator.device}: about {minutes:.2g} minutes")
    (pictures,) = generator.generate([person], num_inference_steps=args.steps)
    contact_sheet(person, [draw(pose) for pose in standard()], pictures).save(sheet)
    print(f"wrote {sheet}: the reference, the poses, and the person in them")


if __name__ == "__main__":
    main()
