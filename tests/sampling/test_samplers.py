"""Greedy, beam and exact search beside plain ways of computing the same."""

import itertools
from functools import cache, partial

import pytest
import torch
from by_definition import mask_by_definition
from helpers import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from nxtp.errors import UserError
from nxtp.inference.recognizer import Recognizer
from nxtp.model.attention_rule import ATTENTION
from nxtp.model.model import Model
from nxtp.model.tokenizer import train_tokenizer
from nxtp.sampling.autoregressive import (
    BeamConfig,
    GreedyConfig,
    _penalty_and_temperature,
    beam,
    greedy,
    published_text_mask,
    split_labels,
)
from nxtp.sampling.exact import ExactConfig, exact
from nxtp.sampling.one_shot import one_shot
from nxtp.sampling.samplers import SAMPLERS, never_first, sample, sampler_config

BOS, DELIMITER = 1, 2
PROMPT = [BOS, 3, 4]
COMMON = {"prompt": PROMPT, "delimiter": DELIMITER}


def tiny_model(vocabulary: int, seed: int = 0, scale: float = 1.0) -> Model:
    torch.manual_seed(seed)
    model = Model(tiny_config(vocab_size=vocabulary)).eval()
    with torch.no_grad():  # far from uniform, so that orders are clear
        model.decoder.lm.lm_head.weight.mul_(20 * scale)
        model.image_token.mul_(50)
    return model


