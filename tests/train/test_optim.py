"""What trains, in which group, at which rate."""

import pytest
import torch
from helpers import tiny_config

from nxtp.errors import UserError
from nxtp.model.model import Model
from nxtp.model.trainable import TrainableConfig, choose_trainable
from nxtp.train.optim import MUON, OptimConfig, build_optimizer, parameter_groups, warmup_cosine


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


@pytest.mark.parametrize("optimizer", ["torch.optim.AdamW", MUON])
def test_the_encoder_may_have_a_learning_rate_of_its_own(optimizer):
    model = Model(tiny_config(), 60)
    settings = {"lr": 1e-3, "optimizer": {"_target_": optimizer}}
    plain, _ = build_optimizer(model, OptimConfig(**settings), 10)
    built, schedule = build_optimizer(model, OptimConfig(encoder_lr=3e-3, **settings), 10)

    def by_parameter(built, setting):
        return {p: group[setting] for group in built.param_groups for p in group["params"]}

    own, factor = set(model.encoder.parameters()), schedule.get_last_lr()[-1] / 1e-3
    for p, rate in by_parameter(built, "lr").items():
        assert rate == pytest.approx(factor * (3e-3 if p in own else 1e-3))
    assert by_parameter(built, "weight_decay") == by_parameter(plain, "weight_decay")


def shares(*arguments: float):
    """The schedule as a function of the step."""
    return warmup_cosine(torch.optim.SGD([torch.zeros(1)], lr=1.0), *arguments).lr_lambdas[0]


def test_schedule_warms_up_and_decays():
    rates = [shares(100, 10, 0.1)(step) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == 10
    assert rates[100] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5)
    assert shares(100, 0.1, 0)(3) == shares(100, 10, 0)(3)
    assert shares(100, 0.1, 0.2)(500) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("schedule", "first", "last"),
    [
        ({"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 1.0, "div_factor": 10}, 0.1, 0.0),
        ({"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "eta_min": 0.1}, 1.0, 0.1),
        ({"_target_": "transformers.get_linear_schedule_with_warmup", "num_warmup_steps": 0}, 1.0, 0.0),
        ({"_target_": "torch.optim.lr_scheduler.ConstantLR", "factor": 0.5}, 0.5, 1.0),
    ],
)
def test_a_schedule_of_others_is_told_the_number_of_steps(schedule, first, last):
    model = Model(tiny_config(), 60)
    optimizer, scheduler = build_optimizer(model, OptimConfig(lr=1.0, schedule=schedule), 10)
    assert scheduler.get_last_lr()[0] == pytest.approx(first)
    for _ in range(9 if "OneCycle" in schedule["_target_"] else 10):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(last, abs=1e-4)


def test_muon_updates_matrices_between_hidden_states_and_adamw_the_rest():
    model = Model(tiny_config(), 60)
    optimizer, _ = build_optimizer(model, OptimConfig(optimizer={"_target_": MUON}), 10)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    adamw = {n for n, p in model.named_parameters() if not optimizer.state[p]["use_muon"]}
    vectors = {n for n, p in model.named_parameters() if p.ndim < 2}
    assert adamw == vectors | {"decoder.lm.model.embed_tokens.weight", "decoder.lm.lm_head.weight"}


def test_optimizer_steps_only_what_trains():
    model = Model(tiny_config(), 60)
    choose_trainable(model, TrainableConfig(**NOTHING | {"projection": True}))
    optimizer, _ = build_optimizer(model, OptimConfig(), 10)
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.projection.weight.grad = torch.ones_like(model.projection.weight)
    optimizer.step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == {"projection.weight"}
