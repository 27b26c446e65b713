"""A video of two cameras, a tracker and a live gallery: who comes back, and whom nobody knows?

python examples/live_gallery.py
python examples/live_gallery.py --save frames  # look at the video

Drawn people walk through two cameras, one after the other; the last one was never in the first. A stand-in for a
detector gives their boxes, a little off. Tracks are those of Roboflow's `trackers` where it is installed (run with
2.6.1), else of the few lines below. A track that ends is searched for, then added. In the end the gallery is saved, and
another process answers a query from the file; tracks that ended long ago are left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pose2id import Centralizer, Extractor, Gallery
from pose2id.demo import SyntheticPedestrians, colour_stripes

PEOPLE, STEPS, TOGETHER = 14, 10, 2  # people, frames that each is seen in, people in one frame
HEIGHT, WIDTH = 160, 360
STRANGERS = range(101, 141)  # people on file who are not in the video, to set a threshold with
OVERLAP, PATIENCE = 0.3, 2  # of boxes of one track; frames without a detection that end it
LONG_AGO = 100  # frames after which a track is removed
ANSWER = """
import sys
import numpy as np
from pose2id import Gallery

gallery = Gallery.load(sys.argv[1], mmap=True)
found = gallery.search(np.load(sys.argv[2]), 1, query_camids=[2])
print(f"another process: {len(gallery)} tracks on file, nearest is {found.labels[0, 0]}")
"""


class Frame(NamedTuple):
    """A frame of a camera.

    Attributes:
        camera: 1 or 2.
        time: in frames.
        image: (H, W, 3) uint8, blue first, as OpenCV reads it.
        boxes: (N, 4) float left, top, right and bottom of the people on it.
        people: who they are, for the summary alone.
    """

    camera: int
    time: int
    image: NDArray[np.uint8]
    boxes: NDArray[np.float64]
    people: list[int]


class Track(NamedTuple):
    """A person's way through a camera: crops, blue first, the detector's confidence, and who it was, mostly."""

    number: int
    camera: int
    crops: list[NDArray[np.uint8]]
    quality: list[float]
    people: list[int]


def video() -> Iterator[Frame]:
    """Everybody walks through camera 1, then, with a newcomer, through camera 2."""
    drawn, time = SyntheticPedestrians(PEOPLE, num_cameras=2, images_per_camera=STEPS, seed=3), 0
    for camera, walkers in ((1, range(1, PEOPLE)), (2, range(1, PEOPLE + 1))):
        background = np.full((HEIGHT, WIDTH, 3), 120 + 20 * camera, dtype=np.uint8)
        for start in range(0, len(walkers), TOGETHER):
            group = walkers[start : start + TOGETHER]
            for step in range(STEPS + PATIENCE + 1):
                image, boxes = background.copy(), []
                for lane, person in enumerate(group if step < STEPS else ()):
                    left, top = 10 + 10 * step + 170 * lane, 16
                    picture = drawn.render(person, camera, step).image
                    height, width = picture.shape[:2]
                    image[top : top + height, left : left + width] = picture[..., ::-1]
                    boxes.append((left, top, left + width, top + height))
                yield Frame(camera, time, image, np.array(boxes, float).reshape(-1, 4), list(group)[: len(boxes)])
                time += 1


def detected(frame: Frame, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A detector's stand-in: boxes a little off, and confidences."""
    boxes = frame.boxes + rng.integers(-2, 3, frame.boxes.shape)
    return boxes.clip(0, [WIDTH, HEIGHT, WIDTH, HEIGHT]), rng.uniform(0.6, 1.0, len(boxes))


class Overlaps:
    """A tracker in a few lines: a box goes on with the track whose last box it overlaps most."""

    def __init__(self) -> None:
        self.last: dict[int, tuple[NDArray[np.float64], int]] = {}
        self.next = 1

    def update(self, boxes: NDArray[np.float64], confidences: NDArray[np.float64], time: int) -> list[int]:
        """The number of each box's track."""
        numbers = []
        for box in boxes:
            near = {number: _overlap(box, old) for number, (old, seen) in self.last.items() if seen < time}
            number = max(near, key=near.__getitem__, default=-1)
            if number < 0 or near[number] < OVERLAP:
                number, self.next = self.next, self.next + 1
            self.last[number] = box, time
            numbers.append(number)
        self.last = {number: old for number, old in self.last.items() if time - old[1] <= PATIENCE}
        return numbers


class Roboflow:
    """ByteTrack of Roboflow's `trackers`."""

    def __init__(self) -> None:
        import supervision  # noqa: PLC0415 - optional
        from trackers import ByteTrackTracker  # noqa: PLC0415

        self.detections = supervision.Detections
        self.tracker = ByteTrackTracker(lost_track_buffer=PATIENCE, minimum_consecutive_frames=1)

    def update(self, boxes: NDArray[np.float64], confidences: NDArray[np.float64], time: int) -> list[int]:
        """The number of each box's track, -1 for none yet."""
        if not len(boxes):
            self.tracker.update(self.detections.empty())
            return []
        given = self.detections(xyxy=boxes.astype(np.float32), confidence=confidences.astype(np.float32))
        given.data["row"] = np.arange(len(boxes))
        found = self.tracker.update(given)
        numbers = [-1] * len(boxes)
        for row, number in zip(found.data["row"], found.tracker_id, strict=True):
            numbers[int(row)] = int(number)
        return numbers


