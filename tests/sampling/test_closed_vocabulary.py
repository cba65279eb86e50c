"""A closed vocabulary in one pass is every label scored alone; sampling restricted to it writes nothing else."""

import math

import pytest
import torch
from helpers import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from nxtp.data.labels.imagenet import imagenet_classes
from nxtp.errors import UserError
from nxtp.inference.recognizer import Recognizer
from nxtp.model.layout import lay_out
from nxtp.model.model import Model
from nxtp.model.tokenizer import train_tokenizer
from nxtp.sampling import closed_vocabulary as module
from nxtp.sampling.closed_vocabulary import Tree, Vocabulary, class_log_probs, name_log_probs, read_classes

LABELS = ["coffee", "coffee table", "table", "tablet", "red rose", "red", "rose", "cat", "cattle", "a very long label"]
TOKENIZER = train_tokenizer(["coffee table", "rose", "cat"], vocab_size=330)


@pytest.fixture(scope="module")
def recognizer():
    torch.manual_seed(0)
    config = tiny_config()
    model = Model(config, len(TOKENIZER)).eval()
    torch.nn.init.normal_(model.decoder.lm.lm_head.weight, std=0.3)
    return Recognizer(model, TOKENIZER, config)


def images(count=2):
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@torch.no_grad()
def alone(recognizer, pixels, label):
    """The logarithm of a label's probability, laid out by itself as in training."""
    (ids,) = TOKENIZER.encode_labels([label])
    layout = lay_out(
        [[ids]],
        prompt=TOKENIZER.prompt_ids,
        delimiter=TOKENIZER.delimiter_id,
        num_image_tokens=recognizer.model.num_image_tokens,
    )
    return -recognizer.model(pixels[None], layout).total.item()


@pytest.mark.parametrize(("row", "logits"), [(4096, 1 << 26), (1, 1 << 26), (8, 1)], ids=["whole", "rows", "blocks"])
def test_one_pass_equals_every_label_alone(recognizer, monkeypatch, row, logits):
    monkeypatch.setattr(module, "_ROW", row)
    monkeypatch.setattr(module, "_LOGITS", logits)
    pixels = images(3)
    known = Vocabulary(LABELS, TOKENIZER)
    assert len(known.tree) < sum(map(len, known.sequences)), "labels that begin alike share nodes"
    found = name_log_probs(recognizer.model, pixels, known, prompt=TOKENIZER.prompt_ids)
    expected = [[alone(recognizer, image, label) for label in LABELS] for image in pixels]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_classify_adds_synonyms_and_orders(recognizer):
    classes = [["cat", "cattle"], "rose", ["coffee", "coffee table", "coffee"], ["red rose", "rose"]]
    expected = {}
    for names in classes:
        names = [names] if isinstance(names, str) else names
        expected[names[0]] = sum(math.exp(alone(recognizer, images()[0], name)) for name in set(names))
    found = recognizer.classify(images()[0], classes)
    assert dict(found) == pytest.approx(expected, rel=1e-5)
    assert [p for _, p in found] == sorted((p for _, p in found), reverse=True)
    assert recognizer.classify(images()[0], classes, top_k=2) == found[:2]
    each = recognizer.classify(list(images(5)), recognizer.prepare_classes(classes), batch_size=2)
    for image, labels in zip(images(5), each, strict=True):
        assert dict(labels) == pytest.approx(dict(recognizer.classify(image, classes)), rel=1e-5)


def test_probabilities_of_a_class_s_names_add_up(monkeypatch):
    known = Vocabulary([["cat", "cattle"], "rose", ["table", "cat", "table"]], TOKENIZER)
    log_probs = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.0, 0.25, 0.125]]).log()
    monkeypatch.setattr(module, "name_log_probs", lambda *_, **__: log_probs)
    sums = class_log_probs(None, None, known, prompt=[]).exp()
    torch.testing.assert_close(sums, torch.tensor([[0.3, 0.3, 0.5], [0.5, 0.25, 0.625]]))