def pictures(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 4 - 2


@cache
def mask_of_one_segment(length: int, images: int, attention: str) -> torch.Tensor:
    return mask_by_definition(torch.zeros(1, length, dtype=torch.long), images, attention)[None]


def plain_logits(model: Model, image: torch.Tensor, text: list[int], sees) -> torch.Tensor:
    """Logits of what follows ``text`` behind the prompt; ``sees(q, k)`` says what text position q sees of text k."""
    tokens = torch.tensor([[*PROMPT, *text]])
    embeddings = model.embed(model.encode(image), tokens, len(PROMPT))
    length = embeddings.shape[1]
    prefix = length - len(text)
    mask = mask_of_one_segment(length, model.num_image_tokens, model.config.attention).clone()
    for q, k in itertools.product(range(len(text)), range(len(text))):
        mask[0, 0, prefix + q, prefix + k] = k <= q and sees(q, k)
    return model.decoder.logits(model.decoder(embeddings, torch.arange(length)[None], mask)[0, -1])


def label_of(text: list[int]) -> list[int]:
    """The label that each token belongs to; a delimiter belongs to the label that it ends."""
    numbers, current = [], 0
    for token in text:
        numbers.append(current)
        current += token == DELIMITER
    return numbers


@pytest.mark.parametrize(("temperature", "attention"), [(0.0, "independent"), *((1.0, rule) for rule in ATTENTION)])
@torch.no_grad()
def test_greedy_sees_what_its_rule_allows_and_equals_the_plain_way(temperature, attention):
    model, images = tiny_model(7, scale=0.1), pictures(3)
    model.config.attention = attention
    config = GreedyConfig(max_new_tokens=10, temperature=temperature)
    tokens, probs = greedy(model, images, config, **COMMON, never_first=[BOS, DELIMITER])
    for image, written, given_probs in zip(images.split(1), tokens.tolist(), probs, strict=True):
        text: list[int] = []
        for token, prob in zip(written, given_probs, strict=True):
            number = label_of([*text, 0])
            own = attention == "independent"
            logits = plain_logits(model, image, text, lambda q, k, n=number, own=own: not own or n[q] == n[k])
            torch.testing.assert_close(prob, logits.softmax(-1)[token], rtol=1e-4, atol=1e-6)
            if not text or text[-1] == DELIMITER:
                logits[[BOS, DELIMITER]] = -torch.inf
            assert temperature > 0 or token == logits.argmax()
            assert logits[token] > -torch.inf
            text.append(token)
    assert temperature == 0 or (tokens[:, :-1] == DELIMITER).any(dim=1).all(), "texts of one label would show nothing"


def test_drawing_follows_its_seed_and_stays_within_top_k_and_top_p():
    model, images = tiny_model(30, scale=0.2), pictures(1).expand(64, -1, -1, -1)
    config = GreedyConfig(max_new_tokens=1, temperature=1.0, seed=3)
    first, again = (greedy(model, images, config, **COMMON)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert len(first.unique()) > 3
    probs = model.prefill(images[:1], PROMPT)[0].softmax(-1)[0]
    order = probs.argsort(descending=True)
    narrow = greedy(model, images, GreedyConfig(max_new_tokens=1, temperature=1.0, top_k=3), **COMMON)[0]
    assert set(narrow.flatten().tolist()) == set(order[:3].tolist())
    mass = probs[order].cumsum(0)
    within = order[: int((mass < 0.5).sum()) + 1]
    nucleus = greedy(model, images, GreedyConfig(max_new_tokens=1, temperature=1.0, top_p=0.5), **COMMON)[0]
    assert set(nucleus.flatten().tolist()) <= set(within.tolist())
    cold = greedy(model, images, GreedyConfig(max_new_tokens=1, temperature=1e-4), **COMMON)[0]
    assert cold.unique().tolist() == [int(order[0])]


def test_repetition_penalty_keeps_a_text_from_repeating():
    model, images = tiny_model(12), pictures(2)
    plain = greedy(model, images, GreedyConfig(max_new_tokens=9), **COMMON)[0]
    varied = greedy(model, images, GreedyConfig(max_new_tokens=9, repetition_penalty=50.0), **COMMON)[0]
    assert len(varied[0].unique()) > len(plain[0].unique())


@torch.no_grad()
def test_beam_search_of_full_width_finds_the_best_text():
    vocabulary, length = 5, 3
    model, images = tiny_model(vocabulary, scale=0.05), pictures(2)
    config = BeamConfig(max_new_tokens=length, num_beams=vocabulary ** (length - 1))
    tokens, probs = beam(model, images, config, **COMMON)
    for image, text, found in zip(images.split(1), tokens.tolist(), probs, strict=True):
        following = cache(partial(plain_log_probs, model, image))
        best = max(
            (sum(following(candidate[:i])[token].item() for i, token in enumerate(candidate)), candidate)
            for candidate in itertools.product(range(vocabulary), repeat=length)
        )
        assert tuple(text) == best[1]
        assert found.log().sum().item() == pytest.approx(best[0], abs=1e-4)
    one = beam(model, images, BeamConfig(max_new_tokens=length, num_beams=1), **COMMON)[0]
    assert torch.equal(one, greedy(model, images, GreedyConfig(max_new_tokens=length), **COMMON)[0])


def plain_log_probs(model: Model, image: torch.Tensor, text: tuple[int, ...]) -> torch.Tensor:
    """Of the token that follows ``text``, which sees its own label only."""
    number = label_of([*text, 0])
    return plain_logits(model, image, list(text), lambda q, k: number[q] == number[k]).log_softmax(-1)


def test_beam_search_may_end_with_eos_and_favours_length_by_its_penalty():
    model, images = tiny_model(6, scale=0.3), pictures(4)
    texts = [
        beam(model, images, BeamConfig(max_new_tokens=6, num_beams=4, length_penalty=power), **COMMON, eos=5)[0]
        for power in (0.0, 4.0)
    ]
    assert all((text != 5).all() for text in texts)
    used = [(text != DELIMITER).sum() for text in texts]
    assert used[0] <= used[1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([DELIMITER, 5, 6]), min_size=1, max_size=12))
def test_the_published_mask_is_what_the_description_says(text):
    prefix, length = 4, len(text)
    mask = published_text_mask(torch.tensor([text]), prefix, DELIMITER)[0, 0]
    ends = [i for i, token in enumerate(text) if token == DELIMITER]
    for q in range(length):
        unseen = set()
        for n, end in enumerate(ends[:-1]):  # delimiter n + 1 is out
            assert ends[n + 1] < length
            if q > end:
                unseen |= set(range(prefix - 1, prefix + end + 1))
        expected = [k <= prefix + q and k not in unseen for k in range(prefix + length)]
        assert mask[q].tolist() == expected


def enumerate_labels(model: Model, image: torch.Tensor, vocabulary: int, max_tokens: int, never: list[int]):
    """Every label and its probability, by asking the model for every prefix."""
    found, open_labels = {}, [((), 1.0)]
    while open_labels:
        label, probability = open_labels.pop()
        probs = plain_logits(model, image, list(label), lambda q, k: True).softmax(-1).tolist()
        for token in range(vocabulary):
            if not label and token in never:
                continue
            if token == DELIMITER:
                found[label] = probability * probs[token]
            elif len(label) + 1 == max_tokens:
                found[(*label, token)] = probability * probs[token]
            else:
                open_labels.append(((*label, token), probability * probs[token]))
    return sorted(found.items(), key=lambda item: -item[1])


@pytest.mark.parametrize(("seed", "branches"), [(0, 1), (1, 3), (2, 32)])
@torch.no_grad()
def test_exact_search_finds_what_enumeration_finds(seed, branches):
    vocabulary, never = 6, [BOS, DELIMITER]
    model, images = tiny_model(vocabulary, seed, scale=0.1), pictures(2, seed)
    config = ExactConfig(max_expansions=500, branches_per_step=branches, max_tokens=3)
    samples = exact(model, images, config, **COMMON, top_k=7, never_first=never)
    assert samples.complete_B.tolist() == [True, True]
    for i, image in enumerate(images.split(1)):
        expected = enumerate_labels(model, image, vocabulary, 3, never)[:7]
        tokens, lengths = samples.tokens_BKL[i].tolist(), samples.lengths_BK[i].tolist()
        labels = [tuple(row[:length]) for row, length in zip(tokens, lengths, strict=True)]
        assert labels == [label for label, _ in expected]
        torch.testing.assert_close(
            samples.label_probs_BK[i], torch.tensor([p for _, p in expected]), rtol=1e-4, atol=1e-7
        )
        assert samples.cut_BK[i].tolist() == [p for p in (samples.lengths_BK[i] == 3).tolist()]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
@torch.no_grad()
def test_exact_search_that_leaves_most_of_the_tree_alone_is_proven_at_its_bound_and_not_before(seed):
    vocabulary, never = 6, [BOS, DELIMITER]  # 24 inner nodes
    model, image = tiny_model(vocabulary, seed, scale=0.6), pictures(1, seed)
    model.decoder.lm.lm_head.weight[DELIMITER] *= 1.5
    expected = enumerate_labels(model, image, vocabulary, 3, never)[:3]
    proven = []
    for bound in range(25):
        config = ExactConfig(max_expansions=bound, branches_per_step=1, max_tokens=3)
        samples = exact(model, image, config, **COMMON, top_k=3, never_first=never)
        proven.append(samples.complete_B.item())
        if proven[-1]:
            found = zip(samples.tokens_BKL[0].tolist(), samples.lengths_BK[0].tolist(), strict=True)
            assert [tuple(row[:length]) for row, length in found] == [label for label, _ in expected]
    assert proven == sorted(proven), "what is proven stays proven"
    least = expected[-1][1]
    needed = sum(p > least for p in inner_nodes(model, image, vocabulary, 3, never))
    assert 0 < needed < 24
    assert proven.index(True) == needed, "best first: exactly the labels that are more probable than the last found"


def inner_nodes(model: Model, image: torch.Tensor, vocabulary: int, max_tokens: int, never: list[int]) -> list[float]:
    """Probability of every unfinished label of 1 … ``max_tokens`` - 1 tokens."""
    found, level = [], [((), 1.0)]
    for _ in range(max_tokens - 1):
        following = []
        for label, probability in level:
            probs = plain_logits(model, image, list(label), lambda q, k: True).softmax(-1).tolist()
            starts = [t for t in range(vocabulary) if t != DELIMITER and (label or t not in never)]
            following += [((*label, token), probability * probs[token]) for token in starts]
        found += [probability for _, probability in following]
        level = following
    return found


def test_exact_search_is_at_least_as_good_as_one_shot_and_says_when_it_gives_up():
    model, images = tiny_model(40, scale=0.3), pictures(3)
    shot = one_shot(model, images, **COMMON, top_k=5, max_tokens=6, never_first=[BOS, DELIMITER])
    config = ExactConfig(max_expansions=2000, max_tokens=6)
    best = exact(model, images, config, **COMMON, top_k=5, never_first=[BOS, DELIMITER])
    shot_scores = shot.label_probs_BK.sort(dim=1, descending=True).values
    assert best.complete_B.all()
    assert (best.label_probs_BK >= shot_scores - 1e-6).all()
    assert (best.label_probs_BK.sum(dim=1) > shot_scores.sum(dim=1) + 1e-4).any(), "labels that share a first token"
    config = ExactConfig(max_expansions=3, branches_per_step=2, max_tokens=6)
    assert not exact(model, images, config, **COMMON, top_k=5, never_first=[BOS, DELIMITER]).complete_B.any()


def test_texts_are_split_into_labels():
    tokens = torch.tensor([[5, 6, DELIMITER, 7, DELIMITER, DELIMITER, 8], [DELIMITER] * 7])
    probs = torch.full(tokens.shape, 0.5)
    samples = split_labels(tokens, probs, DELIMITER, max_tokens=19)
    assert samples.lengths_BK.tolist() == [[2, 1, 1], [0, 0, 0]]
    assert samples.cut_BK.tolist()[0] == [False, False, True]
    assert samples.label_probs_BK[0].tolist() == [0.125, 0.25, 0.5]
    cut = split_labels(tokens, probs, DELIMITER, max_tokens=1)
    assert cut.lengths_BK[0].tolist() == [1, 1, 1]
    assert cut.cut_BK[0].tolist() == [True, True, True], "as one-shot: the delimiter's probability does not enter"
    assert cut.label_probs_BK[0].tolist() == [0.5, 0.5, 0.5]


def test_a_beam_search_does_not_depend_on_its_batch():
    for seed in range(8):
        model, images = tiny_model(6, seed, scale=0.1), pictures(6, seed)
        with torch.no_grad():
            model.decoder.lm.lm_head.weight[5] *= 2  # EOS comes often
        together = beam(model, images, BeamConfig(max_new_tokens=8), **COMMON, eos=5)[0]
        for image, text in zip(images.split(1), together.tolist(), strict=True):
            alone = beam(model, image, BeamConfig(max_new_tokens=8), **COMMON, eos=5)[0][0].tolist()
            assert alone + [DELIMITER] * (len(text) - len(alone)) == text


def test_samplers_by_name():
    tokenizer = train_tokenizer(["dog", "cat", "red panda"], vocab_size=400)
    config = tiny_config(vocab_size=len(tokenizer) + 2)
    model = Model(config).eval()
    assert set(range(len(tokenizer), len(tokenizer) + 2)) <= set(never_first(model, tokenizer))
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    recognizer = Recognizer(model, tokenizer, config)
    small = {"greedy": {"max_new_tokens": 12}, "beam": {"max_new_tokens": 12}, "exact": {"max_expansions": 64}}
    for name, kind in SAMPLERS.items():
        assert type(sampler_config(name)) is kind
        choice = {"name": name, **small.get(name, {})}
        samples = sample(model, images, sampler_config(choice), tokenizer=tokenizer, top_k=3)
        assert len(samples.tokens_BKL) == 2
        found = recognizer.predict_pixels(images, 3, sampler=choice)
        assert found[0] == found[1]
    assert sampler_config({"name": "beam", "num_beams": 5}).num_beams == 5
    with pytest.raises(UserError, match=r"No sampler 'gredy'. Did you mean 'greedy'"):
        sampler_config("gredy")
    with pytest.raises(UserError, match=r"'sampler.num_beems'. Did you mean 'sampler.num_beams'"):
        sampler_config({"name": "beam", "num_beems": 5})


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"name": "exact", "branches_per_step": 0}, "branches_per_step"),
        ({"name": "exact", "max_expansions": -1}, "max_expansions"),
        ({"name": "greedy", "top_p": 0.0}, "top_p"),
        ({"name": "greedy", "top_k": 0}, "top_k"),
        ({"name": "greedy", "temperature": -1.0}, "temperature"),
        ({"name": "beam", "num_beams": 0}, "num_beams"),
        ({"name": "beam", "repetition_penalty": 0.0}, "repetition_penalty"),
        ({"name": "one_shot", "temperature": 0.0}, "temperature"),
    ],
)
def test_settings_out_of_range_are_named(settings, setting):
    with pytest.raises(UserError, match=rf"sampler\.{setting} must be"):
        sampler_config(settings)


