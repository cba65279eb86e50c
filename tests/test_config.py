"""Every shipped configuration composes and instantiates; a wrong key names the nearest right one."""

import sys
from dataclasses import asdict, fields
from itertools import zip_longest

import pytest
import torch
from helpers import composed, write_shards
from hydra._internal.utils import get_args_parser
from hydra.utils import instantiate
from lightning.fabric.strategies.launchers.subprocess_script import _hydra_subprocess_cmd
from omegaconf import OmegaConf

from nxtp import config
from nxtp.config import compose_and_run, conf_dir, help_text, to_dataclass
from nxtp.data.config import DataConfig
from nxtp.errors import UserError
from nxtp.model.decoder import DecoderConfig
from nxtp.model.encoder import EncoderConfig
from nxtp.model.layout import Objective
from nxtp.model.meta import count_parameters, meta_model
from nxtp.model.model import ModelConfig
from nxtp.model.trainable import TrainableConfig
from nxtp.sampling.ranking import RANKINGS, RankingConfig, ranking_config
from nxtp.sampling.samplers import sampler_config
from nxtp.train.command import SECTIONS
from nxtp.train.module import ValidationConfig
from nxtp.train.optim import OptimConfig

GROUPS = {
    name: sorted(path.stem for path in (conf_dir() / name).glob("*.yaml"))
    for name in (
        *(
            "model",
            "model/encoder",
            "model/decoder",
            "data",
            "nouns",
            "transforms",
            "objective",
            "prompts",
            "optim",
            "trainer",
            "callbacks",
        ),
        *("logger", "debug", "experiment"),
    )
}
# Options of groups that do not set the same keys, composed together; the others alone.
ALONE = ("model", "debug", "experiment")
BESIDE = {"optim=published", "model/decoder=hugging_face"}  # the model they need
TOGETHER = [
    tuple(f"{group}={option}" for group, option in zip(GROUPS, row, strict=True) if option and group not in ALONE)
    for row in zip_longest(*([o for o in GROUPS[g] if f"{g}={o}" not in BESIDE] for g in GROUPS))
]
TOGETHER += [(f"{group}={option}",) for group in ALONE for option in GROUPS[group]]
TOGETHER += [("model=published", "optim=published"), ("model/decoder=hugging_face",)]


# Parameters as published; of encoders without their pooling, so as timm and open_clip have them.
PUBLISHED = {
    "model/decoder=gemma3_1b": 999_885_952,
    "model/decoder=gemma3_270m": 268_098_176,
    "model/decoder=llama3_2_1b": 1_235_814_400,
    "model/decoder=llama3_2_3b": 3_212_749_824,
    "model/decoder=qwen3_0_6b": 596_049_920,
    "model/decoder=qwen3_1_7b": 1_720_574_976,
    "model/decoder=smollm2_135m": 134_515_008,
    "model/decoder=smollm2_1_7b": 1_711_376_384,
    "model/decoder=smollm2_360m": 361_821_120,
    "model/decoder=llama2_7b": 6_738_415_616 + 2 * 2 * 4096,  # two rows more, of the embedding and of the output
    "model/encoder=clip_vit_l_14": 303_179_776,
    "model/encoder=dinov3_vit_b_16": 85_641_216,
    "model/encoder=efficientnet_lite0": 2_958_848,
    "model/encoder=mobileclip2_s2": 34_935_280,
    "model/encoder=pe_core_b_16": 85_799_424,
    "model/encoder=pe_core_l_14": 303_507_456,
    "model/encoder=siglip2_vit_b_16": 85_797_120,
    "model/encoder=siglip2_vit_l_16": 303_361_024,
    "model/encoder=siglip_vit_b_16": 85_797_120,
}

COUNTED: dict[str, dict[str, int]] = {}  # most choices have the same model


def parameters(key: str, model: ModelConfig, optim: OptimConfig) -> dict[str, int]:
    if key not in COUNTED:
        COUNTED[key] = count_parameters(meta_model(model, model.vocab_size or None, optim.trainable))
    return COUNTED[key]


