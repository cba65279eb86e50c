"""Every sample once over ranks × workers × epochs; labels; what is skipped is counted; resuming mid-epoch."""

import io
import itertools
import json
import logging
import tarfile
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import jpeg, sample, shard_data, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from nxtp.data.config import DataConfig, named_sources
from nxtp.data.labels.from_samples import label_counts, warn_if_nouns_differ
from nxtp.data.mixture import MixtureSource
from nxtp.data.sampler import ElasticBatchSampler, subset_counts
from nxtp.errors import UserError
from nxtp.prepare.writer import write_shard


def positions(plan: ElasticBatchSampler) -> list[int]:
    return [int(p) for _, run in plan for p in run]


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(sizes, st.integers(1, 7), st.integers(1, 5), st.integers(0, 3), st.integers(0, 50))
def test_plan_gives_every_sample_once(sizes, batch_size, world, epoch, window):
    total = sum(sizes)
    common = {"seed": 3, "shuffle_window": window, "world": world}
    evaluation = [ElasticBatchSampler(sizes, batch_size, shuffle=False, rank=r, **common) for r in range(world)]
    assert len({len(plan) for plan in evaluation}) == 1, "ranks out of step"
    batches = [run.tolist() for group in zip(*evaluation, strict=True) for _, run in group if len(run)]
    alone = ElasticBatchSampler(sizes, batch_size, shuffle=False)
    assert batches == [run.tolist() for _, run in alone], "the batches of one rank"
    assert sorted(p for run in batches for p in run) == list(range(total))

    if total < batch_size * world:
        with pytest.raises(UserError, match="do not fill one step"):
            ElasticBatchSampler(sizes, batch_size, shuffle=True, **common)
        return
    training = [ElasticBatchSampler(sizes, batch_size, shuffle=True, rank=r, **common) for r in range(world)]
    for plan in training:
        plan.set_epoch(epoch)
    seen = [p for plan in training for p in positions(plan)]
    assert len(seen) == len(set(seen)) == total // (batch_size * world) * batch_size * world
    # the global order does not depend on the number of ranks
    single = ElasticBatchSampler(sizes, batch_size * world, shuffle=True, seed=3, shuffle_window=window)
    single.set_epoch(epoch)
    steps = [np.concatenate([run for _, run in group]) for group in zip(*training, strict=True)]
    assert [run.tolist() for run in steps] == [run.tolist() for _, run in single]


def test_epochs_differ_and_repeat_by_seed():
    plan = ElasticBatchSampler([30, 30, 30], 5, shuffle=True, seed=1, shuffle_window=20)
    first = positions(plan)
    plan.set_epoch(1)
    second = positions(plan)
    assert first != second
    assert sorted(first) == sorted(second) == list(range(90))
    again = ElasticBatchSampler([30, 30, 30], 5, shuffle=True, seed=1, shuffle_window=20)
    assert positions(again) == first
    assert positions(ElasticBatchSampler([30, 30, 30], 5, shuffle=True, seed=2, shuffle_window=20)) != first


def test_every_window_of_every_epoch_has_an_order_of_its_own():
    """One shard, so that windows are all that is shuffled: the same order again would teach a sequence."""
    plan = ElasticBatchSampler([60], 20, shuffle=True, seed=1, shuffle_window=20)
    orders = set()
    for epoch in range(3):
        plan.set_epoch(epoch)
        line = positions(plan)
        orders |= {tuple(p - 20 * i for p in line[20 * i : 20 * i + 20]) for i in range(3)}
    assert len(orders) == 9


SOURCES = [MixtureSource("a", [0, 2]), MixtureSource("b", [1, 3, 4])]
SHARD_SIZES = [30, 50, 7, 20, 11]


