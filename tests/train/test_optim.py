"""What trains, in which group, at which rate."""

import pytest
import torch
from helpers import tiny_config

from nxtp.errors import UserError
from nxtp.model.model import Model
from nxtp.model.trainable import TrainableConfig, choose_trainable
from nxtp.train.optim import OptimConfig, build_optimizer, build_schedule, parameter_groups


def trained(trainable: TrainableConfig, **decoder) -> set[str]:
    model = Model(tiny_config(**decoder), 60)
    choose_trainable(model, trainable)
    return {name for name, p in model.named_parameters() if p.requires_grad}


NOTHING = {
    "encoder": "none",
    "projection": False,
    "image_token": False,
    "embedding": False,
    "decoder": "none",
    "head": False,
}


def test_last_blocks_are_counted_from_the_end():
    names = trained(TrainableConfig(**NOTHING | {"encoder": 1}))
    assert names
    assert all("resblocks.1." in n or "ln_post" in n for n in names), names
    assert any("ln_post" in n for n in names)
    names = trained(TrainableConfig(**NOTHING | {"decoder": 1}), num_hidden_layers=3)
    assert names
    assert all(".layers.2." in n for n in names)


def test_parts_are_chosen_by_name():
    assert trained(TrainableConfig(**NOTHING | {"image_token": True})) == {"image_token"}
    assert trained(TrainableConfig(**NOTHING | {"projection": True})) == {"projection.weight"}
    assert trained(TrainableConfig(**NOTHING | {"embedding": True})) == {"decoder.lm.model.embed_tokens.weight"}
    head = trained(TrainableConfig(**NOTHING | {"head": True}))
    assert head == {"decoder.lm.model.norm.weight", "decoder.lm.lm_head.weight"}
    every = {name for name, _ in Model(tiny_config(), 60).named_parameters()}
    assert trained(TrainableConfig()) == every


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": 9}, r"encoder is 9, but there are 2 blocks"),
        ({"decoder": 3}, r"decoder is 3, but there are 2 blocks"),
        ({"decoder": "some"}, "must be all, none, or a number"),
        ({"encoder": -1}, "must be all, none, or a number"),
        ({}, "nothing to train"),
    ],
)
def test_a_choice_that_matches_nothing_is_an_error(change, message):
    with pytest.raises(UserError, match=message):
        trained(TrainableConfig(**NOTHING | change))


def test_tied_embeddings_train_together():
    with pytest.raises(UserError, match="are tied: set 'embedding' = 'head'"):
        trained(TrainableConfig(embedding=False), tie_word_embeddings=True)


def test_weight_decay_acts_on_matrices_only():
    model = Model(tiny_config(), 60)
    decayed, rest = parameter_groups(model, 0.1)
    embedding = model.decoder.lm.model.embed_tokens.weight
    assert decayed["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0.0
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim < 2 or p is embedding for p in rest["params"])
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_the_final_norm_decays_if_asked():
    """As published; timm's param_groups_weight_decay cannot say so."""
    model = Model(tiny_config(), 60)
    norm = model.decoder.lm.model.norm.weight
    for decays in (False, True):
        optimizer, _ = build_optimizer(model, OptimConfig(decay_final_norm=decays), 10)
        (group,) = [g for g in optimizer.param_groups if any(p is norm for p in g["params"])]
        assert (group["weight_decay"] > 0) == decays


def shares(*arguments: float):
    """The schedule as a function of the step."""
    return build_schedule(torch.optim.SGD([torch.zeros(1)], lr=1.0), *arguments).lr_lambdas[0]


def test_schedule_warms_up_and_decays():
    rates = [shares(100, 10, 0.1)(step) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == 10
    assert rates[100] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5)
    assert shares(100, 0.1, 0)(3) == shares(100, 10, 0)(3)
    assert shares(100, 0.1, 0.2)(500) == pytest.approx(0.2)


def test_state_of_4_bits_is_an_error():
    with pytest.raises(UserError, match=r"optim\.state_bits must be 32 or 8, got 4"):
        build_optimizer(Model(tiny_config(), 60), OptimConfig(state_bits=4), 10)


def test_optimizer_steps_only_what_trains():
    model = Model(tiny_config(), 60)
    choose_trainable(model, TrainableConfig(**NOTHING | {"projection": True}))
    optimizer, _ = build_optimizer(model, OptimConfig(), 10)
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.projection.weight.grad = torch.ones_like(model.projection.weight)
    optimizer.step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == {"projection.weight"}
