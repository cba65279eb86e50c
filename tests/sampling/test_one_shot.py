"""Tree decoding against one label at a time and against the published way; ranking of what was sampled."""

import pytest
import torch
from by_definition import one_label_at_a_time
from helpers import tiny_config

from nxtp.model.model import Model
from nxtp.model.tokenizer import train_tokenizer
from nxtp.paper.reference import published_one_shot
from nxtp.sampling import one_shot as sampling
from nxtp.sampling.label_probability import Samples
from nxtp.sampling.one_shot import one_shot
from nxtp.sampling.ranking import RankingConfig, rank

VOCABULARY, DELIMITER, PROMPT = 60, 4, [1, 7, 8, 9]


def random_model(seed: int = 0, ends: float = 2.5, **decoder) -> Model:
    """Large logits, so that choices are clear; ``ends`` scales the delimiter's, so that labels end early."""
    torch.manual_seed(seed)
    model = Model(tiny_config(**decoder), VOCABULARY).eval()
    with torch.no_grad():
        model.decoder.lm.model.embed_tokens.weight.normal_()
        head = model.decoder.lm.lm_head.weight.normal_(std=0.5)
        head[DELIMITER] *= ends
    return model


def random_images(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def assert_same(samples: Samples, plain: list[list[tuple[list[int], list[float]]]], max_tokens: int) -> None:
    assert samples.tokens_BKL.shape[:2] == (len(plain), len(plain[0]))
    for i, image in enumerate(plain):
        for j, (tokens, probs) in enumerate(image):
            ended = tokens[-1] == DELIMITER
            length = int(samples.lengths_BK[i, j])
            assert length == len(tokens) - ended
            assert ended or length == max_tokens
            assert samples.tokens_BKL[i, j, :length].tolist() == tokens[:length]
            assert (samples.tokens_BKL[i, j, length:] == DELIMITER).all()
            torch.testing.assert_close(samples.probs_BKL[i, j, : len(probs)], torch.tensor(probs), rtol=1e-4, atol=0)
            assert (samples.probs_BKL[i, j, len(probs) :] == 1).all()
            score = torch.tensor(probs).prod()
            torch.testing.assert_close(samples.label_probs_BK[i, j], score, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("batch", "top_k", "max_tokens", "ends"),
    [
        *((*sizes, ends) for sizes in [(1, 1, 5), (1, 8, 1), (2, 5, 2), (3, 7, 6)] for ends in (0.0, 1.0, 2.5)),
        (2, 30, 9, 2.5),
    ],
)
def test_branches_of_one_row_are_single_sequences(batch, top_k, max_tokens, ends):
    model = random_model(seed=batch, ends=ends)
    options = {"prompt": PROMPT, "delimiter": DELIMITER, "top_k": top_k, "max_tokens": max_tokens}
    images = random_images(batch, seed=top_k)
    samples = one_shot(model, images, **options)
    assert_same(samples, one_label_at_a_time(model, images, **options), max_tokens)
    published = published_one_shot(model, images, **options)
    assert torch.equal(samples.tokens_BKL, published.tokens_BKL)
    assert torch.equal(samples.lengths_BK, published.lengths_BK)
    torch.testing.assert_close(samples.probs_BKL, published.probs_BKL, rtol=1e-4, atol=1e-7)


def test_probabilities_are_float32_whatever_the_default_dtype():
    """Lightning's under `trainer.precision=bf16-true` is bfloat16, in validation too."""
    model = random_model().bfloat16()
    torch.set_default_dtype(torch.bfloat16)
    try:
        samples = one_shot(model, random_images(1), prompt=PROMPT, delimiter=DELIMITER, top_k=3, max_tokens=3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert samples.probs_BKL.dtype == torch.float32


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_ended_branches_leave_the_cache(monkeypatch, kv_heads):
    model = random_model(seed=5, num_key_value_heads=kv_heads)
    images = random_images(3)
    kept = []
    keep_branches = sampling._keep_branches

    def spy(cache, keep_BA, prefix, steps):
        keep_branches(cache, keep_BA, prefix, steps)
        kept.append((keep_BA.shape[1], steps, cache.layers[0].keys.shape[2] - prefix))

    monkeypatch.setattr(sampling, "_keep_branches", spy)
    options = {"prompt": PROMPT, "delimiter": DELIMITER, "top_k": 20, "max_tokens": 10}
    samples = one_shot(model, images, **options)
    assert sum(steps > 0 for _, steps, _ in kept) >= 2, "the cache is to be thinned in the middle"
    assert all(cached == branches * steps for branches, steps, cached in kept)
    assert samples.lengths_BK.unique().numel() >= 4
    assert_same(samples, one_label_at_a_time(model, images, **options), 10)


def test_an_image_does_not_depend_on_its_batch():
    model, images = random_model(), random_images(4)
    options = {"prompt": PROMPT, "delimiter": DELIMITER, "top_k": 9, "max_tokens": 6}
    together = one_shot(model, images, **options)
    for i in range(4):
        alone = one_shot(model, images[i : i + 1], **options)
        length = alone.tokens_BKL.shape[-1]
        assert torch.equal(together.tokens_BKL[i, :, :length], alone.tokens_BKL[0])
        torch.testing.assert_close(together.probs_BKL[i, :, :length], alone.probs_BKL[0], rtol=1e-4, atol=1e-7)


def test_fewer_labels_are_the_first_of_more():
    model, images = random_model(), random_images(2)
    options = {"prompt": PROMPT, "delimiter": DELIMITER, "max_tokens": 6}
    few, many = (one_shot(model, images, top_k=k, **options) for k in (3, 12))
    length = few.tokens_BKL.shape[-1]
    assert torch.equal(few.tokens_BKL, many.tokens_BKL[:, :3, :length])


def test_no_label_starts_with_what_is_never_first():
    model, images = random_model(), random_images(2)
    options = {"prompt": PROMPT, "delimiter": DELIMITER, "max_tokens": 3}
    free = one_shot(model, images, top_k=5, **options)
    banned = sorted({DELIMITER, *free.tokens_BKL[..., 0].flatten().tolist()[:4]})
    samples = one_shot(model, images, top_k=5, never_first=banned, **options)
    assert not torch.isin(samples.tokens_BKL[..., 0], torch.tensor(banned)).any()
    assert (samples.probs_BKL > 0).all()
    assert_same(samples, one_label_at_a_time(model, images, top_k=5, never_first=banned, **options), 3)


@pytest.mark.parametrize("never_first", [(), (0, 1, 1, DELIMITER)])
def test_more_labels_than_first_tokens(never_first):
    model, images = random_model(), random_images(2)
    options = {"prompt": PROMPT, "delimiter": DELIMITER, "max_tokens": 2, "never_first": never_first}
    samples = one_shot(model, images, top_k=10 * VOCABULARY, **options)
    allowed = VOCABULARY - len(set(never_first))
    assert samples.tokens_BKL.shape[:2] == (2, allowed)
    assert all(row.unique().numel() == allowed for row in samples.tokens_BKL[..., 0])
    total = samples.probs_BKL[..., 0].sum(dim=1)
    assert (total <= 1 + 1e-5).all()
    assert never_first or torch.allclose(total, torch.ones(2))


def made_samples(tokenizer, *images: dict[str, float]) -> Samples:
    """Samples that spell the given labels, the whole probability on the first token."""
    rows = [[(list(tokenizer.encode_labels([label])[0]), p) for label, p in image.items()] for image in images]
    longest = max(len(ids) for row in rows for ids, _ in row) + 1
    shape = (len(rows), len(rows[0]), longest)
    tokens = torch.full(shape, tokenizer.delimiter_id)
    probs = torch.ones(shape)
    lengths = torch.zeros(shape[:2], dtype=torch.long)
    for i, row in enumerate(rows):
        for j, (ids, probability) in enumerate(row):
            tokens[i, j, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            lengths[i, j], probs[i, j, 0] = len(ids), probability
    return Samples(tokens, probs, lengths, torch.zeros_like(lengths, dtype=torch.bool))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["dog", "Dog", "cat", "red panda", "bee"], vocab_size=400)


def test_duplicates_are_merged_and_the_most_probable_comes_first(tokenizer):
    samples = made_samples(
        tokenizer, {"cat": 0.25, "dog": 0.2, "Dog": 0.125, "bee": 0.25}, {"": 0.9, "red panda": 0.5, "bee": 0, "cat": 0}
    )
    first, second = rank(samples, tokenizer.decode_label, RankingConfig(), 3)
    assert [label for label, _ in first] == ["dog", "bee", "cat"], "equal probabilities: in alphabetical order"
    assert [probability for _, probability in first] == pytest.approx([0.325, 0.25, 0.25])
    assert second == [("red panda", 0.5), ("bee", 0.0), ("cat", 0.0)], "an empty label is left out"
    assert rank(samples, tokenizer.decode_label, RankingConfig(), 1) == [first[:1], second[:1]]