def test_subsets_are_nested_and_keep_the_proportions():
    def chosen(**subset) -> set[int]:
        return set(positions(ElasticBatchSampler(SHARD_SIZES, 1, shuffle=False, sources=SOURCES, **subset)))

    total, previous = sum(SHARD_SIZES), set()
    in_a = {*range(30), *range(80, 87)}
    for count in range(1, total + 1):
        now = chosen(max_samples=count)
        assert len(now) == count
        assert previous < now
        assert abs(len(now & in_a) - count * 37 / total) <= 1
        previous = now
    assert chosen(fraction=0.1) == chosen(max_samples=12) < chosen(fraction=0.5)
    assert chosen(max_samples=12, subset_seed=1) != chosen(max_samples=12)
    assert chosen(max_samples=12, seed=5) == chosen(max_samples=12), "the training's seed does not change the choice"


@pytest.mark.parametrize("share", [{"fraction": 0.1}, {"sources": [MixtureSource("a", range(1000), 0.1)]}])
def test_a_small_share_is_of_few_shards(share):
    """Of 1,000 shards as many bytes are fetched as are used, though no more than a window's shards are kept."""
    plan, epochs = ElasticBatchSampler([50] * 1000, 10, shuffle=True, shuffle_window=200, **share), []
    for epoch in range(3):
        plan.set_epoch(epoch)
        windows = [set(window // 50) for window in np.array(positions(plan)).reshape(-1, 200)]
        assert max(map(len, windows)) <= 200 // 50 + 2
        fetched = sum(len(now - before) for before, now in itertools.pairwise([set(), *windows]))
        assert plan.total == 5000
        assert fetched * 50 < 1.1 * plan.total
        epochs.append(set.union(*windows))
    common = len(set.intersection(*epochs))
    assert common == (100 if "fraction" in share else 0), "a subset is fixed, a share of a repeat moves on"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=9), st.floats(0, 1))
def test_subset_counts_never_fall(sizes, share):
    wanted = int(share * sum(sizes))
    counts, more = subset_counts(sizes, wanted), subset_counts(sizes, min(wanted + 1, sum(sizes)))
    assert sum(counts) == wanted
    assert all(0 <= c <= m <= n for c, m, n in zip(counts, more, sizes, strict=True))


def test_a_repeat_is_how_often_a_sample_comes():
    sources = [MixtureSource("a", [0, 2], 2.0), MixtureSource("b", [1, 3, 4], 0.5)]
    plan = ElasticBatchSampler(SHARD_SIZES, 1, shuffle=True, sources=sources, shuffle_window=40)
    in_a = {*range(30), *range(80, 87)}
    seen = Counter()
    for epoch in range(4):
        plan.set_epoch(epoch)
        once = Counter(positions(plan))
        assert all(once[p] == 2 for p in in_a)
        assert sum(once.values()) == plan.total == 2 * 37 + round(0.5 * 81)
        assert max(once[p] for p in range(118) if p not in in_a) == 1
        seen.update(once)
    assert {seen[p] for p in range(118) if p not in in_a} <= {1, 2, 3}, "the half moves on"
    assert ElasticBatchSampler(SHARD_SIZES, 1, shuffle=False, sources=sources).total == 118, (
        "evaluation counts each once"
    )


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=3, max_size=8),
    st.lists(st.sampled_from([0.1, 0.5, 1.0, 1.7, 2.0]), min_size=3, max_size=3),
    st.sampled_from([None, 0.1, 0.37]),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.integers(0, 5),
    st.data(),
)
def test_a_mixture_gives_each_sample_as_often_as_its_repeat(sizes, weights, fraction, ranks, epoch, data):
    """Within the chosen subset, in any epoch, and when other ranks continue at any step."""
    sources = [MixtureSource(str(i), range(i, len(sizes), 3), weight) for i, weight in enumerate(weights)]
    common = {"sources": sources, "fraction": fraction, "shuffle_window": 25}
    if sum(sizes) == 0:
        return
    chosen = set(positions(ElasticBatchSampler(sizes, 1, shuffle=False, **common)))

    def plan(rank, world, batch_size=2):
        made = ElasticBatchSampler(sizes, batch_size, shuffle=True, rank=rank, world=world, **common)
        made.set_epoch(epoch)
        return made

    try:
        whole, first = plan(0, 1, 1), [plan(rank, ranks[0]) for rank in range(ranks[0])]
        rest = [plan(rank, ranks[1]) for rank in range(ranks[1])]
    except UserError:  # fewer samples than a step needs
        return
    seen = Counter(positions(whole))
    assert set(seen) <= chosen
    starts = np.cumsum(sizes) - sizes
    for source in sources:
        own = [p for s in source.shards for p in range(starts[s], starts[s] + sizes[s]) if p in chosen]
        floor = int(source.repeat)
        assert {seen[p] for p in own} <= {floor, floor + 1}
        assert sum(seen[p] for p in own) == floor * len(own) + round((source.repeat - floor) * len(own))
    steps = data.draw(st.integers(0, first[0].steps))
    got = Counter(p for one in first for _, run in list(one)[:steps] for p in run.tolist())
    for one in rest:
        one.start = steps * first[0].per_step
        got.update(positions(one))
    assert got <= seen, "none too often"
    assert whole.total - got.total() < rest[0].per_step, "all but an incomplete last step"