def test_temperature_is_that_of_the_logits():
    model, images = tiny_model(12, scale=0.2), pictures(2)
    plain = one_shot(model, images, **COMMON, top_k=4, max_tokens=4)
    warm = one_shot(model, images, **COMMON, top_k=4, max_tokens=4, temperature=2.0)
    assert torch.equal(plain.tokens_BKL, warm.tokens_BKL)
    first = (model.prefill(images, PROMPT)[0] / 2).softmax(-1).topk(4).values
    torch.testing.assert_close(warm.probs_BKL[..., 0], first)
    with torch.no_grad():
        model.decoder.lm.lm_head.weight /= 2
    halved = one_shot(model, images, **COMMON, top_k=4, max_tokens=4)
    torch.testing.assert_close(warm.label_probs_BK, halved.label_probs_BK)
    model.decoder.lm.lm_head.weight.data *= 2
    searched = exact(model, images, ExactConfig(temperature=2.0, max_tokens=3), **COMMON, top_k=3)
    model.decoder.lm.lm_head.weight.data /= 2
    torch.testing.assert_close(
        searched.label_probs_BK, exact(model, images, ExactConfig(max_tokens=3), **COMMON, top_k=3).label_probs_BK
    )


def test_patience_ends_a_beam_search_and_rows_the_tokenizer_lacks_are_no_starts():
    model, images = tiny_model(6, 1, scale=0.1), pictures(4, 1)
    with torch.no_grad():
        model.decoder.lm.lm_head.weight[5] *= 2
    texts = [
        beam(model, images, BeamConfig(max_new_tokens=12, num_beams=3, patience=patience), **COMMON, eos=5)[0]
        for patience in (0.3, 100.0)
    ]
    assert texts[0].shape[1] < texts[1].shape[1]
    tokenizer = train_tokenizer(["dog", "cat"], vocab_size=400)
    config = tiny_config(vocab_size=len(tokenizer) + 2)
    grown = Model(config).eval()
    with torch.no_grad():  # the likeliest starts are rows that spell nothing
        hidden = torch.linalg.lstsq(
            grown.decoder.lm.lm_head.weight, grown.prefill(images, tokenizer.prompt_ids)[0].T
        ).solution
        grown.decoder.lm.lm_head.weight[-2:] = 10 * hidden.mean(dim=1)
    small = {"one_shot": {"max_tokens": 3}, "exact": {"max_expansions": 64}, "greedy": {"max_new_tokens": 16}}
    for name, limits in small.items():
        sampler = sampler_config({"name": name, **limits})
        samples = sample(grown, images, sampler, tokenizer=tokenizer, top_k=len(tokenizer))
        assert (samples.tokens_BKL[..., 0] < len(tokenizer)).all()


def test_the_sign_rule_of_the_repetition_penalty():
    logits = torch.tensor([[2.0, -2.0, 3.0, -3.0]])
    written = torch.tensor([[0, 1]])
    ours = _penalty_and_temperature(GreedyConfig(repetition_penalty=2.0))
    assert ours(written, logits).tolist() == [[1.0, -4.0, 3.0, -3.0]]
    published = _penalty_and_temperature(GreedyConfig(repetition_penalty=2.0, published=True))
    assert published(written, logits).tolist() == [[1.0, -1.0, 3.0, -3.0]]
