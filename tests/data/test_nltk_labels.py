"""The published cleaning and its right form; NLTK on a data directory made here; and NLTK without its data."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import nltk
import pytest

from nxtp.data.labels.nltk_nouns import NOISE, RESOURCES, clean, clean_as_published, find_resources
from nxtp.data.labels.nouns import noun_backend
from nxtp.errors import UserError

NOUNS = ["cat", "dog", "table", "stop", "holiday", "sign", "leaf", "desktop", "sunday", "photo", "ox", "holi"]
PLURALS = {"cats": "cat", "dogs": "dog", "tables": "table", "signs": "sign"}


@pytest.fixture(scope="module")
def nltk_data(tmp_path_factory):
    """A tiny tokenizer, tagger and dictionary in NLTK's own formats."""
    place = tmp_path_factory.mktemp("nltk_data")
    punkt = place / "tokenizers" / "punkt_tab" / "english"
    punkt.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (punkt / name).write_text("")
    tagger = place / "taggers" / "averaged_perceptron_tagger_eng"
    tagger.mkdir(parents=True)
    tags = {word: "NN" for word in NOUNS} | {word: "NNS" for word in [*PLURALS, "leaves"]}
    tags |= {"s": "NN", "a": "DT", "the": "DT", "on": "IN", "of": "IN", "and": "CC", "runs": "VBZ", "red": "JJ"}
    tags |= {"b4": "NN", "top": "NN", "day": "NN", "person": "NN"}
    parts = {"weights": {"bias": {"JJ": 1.0}}, "tagdict": tags, "classes": sorted({*tags.values()})}
    for part, content in parts.items():
        (tagger / f"averaged_perceptron_tagger_eng.{part}.json").write_text(json.dumps(content))
    wordnet = place / "corpora" / "wordnet"
    wordnet.mkdir(parents=True)
    for kind in ("adj", "adv", "noun", "verb"):
        words = sorted(NOUNS) if kind == "noun" else []
        (wordnet / f"index.{kind}").write_text("".join(f"{word} n 1 0 1 0 00000001  \n" for word in words))
        (wordnet / f"data.{kind}").write_text("")
        (wordnet / f"{kind}.exc").write_text("leaves leaf\n" if kind == "noun" else "")
    (wordnet / "lexnames").write_text("00\tadj.all\t3\n")
    (wordnet / "index.sense").write_text("")
    return place


def test_the_published_cleaning_deletes_inside_words():
    assert clean_as_published("A STOP sign\non a Holiday") == "a s sign on a holi"
    assert clean_as_published("persons & images, daytop") == "s   s  "
    assert clean_as_published("50% off! it's a co-op, no. 1") == "50 off it's a co-op  no. 1"
    for word in NOISE:
        assert word not in clean_as_published(f"x{word}y {word}")


def test_the_right_cleaning_deletes_whole_words():
    assert clean("A stop sign on a Holiday").split() == ["a", "stop", "sign", "on", "a", "holiday"]
    assert clean("stock illustration of a desktop, front").split() == ["of", "a", "desktop"]
    assert clean("day-old bread at the tip-top").split() == ["day-old", "bread", "at", "the", "tip-top"]
    assert clean("cat/dog!mouse").split() == ["cat", "dog", "mouse"]


def test_nouns_with_nltk(nltk_data, monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [str(nltk_data)])
    captions = ["A cat and cats on the table", "the stop signs of a holiday", "red leaves, an ox & a b4 runs"]
    expected = {
        "nltk": [["cat", "table"], ["stop", "sign", "holiday"], ["leaf"]],
        "nltk_published": [["cat", "cat", "table"], ["sign", "holi"], ["leaf"]],
    }
    for name, nouns in expected.items():
        backend = noun_backend(name)
        assert backend.name == name
        assert [backend(caption) for caption in captions] == nouns


def test_without_data_one_error_says_everything(monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr("nltk.downloader._downloader._url", "http://127.0.0.1:9/index.xml")  # nothing answers there
    with pytest.raises(UserError) as error:
        noun_backend("nltk")
    parts = ("punkt_tab", "averaged_perceptron_tagger_eng", "wordnet", "nltk.downloader", "NLTK_DATA", "nouns=hanta")
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_data_is_fetched_once_by_processes_that_start_together(nltk_data, tmp_path, monkeypatch):
    together, fetched = threading.Barrier(3), []

    def missing() -> list[str]:
        names = [name for name, path in RESOURCES.items() if not (tmp_path / path).exists()]
        with suppress(threading.BrokenBarrierError):
            together.wait(0.1)  # all find them missing before one has fetched any
        return names

    def download(name: str, **_) -> None:
        with suppress(threading.BrokenBarrierError):
            together.wait(0.1)
        fetched.append(name)
        shutil.copytree(nltk_data / RESOURCES[name], tmp_path / RESOURCES[name], dirs_exist_ok=True)

    monkeypatch.setattr("nxtp.data.labels.nltk_nouns.missing_resources", missing)
    monkeypatch.setattr(nltk, "download", download)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: find_resources(), range(3)))
    assert sorted(fetched) == sorted(RESOURCES)


def test_a_misspelt_backend_is_named():
    with pytest.raises(UserError, match=r"Did you mean 'nltk_published'"):
        noun_backend("nltk_publshed")