@pytest.mark.parametrize(("weight", "epochs", "times"), [(0.5, 4, 2), (1.7, 10, 17), (0.1, 10, 1), (2, 3, 6)])
def test_over_epochs_every_sample_comes_equally_often(weight, epochs, times):
    plan, seen = ElasticBatchSampler([20, 30], 1, shuffle=True, sources=[MixtureSource("a", [0, 1], weight)]), Counter()
    for epoch in range(epochs):
        plan.set_epoch(epoch)
        seen.update(positions(plan))
    assert seen == dict.fromkeys(range(50), times)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fraction": 0.0}, r"data\.fraction must be > 0 and ≤ 1, got 0\.0"),
        ({"fraction": 1.5}, r"data\.fraction must .* got 1\.5"),
        ({"seed": -1}, "^seed must be ≥ 0, got -1"),
        ({"subset_seed": -1}, r"data\.subset_seed must be ≥ 0, got -1"),
        ({"max_samples": 0}, r"data\.max_samples must be ≥ 1, got 0"),
        ({"max_samples": 5, "fraction": 0.5}, "give one of them"),
        ({"sources": [MixtureSource("a", [0], 0.0)]}, "repeat of source 'a' must be > 0"),
        ({"sources": [MixtureSource("a", [0], float("nan"))]}, "repeat of source 'a'"),
        ({"sources": [MixtureSource("a", [0], 1e9)]}, "≤ 10,000, got 1000000000"),  # a list of 10⁹ pieces
    ],
)
def test_subsets_and_weights_out_of_range(change, message):
    with pytest.raises(UserError, match=message):
        ElasticBatchSampler([9], 1, shuffle=True, **change)


@settings(max_examples=80, deadline=None)
@given(sizes, st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 40), st.data())
def test_other_ranks_continue_an_epoch(sizes, batch_size, before, after, window, data):
    """None is lost and none comes twice when the number of ranks changes in mid-epoch."""
    total = sum(sizes)
    if total < batch_size * max(before, after):
        return
    plans = [
        ElasticBatchSampler(sizes, batch_size, shuffle=True, shuffle_window=window, rank=r, world=before)
        for r in range(before)
    ]
    steps = data.draw(st.integers(0, plans[0].steps))
    head = [p for plan in plans for _, run in list(plan)[:steps] for p in run.tolist()]
    rest = []
    for rank in range(after):
        plan = ElasticBatchSampler(sizes, batch_size, shuffle=True, shuffle_window=window, rank=rank, world=after)
        plan.start = steps * plans[0].per_step
        rest += positions(plan)
    assert len(head) + len(rest) == len({*head, *rest})
    assert total - len(head) - len(rest) < batch_size * after, "all but an incomplete last step"


