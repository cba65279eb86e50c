"""Where a label looks: the decoder's own weights, of the right tokens, on the right patches."""

import math

import numpy as np
import pytest
import torch
from helpers import ending_recognizer, jpeg, recognizer
from PIL import Image
from transformers.models.llama import modeling_llama

from nxtp.errors import UserError
from nxtp.inference import recognizer as inference
from nxtp.inference.figures import AttentionItem, overlay, save_attention
from nxtp.inference.recognizer import Recognizer
from nxtp.model.attention_maps import average, grid_side
from nxtp.model.layout import lay_out
from nxtp.sampling.one_shot import OneShotConfig
from nxtp.sampling.samplers import sample


@torch.no_grad()
def first_block_by_hand(ours: Recognizer, image, label) -> torch.Tensor:
    """[heads, T, T] of the first block, from its own projections, scores and rotary embedding."""
    model, tokenizer = ours.model, ours.tokenizer
    (ids,) = tokenizer.encode_labels([label])
    layout = lay_out(
        [[ids]],
        prompt=tokenizer.prompt_ids,
        delimiter=tokenizer.delimiter_id,
        num_image_tokens=model.num_image_tokens,
    )
    x = model.embed(model.encode(ours.transform(image)[None]), layout.tokens_BU, layout.num_prompt_tokens)
    block, lm = model.decoder.blocks[0], model.decoder.lm.model
    cos, sin = lm.rotary_emb(x, layout.positions_BT)
    normed = block.input_layernorm(x)
    heads = lm.config.num_attention_heads

    def rotated(projection):
        value = projection(normed).unflatten(-1, (heads, -1)).transpose(1, 2)
        left, right = value.chunk(2, dim=-1)
        return value * cos[:, None] + torch.cat([-right, left], dim=-1) * sin[:, None]

    queries, keys = rotated(block.self_attn.q_proj), rotated(block.self_attn.k_proj)
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    return scores.masked_fill(~layout.mask(), -torch.inf).softmax(dim=-1)[0]


