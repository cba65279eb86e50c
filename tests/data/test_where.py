"""`data.where` and `data.caption_key`: conditions, what they choose, and that what they skip is not damage."""

import json
from collections import Counter

import pytest
from helpers import call_nxtp, jpeg, shard_data

from nxtp.data.config import DataConfig
from nxtp.data.dataset import check_skipped
from nxtp.data.labels.from_samples import label_counts
from nxtp.data.where import Selection
from nxtp.errors import UserError
from nxtp.prepare.writer import write_shard

RECORD = {"similarity": 0.4, "width": 200, "lang": "en", "tags": ["a", "b"], "nsfw": None}


@pytest.mark.parametrize(
    ("where", "holds"),
    [
        ("similarity > 0.3 and width >= 200", True),
        ("similarity > 0.3 and width > 200", False),
        ("0.3 < similarity < 0.5", True),
        ("lang in ['en', 'de'] and 'b' in tags", True),
        ("lang not in ('en', 'de')", False),
        ("not (width == 200.0)", False),
        ("similarity > -1\n and lang != 'de'", True),
        ("lang", True),
        ("nsfw == None", True),
        ("missing > 0 or missing < 0 or lang > 3", False),
        ("missing > 0 or width == 200", True),
        ("not missing", True),
    ],
)
def test_a_condition_holds(where, holds):
    assert Selection(where=where).takes(RECORD) == holds


@pytest.mark.parametrize(
    ("where", "place"),
    [
        ("similarity > > 0.3", "at '> 0.3': invalid syntax."),
        ("width = 200", "at '= 200': invalid syntax."),
        ("similarity > 0.3 and", "at its end: invalid syntax."),
        ("(width > 2", "at '(width > 2': '(' was never closed."),
        ("größe > 1 and f(width)", "at 'f(width)': not allowed: a condition has"),
        ("__import__('os').system('x') == 0", "at '__import__('os').system('x')': not allowed"),
        ("width.real > 2", "at 'width.real': not allowed"),
        ("'x' * 999999999 == lang", "at ''x' * 999999999': not allowed"),
        ("lang is None", "at 'lang is None': not allowed"),
        ("nsfw == false", "at 'false': not allowed"),
        ("width > 0,3", "at 'width > 0,3': no comparison"),
        ("200", "at '200': no comparison"),
        ("not " * 5000 + "x", "too"),
        ("not " * 2000 + "x", "too"),
        ("x\0 > 3", "null bytes"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(where, place):
    with pytest.raises(UserError) as error:
        DataConfig(where=where)
    assert str(error.value).startswith('data.where="')
    assert (place in str(error.value)) or (place == "too" and "recursion" in str(error.value))
    assert "\n" not in str(error.value)


@pytest.fixture
def root(tmp_path):
    """Two shards of 12 samples, whose width is their number."""
    for shard in range(2):
        content = [
            {"__key__": f"{n:02d}", "jpg": jpeg((9, 9, n)), "txt": "a lemon", "json": {"width": n, "new": f"rose {n}"}}
            for n in range(12 * shard, 12 * shard + 12)
        ]
        del content[5]["json"]["new"]
        write_shard(tmp_path / f"{shard}.tar", content)
    return tmp_path


def test_what_fulfils_the_condition_comes_once_for_any_ranks_and_after_a_resume(root):
    chosen = sorted(f"{n:02d}" for n in range(7, 24))
    data = shard_data(str(root), {"v": str(root)}, where="width > 6")
    loaders = [data.loader("train", str(root), training=True, share=(rank, 3)) for rank in range(3)]
    batches = [batch for loader in loaders for batch in loader]
    assert sorted(key for batch in batches for key in batch.keys) == chosen
    assert sum((batch.skipped for batch in batches), Counter()) == {"filtered": 7}
    loader = shard_data(str(root), where="width > 6").train_dataloader()
    iterator = iter(loader)
    head = [next(iterator).keys for _ in range(2)]
    rest = shard_data(str(root), where="width > 6").train_dataloader()
    rest.load_state_dict(loader.state_dict())
    assert sorted(key for keys in (*head, *(batch.keys for batch in rest)) for key in keys) == chosen
    seen = [key for batch in data.val_dataloader()[0] for key in batch.keys]
    assert len(seen) == 24, "validation sets are whole"


def test_a_source_has_a_condition_and_a_caption_of_its_own(root):
    sources = {
        "a": {"shards": str(root / "0.tar"), "where": ""},
        "b": {"shards": str(root / "1.tar"), "caption_key": "new"},
    }
    data = shard_data(sources, {"v": {"all": {"shards": str(root), "where": "width < 3"}}}, where="width > 20")
    batches = list(data.train_dataloader())
    labels = {key: names for batch in batches for key, names in zip(batch.keys, batch.labels, strict=True)}
    assert labels == {f"{n:02d}": ["lemon"] for n in range(12)} | {f"{n}": ["rose"] for n in (21, 22, 23)}
    assert [key for batch in data.val_dataloader()[0] for key in batch.keys] == ["00", "01", "02"]


def test_a_sample_without_the_field_has_no_caption(root):
    batches = list(shard_data(str(root), caption_key="new").train_dataloader())
    assert {tuple(names) for batch in batches for names in batch.labels} == {("rose",)}
    assert sum((batch.skipped for batch in batches), Counter()) == {"no caption": 2}


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({"caption_key": "nwe"}, "no caption × 24"),
        ({"where": "wdth > 3"}, "filtered × 24"),
        ({"caption_key": "parquet:new"}, "unreadable captions × 24"),
    ],
)
def test_a_misspelt_field_is_found_before_a_tokenizer_is_trained_on_nothing(root, settings, kinds):
    data = shard_data(str(root), **settings)
    with pytest.raises(UserError, match=rf"^None of 24 samples of the shards has a label \({kinds}\): compare data\."):
        label_counts(data.open("train", str(root)).shards, data.config)


def test_what_is_filtered_is_not_damaged():
    check_skipped(Counter({"filtered": 900, "bad image": 9}), 1000, 0.1)
    with pytest.raises(UserError, match=r"^11 of 100 samples of 'v' were skipped \(bad image × 11\): more than data\."):
        check_skipped(Counter({"filtered": 900, "bad image": 11}), 1000, 0.1, where=" of 'v'")
    check_skipped(Counter({"filtered": 1000}), 1000, 0.1, at_least=100)
    with pytest.raises(UserError, match=r"^data\.where holds for none of 10,001 samples: compare its names"):
        check_skipped(Counter({"filtered": 10_001}), 10_001, 0.1, at_least=100)


def test_show_counts_what_a_condition_skips(root):
    command = ["data", "show", ".", "--images", "0", "--json", "--caption-key", "new", "--where"]
    found = json.loads(call_nxtp(*command, "width >= 12", cwd=root).stdout)
    assert found["skipped"] == {"filtered": 12, "no caption": 1}
    assert found["labels"]["most_frequent"] == [["rose", 11]]
    assert "wrong at '> 3'" in call_nxtp(*command, "width > > 3", cwd=root).stderr