def test_a_probability_does_not_depend_on_the_other_labels(recognizer):
    alone_, company = recognizer.classify(images()[0], ["cat"]), dict(recognizer.classify(images()[0], LABELS))
    assert company["cat"] == pytest.approx(alone_[0][1], rel=1e-5)
    assert sum(company.values()) < 1


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=12, unique=True))
@settings(max_examples=30, deadline=None)
def test_a_tree_holds_each_beginning_once(sequences):
    tree = Tree.of(sequences)
    assert len(tree) == len({s[:n] for s in sequences for n in range(1, len(s) + 1)})

    def path(node):
        parent = int(tree.parents_M[node])
        return ((*path(parent),) if parent >= 0 else ()) + (int(tree.tokens_M[node]),)

    assert [path(int(end)) for end in tree.ends_S] == sequences
    for size in (1, 3, 100):
        rows = list(tree.rows(size))
        assert [n for begin, end in rows for n in range(begin, end)] == list(range(len(tree)))
        for begin, end in rows:
            expected = [[path(b) == path(a)[: len(path(b))] for b in range(begin, end)] for a in range(begin, end)]
            assert tree.ancestors(begin, end).tolist() == expected
            assert end - begin <= size or len({path(n)[0] for n in range(begin, end)}) == 1


def test_sampling_restricted_to_classes_writes_nothing_else(recognizer):
    free = {label for labels in recognizer.predict(list(images(4)), top_k=10) for label, _ in labels}
    assert not free & set(LABELS), "the random model would not write them by itself"
    for image in images(4):
        exact = dict(recognizer.classify(image, LABELS))
        found = recognizer.predict(image, top_k=10, classes=LABELS)
        firsts = {TOKENIZER.encode_labels([label])[0][0] for label in LABELS}
        assert len(found) == len(firsts), "one label for each first token"
        for label, probability in found:
            assert probability == pytest.approx(exact[label], rel=1e-4)
    assert recognizer.predict(images()[0], top_k=1, classes=["a very long label"])[0][0] == "a very long label"
    batch = recognizer.predict(list(images(4)), top_k=10, classes=LABELS)
    for image, labels in zip(images(4), batch, strict=True):
        assert dict(labels) == pytest.approx(dict(recognizer.predict(image, top_k=10, classes=LABELS)), rel=1e-4)


def test_wrong_use_is_a_user_error(recognizer, tmp_path):
    with pytest.raises(UserError, match="Only one-shot sampling"):
        recognizer.predict(images()[0], classes=LABELS, sampler="exact")
    with pytest.raises(UserError, match="at least one class"):
        recognizer.classify(images()[0], [])
    with pytest.raises(UserError, match="' ' has no tokens"):
        recognizer.classify(images()[0], ["cat", " "])
    with pytest.raises(ValueError, match="top_k must be ≥ 1, got 0"):
        recognizer.classify(images()[0], ["cat"], top_k=0)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_classes(tmp_path / "nothing.txt")
    (tmp_path / "empty.txt").write_text("\n , \n")
    with pytest.raises(UserError, match="contains no class"):
        read_classes(tmp_path / "empty.txt")
    (tmp_path / "twice.txt").write_text("ferry\n\ncat, ferry\n Ferry , boat\n")
    with pytest.raises(UserError, match=r"twice\.txt': 'ferry' \(line 1\) and 'Ferry' \(line 4\) are one") as error:
        read_classes(tmp_path / "twice.txt")
    assert "\n" not in str(error.value)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        read_classes(tmp_path / "binary.txt")
    with pytest.raises(UserError, match="Did you mean 'first'"):
        read_classes("imagenet1k:frist")


def test_classes_of_a_file_and_of_imagenet(tmp_path):
    (tmp_path / "classes.txt").write_text("bicycle, bike\n\ncar, bike, Car\n")
    assert read_classes(tmp_path / "classes.txt") == [["bicycle", "bike"], ["car", "bike", "Car"]]
    assert read_classes("imagenet1k") == [list(c.synonyms) for c in imagenet_classes()]
    assert all(len(names) == 1 for names in read_classes("imagenet1k:first"))
    adversarial = read_classes("imagenet1k:a")
    assert len(adversarial) == len(read_classes("imagenet1k:r")) == 200
    assert adversarial[0] == ["stingray"], "the first of ImageNet-A's classes, number 6"
    shared = Vocabulary(read_classes("imagenet1k"), TOKENIZER)
    cranes = [owner for owner, names in enumerate(shared.classes) if "crane" in names]
    assert len(cranes) == 2, "a name that two classes share counts for both"
    place = shared.sequences.index(TOKENIZER.encode_labels(["crane"])[0])
    assert [owner for owner, names in enumerate(shared.names_CN.tolist()) if place in names] == cranes
