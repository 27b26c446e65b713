"""All people of a folder in the 8 standard poses, as files; interrupt it and run it again as you like.

python examples/generate_folder.py people generated

The command line does the same: pose2id generate people --out generated --grid
"""

from __future__ import annotations

import argparse

from pose2id import IdentityGenerator
from pose2id.ipg import generate_files
from pose2id.ipg.batch import collect_images, missing_pictures, seconds_per_picture


def main() -> None:
    """Say how long it will take, then do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("people", help="folder of images of one person each, cropped; in folders of any depth")
    parser.add_argument("generated", help="folder to write: pose1/NAME.png to pose8/NAME.png, sheets/NAME.png")
    parser.add_argument("--weights", default="yuanc3/Pose2ID", help="directory or repository (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="fewer are faster and worse (%(default)s)")
    args = parser.parse_args()

    generator = IdentityGenerator.from_pretrained(args.weights)
    settings = {"num_inference_steps": args.steps}
    missing = missing_pictures(generator, [args.people], args.generated, **settings)
    if missing:
        sample = next(iter(collect_images([args.people]).values()))
        hours = missing * seconds_per_picture(generator, sample, **settings) / 3600
        print(f"{missing} pictures, about {hours:.2g} hours on {generator.device}")
    done = generate_files(generator, [args.people], args.generated, grid=True, **settings)
    print(f"wrote {done.written} pictures, kept {done.kept}")


if __name__ == "__main__":
    main()
