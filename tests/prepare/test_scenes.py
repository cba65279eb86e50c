"""The embedded data set: deterministic, extensible, with captions that name what is in the scene."""

from pathlib import Path

import numpy as np
import pytest
import scenes
from click.testing import CliRunner

from nxtp.data.labels.nouns import noun_backend
from nxtp.data.shards.manifest import read_manifest
from nxtp.data.shards.reader import IndexedShards
from nxtp.data.shards.urls import expand_shards
from nxtp.errors import UserError
from nxtp.prepare.commands import prepare

SMALL = {"train": 9, "val": 4, "val_style": 3, "shard_size": 4, "workers": 1}


def hashes(out: Path) -> dict[str, list[str]]:
    return {s: [shard["sha256"] for shard in read_manifest(out / s)["shards"]] for s in scenes.SPLITS}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return scenes.make_scenes(tmp_path_factory.mktemp("scenes"), **SMALL)


def test_table_is_clean():
    table = scenes.concept_table()
    nouns = [c.noun for c in table]
    assert len(table) >= 500
    assert len(set(nouns)) == len({c.codepoint for c in table}) == len(table)
    extract = noun_backend()
    lost = [c.noun for c in table if extract(c.phrase(1, np.random.default_rng(0))) != [c.noun] and not c.container]
    assert not lost
    for art in ("twemoji", "openmoji"):
        for concept in table[::29]:
            assert scenes.sprite(art, concept.codepoint).getchannel("A").getextrema()[1] == 255


def test_the_command_with_two_processes_writes_the_same(made, tmp_path):
    options = {"train": 9, "val": 4, "val-style": 3, "shard-size": 4, "workers": 2, "concepts": 500}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    result = CliRunner().invoke(prepare, ["scenes", f"--out={tmp_path}", *arguments])
    assert result.exit_code == 0, result.output
    assert hashes(tmp_path) == hashes(made)


def test_a_larger_set_begins_with_the_smaller_one(made, tmp_path):
    larger = hashes(scenes.make_scenes(tmp_path, **SMALL | {"train": 17}))["train"]
    assert larger[:2] == hashes(made)["train"][:2]


def test_another_seed_gives_other_scenes(made, tmp_path):
    other = scenes.make_scenes(tmp_path, **SMALL, options=scenes.SceneOptions(seed=1))
    assert not set(hashes(other)["val"]) & set(hashes(made)["val"])


def test_a_second_run_does_nothing(made, capsys):
    before = {p: p.stat().st_mtime_ns for p in made.rglob("*.tar")}
    scenes.make_scenes(made, **SMALL)
    assert {p: p.stat().st_mtime_ns for p in made.rglob("*.tar")} == before
    assert capsys.readouterr().err.count("nothing to do") == 3


def test_other_options_do_not_replace_what_is_there(tmp_path):
    scenes.make_scenes(tmp_path, **SMALL)
    with pytest.raises(UserError, match="other options"):
        scenes.make_scenes(tmp_path, **SMALL, options=scenes.SceneOptions(concepts=50))
    scenes.make_scenes(tmp_path, **SMALL, options=scenes.SceneOptions(concepts=50), overwrite=True)
    assert len(read_manifest(tmp_path / "val")["made_by"]["labels"]) == 50


def test_a_lost_shard_is_written_again(tmp_path):
    scenes.make_scenes(tmp_path, **SMALL)
    before = hashes(tmp_path)
    (tmp_path / "train" / "train-00001.tar").unlink()
    scenes.make_scenes(tmp_path, **SMALL)
    assert (tmp_path / "train" / "train-00001.tar").is_file()
    assert hashes(tmp_path) == before


def test_samples_contain_what_they_should(made):
    for split, labelled in (("train", False), ("val", True), ("val_style", True)):
        shards = IndexedShards(expand_shards(str(made / split)))
        raw = [shards.read(i) for i in range(len(shards))]
        assert len(raw) == SMALL[split]
        assert all((r.labels is not None) == labelled and r.caption for r in raw)
        manifest = read_manifest(made / split)
        assert manifest["nouns"]["backend"] == noun_backend().name
        assert "CC-BY" in manifest["made_by"]["art"]


def test_captions_name_the_objects():
    options, extract = scenes.SceneOptions(concepts=len(scenes.concept_table())), noun_backend()
    hits = said = true = 0
    for number in range(1500):
        rng = np.random.default_rng([1, number])
        groups = scenes._groups(int(rng.integers(1, 5)), options, rng)
        assert sum(times for _, times in groups) in range(1, 5)
        labels, nouns = {c.noun for c, _ in groups}, set(extract(scenes._caption(groups, rng)))
        hits, said, true = hits + len(labels & nouns), said + len(nouns), true + len(labels)
    assert hits / said >= 0.98
    assert hits / true >= 0.98


