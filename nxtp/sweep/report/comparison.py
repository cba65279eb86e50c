"""Arms of a study compared: differences from a baseline, paired by seed, and an order of those that can be ordered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement
from math import factorial, prod
from typing import Any

import numpy as np

from nxtp.errors import counted, some_of
from nxtp.eval.hits import Hits
from nxtp.sweep.report.records import Record, note, settings
from nxtp.sweep.report.spec import Spec
from nxtp.sweep.report.tables import as_markdown, columns, equal, is_time, measured, place, size, text

RESAMPLES = 2_000  # of images, beside all draws of seeds
FEW = 7  # seeds, whose draws are enumerated: 924 different ones
BRACKETS = (
    "In brackets: the 95 % bootstrap interval over the seeds and images that the header counts. ≈: it contains 0."
)
RANKED = (
    "Best first. Arms within braces are not ranked: their own intervals all overlap (the paired ones above tell more). "
    "An arm may be in several."
)
# Student's t at 97.5 % for 1, 2, … degrees of freedom, over the normal distribution's 1.96: 3 seeds know little
_STUDENT = [t / 1.96 for t in (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)]
Interval = tuple[float, float]
Arm = tuple[str, ...]  # its size and its columns
Runs = Mapping[Arm, Mapping[Arm, Record]]  # arm → what is averaged over, as the seed → record


@cache
def _image_draws(images: int) -> np.ndarray:
    """[R, N] uint8: how often each of N images is among N draws with replacement."""
    rng, even = np.random.default_rng(images), np.full(images, 1 / images)
    return np.concatenate([rng.multinomial(images, even, RESAMPLES // 20).astype("u1") for _ in range(20)])


@cache
def _seed_draws(seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """[D, S]: the share that each of S seeds has in S - 1 draws with replacement, and the weight of these draws, [D].

    All different draws; of many seeds a random choice.
    """
    count = max(seeds - 1, 1)
    if seeds > FEW:
        random_DS = np.random.default_rng(seeds).multinomial(count, np.full(seeds, 1 / seeds), RESAMPLES)
        return random_DS / count, np.ones(RESAMPLES)
    draws_DS = np.array([np.bincount(d, minlength=seeds) for d in combinations_with_replacement(range(seeds), count)])
    ways_D = np.array([factorial(count) / prod(map(factorial, draw)) for draw in draws_DS.tolist()])
    return draws_DS / count, ways_D


def interval(values_SN: np.ndarray) -> Interval | None:
    """The 95 % bootstrap interval of a mean over S seeds and N images; None of one seed without images (N = 1).

    Seeds and images are drawn independently, as all seeds have the same images. Few seeds would give too narrow an
    interval: S - 1 are drawn (Rao and Wu, 1988), and their distances from the mean are widened as Student's t is. One
    seed is no sample of seeds: then only images are drawn.
    """
    seeds, images = values_SN.shape
    if seeds * images == 1:
        return None
    if seeds > 1:
        means_S1 = values_SN.mean(axis=1, keepdims=True)
        wider = _STUDENT[seeds - 2] if seeds - 2 < len(_STUDENT) else 1 + 1.2 / (seeds - 1)
        values_SN = values_SN + (wider - 1) * (means_S1 - means_S1.mean())
    blocks = np.array_split(_image_draws(images), 20) if images > 1 else [np.ones((1, 1))]
    means_RS = np.concatenate([draws @ values_SN.T for draws in blocks]) / images
    shares_DS, weight_D = _seed_draws(seeds)
    means_RD = means_RS @ shares_DS.T
    weights_RD = np.broadcast_to(weight_D, means_RD.shape)
    low, high = np.quantile(means_RD, (0.025, 0.975), weights=weights_RD, method="inverted_cdf")
    return float(low), float(high)


def _arm_and_run(record: Record, spec: Spec) -> tuple[Arm, Arm]:
    """Its arm, and which of the arm's runs it is: the values of what is averaged over, as the seed."""
    known = settings(record)
    return (size(record), *columns(record, spec).values()), tuple(text(known.get(key)) for key in spec.over)


