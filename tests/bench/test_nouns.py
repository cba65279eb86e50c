"""`nxtp bench nouns`: captions marked as they should be; the default backend is the best one and reaches its aim."""

import json

from click.testing import CliRunner

from nxtp.bench.command import bench
from nxtp.bench.nouns import HALVES, MarkedCaption, marked_captions
from nxtp.data.labels.nouns import noun_backend


def test_captions_are_marked_in_two_comparable_halves():
    captions = marked_captions()
    assert len(captions) >= 300
    assert len({marked.caption for marked in captions}) == len(captions)
    for style in ("coco", "cc3m", "alt-text"):
        sizes = [sum(m.half == half and m.style == style for m in captions) for half in HALVES]
        assert sizes[0] == sizes[1] >= 40
    for marked in captions:
        text = marked.caption.lower()
        assert all(any(word[0] in text for word in noun) for noun in marked.nouns), f"not in it: {marked}"
        assert not marked.others & frozenset().union(*marked.nouns)


def test_missed_and_wrong():
    nouns = frozenset({"people", "person"}), frozenset({"sink"})
    marked = MarkedCaption("tuning", "coco", "people by a sink", nouns, frozenset({"day"}))
    assert marked.missed(["person", "day"]) == ["sink"]
    assert marked.wrong(["person", "day", "use"]) == ["use"]
    assert marked.missed([]) == ["people/person", "sink"]


def test_the_default_is_the_best_and_reaches_its_aim():
    result = CliRunner().invoke(bench, ["nouns", "--repeats=1", "--errors", "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    numbers = json.loads(result.stdout.splitlines()[-1])
    rows = {name: row for name, row in numbers["rows"].items() if "skipped" not in row}
    default = rows[noun_backend().name]
    for half in HALVES:
        assert default[half]["recall"] >= 0.97
        assert default[half]["precision"] >= 0.95
        assert all(
            default[half][score] >= row[half][score] for row in rows.values() for score in ("recall", "precision")
        )
    assert default["captions_per_s"] > 0 < default["first_captions_per_s"]
    tuning = {marked.caption for marked in marked_captions() if marked.half == "tuning"}
    assert {error["caption"] for row in rows.values() for error in row["errors"]} <= tuning
