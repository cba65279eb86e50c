"""Captions → nouns against a reading by hand; labels in comparable and in writable form."""

import pickle
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nxtp.data.labels.cleaning import clean_labels, normalise
from nxtp.data.labels.hanta_nouns import HantaNouns, _readings, _tagger, tag
from nxtp.data.labels.nouns import noun_backend
from nxtp.errors import UserError
from nxtp.model.tokenizer import DELIMITER

CAPTIONS = {
    "a bear and two rockets beside a cup of coffee": "bear rocket cup coffee",
    "A man is riding a horse near the beach.": "man horse beach",
    "two dogs playing with a red ball in the park": "dog ball park",
    "A CAT SLEEPING ON A KEYBOARD": "cat keyboard",
    "the woman's hat is on the chair": "woman hat chair",
    "a bird’s nest with 3 eggs": "bird nest egg",
    "a young girl eating ice cream": "girl ice cream",
    "a herd of sheep grazing on a green hill": "herd sheep hill",
    "a pair of scissors and a roll of tape": "pair scissors roll tape",
    "people walking down a busy street with umbrellas": "people street umbrella",
    "man in black suit holding microphone": "man suit microphone",
    "a chocolate cake with strawberries on top": "chocolate cake strawberry",
    "football player celebrates after scoring a goal": "football player goal",
    "café with a piñata": "café piñata",
    "a crosswalk; traffic lights; taxis": "crosswalk traffic light taxi",
    "a knife/fork and a mouse/rat": "knife fork mouse rat",
    "a 2nd 3d printer": "printer",
    "one saxophone over a yo-yo": "saxophone yo-yo",
    "a t-shirt and a jack-o-lantern": "t-shirt jack-o-lantern",
    # nouns that the tagger takes for something else
    "a fly on a leaf": "fly leaf",
    "an orange, an apple and a key": "orange apple key",
    "there is a saw, a hammer and a nail": "saw hammer nail",
    "a rose in a vase beside a can of beans": "rose vase can bean",
    "a ram, a watch, a drum and a well": "ram watch drum well",
    "two bears and three small flies near those swings": "bear fly swing",
    "the leaves of a tree": "leaf tree",
    "several flies and many small bears": "fly bear",
    "a teddy bear beside a stuffed bear": "teddy bear",
    "a toilet next to a sink": "toilet sink",
    "a painting on the wall": "painting wall",
    # verbs that it takes for nouns
    "a whale jumps out of the sea": "whale sea",
    "a baseball player swings a bat": "baseball player bat",
    "two zebras drinking from a river": "zebra river",
    # and words that are what they seem
    "kids fly kites": "kid kite",
    "a rocket flies above a moose": "rocket moose",
    "a bear swims where it can": "bear",
    "a light bulb that was left on": "light bulb",
    # words that HanTa did not learn: the dictionary's readings
    "a penguin waddles behind a curlier poodle": "penguin poodle",
    "white jacket (launderer)": "jacket launderer",
    "a man in a short-sleeved shirt on a red-brick church": "man shirt church",
    "a man with a mini-fridge and a t-shirt": "man mini-fridge t-shirt",
    # objects in lists
    "a bath with a shower, sink, and toilet": "bath shower sink toilet",
    "there are two mirrors above the sinks": "mirror sink",
    "a knife, fork, and spoon": "knife fork spoon",
    # verbs, adjectives and pronouns that are labels of other captions
    "a man is about to fork some cake": "man cake",
    "a man is cooking rice": "man rice",
    "they cook eggs in a pan": "egg pan",
    "a boy and his friends blow bubbles": "boy friend bubble",
    "two people cook in a small kitchen": "people kitchen",
    "a girl petting a lamb": "girl lamb",
    "many people use phones": "people phone",
    "a small dog next to a small couch": "dog couch",
    "a cat, a ball and two other cats": "cat ball",
    # nouns as they are, also in compounds
    "a cat on the lap of a man": "cat lap man",
    "a fish tank and a broom full of dust": "fish tank broom dust",
    # singulars
    "three dice, four leaves and some knives": "die leaf knife",
    "geese, mice, oxen, wolves and children": "goose mouse ox wolf child",
    "three corgis and a triceratops": "corgi triceratops",
    "two kiwis, six glasses and a bus": "kiwi glass bus",
    "a man in jeans, shorts and sunglasses": "man jeans shorts sunglasses",
    "five orcas, two taxis and nine selfies": "orca taxi selfie",
    "french fries and a tv": "fries tv",
    # the picture itself, and places in it
    "a photo of a dog": "dog",
    "this picture shows a seal": "seal",
    "a picture on the wall": "picture wall",
    "a close-up of a snail in front of a barn": "snail barn",
    "on the left there is a crab, in the background a shop front": "crab shop front",
    # nothing to find
    "": "",
    " \n\t": "",
    "...!? --- 12 000": "",
    "this can be seen": "",
    "日本": "日本",
}