@pytest.mark.parametrize("choices", TOGETHER, ids=" ".join)
def test_every_shipped_option_composes_and_instantiates(tmp_path, choices, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    cfg = composed(tmp_path, *choices)
    for part, kind in (("encoder", EncoderConfig), ("decoder", DecoderConfig)):  # so that none needs a plus
        assert cfg.model[part].keys() == {f.name for f in fields(kind)}
    model = to_dataclass(ModelConfig, cfg.model, "model")
    assert cfg.model.decoder.keys() == asdict(model.decoder).keys()  # none needs a + on the command line
    to_dataclass(DataConfig, cfg.data, "data")
    to_dataclass(ValidationConfig, cfg.validation, "validation")
    optim = to_dataclass(OptimConfig, cfg.optim, "optim")
    to_dataclass(Objective, cfg.objective, "objective")
    assert cfg.objective.keys() == {f.name for f in fields(Objective)}
    if model.decoder.config:
        counts = parameters(repr((model, optim.trainable)), model, optim)
        assert counts["total_trained"] > 0
        for choice in choices:
            part = choice.partition("=")[0].removeprefix("model/")
            assert counts.get(part) == PUBLISHED.get(choice, counts.get(part))
    for callback in cfg.callbacks.values():
        instantiate(callback)
    if "logger=wandb" not in choices:  # started for real in test_train.py
        for logger in cfg.logger.values():
            instantiate(logger)
    trainer = OmegaConf.to_container(cfg.trainer, resolve=True)
    if trainer["accelerator"] == "cpu":
        instantiate({**trainer, "logger": False, "callbacks": [], "profiler": None}, _convert_="all")


def test_all_options_are_among_these():
    options = {f"{group}={option}" for group, options in GROUPS.items() for option in options}
    assert {choice for choices in TOGETHER for choice in choices} == options


@pytest.mark.parametrize("base", ["train", "evaluate"])
def test_nouns_are_chosen_by_name_and_skipped_by_list(base):
    needed = "name=x" if base == "train" else "model_dir=m"
    for overrides, backend, stop in (
        ([], "hanta", []),
        (["nouns=nltk_published", "nouns.stop=[person,view]"], "nltk_published", ["person", "view"]),
        (["data.nouns=nltk"], "nltk", []),
    ):
        data = to_dataclass(DataConfig, config.composed(base, [needed, *overrides]).data, "data")
        assert (data.nouns, data.stop_nouns) == (backend, stop)


@pytest.mark.parametrize("sampler", sorted(path.stem for path in (conf_dir() / "sampler").glob("*.yaml")))
def test_every_shipped_sampler_states_its_defaults(tmp_path, sampler):
    settings = OmegaConf.to_container(OmegaConf.load(conf_dir() / "sampler" / f"{sampler}.yaml"))
    assert settings["name"] == sampler
    assert asdict(sampler_config(settings)) == asdict(sampler_config(sampler))
    assert settings.keys() == {"name", *asdict(sampler_config(sampler))}


def test_every_ranking_is_shipped_as_a_group():
    shipped = {path.stem: OmegaConf.load(path) for path in (conf_dir() / "ranking").glob("*.yaml")}
    assert shipped.keys() == set(RANKINGS)
    for name, settings in shipped.items():
        assert ranking_config(settings) == RankingConfig(name)


@pytest.mark.parametrize("experiment", GROUPS["experiment"])
def test_experiments_are_short_and_say_their_command(experiment):
    text = (conf_dir() / "experiment" / f"{experiment}.yaml").read_text()
    settings = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert len(settings) <= 22
    assert f"experiment={experiment}" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["experiment=dmo"], "^No option 'experiment=dmo'. Did you mean 'experiment=demo'. Known: demo, g3m, "),
        (
            ["name=x", "logger=null"],
            r"^logger=null: leave logger out, or choose one of its options: csv, tensorboard, wandb\.$",
        ),
        (["name=x", "trainer=cup"], r"^No option 'trainer=cup'\. Did you mean 'trainer=cpu'\? Known: auto, .*, gpu\.$"),
        (
            ["optim.ler=3", "name=x"],
            r"'optim.ler'\. Did you mean 'optim.lr'\? Known keys: .*\. To add a key: \+optim.ler=3",
        ),
        (["data.val.mine=x", "name=x"], r"'data.val.mine'\. Known keys: none\. To add a key: \+data.val.mine=x$"),
        (["data.val={a: x}", "name=x"], r"To add a key: \+data.val={a: x}$"),
        (["data.where=w > 3 and a", "name=x"], r"two pairs of quotes: 'data.where=\"w > 3 and a\"'$"),
        (["data.where=lang == 'a'", "name=x"], r"two pairs of quotes: 'data.where=\"lang == '\"'\"'a'\"'\"'\"'$"),
        (
            ["name=x", "model/encoder=vit_tiiny"],
            "^No option 'model/encoder=vit_tiiny'. Did you mean 'model/encoder=vit_tiny'",
        ),
        (["optin.lr=3", "name=x"], "Did you mean 'optim'"),
        (["experimant=demo"], "Did you mean 'experiment'"),
        ([], "'name' has no value"),
        (["name=../x"], "name=../x: a run is written to runs/<name>"),
        (["name='/x'"], "must be inside runs/"),
        (["name=x", "seed=x"], "^seed must be ≥ 0, got x"),
        (["name=x", "optim.lr=1", "--config-dir", "nowhere"], "nowhere"),
    ],
)
def test_misspelt_settings_are_named(tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["nxtp"])
    with pytest.raises(UserError, match=message):
        compose_and_run(lambda cfg: pytest.fail("ran"), "train", argv)


