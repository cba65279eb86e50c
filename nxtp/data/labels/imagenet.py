"""ImageNet's classes: their names, and the subsets and labels of its variants, from timm's data files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from nxtp.errors import one_of

NAMES = ("synonyms", "first", "clip")
SUBSETS = ("imagenet_a", "imagenet_r")


@dataclass(frozen=True)
class ImageNetClass:
    """One of the 1,000 classes; ``synonyms`` are WordNet's lemmas of the synset, the usual one first."""

    index: int
    wnid: str
    synonyms: tuple[str, ...]

    def labels(self, names: str = "synonyms") -> list[str]:
        """The class as label texts: all ``synonyms``, the ``first`` of them, or CLIP's name for it (``clip``).

        Two pairs of classes share their ``clip`` name.

        Raises:
            UserError: another value of ``names``.
        """
        one_of("names", names, NAMES)
        if names == "clip":
            from open_clip import IMAGENET_CLASSNAMES  # seconds to import, and seldom needed

            return [IMAGENET_CLASSNAMES[self.index]]
        return list(self.synonyms) if names == "synonyms" else [self.synonyms[0]]


@cache
def imagenet_classes() -> tuple[ImageNetClass, ...]:
    """The 1,000 classes of ImageNet-1k, in the order of their indices."""
    wnids = _info("imagenet_synsets.txt").splitlines()
    lemmas = dict(line.split("\t", 1) for line in _info("imagenet_synset_to_lemma.txt").splitlines())
    synonyms = [tuple(dict.fromkeys(name.strip() for name in lemmas[wnid].split(","))) for wnid in wnids]
    return tuple(ImageNetClass(i, *row) for i, row in enumerate(zip(wnids, synonyms, strict=True)))


@cache
def by_wnid() -> dict[str, ImageNetClass]:
    """The classes by their WordNet id, such as "n01440764"."""
    return {c.wnid: c for c in imagenet_classes()}


@cache
def subset(name: str) -> frozenset[int]:
    """Indices of the 200 classes of "imagenet_a" or "imagenet_r"."""
    return frozenset(int(line) for line in _info(f"{name}_indices.txt").splitlines())


@cache
def real_labels() -> tuple[tuple[int, ...], ...]:
    """ReaL's class indices of each of the 50,000 validation images, in their order; some have none."""
    return tuple(tuple(indices) for indices in json.loads(_info("imagenet_real_labels.json")))


def _info(name: str) -> str:
    """One of timm's data files, read without importing timm."""
    spec = find_spec("timm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name("data").joinpath("_info", name).read_text()