def arms(records: list[Record], spec: Spec) -> Runs:
    found: dict[Arm, dict[Arm, Record]] = {}
    for record in records:
        arm, run = _arm_and_run(record, spec)
        found.setdefault(arm, {})[run] = record
    titles = ("size", *spec.columns)
    return dict(
        sorted(found.items(), key=lambda item: [place(v, c, spec) for c, v in zip(titles, item[0], strict=True)])
    )


def _images(record: Record, metric: str) -> tuple[int, np.ndarray] | None:
    """The metric of each image, with the fingerprint of the images; None where the record has no hits."""
    name, _, kind = metric.partition("/")
    kept = record.get("hits", {}).get(name)
    values = Hits.unpacked(kept["packed"]).metric(kind) if kept else None
    return None if kept is None or values is None else (kept["images"], values)


def values(runs: list[Mapping[Arm, Record]], metric: str) -> list[np.ndarray]:
    """Of each arm [S, N], over the seeds that all have; [S, 1] unless all records have hits of the same images."""
    having = [{seed: r for seed, r in each.items() if metric in measured(r)} for each in runs]
    seeds = [seed for seed in having[0] if all(seed in each for each in having)]
    found = [_images(each[seed], metric) for each in having for seed in seeds]
    if found and all(found) and len({images for images, _ in filter(None, found)}) == 1:
        stacked = np.stack([each for _, each in filter(None, found)])
        return list(stacked.reshape(len(runs), len(seeds), -1))
    return [np.array([[measured(each[seed])[metric]] for seed in seeds]).reshape(-1, 1) for each in having]


def differences(
    records: list[Record], spec: Spec
) -> list[tuple[Arm, dict[str, tuple[float, Interval | None, tuple[int, int]]]]]:
    """Arm → metric → mean difference from its baseline, interval, and numbers of seeds and images (1: of seeds only).

    An arm's baseline is the one that differs from it in no other column than those that ``spec.baseline`` names.
    """
    runs, found = arms(records, spec), []
    for arm, of in runs.items():
        wanted = dict(zip(spec.columns, arm[1:], strict=True)) | {c: text(v) for c, v in spec.baseline.items()}
        base = next((other for other in runs if all(map(equal, other, (arm[0], *wanted.values())))), arm)
        if base == arm:
            continue
        row = {}
        for metric in filter(lambda m: not is_time(m), spec.metrics):
            ours, theirs = values([of, runs[base]], metric)
            if ours.size:
                row[metric] = float((ours - theirs).mean()), interval(ours - theirs), (len(ours), ours.shape[1])
        found.append((arm, row))
    return found


def ranked(records: list[Record], spec: Spec, metric: str) -> list[list[list[Arm]]]:
    """Lists of groups of arms by a metric, best first. A group is as many arms as have intervals that all overlap, so
    that an arm may be in several; one without interval is in each.

    Arms are in one list if they differ in nothing but the columns of ``spec.baseline``.
    """
    known = {arm: v for arm, of in arms(records, spec).items() if (v := values([of], metric)[0]).size}
    best = -1 if metric.endswith("loss") else 1
    lists: dict[Arm, dict[Arm, Interval]] = {}
    for arm, each in sorted(known.items(), key=lambda item: -best * item[1].mean()):
        key = (arm[0], *(t for column, t in zip(spec.columns, arm[1:], strict=True) if column not in spec.baseline))
        low, high = sorted(best * bound for bound in interval(each) or (-np.inf, np.inf))
        lists.setdefault(key, {})[arm] = (low, high)
    return [_groups(bounds) for bounds in lists.values()]


def _groups(bounds: dict[Arm, Interval]) -> list[list[Arm]]:
    """The largest groups of arms whose intervals all overlap, from high to low."""
    found: list[list[Arm]] = []
    for at in sorted((low for low, _ in bounds.values()), reverse=True):  # all overlap where the highest of them begins
        group = [arm for arm, (low, high) in bounds.items() if low <= at <= high]
        if not any(set(group) <= set(other) for other in found):
            found = [other for other in found if not set(other) < set(group)] + [group]
    return found


@dataclass
class Comparison:
    """The second table of a study with a baseline, with its explanation, and the arms in order.

    Columns of ``header`` and ``body`` are numbers from ``start`` on.
    """

    explanation: str
    header: list[str]
    body: list[list[str]]
    start: int
    ranking: list[str]

    def markdown(self) -> str:
        ranked = "\n".join(f"- {line}" for line in self.ranking)
        return f"\n{self.explanation}\n\n{as_markdown(self.header, self.body, self.start)}\n{RANKED}\n\n{ranked}\n"


