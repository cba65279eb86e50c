"""Scores, merging and order of each ranking, on samples made by hand."""

import json

import open_clip
import pytest
import torch
from helpers import tiny_config
from safetensors.torch import save_file

from nxtp.errors import UserError
from nxtp.eval.embedders import ClipText, label_embedder
from nxtp.eval.metrics import semantic_scores
from nxtp.inference.recognizer import Recognizer
from nxtp.model.model import Model
from nxtp.model.tokenizer import train_tokenizer
from nxtp.sampling.autoregressive import split_labels
from nxtp.sampling.clip import Clip, ClipSimilarity
from nxtp.sampling.label_probability import Samples
from nxtp.sampling.ranking import RankingConfig, rank, ranking_config

END = 9
NAMES = {0: "ant", 1: "bee", 2: "Bee", 3: " cat"}


def spell(ids):
    return " ".join(NAMES[i] for i in ids)


def samples(*labels):
    """One image; each label its tokens and probabilities."""
    return Samples.of([labels], END)


def ranked(name, made, **settings):
    return rank(made, spell, RankingConfig(name, **settings), 10)[0]


MADE = samples(([1], [0.4, 0.1]), ([0], [0.3, 0.3]), ([2], [0.09, 0.9]), ([3, 0], [0.25, 0.5]), ([], [0.9]))


def same(found, expected):
    assert [label for label, _ in found] == [label for label, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected])


def test_prob_adds_up_and_ppl_takes_the_better_occurrence():
    same(ranked("prob", MADE), [("cat ant", 0.125), ("bee", 0.04 + 0.081), ("ant", 0.09)])
    same(ranked("ppl", MADE), [("cat ant", 0.125**0.5), ("ant", 0.3), ("bee", 0.081**0.5)])


def test_a_label_has_the_spelling_of_its_most_probable_occurrence():
    found = {label: label.written for label, _ in ranked("prob", MADE)}
    assert found == {"cat ant": " cat ant", "bee": "Bee", "ant": "ant"}


def test_probabilities_of_a_label_written_twice_do_not_add_up():
    made = split_labels(torch.tensor([[0, END, 1, END, 0, END]]), torch.full((1, 6), 0.9), END, max_tokens=5)
    same(ranked("prob", made), [("ant", 0.81), ("bee", 0.81)])
    same(ranked("prob", made, published=True), [("ant", 1.62), ("bee", 0.81)])


def test_published_ppl_is_the_recorded_defect():
    same(ranked("ppl", MADE, published=True), [("bee", 0.2), ("ant", 0.3), ("cat ant", 0.125**0.5)])


def test_a_cut_label_has_no_delimiter_in_its_mean():
    made = samples(([0, 1], [0.25, 0.25]), ([3], [0.5, 0.125]))
    assert made.cut_BK.tolist() == [[True, False]]
    assert dict(ranked("ppl", made)) == pytest.approx({"ant bee": 0.25, "cat": 0.25})


def test_none_keeps_the_order():
    assert ranked("none", MADE) == [("bee", 0.0), ("ant", 0.0), ("cat ant", 0.0)]


def test_similarity_is_that_of_its_definition():
    torch.manual_seed(0)
    model = Model(tiny_config(vocab_size=12)).eval()
    image = torch.randn(1, 3, 32, 32)
    made = samples(([0], [0.1, 0.1]), ([1, 3], [0.1, 0.1, 0.1]))
    with torch.no_grad():
        tokens = model.encode(image)[0]
        for name, best in (("sim_mean", min), ("sim_max", max)):
            expected = {}
            for text, ids in (("ant", [0, END]), ("bee cat", [1, 3, END])):
                rows = model.decoder.embed(torch.tensor(ids))
                cosine = torch.nn.functional.cosine_similarity(rows[:, None], tokens[None], dim=-1)
                distance = (2 - 2 * cosine).sqrt() / 2
                expected[text] = float(distance.mean() if name == "sim_mean" else cosine.amax(dim=1).mean())
            found = rank(
                made, lambda ids: spell(ids).replace("  ", " "), RankingConfig(name), 10, model=model, images=image
            )
            assert dict(found[0]) == pytest.approx(expected, rel=1e-4)
            assert found[0][0][0] == best(expected, key=expected.get)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP as an architecture of open_clip's zoo with a weight file."""
    place = tmp_path_factory.mktemp("clip")
    (place / "nxtp-tiny-clip.json").write_text(
        json.dumps(
            {
                "embed_dim": 16,
                "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
                "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
            }
        )
    )
    open_clip.add_model_config(place)
    torch.manual_seed(0)
    model = open_clip.create_model("nxtp-tiny-clip", pretrained=None)
    save_file(model.state_dict(), place / "weights.safetensors")
    return f"nxtp-tiny-clip:{place / 'weights.safetensors'}", model.eval()


def test_clip_ranks_by_similarity_of_image_and_text(clip):
    source, model = clip
    images = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    similarity = ClipSimilarity(source)
    made = Samples.of([[([0], [0.5, 0.5]), ([1], [0.1, 0.1])]] * 2, END)
    found = rank(made, spell, RankingConfig("clip"), 10, images=images, clip=similarity)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        image = model.encode_image((images / 255 - mean) / std, normalize=True)
        text = model.encode_text(open_clip.get_tokenizer("nxtp-tiny-clip")(["ant", "bee"]), normalize=True)
    for row, expected in zip(found, (image @ text.T).tolist(), strict=True):
        assert dict(row) == pytest.approx(dict(zip(["ant", "bee"], expected, strict=True)), abs=1e-5)
        assert row[0][1] >= row[1][1]


def test_clip_text_as_the_metrics_encoder(clip):
    source, model = clip
    embedder = label_embedder(f"clip:{source}", device="cpu")
    assert isinstance(embedder, ClipText)
    rows = embedder.embed(["dog", "coffee table", "dog"])
    with torch.no_grad():
        tokens = open_clip.get_tokenizer("nxtp-tiny-clip")(["dog", "coffee table", "dog"])
        torch.testing.assert_close(rows, model.encode_text(tokens, normalize=True), rtol=1e-4, atol=1e-5)
    assert len(embedder) == 2
    scores = semantic_scores([["dog", "cat"]], [["dog"]], embedder)
    assert scores.recall.item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ViT-L14/openai", "Did you mean 'ViT-L-14'"),
        ("ViT-L-14/opnai", "Did you mean 'openai'"),
        ("ViT-L-14:/nowhere.pt", "No CLIP weights at '/nowhere.pt'"),
        ("ViT-L-14", "use ViT-L-14/TAG"),
    ],
)
def test_a_clip_that_is_not_there_is_named(source, message):
    with pytest.raises(UserError, match=message):
        Clip(source)


def test_rankings_by_name(clip):
    tokenizer = train_tokenizer(["dog", "cat"], vocab_size=400)
    config = tiny_config(vocab_size=len(tokenizer))
    recognizer = Recognizer(Model(config), tokenizer, config)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    for ranking in ("prob", "ppl", "sim_mean", "sim_max", "none", {"name": "clip", "clip": clip[0]}):
        first, second = recognizer.predict_pixels(images, 4, ranking=ranking)
        assert [label for label, _ in first] == [label for label, _ in second]
        assert first
    with pytest.raises(UserError, match=r"No ranking 'pbl'"):
        ranking_config("pbl")
    with pytest.raises(UserError, match=r"No ranking 'sim_men'. Did you mean 'sim_mean'"):
        ranking_config("sim_men")
