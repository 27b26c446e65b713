"""Protocols and verification as papers and code of the field describe them: loops over queries, pairs, sorted lists."""

from __future__ import annotations

import random

import numpy as np

GALLERY_CAMERAS = {"all": [1, 2, 4, 5], "indoor": [1, 2]}


def ranked_lists(distmat, is_dropped):
    """For each query the gallery's indices by distance, then by index, without those that are dropped for it."""
    for q in range(len(distmat)):
        by_distance = sorted(range(len(distmat[q])), key=lambda g: (distmat[q][g], g))
        yield q, [g for g in by_distance if not is_dropped(q, g)]


def measured(distmat, q_pids, g_pids, is_dropped, max_rank, *, collapsed=False):
    """(mAP, cmc, mINP, number of valid queries)."""
    aps, inps, cmcs = [], [], []
    for q, found in ranked_lists(distmat, lambda q, g: g_pids[g] == -1 or is_dropped(q, g)):
        people = [g_pids[g] for g in found]
        right = [pid == q_pids[q] and pid != -1 for pid in people]
        if not any(right):
            continue
        hits, precisions = 0, []
        for rank, is_right in enumerate(right, 1):
            if is_right:
                hits += 1
                precisions.append(hits / rank)
                last = rank
        aps.append(np.mean(precisions))
        inps.append(hits / last)
        if collapsed:
            seen = []
            for pid in people:
                if pid not in seen:
                    seen.append(pid)
            right = [pid == q_pids[q] for pid in seen]
        cmcs.append([any(right[:r]) for r in range(1, max_rank + 1)])
    return np.mean(aps), np.mean(cmcs, axis=0), np.mean(inps), len(aps)


def seeded_gallery(names, mode, shots, trial):
    """Names that one trial draws: seeded by its number; persons sorted, then cameras, then sorted files."""
    random.seed(trial)
    drawn = []
    for person in sorted({name.split("/")[1] for name in names}):
        for camera in GALLERY_CAMERAS[mode]:
            files = sorted(name for name in names if name.startswith(f"cam{camera}/{person}/"))
            if files and shots == 1:
                drawn.append(random.choice(files))
            elif files:
                drawn.extend(random.sample(files, min(shots, len(files))))
    return drawn


def official_gallery(permutation, persons, mode, shots, trial):
    """Names that the data set's file lists for one trial."""
    drawn = []
    for camera in GALLERY_CAMERAS[mode]:
        of_camera = permutation[camera - 1][0].squeeze()
        for person in persons:
            if of_camera[person - 1].size:
                numbers = of_camera[person - 1][trial][:shots]
                drawn.extend(f"cam{camera}/{person:04d}/{number:04d}.jpg" for number in numbers)
    return drawn


def same_place(q_camid, g_camid):
    """Cameras 2 and 3 of SYSU-MM01."""
    return q_camid == 3 and g_camid == 2


def pairs(distmat, q_pids, g_pids, is_dropped):
    """Genuine and impostor distances, with the two persons of each impostor pair."""
    genuine, impostor = [], []
    for q in range(len(q_pids)):
        for g in range(len(g_pids)):
            if q_pids[q] == -1 or g_pids[g] == -1 or is_dropped(q, g):
                continue
            if q_pids[q] == g_pids[g]:
                genuine.append(distmat[q][g])
            else:
                impostor.append((distmat[q][g], q_pids[q], g_pids[g]))
    return genuine, impostor


def operating_point(genuine, impostor, rate):
    """(threshold, FPR, TPR) of the largest distance below which at most the wanted share of impostors lies."""
    distances = np.array([d for d, _, _ in impostor])
    for threshold in sorted(set(distances), reverse=True):
        fpr = np.mean(distances < threshold)
        if fpr <= rate + 1e-12:
            return threshold, fpr, np.mean(np.array(genuine) < threshold)
    raise AssertionError


def equal_error_rate(genuine, impostor):
    """The least of the larger error, over every distance as the largest that is accepted."""
    distances = [d for d, _, _ in impostor]
    errors = [1.0]
    for threshold in {*genuine, *distances}:
        false_match = sum(d <= threshold for d in distances) / len(distances)
        errors.append(max(false_match, sum(d > threshold for d in genuine) / len(genuine)))
    return min(errors)


def weighted_point(impostor, weight, rate, threshold):
    """Threshold, and rate at a given one, where a pair counts as often as both of its persons were drawn."""
    counts = sorted((d, weight[a] * weight[b]) for d, a, b in impostor)
    total = sum(count for _, count in counts)
    if total == 0:
        return None
    share = sum(count for d, count in counts if d < threshold) / total
    for d, _ in reversed(counts):
        if sum(count for other, count in counts if other < d) <= rate * total * (1 + 1e-12):
            return d, share
    raise AssertionError


def searches(distmat, q_pids, g_pids, is_dropped):
    """(nearest of each stranger, nearest of each query that finds its own, number of mated queries)."""
    alarms, found, mated = [], [], 0
    for q, ranking in ranked_lists(distmat, lambda q, g: g_pids[g] == -1 or is_dropped(q, g)):
        if q_pids[q] == -1:
            continue
        nearest = distmat[q][ranking[0]] if ranking else np.inf
        if q_pids[q] not in [g_pids[g] for g in ranking]:
            alarms.append(nearest)
        else:
            mated += 1
            if g_pids[ranking[0]] == q_pids[q]:
                found.append(nearest)
    return alarms, found, mated


def open_set(alarms, found, mated, rate):
    """(threshold, FPIR, FNIR) of the largest distance below which at most the wanted share of strangers is answered."""
    for threshold in sorted(set(alarms), reverse=True):
        fpir = sum(d < threshold for d in alarms) / len(alarms)
        if fpir <= rate + 1e-12:
            return threshold, fpir, 1 - sum(d < threshold for d in found) / mated
    raise AssertionError
