"""A gallery of a model: images with their most probable labels, the probabilities, and where each label is seen.

Writes gallery.png, and index.html, one file that needs nothing else: point at a label to see where it is seen.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from itertools import islice, zip_longest
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import click

from nxtp.errors import UserError, counted, printable
from nxtp.inference.figures import HEAT, heat_map
from nxtp.prepare.options import Script

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from nxtp.inference.streaming import Prediction

PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
  :root { --side: min(256px, 45vw) }
  body { font: 14px/1.35 system-ui, sans-serif; margin: 24px auto; max-width: 900px; padding: 0 12px; color: #222 }
  article { position: relative; border-top: 1px solid #ddd; padding: 12px 0; min-height: 290px }
  h2 { font-size: 13px; margin: 0 0 8px; color: #666; overflow-wrap: anywhere }
  .photo, .look { background: center / cover; width: var(--side); height: var(--side) }
  .photo { float: left }
  .look { position: absolute; left: calc(var(--side) + 12px); top: 38px; visibility: hidden }
  .look img { width: 100%; height: 100%; opacity: $opacity; image-rendering: pixelated }
  ol { list-style: none; margin: 0 0 0 calc(2 * var(--side) + 24px); padding: 0 }
  li { display: flex; justify-content: space-between; padding: 0 6px; cursor: pointer;
       background: linear-gradient(#a8bccd 0 0) no-repeat 0 / var(--share) 100% #eef1f4; border-bottom: 1px solid #fff }
  li:hover, li:focus { outline: 2px solid #0072b2 }
  li:first-child .look, li:hover .look, li:focus .look { visibility: visible }
  li:hover .look, li:focus .look { z-index: 1 }
  @media (max-width: 820px) {
    ol { margin-left: calc(var(--side) + 12px) } .look { left: 0 }
    li:first-child:not(:hover, :focus) .look { visibility: hidden }
  }
</style>
<h1>$title</h1>
<p>Point at a label to see where it is seen: attention times the gradient of its log probability.</p>
$articles
</html>
""")
ARTICLE = Template("""<article style="--photo: url($photo)">
<h2>$name</h2>
<div class="photo" style="background-image: var(--photo)" role="img" aria-label="$name"></div>
<ol>
$labels</ol>
</article>
""")
LABEL = Template("""<li tabindex="0" style="--share: $share"><span>$label</span><span>$probability</span>$look</li>
""")
LOOK = Template('<div class="look" style="background-image: var(--photo)"><img src="$heat" alt=""></div>')


@click.command(cls=Script)
@click.argument("model")
@click.argument("pictures", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Directory.")
@click.option("--top-k", type=click.IntRange(1), default=20, show_default=True, help="Labels per image.")
@click.option("--images", type=click.IntRange(1), default=24, show_default=True, help="The first so many of PICTURES.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, …")
def gallery(model: str, pictures: tuple[str, ...], out: Path, top_k: int, images: int, device: str) -> None:
    """Draw PICTURES (files, directories, shards) with the labels of MODEL, a model directory or hub name.

    python docs/gallery.py runs/demo/model data/shards/demo/examples --out gallery
    """
    from nxtp.inference.figures import GridItem, save_grid
    from nxtp.inference.predict import attention_item
    from nxtp.inference.recognizer import Recognizer
    from nxtp.inference.streaming import ImageSource, stream
    from nxtp.model.attention_maps import grid_side

    recognizer = Recognizer.from_pretrained(model, device=device)
    shown_maps = top_k
    try:
        grid_side(recognizer.model.num_image_tokens)
    except UserError as error:
        shown_maps = 0
        click.echo(f"No attention maps: {error}", err=True)
    source = ImageSource.from_paths(pictures)
    source = replace(source, items=islice(source.items, images))
    items, articles = [], []
    for prediction in stream(source, lambda pixels: recognizer.predict_pixels(pixels, top_k), recognizer.transform, 32):
        if prediction.labels is None:
            click.echo(f"{printable(prediction.item.name)}: {prediction.error}; skipped", err=True)
            continue
        image, found, _ = attention_item(prediction, recognizer, shown_maps)
        maps = [weights for _, _, weights in found]
        items.append(GridItem(image, [], prediction.labels, maps[0] if maps else None))
        articles.append(article(prediction, image, maps))
    if not items:
        raise UserError("None of the pictures can be read.")
    out.mkdir(parents=True, exist_ok=True)
    save_grid(out / "gallery.png", items, top=top_k)
    title = f"{counted(len(items), 'image')}, {top_k} labels each"
    page = PAGE.substitute(title=title, articles="".join(articles), opacity=HEAT)
    (out / "index.html").write_text(page, encoding="utf-8")
    click.echo(f"{out / 'gallery.png'}, {out / 'index.html'}")


def article(prediction: Prediction, image: Image.Image, maps: Sequence[np.ndarray]) -> str:
    """An image, its labels, and where each of them is seen, as far as there are ``maps``."""
    labels = [
        LABEL.substitute(
            label=escape(label),
            probability=f"{probability:.3f}",
            share=f"{probability:.1%}",
            look=LOOK.substitute(heat=data_url(heat_map(weights), "PNG")) if weights is not None else "",
        )
        for (label, probability), weights in zip_longest(prediction.labels or [], maps)
    ]
    name = escape(printable(Path(prediction.image).name))
    return ARTICLE.substitute(name=name, photo=data_url(image, "JPEG"), labels="".join(labels))


def data_url(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=85)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


if __name__ == "__main__":
    gallery()
