"""Nouns by HanTa, a trigram tagger learned from text, with the readings that lemminflect's dictionary adds to it.

A word that HanTa did not learn has the dictionary's readings alone: HanTa's guess by its letters takes a millisecond.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING

from nxtp.data.labels.cleaning import normalise
from nxtp.data.labels.nouns import PICTURES, PLACES, SHOWS, lemmas, singular

if TYPE_CHECKING:
    from HanTa.HanoverTagger import HanoverTagger

_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+|'(?!s\b)[^\W\d_]+)*")
_TOKEN = re.compile(rf"'s\b|{_WORD.pattern}|\d[\w.,-]*|[^\w\s]")

# Log probabilities.
_BEAM = 8.0  # a reading of the words so far that is less probable than the best one by this is dropped
_UNSEEN = -20.0  # of a tag after two others that HanTa has not seen together
_RARE = -3.0  # of a reading that the dictionary alone has, beside HanTa's best one
_SPELLED_ALIKE = -1.2  # of the present tense, beside the infinitive, where HanTa has only that
# Captions say what happens now, the text that HanTa learned from what happened: added to the present tense.
_PRESENT = {"VVB": 1.5, "VVG": 1.5, "VVZ": 1.0}

_ADJECTIVE_OR_VERB = frozenset({"AJ", "VV"})
_ADDS_TO_NOUN = ("NN", "AJ", "VVN", "VVG", "CRD")  # tags of words between an article and its noun, and of the noun
# Adjectives that are nouns before these words.
_NOUN_BEFORE = {"light": {"bulb", "bulbs", "fixture", "switch"}, "orange": {"juice", "peel", "slice", "slices"}}
_NEVER = frozenset({"doing", "one", "ones", "other", "others", "up"})  # HanTa has them as nouns too


class HantaNouns:
    """HanTa's English model (in its package) and lemminflect's dictionary: offline, no download."""

    name = "hanta"

    @property
    def version(self) -> str:
        return f"HanTa {version('HanTa')}, lemminflect {version('lemminflect')}, rules 2"

    def __call__(self, caption: str) -> list[str]:
        words = _TOKEN.findall(normalise(caption).replace("’", "'").replace("/", " , "))
        tags = tag(words)
        found: dict[str, None] = {}
        for i, word in enumerate(words):
            before, pos = tags[i - 1] if i else "", tags[i]
            if pos[:2] != "NN" and not _must_be_noun(words, tags, i):
                continue
            after = words[i + 1] if i + 1 < len(words) else ""
            place = word in PLACES and before[:2] != "NN"
            picture = word in PICTURES and after in SHOWS
            if len(word) > 1 and word[0].isalpha() and not place and not picture and word not in _NEVER:
                plural = pos in ("NN2", "NN0") and words[i - 1 : i] not in (["a"], ["an"])
                found[_singular(word, plural)] = None
        return list(found)


def _must_be_noun(words: list[str], tags: list[str], i: int) -> bool:
    """Whether an adjective, adverb or verb is where a noun must be.

    That is after an article and not before a noun ("a well"), and in a list ("a knife, fork, and spoon": a verb in the
    base form that is joined to a noun, and none before it).
    """
    if tags[i] != "AV0" and tags[i][:2] not in _ADJECTIVE_OR_VERB:
        return False
    following = tags[i + 1 : i + 3]
    if words[i] in _NOUN_BEFORE:
        return words[i + 1] in _NOUN_BEFORE[words[i]] if following else False
    if tags[i] == "VVB" and i and tags[i - 1] in ("CJC", "PUN") and not any(pos[0] == "V" for pos in tags[:i]):
        return _is_noun(words[i])
    if i == 0 or tags[i - 1] not in ("AT0", "DPS") or (following and following[0].startswith(_ADDS_TO_NOUN)):
        return False
    joined = len(following) == 2 and following[0] in ("CJC", "PUN") and following[1].startswith("AJ")
    return not joined and _is_noun(words[i])


def tag(words: list[str]) -> list[str]:
    """C5 tags of lower-case words: HanTa's most probable sequence, over the readings that each word has."""
    tagger = _tagger()
    transitions = tagger.LP_trans_word
    states: dict[tuple[int, int], float] = {(0, 1): 0.0}  # last two tags → log probability of the best way there
    ways: list[dict[tuple[int, int], tuple[int, int]]] = []
    for word in words:
        readings = _readings(word)
        lowest = max(states.values()) - _BEAM
        following: dict[tuple[int, int], float] = {}
        way: dict[tuple[int, int], tuple[int, int]] = {}
        for state, so_far in states.items():
            if so_far < lowest:
                continue
            after = transitions.get(state, {})
            for pos, fits in readings:
                total = so_far + fits + after.get(pos, _UNSEEN)
                new = (state[1], pos)
                if new not in following or total > following[new]:
                    following[new] = total
                    way[new] = state
        states = following
        ways.append(way)
    end = tagger.tag2int["END"]
    state = max(states, key=lambda state: states[state] + transitions.get(state, {}).get(end, _UNSEEN))
    tags = []
    for way in reversed(ways):
        tags.append(tagger.int2tag[state[1]])
        state = way[state]
    return tags[::-1]


