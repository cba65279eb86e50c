"""docs/gallery.py, as a user runs it."""

import html
import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import jpeg, recognizer
from PIL import Image

from nxtp.errors import UserError

sys.path.append(str(Path(__file__).resolve().parents[2] / "docs"))

from gallery import gallery


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return recognizer().save_pretrained(tmp_path_factory.mktemp("models") / "m")


def run(model, pictures: Path, *options: str):
    return CliRunner().invoke(gallery, [str(model), str(pictures), "--device", "cpu", *options])


def test_a_gallery_is_one_picture_and_one_page(model, tmp_path):
    pictures, out = tmp_path / "pictures", tmp_path / "new" / "gallery"
    pictures.mkdir()
    (pictures / "a <b>.jpg").write_bytes(jpeg((200, 40, 60)))
    (pictures / "b.jpg").write_bytes(jpeg((20, 140, 60), size=77))
    (pictures / "bad.jpg").write_bytes(b"nothing")
    (pictures / "c.jpg").write_bytes(jpeg((9, 9, 9)))
    done = run(model, pictures, "--out", str(out), "--images", "3")
    assert done.exit_code == 0, done.output
    assert "bad.jpg: not an image in a known format; skipped" in done.stderr
    with Image.open(out / "gallery.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100
    page = (out / "index.html").read_text()
    assert re.findall("<h2>(.*)</h2>", page) == ["a &lt;b&gt;.jpg", "b.jpg"]
    predicted = recognizer().predict([pictures / "a <b>.jpg", pictures / "b.jpg"], top_k=20)
    expected = [(label, f"{probability:.3f}") for labels in predicted for label, probability in labels]
    shown = re.findall(r"<li.*?><span>(.*?)</span><span>(.*?)</span>", page)
    assert [(html.unescape(label), probability) for label, probability in shown] == expected
    assert page.count("data:image/png") == len(expected) > 10, "each label has its attention"
    assert page.count("data:image/jpeg") == 2
    assert not re.search(r"https?:|src=\"(?!data:)", page), "the page needs nothing else"


def test_a_grid_that_is_not_square_has_no_attention(model, tmp_path, monkeypatch):
    def refuse(count):
        raise UserError("no square grid")

    monkeypatch.setattr("nxtp.model.attention_maps.grid_side", refuse)
    (tmp_path / "a.jpg").write_bytes(jpeg((200, 40, 60)))
    done = run(model, tmp_path / "a.jpg", "--out", str(tmp_path), "--top-k", "3")
    assert done.exit_code == 0, done.output
    assert "No attention maps: no square grid" in done.stderr
    page = (tmp_path / "index.html").read_text()
    assert page.count("<li") == 3
    assert "data:image/png" not in page
