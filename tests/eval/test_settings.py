"""What tells one evaluation of a sweep from another: its settings, and which weights the model has."""

import json

import pytest
from omegaconf import open_dict

from nxtp.config import composed
from nxtp.errors import UserError
from nxtp.eval.command import evaluate, evaluate_into
from nxtp.eval.settings import recorded_settings
from nxtp.runs.resume import is_finished


def model(directory, weights: str):
    directory.mkdir(exist_ok=True)
    (directory / "config.yaml").write_text(
        f"format: 1\nmodel: {{}}\nfiles: {{model.safetensors: {{sha256: {weights}}}}}\n"
    )
    return directory


def settings(directory, *overrides: str):
    cfg = composed("evaluate", [f"model_dir={directory}", "out=out", "+data.val.v=x", *overrides])
    with open_dict(cfg):
        cfg.sweep, cfg.name = "mine", "one"
        cfg.pop("hydra")  # a command has it apart
    return cfg


def finished(out, cfg) -> None:
    out.mkdir(exist_ok=True)
    content = {"format": 3, "status": "finished", "command": "evaluate", "config": recorded_settings(cfg)}
    (out / "run.json").write_text(json.dumps(content))


@pytest.mark.parametrize("trainer", [[], ["trainer=cpu"]])
def test_a_finished_evaluation_is_that_of_the_same_weights(tmp_path, trainer):
    cfg = settings(model(tmp_path / "m", "a" * 64), *trainer)
    finished(tmp_path / "out", cfg)
    assert is_finished(tmp_path / "out", recorded_settings(cfg))
    model(tmp_path / "m", "b" * 64)
    assert not is_finished(tmp_path / "out", recorded_settings(cfg)), "another model in the same place"
    assert recorded_settings(settings(tmp_path / "gone"))["weights"] is None
    (tmp_path / "m" / "config.yaml").write_text("format: 1\nmodel: {}\n")
    assert recorded_settings(cfg)["weights"] is None, "evaluating it says what is missing"


def test_an_evaluation_of_other_settings_is_not_overwritten_by_a_sweep(tmp_path):
    finished(tmp_path / "out", settings(model(tmp_path / "m", "a" * 64)))
    before = (tmp_path / "out" / "run.json").read_bytes()
    other = settings(model(tmp_path / "n", "b" * 64), "top_k=3")
    with pytest.raises(UserError, match=r"contains a run with other settings \(model_dir, top_k, weights\)"):
        evaluate_into(tmp_path / "out", other, [])
    assert (tmp_path / "out" / "run.json").read_bytes() == before


@pytest.mark.parametrize("grid", ["-1", "null", "many"])
def test_pictures_must_be_a_number(grid):
    with pytest.raises(UserError, match=r"^grid must be ≥ 0, got "):
        evaluate(composed("evaluate", ["model_dir=m", "+data.val.v=x", f"grid={grid}"]))