@lru_cache(1)
def _tagger() -> HanoverTagger:
    from HanTa.HanoverTagger import HanoverTagger

    return HanoverTagger("morphmodel_en.pgz")


@lru_cache(1 << 16)
def _readings(word: str) -> tuple[tuple[int, float], ...]:
    """Tags that a word can have, each with log P(word | tag): HanTa's, and where it has none, the dictionary's."""
    tagger = _tagger()
    if word in ("a", "an", "the"):
        return ((tagger.tag2int["AT0"], 0.0),)
    seen = tagger.cache.get(tagger.normalize(word), ())
    found = {tagger.int2tag[pos]: float(p - tagger.LP_wtag[pos]) for pos, p in seen}
    if word == "people":  # for HanTa of no number, so that no verb agrees with it
        found = {"NN2": max(found.values())}
    if _WORD.fullmatch(word):
        known = _lemmas(word)
        best = max(found.values(), default=0.0)
        rare = best + _RARE if seen else best
        if "NP0" in found:  # a name is a noun: captions are compared in lower case
            found["NN1"] = max(found.pop("NP0"), found.get("NN1", rare))
        kinds = {pos[:2] for pos in found}
        if "NOUN" in known and kinds <= _ADJECTIVE_OR_VERB:
            found["NN1" if word in known["NOUN"] else "NN2"] = rare
        if "VERB" in known and not any(kind[0] == "V" for kind in kinds):
            participle = word.endswith("ing")  # every verb has one, however rare
            found |= dict.fromkeys(_verb_tags(word, known["VERB"]), best if participle else rare)
        if "VVI" in found:  # the infinitive and the present tense are spelled alike
            found.setdefault("VVB", found["VVI"] + _SPELLED_ALIKE)
        if not seen:
            found |= {pos: best for kind, pos in (("ADJ", "AJ0"), ("ADV", "AV0")) if kind in known}
            found = found or {"NN2" if word.endswith("s") else "NN1": best}
            if "-" in word:  # before a noun a compound is an adjective ("a king-size bed")
                found["AJ0"] = best
    elif not found:
        found = {"CRD" if word[0].isdigit() else "PUN": 0.0}
    return tuple((tagger.tag2int[pos], p + _PRESENT.get(pos, 0.0)) for pos, p in found.items())


def _verb_tags(word: str, infinitives: tuple[str, ...]) -> tuple[str, ...]:
    if word in infinitives:
        return "VVB", "VVI"
    return ("VVG",) if word.endswith("ing") else ("VVZ",) if word.endswith("s") else ("VVD", "VVN")


def _lemmas(word: str) -> dict[str, tuple[str, ...]]:
    """Part of speech → lemmas; of a compound with hyphens that the dictionary lacks, those of its last part."""
    return lemmas(word) or lemmas(word.rpartition("-")[2])


def _is_noun(word: str) -> bool:
    return "NOUN" in _lemmas(word)


@lru_cache(1 << 16)
def _singular(word: str, plural: bool) -> str:
    return singular(word, plural, _guessed_singular)


def _guessed_singular(word: str) -> str:
    from lemminflect import getAllLemmasOOV

    guess = getAllLemmasOOV(word, "NOUN").get("NOUN", (word,))[0]
    return word.removesuffix("s") if guess == word else guess