def test_concepts_from_another_number_on():
    table = scenes.concept_table()
    found = {label for n in range(60) for label in scenes.make_scene("val", n, scenes.SceneOptions(5, first=20)).labels}
    assert found == {concept.noun for concept in table[20:25]}
    with pytest.raises(UserError, match="with --first 540"):
        scenes._check(scenes.SceneOptions(20, first=540))


def test_concepts_chosen_by_name(tmp_path):
    first = [concept.noun for concept in scenes.concept_table()[:6]]
    names = tmp_path / "names.txt"
    names.write_text("\n".join([*first[1::2], ""]))
    options = [*("--concepts", "6", "--max-objects", "1", "--train", "0", "--val", "40", "--val-style", "0")]
    for option, kept in (("--only", first[1::2]), ("--without", first[::2])):
        out = tmp_path / option
        command = [*options, "--out", str(out), "--workers", "1", option, str(names)]
        assert CliRunner().invoke(scenes.main, command, catch_exceptions=False).exit_code == 0
        assert read_manifest(out / "val")["made_by"]["labels"] == kept
        shards = IndexedShards(expand_shards(str(out / "val")))
        assert {label for n in range(40) for label in shards.read(n).labels} == set(kept)
    with pytest.raises(UserError, match="no such concept: unicorns"):
        scenes._check(scenes.SceneOptions(6, without=("unicorns",)))
    with pytest.raises(UserError, match="leave 1 concepts"):
        scenes._check(scenes.SceneOptions(6, max_objects=2, only=(first[0],)))


def test_synonyms_are_labels_and_no_other_concepts_name():
    nouns = {concept.noun for concept in scenes.concept_table()}
    names = [name for others in scenes.synonyms().values() for name in others]
    assert set(scenes.synonyms()) <= nouns
    assert not nouns & set(names)
    assert len(names) == len(set(names)) >= 40
    plain, named = (scenes.SceneOptions(100, max_objects=1, synonyms=s) for s in (False, True))
    with_others = 0
    for number in range(40):
        (noun,) = scenes.make_scene("train", number, plain).labels
        labels = scenes.make_scene("train", number, named).labels
        assert labels == [noun, *scenes.synonyms().get(noun, [])]
        assert scenes.sample_of("train", number, named)["json"] == {"labels": labels}
        assert "json" not in scenes.sample_of("train", number, plain)
        with_others += len(labels) > 1
    assert with_others > 5


def test_other_names_are_part_of_what_a_set_was_made_by(tmp_path, monkeypatch):
    options = scenes.SceneOptions(4, max_objects=1, synonyms=True)
    counts = {"train": 3, "val": 0, "val_style": 0}
    scenes.make_scenes(tmp_path, **counts, options=options, workers=1)
    monkeypatch.setattr(scenes, "synonyms", lambda: {"banana": ["ba-na-na"]})
    with pytest.raises(UserError, match="overwrite"):
        scenes.make_scenes(tmp_path, **counts, options=options, workers=1)


def test_styles_differ_but_not_the_concepts():
    options = scenes.SceneOptions(concepts=20)
    for codepoint in [c.codepoint for c in scenes.concept_table()[:5]]:
        art = [np.asarray(scenes.sprite(a, codepoint), dtype=float) for a in ("twemoji", "openmoji")]
        assert np.abs(art[0] - art[1]).mean() > 5
    nouns = {c.noun for c in scenes.concept_table()[:20]}
    assert all(set(scenes.make_scene("val_style", i, options).labels) <= nouns for i in range(20))


def test_pictures_are_not_too_small_and_stay_inside():
    for count in (1, 2, 3, 4):
        for number in range(40):
            places = list(scenes._places(count, 64, np.random.default_rng(number)))
            assert len(places) == count
            for left, top, side in places:
                assert side >= 25
                assert min(left, top) >= 0
                assert max(left, top) + side <= 64


@pytest.mark.parametrize(
    ("change", "message"),
    [({"concepts": 10_000}, "--concepts"), ({"size": 20}, "--size"), ({"min_objects": 5}, "--min-objects")],
)
def test_options_out_of_range(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        scenes.make_scenes(tmp_path, **SMALL, options=scenes.SceneOptions(**change))


def test_a_skew_is_a_long_tail():
    """Concept n of ten in proportion to 1/n: of 2,000 draws the first has 683 and the last 68, both within 5 sigma."""
    options, rng = scenes.SceneOptions(concepts=10, skew=1.0), np.random.default_rng(0)
    drawn = [scenes._groups(1, options, rng)[0][0].noun for _ in range(2000)]
    counts = [drawn.count(concept.noun) for concept in scenes.drawn(options)]
    assert abs(counts[0] - 683) < 105
    assert abs(counts[-1] - 68) < 41
    assert options.made_by()["skew"] == 1.0
    assert "skew" not in scenes.SceneOptions().made_by(), "sets that were made without it are still found"
