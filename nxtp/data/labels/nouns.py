"""Where a caption becomes nouns: the backends of ``data.nouns``, and the words that they treat alike."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

from nxtp.data.labels.cleaning import normalise
from nxtp.errors import UserError, nearest


class NounBackend(Protocol):
    """Turns a caption into labels. Can be pickled; imports its libraries at the first call."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str:
        """Name and version of every library that the result depends on."""

    def __call__(self, caption: str) -> list[str]:
        """Distinct singular nouns, lower-case, in order of appearance."""


BACKENDS = {  # module and class, imported when chosen
    "hanta": ("nxtp.data.labels.hanta_nouns", "HantaNouns"),
    "nltk": ("nxtp.data.labels.nltk_nouns", "NltkNouns"),
    "nltk_published": ("nxtp.data.labels.nltk_nouns", "PublishedNouns"),
}


def noun_backend(name: str = "hanta", stop: Collection[str] = ()) -> NounBackend:
    """The noun backend of that name, without the nouns ``stop``.

    Raises:
        UserError: no such backend, or its package is not installed.
    """
    if name not in BACKENDS:
        raise UserError(f"No noun backend '{name}'; known are {', '.join(BACKENDS)}.{nearest(name, BACKENDS)}")
    package = name.partition("_")[0]
    if name != "hanta" and not find_spec(package):
        raise UserError(f"nouns={name} needs {package}: pip install 'nxtp[nouns]'.")
    module, kind = BACKENDS[name]
    backend = getattr(import_module(module), kind)()
    stopped = frozenset(filter(None, map(normalise, stop)))
    return WithoutNouns(backend, stopped) if stopped else backend


@dataclass(frozen=True)
class WithoutNouns:
    """A backend without some nouns, as it spells them."""

    backend: NounBackend
    stop: frozenset[str]

    @property
    def name(self) -> str:
        return self.backend.name

    @property
    def version(self) -> str:
        return self.backend.version

    def __call__(self, caption: str) -> list[str]:
        return [noun for noun in self.backend(caption) if noun not in self.stop]


# Singulars where the dictionary has none or a rarer word, and plurals that name one thing.
SINGULAR = {
    "leaves": "leaf",
    "dice": "die",
    "graffiti": "graffiti",
    "hoodies": "hoodie",
    "onesies": "onesie",
    "oxen": "ox",
    "selfies": "selfie",
    "smoothies": "smoothie",
} | {word: word for word in ("fries", "pants", "shears", "shorts", "sunglasses", "tongs", "trousers")}


def singular(word: str, plural: bool, guess: Callable[[str], str]) -> str:
    """Singular of a lower-case noun: the dictionary's; ``guess`` is for plurals that it lacks."""
    if word in SINGULAR:
        return SINGULAR[word]
    known = lemmas(word).get("NOUN", ())
    if known:
        return word if word in known and not plural else known[0]
    return guess(word) if plural else word


@lru_cache(1 << 16)  # lemminflect copies its entry for each caller
def lemmas(word: str) -> dict[str, tuple[str, ...]]:
    """Part of speech → lemmas of a lower-case word in lemminflect's dictionary; not to be changed."""
    from lemminflect import getAllLemmas

    return getAllLemmas(word)


# Where in the picture, not what: skipped unless part of a compound ("shop front").
PLACES = frozenset({"back", "background", "bottom", "center", "centre", "foreground"})
PLACES |= {"front", "left", "middle", "right", "side", "top"}
# The picture itself: skipped before the words that introduce what it shows ("a photo of a dog").
PICTURES = frozenset({"close", "close-up", "illustration", "image", "photo", "photograph", "picture", "view"})
SHOWS = frozenset({"depicting", "depicts", "featuring", "of", "show", "showing", "shows", "up", "with"})