def compare(records: list[Record], spec: Spec) -> Comparison | None:
    """None without a baseline, or where no arm has one."""
    _warn_of_twins(records, spec)
    found = differences(records, spec) if spec.baseline else []
    if not any(row for _, row in found):
        if spec.baseline and records:
            note(f"report.yaml, baseline: no runs to compare with those of {_where(spec)}")
        return None
    runs = arms(records, spec)
    titles = ("size", *spec.columns)
    differ = [t for t, texts in zip(titles, zip(*runs, strict=True), strict=True) if len(set(texts)) > 1]

    def only(wanted: list[str], arm: Arm) -> list[str]:
        return [part for title, part in zip(titles, arm, strict=True) if title in wanted]

    over = "seed" if spec.over == ["seed"] else "run"
    shown = [m for m in spec.metrics if any(m in row for _, row in found)]
    counts = {m: [row[m][2] for _, row in found if m in row] for m in shown}
    body = [[*only(differ, arm), *(_difference(*row[m][:2]) if m in row else "" for m in shown)] for arm, row in found]
    header = [*differ, *(f"Δ {spec.metrics[m]} ({_basis(counts[m], over)})" for m in shown)]
    explanation = f"Difference from {_where(spec)}, paired by {', '.join(spec.over)}.\n{BRACKETS}"
    compared = [title for title in differ if title in spec.baseline]
    alike = [title for title in differ if title not in spec.baseline]
    ranking = []
    for metric in shown:
        for groups in ranked(records, spec, metric):
            shared = "".join(f", {t} {part}" for t, part in zip(alike, only(alike, groups[0][0]), strict=True))
            parts = {arm: only(compared, arm) for group in groups for arm in group}
            names = {arm: " ".join(filter(None, each)) or "–" for arm, each in parts.items()}
            if len(set(names.values())) < len(names):  # blanks tell them apart
                names = {arm: " ".join(part or "–" for part in each) for arm, each in parts.items()}
            places = ""
            for before, group in zip([[], *groups], groups, strict=False):
                places += "" if not before else " " if set(before) & set(group) else " > "
                places += (", ".join(names[arm] for arm in group)).join("{}" if len(group) > 1 else ("", ""))
            ranking.append(f"{spec.metrics[metric]}{shared}: {places}")
    return Comparison(explanation, header, body, len(differ), ranking)


def _warn_of_twins(records: list[Record], spec: Spec) -> None:
    """Of runs that no column tells apart."""
    found: dict[tuple[Arm, Arm], list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(_arm_and_run(record, spec), []).append(settings(record))
    twins = [alike for alike in found.values() if len(alike) > 1]
    if not twins:
        return
    one, other = twins[0][:2]
    differ = [key for key in one if text(one[key]) != text(other.get(key))]
    add = f"; they differ in {some_of(differ)}, which columns could name" if differ else ""
    alike = f"the columns and {', '.join(spec.over)} of another"
    many = counted(sum(map(len, twins)) - len(twins), "run")
    note(f"report.yaml, columns: {many} with {alike}: means are over all of them, one of each is compared{add}")


def _where(spec: Spec) -> str:
    return ", ".join(f"{column} {text(value) or '–'}" for column, value in spec.baseline.items())


def _basis(counts: list[tuple[int, int]], over: str) -> str:
    """Of all arms' numbers of seeds and images."""
    seeds, images = [seeds for seeds, _ in counts], [images for _, images in counts]

    def several(numbers: list[int], of: str) -> str:
        return (f"{min(numbers):,} to " if min(numbers) < max(numbers) else "") + counted(max(numbers), of)

    own = [number for number in images if number > 1]
    alone = " only" if not own else ", some by these only" if len(own) < len(images) else ""
    return f"{several(seeds, over)}{alone}" + (f", {several(own, 'image')}" if own else "")


def _difference(mean: float, bounds: Interval | None) -> str:
    if bounds is None:
        return f"{mean:+z.3f} (one run)"
    low, high = (round(bound, 3) for bound in bounds)
    return f"{mean:+z.3f} [{low:+z.3f}, {high:+z.3f}]" + (" ≈" if low <= 0 <= high else "")