def test_a_plan_of_seventy_million_is_cheap():
    """Only the window at hand is computed: the middle of an epoch of 70 M samples is found at once."""
    tracemalloc.start()
    plan = ElasticBatchSampler([10_000] * 7_000, 512, shuffle=True)
    plan.start = 35_000_000
    _, run = next(iter(plan))
    assert len(set(run.tolist())) == 512
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_loader_gives_every_sample_once_for_any_workers(tmp_path, workers):
    root = write_shards(tmp_path / "s", [7, 3, 12])  # fewer shards than workers, none divisible
    loader = shard_data(val={"v": str(root)}, num_workers=workers).val_dataloader()[0]
    keys = [key for batch in loader for key in batch.keys]
    assert keys == [f"{i:06d}" for i in range(22)]


def test_order_does_not_depend_on_workers(tmp_path):
    root = write_shards(tmp_path / "s", [20, 20])
    orders = []
    for workers in (0, 2):
        loader = shard_data(str(root), num_workers=workers).train_dataloader()
        loader.sampler.set_epoch(2)
        orders.append([(batch.keys, batch.labels, batch.layout.tokens_BU.tolist()) for batch in loader])
    assert orders[0] == orders[1]


@pytest.mark.parametrize("done", [1, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_in_mid_epoch(tmp_path, done, workers):
    root = write_shards(tmp_path / "s", [20, 20])
    whole = shard_data(str(root)).train_dataloader()
    whole.sampler.set_epoch(1)
    expected = [batch.keys for batch in whole]

    first = shard_data(str(root), num_workers=workers).train_dataloader()
    first.sampler.set_epoch(1)
    iterator = iter(first)
    head = [next(iterator).keys for _ in range(done)]
    state = first.state_dict()  # loader workers have read further: only what was handed out counts
    rest = shard_data(str(root), num_workers=workers).train_dataloader()
    rest.load_state_dict(state)
    rest.sampler.set_epoch(1)
    assert head + [batch.keys for batch in rest] == expected
    rest.sampler.set_epoch(2)
    assert len([batch.keys for batch in rest]) == len(expected), "the next epoch starts at its beginning"


def test_a_position_is_of_its_epoch(tmp_path):
    """A state of another epoch does not cut this one short."""
    write_shards(tmp_path / "train", [24])
    loader = shard_data(tmp_path / "train").train_dataloader()
    loader.load_state_dict({"epoch": 3, "samples": 16})
    assert sum(len(batch) for batch in loader) == 24
    loader.load_state_dict({"epoch": 3, "samples": 16})
    loader.sampler.set_epoch(3)
    assert sum(len(batch) for batch in loader) == 8


def test_batch_holds_pixels_and_labels(tmp_path):
    root = write_shards(tmp_path / "s", [4])
    batch = next(iter(shard_data(val={"v": str(root)}).val_dataloader()[0]))
    assert batch.images.shape == (4, 3, 32, 32)
    assert batch.images.dtype == torch.uint8
    assert batch.labels == [["rose", "stone"], ["lemon", "stone"], ["leaf", "stone"], ["ocean", "stone"]]
    assert batch.samples_read == 4
    assert not batch.skipped


def test_labels_win_over_the_caption(tmp_path):
    write_shard(
        tmp_path / "a.tar", [{"__key__": "x", "jpg": jpeg((9, 9, 9)), "txt": "a lemon", "json": {"labels": ["rose"]}}]
    )
    batch = next(iter(shard_data(val={"v": str(tmp_path)}).val_dataloader()[0]))
    assert batch.labels == [["rose"]]


@pytest.mark.parametrize("given", ["all", "first"])
def test_given_labels_of_training(tmp_path, given):
    names = {"x": ["rose", "stone"], "y": ["lemon"]}
    content = [{"__key__": k, "jpg": jpeg((9, 9, 9)), "json": {"labels": v}} for k, v in names.items()]
    content.append({"__key__": "z", "jpg": jpeg((9, 9, 9)), "txt": "an ocean and a leaf"})
    write_shard(tmp_path / "a.tar", content)
    data = shard_data(str(tmp_path), {"v": str(tmp_path)}, batch_size=3, given_labels=given)
    (batch,) = data.train_dataloader()
    found = dict(zip(batch.keys, map(sorted, batch.labels), strict=True))
    assert found == {"x": ["rose", "stone"] if given == "all" else ["rose"], "y": ["lemon"], "z": ["leaf", "ocean"]}
    (batch,) = data.val_dataloader()[0]
    assert batch.labels[batch.keys.index("x")] == ["rose", "stone"], "validation keeps all names"


def test_labels_in_an_order_of_their_own_and_what_it_does_not_name_behind_them(tmp_path):
    names = ["rose", "stone", "lemon", "leaf", "ocean"]
    content = [{"__key__": f"{i}", "jpg": jpeg((9, 9, 9)), "json": {"labels": names}} for i in range(20)]
    write_shard(tmp_path / "a.tar", content)
    order = tmp_path / "order.txt"
    order.write_text("\ufeffOcean\n\n lemon\nfern\nrose\nocean\n", encoding="utf-8")  # by the first place of each
    data = shard_data(str(tmp_path), {"v": str(tmp_path)}, batch_size=20, max_labels=9, label_order=str(order))
    (batch,) = data.train_dataloader()
    assert {tuple(labels[:3]) for labels in batch.labels} == {("ocean", "lemon", "rose")}
    assert {tuple(labels[3:]) for labels in batch.labels} == {("stone", "leaf"), ("leaf", "stone")}, "shuffled"
    batch = next(iter(data.val_dataloader()[0]))
    assert batch.labels[0] == names, "validation keeps the given order"
    with pytest.raises(UserError, match=r"data.label_order: '.*none.txt' cannot be read: No such file or directory"):
        shard_data(str(tmp_path), label_order=str(tmp_path / "none.txt")).train_dataloader()
    order.write_text(" \n\n")
    with pytest.raises(UserError, match=r"order.txt' contains no label: write one per line"):
        shard_data(str(tmp_path), label_order=str(order)).train_dataloader()


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("given_labels", "frist", "must be all or first, got 'frist'. Did you mean 'first'?"),
        ("read_timeout", 0, "must be > 0 seconds, got 0."),
        ("read_timeout", float("inf"), "must be > 0 seconds, got inf."),
        ("caption_key", "parquet:", "=parquet: names no column: write parquet:COLUMN."),
        ("max_skip_fraction", 2, "must be ≥ 0 and ≤ 1, got 2."),
        ("max_skip_fraction", -0.1, "must be ≥ 0 and ≤ 1, got -0.1."),
        ("num_workers", -1, "must be ≥ 0, got -1."),
        ("max_image_pixels", 0, "must be ≥ 1, got 0."),
        ("max_labels", 0, "must be ≥ 1, got 0."),
        ("val", {"a": "s", "b/c": "s"}, "must not name a set 'b/c': its metrics are SET/METRIC."),
    ],
)
def test_settings_out_of_range(setting, value, message):
    with pytest.raises(UserError) as error:
        DataConfig(**{setting: value})
    assert str(error.value) == f"data.{setting} {message}".replace(" =", "=")


