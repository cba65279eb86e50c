"""What pictures of predictions say."""

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from nxtp.inference import figures
from nxtp.inference.figures import AttentionItem, GridItem, SheetItem, save_attention, save_contact_sheet, save_grid
from nxtp.inference.predict import _names
from nxtp.inference.streaming import ImageItem, Prediction

PICTURE = Image.new("RGB", (8, 8))


@pytest.fixture
def drawn(monkeypatch):
    """The figures in place of their files."""
    found: list = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: found.append(figure))
    return found


def texts(figure) -> set[str]:
    return {text.get_text() for text in figure.findobj(Text)}


def test_a_grid_of_unknown_images_has_their_names_and_the_number_of_labels(drawn):
    item = GridItem(PICTURE, [], [("cat", 0.5), ("dog", 0.2)], name="a.jpg")
    save_grid("x.png", [item])
    save_grid("x.png", [item], what="classes")
    assert {"Top-2 predicted labels with their probabilities", "a.jpg"} <= texts(drawn[0])
    assert "Top-2 classes with their probabilities" in texts(drawn[1])


def test_titles_are_no_wider_than_their_pictures(drawn):
    save_grid("x.png", [GridItem(PICTURE, ["MWMW" * 10], [("cat", 0.5)]), GridItem(PICTURE, ["a b"], [])])
    save_grid("x.png", [GridItem(PICTURE, [], [], name="train2017/000000173350.jpg")])
    (name,) = (axes.get_title() for axes in drawn[1].axes if axes.get_title())
    assert name.startswith("…")
    assert name.endswith("/000000173350.jpg")
    wide, narrow = (axes.title for axes in drawn[0].axes if axes.get_title())
    assert narrow.get_text() == "a b"
    assert wide.get_text().startswith("MWMW")
    assert wide.get_text().endswith("…")
    assert 0 < wide.get_window_extent().x0 < wide.get_window_extent().x1 <= wide.axes.get_window_extent().x1 + 1


def test_attention_has_names_and_probabilities(drawn):
    save_attention("x.png", [AttentionItem(PICTURE, [("rose", 0.53, np.ones((8, 8)))], name="a.jpg")])
    assert {"Where each label is seen", "a.jpg", "rose 0.53"} <= texts(drawn[0])


def test_images_of_several_folders_are_named_with_these():
    def names(*paths):
        return _names([Prediction(ImageItem(path, lambda: b""), []) for path in paths])

    assert names("photos/cat/1.jpg", "photos/dog/1.jpg") == ["cat/1.jpg", "dog/1.jpg"]
    assert names("photos/cat/1.jpg", "photos/cat/2.jpg") == ["1.jpg", "2.jpg"]
    assert names("000001", "000002") == ["000001", "000002"]


@pytest.mark.parametrize("caption", ["", "a rose"])
def test_a_sheet_of_classes_says_nothing_of_captions(drawn, caption):
    save_contact_sheet("x.png", [SheetItem(PICTURE, "1", "", ["cat"]), SheetItem(PICTURE, "2", caption, [])], title="t")
    assert ("no caption" in texts(drawn[0])) == bool(caption)
