"""ImageNet's classes: their names, and the subsets and labels of its variants, from timm's data files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from open_clip import IMAGENET_CLASSNAMES

from nxtp.errors import UserError, nearest

NAMES = ("synonyms", "first", "clip")
SUBSETS = ("imagenet_a", "imagenet_r")


@dataclass(frozen=True)
class ImageNetClass:
    """One of the 1,000 classes.

    ``synonyms``   WordNet's lemmas of the synset, the usual first
    ``clip_name``  the one name that CLIP's authors chose; two pairs of classes share theirs
    """

    index: int
    wnid: str
    synonyms: tuple[str, ...]
    clip_name: str

    def labels(self, names: str = "synonyms") -> list[str]:
        """The class as label texts: all ``synonyms``, the ``first`` of them, or the ``clip`` name.

        Raises:
            UserError: no such naming.
        """
        if names not in NAMES:
            raise UserError(f"No naming '{names}' of ImageNet's classes.{nearest(names, NAMES)} Known: {NAMES}.")
        return {"synonyms": list(self.synonyms), "first": [self.synonyms[0]], "clip": [self.clip_name]}[names]


@cache
def imagenet_classes() -> tuple[ImageNetClass, ...]:
    """The 1,000 classes of ImageNet-1k, in the order of their indices."""
    wnids = _lines("imagenet_synsets.txt")
    lemmas = dict(line.split("\t", 1) for line in _lines("imagenet_synset_to_lemma.txt"))
    synonyms = [tuple(dict.fromkeys(name.strip() for name in lemmas[wnid].split(","))) for wnid in wnids]
    rows = zip(wnids, synonyms, IMAGENET_CLASSNAMES, strict=True)
    return tuple(ImageNetClass(i, *row) for i, row in enumerate(rows))


@cache
def by_wnid() -> dict[str, ImageNetClass]:
    """The classes by their WordNet id, such as "n01440764"."""
    return {c.wnid: c for c in imagenet_classes()}


@cache
def subset(name: str) -> frozenset[int]:
    """Indices of the 200 classes of "imagenet_a" or "imagenet_r"."""
    return frozenset(int(line) for line in _lines(f"{name}_indices.txt"))


@cache
def real_labels() -> tuple[tuple[int, ...], ...]:
    """ReaL's class indices of each of the 50,000 validation images, in their order; some have none."""
    text = files("timm.data").joinpath("_info", "imagenet_real_labels.json").read_text()
    return tuple(tuple(indices) for indices in json.loads(text))


def _lines(name: str) -> list[str]:
    return files("timm.data").joinpath("_info", name).read_text().splitlines()
