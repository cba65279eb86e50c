"""Nouns of captions by NLTK's tagger and WordNet's lemmas, after the published cleaning or a corrected one.

The published cleaning deletes a list of words as *substrings*, inside longer words too ("stop" becomes "s", "holiday"
"holi"): use it to reproduce published numbers only.
"""

from __future__ import annotations

import io
import re
from functools import lru_cache
from importlib.metadata import version

from nxtp.data.shards.tar_index import IndexStore
from nxtp.errors import UserError

# Words that do not name what a picture shows, in the order in which they are deleted.
NOISE = (
    *("person", "persons", "stock", "illustration", "foreground", "background", "photography"),
    *("image", "images", "front", "day", "ounce", "top"),
)
RESOURCES = {
    "punkt_tab": "tokenizers/punkt_tab",
    "averaged_perceptron_tagger_eng": "taggers/averaged_perceptron_tagger_eng",
    "wordnet": "corpora/wordnet",
}
_NOISE_WORD = re.compile(rf"(?<![\w'-])(?:{'|'.join(NOISE)})(?![\w'-])")
_DROPPED = re.compile(r"[^a-z0-9 '.,&-]")


def clean_as_published(caption: str) -> str:
    """Lower case, the noise deleted as substrings, odd characters dropped, commas and ampersands to spaces."""
    text = caption.lower().replace("\n", " ")
    for word in NOISE:
        text = text.replace(word, "")
    return re.sub(r"[,&]", " ", _DROPPED.sub("", text))


def clean(caption: str) -> str:
    """The same, but only whole words are deleted, and an odd character ends a word."""
    text = _NOISE_WORD.sub(" ", caption.lower().replace("’", "'"))
    return re.sub(r"[,&]", " ", _DROPPED.sub(" ", text))


class NltkNouns:
    """``nltk``: whole-word cleaning, lemmas without repetition.

    Raises:
        UserError: NLTK's data is missing and cannot be fetched.
    """

    name = "nltk"

    def __init__(self):
        find_resources()  # here, once, rather than in every loader process

    @property
    def version(self) -> str:
        return f"nltk {version('nltk')}, rules 1"

    def __call__(self, caption: str) -> list[str]:
        return list(dict.fromkeys(_lemmas(clean(caption))))


class PublishedNouns(NltkNouns):
    """``nltk_published``: substring cleaning; words that differ before lemmatising are repeated."""

    name = "nltk_published"

    def __call__(self, caption: str) -> list[str]:
        return _lemmas(clean_as_published(caption))


def _lemmas(text: str) -> list[str]:
    """Lemmas of the distinct words that NLTK tags as common nouns, in order; none with a digit or of two letters."""
    import nltk

    tagged = nltk.pos_tag(nltk.word_tokenize(text))
    words = dict.fromkeys(word for word, tag in tagged if tag in ("NN", "NNS") and not any(map(str.isdigit, word)))
    return [lemma for lemma in map(_lemma, words) if len(lemma) > 2]


@lru_cache(1 << 16)
def _lemma(word: str) -> str:
    from nltk.stem import WordNetLemmatizer

    return WordNetLemmatizer().lemmatize(word, "n")


def find_resources() -> None:
    """Fetch what is missing of NLTK's data, by one of the user's processes while others wait.

    Raises:
        UserError: it is missing and cannot be fetched.
    """
    import nltk

    if not missing_resources():
        return
    with IndexStore().locked("nltk"):
        for name in missing_resources():
            nltk.download(name, quiet=True, print_error_to=io.StringIO())  # a failure is reported below, once
    if missing_resources():
        raise UserError(
            f"NLTK's data is missing ({', '.join(RESOURCES)}) and could not be fetched. On a machine with network: "
            f"python -m nltk.downloader {' '.join(RESOURCES)}; then copy its nltk_data here and set NLTK_DATA to it. "
            "Or use the backend that needs none: data.nouns=hanta."
        )


def missing_resources() -> list[str]:
    return [name for name, path in RESOURCES.items() if not _has(path)]


def _has(path: str) -> bool:
    import nltk

    for candidate in (path, f"{path}.zip"):
        try:
            nltk.data.find(candidate)
            return True
        except LookupError:
            continue
    return False
