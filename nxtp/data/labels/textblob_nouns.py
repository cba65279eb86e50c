"""Nouns by TextBlob's rule tagger and lemminflect's dictionary."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.metadata import version

from nxtp.data.labels.cleaning import normalise
from nxtp.data.labels.nouns import PICTURES, PLACES, SHOWS, lemmas, singular

_ONE = frozenset({"a", "an", "another", "each", "every", "one"})
_MANY = frozenset({"few", "many", "several", "some", "these", "those"})
_ARTICLES = _ONE | {"the"}
_NOUN_TAGS = frozenset({"NN", "NNS"})
_MODIFIER_TAGS = frozenset({"DT", "CD", "JJ", "PRP$"})
_NOT_AFTER_NOUN = _NOUN_TAGS | {"JJ", "VB"}
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


class TextBlobNouns:
    """TextBlob's rule tagger and lemminflect's dictionary: offline, no download.

    The tagger gives many words their most frequent tag ("a bear": verb). Where the grammar needs a noun, a word that
    the dictionary has as a noun counts as one; a "plural" after a singular noun ("a whale jumps") counts as a verb.
    """

    name = "textblob"

    @property
    def version(self) -> str:
        return f"textblob {version('textblob')}, lemminflect {version('lemminflect')}, rules 1"

    def __call__(self, caption: str) -> list[str]:
        from textblob.en import tag

        tagged = tag(normalise(caption).replace("’", "'").replace("/", " , "), tokenize=True)
        found: dict[str, None] = {}
        before, before_pos, number = "", "", 0  # number: 1 after "a", 2 after "three", 0 unknown
        for i, (word, pos) in enumerate(tagged):
            after, after_pos = tagged[i + 1] if i + 1 < len(tagged) else ("", "")
            if pos in _NOUN_TAGS:
                if after_pos not in _NOUN_TAGS and _must_be_verb(word, pos, before_pos, number):
                    pos = "VB"
            elif after_pos not in _NOT_AFTER_NOUN and _must_be_noun(word, pos, before, before_pos, number):
                pos = "NNS" if pos == "VBZ" else "NN"
            if pos in ("DT", "CD", "PRP$") or word in _MANY:
                number = 1 if word in _ONE else 2 if pos == "CD" or word in _MANY else 0
            elif pos in _NOUN_TAGS:
                place = word in PLACES and before_pos not in _NOUN_TAGS
                picture = word in PICTURES and after in SHOWS
                if len(word) > 1 and _WORD.fullmatch(word) and not place and not picture:
                    found[_singular(word, number == 2 or (number == 0 and pos == "NNS"))] = None
            elif pos not in ("JJ", "VBN"):
                number = 0
            before, before_pos = word, pos
        return list(found)


def _must_be_noun(word: str, pos: str, before: str, before_pos: str, number: int) -> bool:
    """Whether a word that is not tagged as a noun is where a noun must be, and can be one."""
    article = before in _ARTICLES or before_pos == "PRP$"
    if pos in ("JJ", "RB"):
        fits = before_pos in _MODIFIER_TAGS and number != 2
    elif pos == "VB":  # a base form agrees with no singular: "a teddy bear"
        fits = before_pos in _MODIFIER_TAGS or (number == 1 and before_pos in ("NN", "VBN"))
    elif pos in ("VBP", "VBD", "VBN", "MD"):
        fits = article or before_pos == "CD"
    elif pos == "VBG":
        fits = article
    else:
        fits = pos == "VBZ" and (
            before_pos == "PRP$" or before == "the" or (number == 2 and before_pos not in _NOUN_TAGS)
        )
    return fits and _is_noun(word)


def _must_be_verb(word: str, pos: str, before_pos: str, number: int) -> bool:
    """Whether a word that is tagged as a noun disagrees with the noun before it, and can be a verb."""
    disagrees = (number == 1 and before_pos == "NN" and pos == "NNS") or (
        number == 2 and before_pos == "NNS" and word.endswith("ing")
    )
    return disagrees and _is_verb(word)


@lru_cache(1 << 16)
def _singular(word: str, plural: bool) -> str:
    from textblob.en.inflect import singularize

    return singular(word, plural, singularize)


def _is_noun(word: str) -> bool:
    """Whether the dictionary has the word, or its part after the last hyphen, as a noun."""
    return "NOUN" in lemmas(word.rpartition("-")[2])


def _is_verb(word: str) -> bool:
    return "VERB" in lemmas(word)
