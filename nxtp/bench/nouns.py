"""`nxtp bench nouns`: the noun backends on captions whose nouns are marked by hand (nouns.tsv, beside this file).

One caption per line. ``nouns`` are the concrete nouns, singular, one word each ("traffic light" is two), alternatives
with a slash: each must be found. ``others`` are nouns that may be found or not: abstract ones, quantities, names, and
words that name something else in a compound ("fire hydrant"). Anything else is wrong, such as a verb, a place in the
picture ("in front") or the picture itself ("a photo of"). Rules of a backend may be changed by looking at the half
``tuning`` only.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from statistics import median
from typing import Any

from rich.table import Table

from nxtp.bench.reporting import build_table, machine_description, machine_line
from nxtp.data.labels.nltk_nouns import missing_resources
from nxtp.data.labels.nouns import BACKENDS, lemmas, noun_backend

HALVES = ("tuning", "held_out")


@dataclass(frozen=True)
class MarkedCaption:
    """``nouns``: the accepted spellings of each noun that must be found; ``others``: what may be found."""

    half: str
    style: str
    caption: str
    nouns: tuple[frozenset[str], ...]
    others: frozenset[str]

    def missed(self, found: Iterable[str]) -> list[str]:
        return ["/".join(sorted(noun)) for noun in self.nouns if not noun & set(found)]

    def wrong(self, found: Iterable[str]) -> list[str]:
        accepted = self.others.union(*self.nouns)
        return [label for label in found if label not in accepted]


def marked_captions() -> list[MarkedCaption]:
    lines = (files("nxtp.bench") / "nouns.tsv").read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    return [
        MarkedCaption(
            row["half"],
            row["style"],
            row["caption"],
            tuple(frozenset(noun.split("/")) for noun in row["nouns"].split()),
            frozenset(row["others"].split()),
        )
        for row in rows
    ]


def measure_nouns(*, repeats: int, errors: bool) -> dict[str, Any]:
    """Precision and recall of each backend on both halves, and captions per second of one core.

    ``first_captions_per_s`` is measured when most words are new, ``captions_per_s`` when all were seen before.
    ``errors`` adds what each backend gets wrong in the half ``tuning``. NLTK is skipped where its data is missing.
    """
    captions = marked_captions()
    rows: dict[str, dict[str, Any]] = {}
    for name in BACKENDS:
        if name.startswith("nltk") and (missing := missing_resources()):
            rows[name] = {"skipped": f"NLTK's data is missing: {', '.join(missing)}"}
            continue
        backend = noun_backend(name)
        lemmas.cache_clear()  # the backends share it
        backend("two wugs")  # loads its models
        rates = []
        for _ in range(1 + repeats):
            begin = time.process_time()
            found = [backend(marked.caption) for marked in captions]
            rates.append(len(captions) / (time.process_time() - begin))
        first, *later = rates
        rows[name] = {"version": backend.version, "first_captions_per_s": first, "captions_per_s": median(later)}
        for half in HALVES:
            pairs = [(marked, labels) for marked, labels in zip(captions, found, strict=True) if marked.half == half]
            nouns = sum(len(marked.nouns) for marked, _ in pairs)
            right = nouns - sum(len(marked.missed(labels)) for marked, labels in pairs)
            wrong = sum(len(marked.wrong(labels)) for marked, labels in pairs)
            rows[name][half] = {"recall": right / nouns, "precision": right / max(right + wrong, 1)}
        if errors:
            marks = [
                {"caption": marked.caption, "missed": marked.missed(labels), "wrong": marked.wrong(labels)}
                for marked, labels in zip(captions, found, strict=True)
                if marked.half == "tuning"
            ]
            rows[name]["errors"] = [mark for mark in marks if mark["missed"] or mark["wrong"]]
    sizes = {half: sum(marked.half == half for marked in captions) for half in HALVES}
    return {"rows": rows, "captions": sizes, "repeats": repeats, "machine": machine_description()}


def nouns_table(result: dict[str, Any]) -> Table:
    rows = []
    for name, row in result["rows"].items():
        if "skipped" in row:
            rows.append((name, *["–"] * 5))
            continue
        scores = [f"{row[half][score]:.3f}" for half in HALVES for score in ("recall", "precision")]
        rows.append((name, *scores, f"{row['first_captions_per_s']:,.0f}–{row['captions_per_s']:,.0f}"))
        for error in row.get("errors", ()):
            marks = [f"−{noun}" for noun in error["missed"]] + [f"+{label}" for label in error["wrong"]]
            rows.append((f"  {' '.join(marks)}: {error['caption']}", *[""] * 5))
    skipped = [f"{name}: {row['skipped']}." for name, row in result["rows"].items() if "skipped" in row]
    caption = (
        f"{result['captions']['tuning']} captions for tuning and {result['captions']['held_out']} held out, in the "
        f"style of COCO, CC3M and alt text, marked by hand. Captions/s of one core: "
        f"the first time, when most words are new, and again. {machine_line(result['machine'])}"
    )
    columns = ("", "recall", "precision", "recall,\nheld out", "precision,\nheld out", "captions/s")
    return build_table("Nouns of captions", columns, rows, "\n".join([caption, *skipped]))
