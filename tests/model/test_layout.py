"""The attention rule against its scalar definition; both objectives against a plain construction."""

import pytest
import torch
from by_definition import mask_by_definition
from hypothesis import given, settings
from hypothesis import strategies as st

from nxtp.errors import UserError
from nxtp.model.attention_rule import ATTENTION, attention_mask, branch_mask
from nxtp.model.layout import Objective, lay_out

DELIMITER = 4
label = st.lists(st.integers(5, 60), min_size=1, max_size=4)
batch_of_labels = st.lists(st.lists(label, max_size=4), min_size=1, max_size=4)
prompts = st.lists(st.integers(5, 60), min_size=1, max_size=4)
objectives = st.builds(
    Objective, st.sampled_from(["parallel", "continued"]), st.sampled_from(["prompt", "delimiter"]), st.booleans()
)


def plain_pairs(labels, prompt, num_image_tokens, objective):
    """For each image: its text tokens, positions, segments, and {(source, target)}, built token by token."""
    prefix = num_image_tokens + 1 + len(prompt)
    for image in labels:
        tokens, segments, positions, pairs = list(prompt), [0] * prefix, list(range(prefix)), []
        if objective.supervise_prompt:
            pairs += [(num_image_tokens + i, token) for i, token in enumerate(prompt)]
        for number, ids in enumerate(image, start=1):
            for offset, token in enumerate([*ids, DELIMITER]):
                column = len(segments)
                at_prompt = objective.first_token == "prompt" and offset == 0
                source = prefix - 1 if at_prompt else column - 1
                pairs.append((source, token))
                tokens.append(token)
                segments.append(number)
                positions.append(prefix + offset if objective.positions == "parallel" else column)
        yield tokens, segments, positions, sorted(pairs)


@settings(max_examples=60, deadline=None)
@given(batch_of_labels, prompts, st.integers(1, 6), objectives)
def test_layout_is_the_plain_construction(labels, prompt, num_image_tokens, objective):
    layout = lay_out(labels, prompt=prompt, delimiter=DELIMITER, num_image_tokens=num_image_tokens, objective=objective)
    length = layout.segments_BT.shape[1]
    rows, columns = layout.sources[layout.pairs_S] // length, layout.sources[layout.pairs_S] % length
    plain = list(plain_pairs(labels, prompt, num_image_tokens, objective))
    assert layout.num_tokens == sum(len(segments) for _, segments, _, _ in plain)
    assert length == max(len(segments) for _, segments, _, _ in plain), "as long as the longest real sequence"
    assert len(layout.sources.unique()) == len(layout.sources)
    for i, (tokens, segments, positions, pairs) in enumerate(plain):
        real = len(segments)
        assert layout.tokens_BU[i, : len(tokens)].tolist() == tokens
        assert layout.segments_BT[i].tolist() == segments + [-1] * (length - real)
        assert layout.positions_BT[i, :real].tolist() == positions
        mine = rows == i
        assert sorted(zip(columns[mine].tolist(), layout.targets_S[mine].tolist(), strict=True)) == pairs


@settings(max_examples=30, deadline=None)
@given(batch_of_labels, prompts, st.integers(1, 6), objectives)
def test_a_length_of_a_multiple_adds_padding_only(labels, prompt, num_image_tokens, objective):
    fields = {"prompt": prompt, "num_image_tokens": num_image_tokens, "objective": objective}
    exact, padded = (lay_out(labels, delimiter=DELIMITER, multiple=n, **fields) for n in (1, 8))
    length = exact.segments_BT.shape[1]
    assert padded.segments_BT.shape[1] == -(-length // 8) * 8
    assert (padded.segments_BT[:, length:] == -1).all()
    for name in ("segments_BT", "positions_BT", "tokens_BU"):
        own, short = getattr(padded, name), getattr(exact, name)
        assert torch.equal(own[:, : short.shape[1]], short)
    assert torch.equal(padded.targets_S, exact.targets_S)
    rows, columns = padded.sources // padded.segments_BT.shape[1], padded.sources % padded.segments_BT.shape[1]
    assert torch.equal((rows * length + columns)[padded.pairs_S], exact.sources[exact.pairs_S])


@settings(max_examples=60, deadline=None)
@given(batch_of_labels, st.integers(1, 6), st.sampled_from(ATTENTION))
def test_mask_is_the_definition(labels, num_image_tokens, attention):
    layout = lay_out(labels, prompt=[1, 2], delimiter=DELIMITER, num_image_tokens=num_image_tokens)
    mask = layout.mask(attention)
    assert mask.dtype == torch.bool
    real = layout.segments_BT >= 0
    expected = mask_by_definition(layout.segments_BT, num_image_tokens, attention)
    assert torch.equal(mask[:, 0][real], expected[real]), "what padding sees is nobody's business"
    assert mask.any(dim=-1).all(), "a query without any key gives NaN in softmax"
    assert not (mask[:, 0] & real[:, :, None] & ~real[:, None, :]).any(), "a real token sees padding"


def test_query_start_leaves_out_rows():
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, -1]])
    assert torch.equal(attention_mask(segments, 2, query_start=3), attention_mask(segments, 2)[:, :, 3:])


@pytest.mark.parametrize(("prefix", "branches", "steps"), [(5, 1, 1), (4, 3, 1), (3, 4, 3)])
def test_branches_follow_the_same_rule(prefix, branches, steps):
    segments = torch.tensor([[0] * prefix + [*range(1, branches + 1)] * steps])
    last = attention_mask(segments, 2, query_start=prefix + branches * (steps - 1))
    assert torch.equal(branch_mask(prefix, branches, steps), last)


def test_what_cannot_be_laid_out_is_refused():
    with pytest.raises(ValueError, match="without tokens"):
        lay_out([[[]]], prompt=[1], delimiter=DELIMITER, num_image_tokens=2)
    with pytest.raises(ValueError, match="at least one token"):
        lay_out([[[7]]], prompt=[], delimiter=DELIMITER, num_image_tokens=2)
    with pytest.raises(UserError, match=r"objective.positions must be parallel or continued, got 'continue'. Did you"):
        Objective("continue")
    with pytest.raises(UserError, match=r"objective.first_token must be prompt or delimiter, got 'other'."):
        Objective(first_token="other")


def test_an_empty_batch_has_a_layout():
    layout = lay_out([], prompt=[1, 2], delimiter=DELIMITER, num_image_tokens=3)
    assert layout.segments_BT.shape == (0, 6)
    assert len(layout.targets_S) == 0
