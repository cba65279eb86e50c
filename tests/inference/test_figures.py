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


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (3, 3), (4, 4), (5, 3), (6, 3), (7, 4), (12, 4)])
def test_a_grid_has_as_few_empty_places_as_possible(drawn, count, columns):
    save_grid("x.png", [GridItem(PICTURE, ["cat"], [("cat", 0.5)], name="1")] * count)
    grid = drawn[0].axes[0].get_gridspec().get_topmost_subplotspec().get_gridspec()
    assert (grid.nrows, grid.ncols) == (-(-count // columns), columns)
    title, legend = (text.get_window_extent() for text in drawn[0].texts)
    assert not title.overlaps(legend)
    assert max(title.x1, legend.x1) <= drawn[0].bbox.width


def test_bars_of_few_labels_are_as_high_as_an_image(drawn):
    save_grid("x.png", [GridItem(PICTURE, [], [("cat", 0.5), ("dog", 0.3), ("car", 0.1)])])
    assert drawn[0].axes[1].get_ylim() == (2.5, -0.5)


def test_a_sheet_has_no_room_for_captions_that_are_not_there(drawn):
    for caption in ("", "a rose", "a rose and many other flowers in a very large garden behind the house"):
        save_contact_sheet("x.png", [SheetItem(PICTURE, "1", caption, ["cat"])] * 8, title="t")
    assert drawn[0].axes[0].get_gridspec().ncols == 4
    assert [figure.get_figheight() for figure in drawn] == sorted({figure.get_figheight() for figure in drawn})
    for figure in drawn:
        image, text = figure.axes[-1].get_window_extent(), figure.axes[-1].texts[-1].get_window_extent()
        assert image.height == pytest.approx(image.width, rel=0.01)
        assert 0 < text.y0 < 20


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