def test_weights_are_those_of_the_labels_tokens_on_the_grid():
    ours, image = recognizer(), jpeg((200, 40, 60))
    label = "hot dog"
    (ids,) = ours.tokenizer.encode_labels([label])
    found = ours.attention(image, label)
    assert found.shape == (2, 4, len(ids), 4, 4)
    by_hand = first_block_by_hand(ours, image, label)
    begin = ours.model.num_image_tokens + 1 + len(ours.tokenizer.prompt_ids)
    expected = by_hand[:, begin : begin + len(ids), :16].reshape(4, len(ids), 4, 4)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-6)
    assert (found.sum(dim=(-1, -2)) < 1).all(), "the prompt and the label have their share"
    torch.testing.assert_close(ours.attention(image, label), found)
    between = ours.patch_attention(image)
    assert between.shape == (2, 4, 16, 16)
    torch.testing.assert_close(between[0], by_hand[:, :16, :16], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(between.sum(dim=-1), torch.ones(2, 4, 16))


def test_relevance_is_a_weight_times_what_it_does_to_the_labels_probability(monkeypatch):
    """Against a nudge of single weights, in the rows that predict the label's tokens."""
    ours, image = recognizer(), jpeg((200, 40, 60))
    model, tokenizer = ours.model, ours.tokenizer
    (ids,) = tokenizer.encode_labels(["hot dog"])
    found = ours.relevance(image, "hot dog")
    assert found.shape == (2, 4, len(ids), 4, 4)
    assert found.max() > 0 == found.min()
    found = found.flatten(3)
    where = {"prompt": tokenizer.prompt_ids, "delimiter": tokenizer.delimiter_id, "num_image_tokens": 16}
    layout, plain, nudge = lay_out([[ids]], **where), modeling_llama.eager_attention_forward, {}
    first = 16 + len(tokenizer.prompt_ids)

    def nudged(module, query, key, value, *args, **kwargs):
        out, weights = plain(module, query, key, value, *args, **kwargs)
        if module.layer_idx == nudge.get("block"):
            out[0, nudge["row"], nudge["head"]] += nudge["by"] * value[0, nudge["head"], nudge["column"]]
        return out, weights

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", nudged)

    @torch.no_grad()
    def log_prob() -> tuple[float, list[torch.Tensor]]:
        embeddings = model.embed(model.encode(ours.transform(image)[None]), layout.tokens_BU, layout.num_prompt_tokens)
        hidden, weights = model.decoder.attention(embeddings, layout.positions_BT, layout.mask())
        logits = model.decoder.logits(hidden[0]).log_softmax(dim=-1)
        return sum(logits[first + i, token].item() for i, token in enumerate(ids)), weights

    _, weights = log_prob()
    for block in (0, 1):
        for flat in (int(found[block].argmax()), int(found[block].argmin())):  # one that raises it, one that does not
            head, token, column = (int(n) for n in np.unravel_index(flat, found[block].shape))
            nudge.update(block=block, head=head, row=first + token, column=column)
            up, down = (log_prob()[0] for nudge["by"] in (0.05, -0.05))
            expected = weights[block][0, head, first + token, column] * (up - down) / 0.1
            torch.testing.assert_close(found[block, head, token, column], expected.clamp(min=0), rtol=0.02, atol=1e-7)


def test_a_predicted_label_is_asked_about_as_it_was_written(monkeypatch):
    """The text that is returned is in lower case."""
    ours, image = ending_recognizer(), jpeg((200, 40, 60))
    predicted = ours.predict(image, top_k=5)
    asked = []
    monkeypatch.setattr(inference, "label_relevance", lambda model, pixels, label, **_: asked.append(tuple(label)))
    for label, _ in predicted:
        ours.relevance(image, label)
    pixels, tokenizer = ours.transform(image)[None], ours.tokenizer
    samples = sample(ours.model, pixels, OneShotConfig(), tokenizer=tokenizer, top_k=5)
    written = [
        tokenizer.decode_label(ids[:length])
        for ids, length in zip(samples.tokens_BKL[0].tolist(), samples.lengths_BK[0].tolist(), strict=True)
    ]
    assert set(asked) <= set(tokenizer.encode_labels(written)), "some are written twice"
    assert any(tokenizer.decode_label(ids) != label for ids, (label, _) in zip(asked, predicted, strict=True))


def test_an_average_is_of_what_is_named():
    weights = torch.rand(3, 4, 2, 5, 5)
    torch.testing.assert_close(average(weights), weights.mean(dim=(0, 1, 2)))
    torch.testing.assert_close(average(weights, block=-1), weights[2].mean(dim=(0, 1)))
    torch.testing.assert_close(average(weights, 1, 3), weights[1, 3].mean(dim=0))
    with pytest.raises(UserError, match="head must be from -4 to 3, got 4"):
        average(weights, head=4)


def test_an_overlay_is_brightest_where_the_weight_is(tmp_path):
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    weights = np.zeros((4, 4))
    weights[0, 3] = 0.5  # the upper right corner
    save_attention(tmp_path / "a.png", [AttentionItem(grey, [("rose", 0.5, weights)])])
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("L"), dtype=float)
    right = picture[70:, picture.shape[1] // 2 + 8 : -8]  # below the titles: the overlay
    rows, columns = right.shape[0] // 4, right.shape[1] // 4
    corner = right[: 2 * rows // 2, -columns:].mean()
    assert corner > right[2 * rows :, : 2 * columns].mean() + 30


def test_a_coarse_overlay_says_so():
    """In white letters at the bottom; black elsewhere, as the weights are 0."""
    black = Image.new("RGB", (256, 256))
    fine, coarse = (np.asarray(overlay(black, np.zeros((side, side)))) for side in (7, 6))
    assert fine[-40:].max() < 128 < coarse[-40:].max()
    assert coarse[:-40].max() < 128


def test_what_has_no_place_is_told():
    ours = recognizer()
    with pytest.raises(UserError, match="has no tokens"):
        ours.attention(jpeg((1, 2, 3)), " ")
    with pytest.raises(UserError, match="15 image tokens do not form a square grid"):
        grid_side(15)
