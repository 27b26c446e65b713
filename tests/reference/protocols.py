"""Protocols, literally: one query at a time, lists sorted whole, loops over them."""

from __future__ import annotations

import os
import random

import numpy as np


def market(distances, q_pids, g_pids, q_camids, g_camids, max_rank=10):
    """Market1501: images of the query's identity and camera, and junk, are not in its list."""

    def kept(q, g):
        same_camera = q_camids is not None and q_camids[q] == g_camids[g]
        return g_pids[g] != -1 and not (q_pids[q] == g_pids[g] and same_camera)

    return _measured(distances, q_pids, g_pids, kept, max_rank)


def without_cameras(distances, q_pids, g_pids, max_rank=10):
    return _measured(distances, q_pids, g_pids, lambda q, g: g_pids[g] != -1, max_rank)


def leave_one_out(distances, pids, max_rank=10):
    return _measured(distances, pids, pids, lambda q, g: g != q and pids[g] != -1, max_rank)


def sysu(distances, q_pids, g_pids, q_camids, g_camids, max_rank=10):
    """Camera 3 does not search camera 2; CMC goes by people, each at their first image."""

    def kept(q, g):
        return not (q_camids[q] == 3 and g_camids[g] == 2)

    return _measured(distances, q_pids, g_pids, kept, max_rank, by_people=True)


def _measured(distances, q_pids, g_pids, kept, max_rank, by_people=False):
    """(mAP, CMC, mINP, number of queries with a match)."""
    precisions, penalties, hits = [], [], []
    for q in range(len(q_pids)):
        ranked = sorted((distances[q][g], g) for g in range(len(g_pids)) if kept(q, g))
        people = [g_pids[g] for _, g in ranked]
        right = [person == q_pids[q] and q_pids[q] != -1 for person in people]
        if not any(right):
            continue
        found, precision = 0, []
        for place, is_right in enumerate(right, 1):
            if is_right:
                found += 1
                precision.append(found / place)
        precisions.append(sum(precision) / len(precision))
        last = max(place for place, is_right in enumerate(right, 1) if is_right)
        penalties.append(found / last)
        if by_people:
            people = list(dict.fromkeys(people))
        first = people.index(q_pids[q])
        hits.append([1.0 if place >= first else 0.0 for place in range(max_rank)])
    return np.mean(precisions), np.mean(hits, axis=0), np.mean(penalties), len(precisions)


def seeded_gallery(paths, cameras, trial, shots):
    """Names of the drawn images, as Ye et al.'s code draws one: person by person, camera by camera, sorted files.

    Paths are .../cam1/0006/0001.jpg. Python's own generator is used, and left as it was.
    """
    folders = {}
    for path in paths:
        camera, person, _ = path.split("/")[-3:]
        folders.setdefault((person, camera), []).append(path)
    state = random.getstate()
    random.seed(trial)
    drawn = []
    for person in sorted({person for person, _ in folders}):
        for camera in [f"cam{number}" for number in cameras]:
            if (person, camera) in folders:
                files = sorted(folders[person, camera])
                if shots == 1:
                    drawn.append(random.choice(files))
                else:
                    drawn.extend(random.sample(files, min(shots, len(files))))
    random.setstate(state)
    return drawn


def official_gallery(paths, cameras, permutation, trial, shots):
    """Names of the images that the data set's file lists; permutation[camera][person][trial] are image numbers."""
    drawn = []
    for path in paths:
        camera, person, name = path.split("/")[-3:]
        number, camera, person = int(os.path.splitext(name)[0]), int(camera[3:]), int(person)
        if camera in cameras and number in permutation[camera][person][trial][:shots]:
            drawn.append(path)
    return drawn