def test_yaml_that_is_broken_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "experiments" / "mine").mkdir(parents=True)
    (tmp_path / "experiments" / "mine" / "full.yaml").write_text("name: [mine\noptim: {\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"expected .* in \".*full.yaml\", line") as error:
        compose_and_run(lambda cfg: pytest.fail("ran"), "train", ["study=mine/full"])
    assert "\n" not in str(error.value)


def test_the_users_own_conf_is_searched_too(tmp_path, monkeypatch):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\noptim: {lr: 0.125}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["nxtp"])
    seen = []
    compose_and_run(lambda cfg: seen.append((cfg.name, cfg.optim.lr)), "train", ["experiment=mine"])
    assert seen == [("mine", 0.125)]


@pytest.mark.parametrize("config", ["evaluate", "train"])
def test_mistakes_name_only_groups_of_the_command(tmp_path, monkeypatch, config):
    """Of a group that another command has, nothing is suggested."""
    monkeypatch.chdir(tmp_path)
    other = {"evaluate": "optim", "train": "sampler"}[config]
    for argument in (f"{other}=x", f"{other}.x=1", f"{other}x.y=1"):
        with pytest.raises(UserError, match="No configuration") as error:
            compose_and_run(lambda cfg: pytest.fail("ran"), config, [argument, "name=x"])
        assert f"Did you mean '{other}'" not in str(error.value)
        assert f" {other}," not in str(error.value)