def test_images_of_too_many_pixels_are_skipped(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (50, 40)).save(picture, "PNG")
    write_shard(
        tmp_path / "a.tar", [{"__key__": f"{i}", "png": picture.getvalue(), "txt": "a lemon"} for i in range(4)]
    )
    for limit, skipped in ((2000, {}), (1999, {"bad image": 4})):
        batch = next(iter(shard_data(max_image_pixels=limit).loader("train", str(tmp_path), training=True)))
        assert batch.skipped == skipped


def test_bad_samples_are_skipped_and_counted(tmp_path):
    good = [sample(i) for i in range(3)]
    bad = [
        {"__key__": "b0", "jpg": b"not an image", "txt": "a lemon"},
        {"__key__": "b1", "jpg": jpeg((1, 2, 3))},
        {"__key__": "b2", "jpg": jpeg((1, 2, 3)), "txt": "of the and"},
        {"__key__": "b3", "jpg": jpeg((1, 2, 3))[:300], "txt": "a lemon"},
    ]
    write_shard(tmp_path / "a.tar", [*good, *bad])
    (batch,) = shard_data(val={"v": str(tmp_path)}, val_batch_size=16).val_dataloader()[0]
    assert batch.keys == [s["__key__"] for s in good]
    assert batch.samples_read == 7
    assert sum(batch.skipped.values()) == 4
    assert batch.skipped["no caption"] == batch.skipped["no labels"] == 1
    assert batch.skipped["bad image"] == 2


