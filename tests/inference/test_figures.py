"""What pictures of predictions say."""

from matplotlib.text import Text
from PIL import Image

from nxtp.inference import figures
from nxtp.inference.figures import GridItem, save_grid


def test_a_grid_of_unknown_images_has_their_names_and_the_number_of_labels(tmp_path, monkeypatch):
    drawn: list = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.extend(figure.findobj(Text)))
    save_grid(tmp_path / "x.png", [GridItem(Image.new("RGB", (8, 8)), [], [("cat", 0.5), ("dog", 0.2)], name="a.jpg")])
    assert {"Top-2 predicted labels with their probabilities", "a.jpg"} <= {text.get_text() for text in drawn}
