"""Every study of experiments/ composes over its whole grid, says what a study has to say, and reports what it lists."""

import re
from functools import cache

import pytest
from omegaconf import DictConfig, OmegaConf

from nxtp.config import EXPERIMENTS, composed, study_names, to_dataclass
from nxtp.data.config import DataConfig
from nxtp.model.model import ModelConfig
from nxtp.sampling.ranking import ranking_config
from nxtp.sampling.samplers import sampler_config
from nxtp.sweep.report.records import leaves
from nxtp.sweep.report.spec import Spec
from nxtp.sweep.sweep import Sweep
from nxtp.train.optim import OptimConfig

STUDIES = [
    *("dataset_scale", "decoder_depth", "encoder", "imagenet_variants", "label_order"),
    *("language_model", "new_words", "objective", "objective_parts", "photographs", "sampling"),
]
SWEEPS = [f"{study}/{size}" for study in STUDIES for size in ("laptop", "full")]


def command(sweep: str) -> str:
    """The command that the sweep's first line gives."""
    text = (EXPERIMENTS / f"{sweep}.yaml").read_text()
    return re.search(rf"# nxtp (train|evaluate) study={sweep}\b", text)[1]


def base(sweep: str) -> list[str]:
    return [f"study={sweep}", *(["model_dir=m"] if command(sweep) == "evaluate" else [])]


@cache
def shared(sweep: str, *overrides: str) -> DictConfig:
    """The configuration that the sweep's runs share."""
    return composed(command(sweep), [*base(sweep), *overrides])


def test_there_are_these_studies():
    own_script = ["baselines"]  # not a sweep of `nxtp train`
    assert sorted(p.name for p in EXPERIMENTS.iterdir() if (p / "report.yaml").is_file()) == [*own_script, *STUDIES]
    assert set(SWEEPS) == set(study_names())


# The full studies have the same axes and more values: a second for each.
OFTEN = [pytest.param(s, marks=[pytest.mark.slow] if s.endswith("/full") else []) for s in SWEEPS]


@pytest.mark.parametrize("sweep", OFTEN)
def test_every_value_of_the_grid_composes(sweep):
    """In the first point that has it: what a value changes does not depend on the other values."""
    cfg = shared(sweep)
    grid = Sweep.of(cfg)
    assert cfg.name == sweep
    assert len(grid.points) > 1
    assert len(set(grid.runs)) == len(grid.points)
    seeds = {o for point in grid.points for o in point if o.startswith("seed=")}
    assert bool(seeds) == sweep.endswith("/laptop")
    first = {value: point for point in reversed(grid.points) for value in point if value not in seeds - {"seed=0"}}
    points, seen = {tuple(point) for point in first.values()}, set()
    for point in points:
        run = composed(command(sweep), [*base(sweep), *point])
        seen.add(OmegaConf.to_yaml({k: v for k, v in run.items() if k != "hydra"}))
        if command(sweep) == "train":
            for name, section in (("model", ModelConfig), ("data", DataConfig), ("optim", OptimConfig)):
                to_dataclass(section, run[name], name)
        else:
            sampler_config(run.sampler)
            ranking_config(run.ranking)
    assert len(seen) == len(points), "every point is a configuration of its own"


@pytest.mark.parametrize("sweep", SWEEPS)
def test_its_report_shows_what_it_varies(sweep):
    cfg = shared(sweep)
    spec = Spec.read(EXPERIMENTS / sweep.split("/")[0] / "report.yaml")
    grid = Sweep.of(cfg)
    varied = {o.split("=", 1)[0] for point in grid.points for o in point}
    shown = {*spec.columns.values(), *spec.over}
    groups = {"sampler": "sampler.name", "ranking": "ranking.name", "objective": "objective.name"}
    groups |= {"experiment": "objective.name", "data": "data.train.laion.expected_samples"}
    assert {groups.get(key, key) for key in varied} <= shown


@pytest.mark.parametrize("study", STUDIES)
def test_columns_are_settings(study):
    spec = Spec.read(EXPERIMENTS / study / "report.yaml")
    settings = set()
    for size in ("laptop", "full"):
        cfg = shared(f"{study}/{size}", *(["data=g70m"] if (study, size) == ("dataset_scale", "full") else []))
        settings |= set(leaves(OmegaConf.to_container(cfg)))
    assert set(spec.columns.values()) <= settings


@pytest.mark.parametrize("study", ["baselines", *STUDIES])
def test_a_study_asks_predicts_and_tells(study):
    text = (EXPERIMENTS / study / "README.md").read_text()
    assert "**Question.**" in text
    assert re.search(r"\*\*Prediction\*\* \(written [^)]*before ", text)
    assert "## Verdict" in text
    assert "Not run yet" not in text
    for said in re.findall(r"study=(\S+)", text):
        assert said.strip("`") in SWEEPS, "its commands name sweeps that exist"
    for script in re.findall(r"python (\S+\.py)", text):
        assert (EXPERIMENTS.parent / script).is_file()