def test_damaged_shards_are_counted(tmp_path):
    write_shards(tmp_path, [6])
    (tmp_path / "empty.tar").touch()
    (tmp_path / "text.tar").write_text("this is no tar file" * 100)
    whole = (tmp_path / "part-00000.tar").read_bytes()
    (tmp_path / "torn.tar").write_bytes(whole[: len(whole) // 2])
    data = shard_data(val={"v": str(tmp_path)})
    loader = data.val_dataloader()[0]
    keys = [key for batch in loader for key in batch.keys]
    assert keys[:6] == [f"{i:06d}" for i in range(6)]
    assert sum(data.shard_faults.values()) == 3


def test_no_shards_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        shard_data(val={"v": str(tmp_path / "nowhere")}).val_dataloader()
    with tarfile.open(tmp_path / "none.tar", "w"):
        pass
    with pytest.raises(UserError, match="no sample"):
        shard_data(val={"v": str(tmp_path)}).val_dataloader()
    with pytest.raises(UserError, match=r"data\.train"):
        shard_data().train_dataloader()


def test_labels_are_what_the_samples_say(tmp_path):
    root = write_shards(tmp_path / "s", [5, 5])
    data = shard_data(str(root))
    texts = label_counts(data.open("train", str(root)).shards, data.config)
    assert sorted(texts) == ["leaf", "lemon", "ocean", "rose", "stone"]


def test_another_noun_backend_than_the_trainings_is_logged(tmp_path, caplog, monkeypatch):
    shards = write_shards(tmp_path / "s", [2])
    manifest = json.loads((shards / "manifest.json").read_text())
    with caplog.at_level(logging.WARNING, "nxtp"):
        warn_if_nouns_differ("val", str(shards), "hanta", "hanta")
        warn_if_nouns_differ("val", str(shards), "hanta", None)
        warn_if_nouns_differ("val", [str(shards)], "hanta", "hanta")
        assert not caplog.records
        warn_if_nouns_differ("val", str(shards), "hanta", "nltk")
        (shards / "manifest.json").write_text(json.dumps(manifest | {"nouns": {"backend": "nltk", "version": "1"}}))
        warn_if_nouns_differ("other", str(shards), "hanta", "hanta")
        warn_if_nouns_differ("list", [str(write_shards(tmp_path / "x", [2])), str(shards)], "hanta", "hanta")
        monkeypatch.setenv("HOME", str(tmp_path))
        warn_if_nouns_differ("home", "~/s", "hanta", "hanta")
    names = [record.getMessage().split(":")[0] for record in caplog.records]
    assert names == ["Set 'val'", "Set 'other'", "Set 'list'", "Set 'home'"]
    assert "'nltk'" in caplog.records[1].getMessage()


@pytest.mark.parametrize("repeat", [2, 0.1])
def test_repeat_is_a_whole_number_or_a_fraction(repeat):
    config = OmegaConf.create({"sbu": {"shards": "data/shards/sbu", "repeat": repeat}})
    assert named_sources(config)["sbu"].repeat == repeat