@pytest.mark.parametrize("multirun", [False, True])
@pytest.mark.parametrize(
    "argv", [["name=x"], ["name=x", "--config-dir", "own", "seed=1"], ["--config-dir=own", "name=x"]]
)
def test_arguments_may_follow_the_users_own_conf(tmp_path, monkeypatch, argv, multirun):
    """Lightning starts further ranks with overrides of its own behind those of the command line."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "own").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["nxtp"])
    ranks = []

    def job(cfg):
        ranks.append(_hydra_subprocess_cmd(1)[0][-len(sys.argv[1:]) - 3 :])

    compose_and_run(job, "train", argv, multirun=multirun)
    (arguments,) = ranks
    parsed = get_args_parser().parse_args(arguments)
    assert "hydra.job.name=train_ddp_process_1" in parsed.overrides
    assert parsed.config_dir == (str(tmp_path / "conf") if argv == ["name=x"] else "own")


def test_an_option_of_ones_own_does_not_hide_behind_a_shipped_one(tmp_path, monkeypatch):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "demo.yaml").write_text("# @package _global_\nname: mine\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^experiment=demo is an option of nxtp, .*conf/experiment/demo.yaml.* rename"):
        compose_and_run(lambda cfg: pytest.fail("ran"), "train", ["experiment=demo"])


def test_modules_of_the_working_directory_can_be_targets(tmp_path, monkeypatch):
    """As with `python -m`: an installed `nxtp` starts with its own directory on the path instead."""
    (tmp_path / "my_callbacks.py").write_text("class Mine: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [place for place in sys.path if place])
    made = []
    argv = ["name=x", "+callbacks.mine={_target_: my_callbacks.Mine}"]
    compose_and_run(lambda cfg: made.append(instantiate(cfg.callbacks.mine)), "train", argv)
    assert type(made[0]).__name__ == "Mine"


@pytest.mark.parametrize("experiment", ["demo", "scenes"])
def test_the_precision_is_the_trainers(tmp_path, experiment):
    for trainer in ("ddp", "fsdp"):  # cpu and gpu: below
        assert composed(tmp_path, f"experiment={experiment}", f"trainer={trainer}").trainer.precision == "bf16-mixed"


@pytest.mark.parametrize("recipe", [[], ["experiment=demo"], ["experiment=scenes"], ["experiment=laptop"]])
def test_a_gpu_is_used_where_there_is_one(tmp_path, monkeypatch, recipe):
    given = ("", "trainer=gpu", "trainer=cpu", "trainer.accelerator=cpu")
    trainers = {override: composed(tmp_path, *recipe, *filter(None, [override])).trainer for override in given}

    def chosen(override=""):  # resolved anew each time
        return trainers[override].accelerator, trainers[override].precision

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    on_cpu = "bf16-mixed" if recipe in (["experiment=demo"], ["experiment=scenes"]) else "32-true"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen() == ("cpu", on_cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for able, on_gpu in ((True, "bf16-mixed"), (False, "32-true")):  # an older GPU computes bfloat16 slowly
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)  # noqa: B023
        assert chosen() == chosen("trainer=gpu") == ("gpu", on_gpu)
        assert chosen("trainer.accelerator=cpu") == ("cpu", on_cpu)
        assert chosen("trainer=cpu") == ("cpu", "32-true")


def test_every_setting_is_a_key_that_can_be_given_without_a_plus(tmp_path):
    cfg = composed(tmp_path)
    keys = {name: cfg[name].keys() for name in SECTIONS}
    assert {
        (name, f.name) for name, kind in SECTIONS.items() for f in fields(kind) if f.name not in keys[name]
    } == set()


def test_documented_options_of_wandb_exist(tmp_path):
    options = ["logger.wandb.project=mine", "logger.wandb.entity=us", "logger.wandb.model_artifact=true"]
    assert composed(tmp_path, "logger=wandb", *options).logger.wandb.entity == "us"


def test_dataclasses_refuse_unknown_keys_and_types():
    with pytest.raises(UserError, match=r"No key 'optim.weight_decy'. Did you mean 'optim.weight_decay'"):
        to_dataclass(OptimConfig, {"weight_decy": 1}, "optim")
    with pytest.raises(UserError, match=r"optim.lr"):
        to_dataclass(OptimConfig, {"lr": "fast"}, "optim")
    with pytest.raises(UserError, match=r"^No key 'optim.trainable.encodr'. Did you mean 'optim.trainable.encoder'"):
        to_dataclass(OptimConfig, {"trainable": {"encodr": "all"}}, "optim")
    assert to_dataclass(OptimConfig, {"trainable": {"encoder": 2}}, "optim").trainable == TrainableConfig(encoder=2)


def test_val_sets_may_be_added_on_the_command_line(tmp_path):
    root = write_shards(tmp_path / "v", [2])
    cfg = composed(tmp_path, f"+data.val.mine={root}")
    assert to_dataclass(DataConfig, cfg.data, "data").val == {"mine": str(root)}


def test_numbers_of_the_data_have_limits():
    for name, value in {"num_workers": -1, "batch_size": 0, "val_batch_size": 0, "shuffle_window": -1}.items():
        with pytest.raises(UserError, match=rf"^data\.{name} must be ≥ {value + 1}, got {value}\.$"):
            to_dataclass(DataConfig, {name: value}, "data")


@pytest.mark.parametrize(("name", "value"), [("lr", -0.1), ("weight_decay", -1)])
def test_numbers_of_the_optimizer_have_limits(name, value):
    with pytest.raises(UserError, match=rf"^optim\.{name} must be ≥ 0, got {value}"):
        to_dataclass(OptimConfig, {name: value}, "optim")


def test_a_class_on_the_command_line_replaces_another_with_its_arguments():
    for key, node in (("optim.optimizer", "{_target_: a.B, c: 0.9}"), ("logger.csv", "{_target_: A}")):
        cfg = config.composed("train", [f"{key}={node}"])
        assert OmegaConf.select(cfg, key) == OmegaConf.create(node)
    kept = config.composed("train", ["optim.optimizer.eps=1"])
    assert kept.optim.optimizer.keys() == {"_target_", "betas", "eps"}


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help_lists_what_the_command_takes(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    lines = help_text(command, command, []).split("\n\n")[1].splitlines()[1:]
    listed = dict(line.strip().split("=", 1) for line in lines)
    assert len(listed) == len(lines), "each group once"
    assert set(listed["hydra/launcher"].split("|")) >= {"basic", "slurm"}
    assert listed["hydra/sweeper"] == "basic|optuna"
    assert listed["logger"] == "csv|tensorboard|wandb"
    studies = listed["study"].split("|")
    assert ("sampling/laptop" in studies) == (command == "evaluate")
    for study in (
        "decoder_depth/laptop",
        "language_model/laptop",
        "objective/full",
    ):  # with keys of its own, swept only
        assert (study in studies) == (command == "train")
    assert len(studies) > 1
    compose_and_run(lambda cfg: None, command, [f"study={studies[-1]}", "seed=0"])  # all: sweep/test_studies.py
