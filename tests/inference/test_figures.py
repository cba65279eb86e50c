"""What pictures of predictions say."""

from matplotlib.text import Text
from PIL import Image

from nxtp.inference import figures
from nxtp.inference.figures import GridItem, save_grid


def test_a_grid_of_unknown_images_has_their_names_and_the_number_of_labels(tmp_path, monkeypatch):
    texts: list[str] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: texts.extend(t.get_text() for t in figure.findobj(Text)))
    save_grid(tmp_path / "x.png", [GridItem(Image.new("RGB", (8, 8)), [], [("cat", 0.5), ("dog", 0.2)], name="a.jpg")])
    assert {"Top-2 predicted labels with their probabilities", "a.jpg"} <= set(texts)