def _overlap(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Intersection over union."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = float(np.prod(sides.clip(0)))
    return shared / float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared)


def tracks(kind: str, save: Path | None) -> Iterator[tuple[int, Track]]:
    """Tracks as they end, with the time."""
    rng = np.random.default_rng(0)
    trackers: dict[int, Any] = {camera: _tracker(kind) for camera in (1, 2)}
    alive: dict[tuple[int, int], tuple[Track, int]] = {}
    for frame in video():
        if save is not None:
            Image.fromarray(frame.image[..., ::-1]).save(save / f"{frame.time:04}.png")
        boxes, confidences = detected(frame, rng)
        numbers = trackers[frame.camera].update(boxes, confidences, frame.time)
        for box, confidence, number, person in zip(boxes, confidences, numbers, frame.people, strict=True):
            if number < 0:
                continue
            left, top, right, bottom = box.astype(int)
            key = frame.camera, number
            track, _ = alive.get(key, (Track(number, frame.camera, [], [], []), 0))
            track.crops.append(frame.image[top:bottom, left:right])
            track.quality.append(float(confidence))
            track.people.append(person)
            alive[key] = track, frame.time
        ended = [key for key, (_, seen) in alive.items() if frame.time - seen > PATIENCE]
        yield from ((frame.time, alive.pop(key)[0]) for key in ended)
    yield from ((frame.time, track) for track, _ in alive.values())


def _tracker(kind: str) -> Any:
    if kind == "overlaps":
        return Overlaps()
    try:
        return Roboflow()
    except ImportError:
        if kind == "trackers":
            raise
        return Overlaps()


def strangers(model: Extractor) -> NDArray[np.float32]:
    """(N, D) features of the tracks of people on file, in camera 2: tracks, since tracks are what is searched for."""
    drawn, file = SyntheticPedestrians(max(STRANGERS), num_cameras=2, seed=3), Gallery(Centralizer(model))
    for person in STRANGERS:
        crops = [drawn.render(person, 2, step).image[..., ::-1] for step in range(STEPS)]
        file.add_images(crops, colors="bgr", group_by=[person] * STEPS)
    return file.features(raw=True)


def main() -> None:
    """Run the video; print who came back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tracker", choices=("auto", "trackers", "overlaps"), default="auto")
    parser.add_argument("--save", type=Path, help="folder for the frames, which exists")
    options = parser.parse_args()

    # Your model in its place: `inputs="images"` hands over RGB arrays, whatever order the crops came in.
    model = Extractor(colour_stripes, inputs="images")
    gallery = Gallery(Centralizer(model), metadata={"model": "colour_stripes"})
    threshold, right, came_back = None, 0, 0
    ended: dict[int, int] = {}  # id to time
    for time, track in tracks(options.tracker, options.save):
        person = max(set(track.people), key=track.people.count)
        same: dict[str, Any] = {"group_by": track.number, "quality": track.quality}
        name = f"person {person}"  # in camera 1 a guard says who that is
        if track.camera == 2:
            if threshold is None:  # everybody of camera 1 is there
                file = strangers(model)
                threshold = gallery.calibrate(
                    impostor=file, impostor_camids=[2] * len(file), fpr=0.1, exclude_camera=True
                )
            found = gallery.search_images(
                track.crops, 1, colors="bgr", query_camids=2, exclude_camera=True, threshold=threshold, **same
            )
            truth, name = name if person < PEOPLE else "unknown", found.labels[0, 0]
            came_back, right = came_back + 1, right + (name == truth)
            print(f"{time:4} camera 2, track {track.number}: {name}, distance {found.distances[0, 0]:.2f} ({truth})")
            name = f"newcomer {time}" if name == "unknown" else name
        added = gallery.add_images(track.crops, colors="bgr", camids=track.camera, labels=name, **same)
        ended[int(added[0])] = time
    print(f"{right} of {came_back} in camera 2 are right; {gallery}")

    # Not sooner: the threshold is for a gallery about as large as the one that it was set on.
    old = [number for number, last in ended.items() if time - last > LONG_AGO]
    gallery.remove(old)
    print(f"{len(old)} tracks that ended more than {LONG_AGO} frames ago are removed")

    with tempfile.TemporaryDirectory() as folder:
        file, query = Path(folder, "gallery.safetensors"), Path(folder, "query.npy")
        gallery.save(file)
        np.save(query, gallery.features(raw=True)[-1:])
        subprocess.run([sys.executable, "-c", ANSWER, str(file), str(query)], check=True)


if __name__ == "__main__":
    main()