@pytest.fixture(scope="module")
def nouns():
    return noun_backend()


@pytest.mark.parametrize("caption", CAPTIONS)
def test_nouns_of_caption(nouns, caption):
    assert nouns(caption) == CAPTIONS[caption].split()


def test_nouns_are_distinct_in_order_of_appearance(nouns):
    assert nouns("a cat, two dogs, three cats and a dog") == ["cat", "dog"]


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_gives_labels_that_can_be_written(caption):
    labels = noun_backend()(caption)
    assert len(set(labels)) == len(labels)
    assert clean_labels(labels) == labels
    assert all(label == label.lower() and DELIMITER not in label for label in labels)


@pytest.mark.parametrize("piece", ["a ", "(", "dog, ", "&", "http://", "x", "\n", "a 2 dogs "])
def test_longest_caption_takes_seconds_at_most(nouns, piece):
    nouns("a dog")
    start = time.process_time()
    nouns(piece * ((1 << 16) // len(piece)))
    assert time.process_time() - start < 20


def test_backend_is_named_versioned_and_pickled(nouns):
    assert nouns.name == "hanta"
    assert "HanTa 1." in nouns.version
    assert "lemminflect 0." in nouns.version
    assert pickle.loads(pickle.dumps(nouns))("a bear") == ["bear"]
    assert isinstance(noun_backend("hanta"), HantaNouns)


def test_tags_are_those_of_hantas_own_search(monkeypatch):
    """Ours follows the readings of a word only; HanTa's own follows every tag."""
    captions = [caption.split() for caption in CAPTIONS if caption.split()]
    tagger = _tagger()
    ours = [tag(words) for words in captions]
    monkeypatch.setattr(tagger, "_tag_word", lambda word, **_: list(_readings(word)))
    assert ours == [tagger.tag_sent(words, taglevel=0) for words in captions]


def test_stop_nouns_are_no_labels():
    nouns = noun_backend(stop=["People", "hat"])
    assert nouns("people in hats with a dog") == ["dog"]
    assert (nouns.name, nouns.version) == ("hanta", noun_backend().version)
    assert pickle.loads(pickle.dumps(nouns))("a cat in a hat") == ["cat"]


def test_unknown_backend_names_the_nearest():
    with pytest.raises(UserError, match=r"No noun backend 'hnta'; known are hanta, nltk, .*Did you mean 'hanta'\?"):
        noun_backend("hnta")


def test_libraries_load_at_the_first_caption():
    code = (
        "import sys; from nxtp.data.labels.nouns import noun_backend; nouns = noun_backend();"
        "libraries = {'HanTa', 'lemminflect', 'nltk', 'scipy', 'torch'};"
        "assert not libraries & set(sys.modules);"
        "nouns('a bear'); assert libraries & set(sys.modules) == {'HanTa', 'lemminflect'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_backend_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setattr(sys.modules["nxtp.data.labels.nouns"], "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs nltk: pip install 'nxtp\[nouns\]'"):
        noun_backend("nltk_published")
    assert noun_backend().name == "hanta"


@pytest.mark.parametrize(
    ("label", "form"),
    [
        ("  Egyptian\u00a0 Cat\n", "egyptian cat"),
        ("ﬁsh", "fish"),
        ("CAFE\u0301", "café"),
        ("Ｔ－shirt", "t-shirt"),
        ("", ""),
    ],
)
def test_normalise(label, form):
    assert normalise(label) == form


@given(st.text())
def test_normalise_is_idempotent(label):
    form = normalise(label)
    assert normalise(form) == form
    assert normalise(f"  {label}\t") == form


def test_clean_labels():
    given = [" dog ", "cat, tabby", "", " , ", "Dog", "hot\n dog", "dog", "Egyptian Cat"]
    assert clean_labels(given) == ["dog", "cat tabby", "hot dog", "Egyptian Cat"]


@given(st.lists(st.text()))
def test_clean_labels_is_idempotent(labels):
    cleaned = clean_labels(labels)
    assert clean_labels(cleaned) == cleaned
    assert all(label.strip() == label != "" and DELIMITER not in label for label in cleaned)
