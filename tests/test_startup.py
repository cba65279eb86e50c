"""Which modules a command imports: commands start fast because they import only what they use."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import fork, jpeg, recognizer

HEAVY = {"torch", "transformers", "lightning", "open_clip", "timm", "torchmetrics", "scipy", "wandb", "matplotlib"}
NOT_OF_PREDICT = {"lightning", "torchmetrics", "matplotlib", "hydra", "webdataset", "optuna", "pandas", "HanTa"}
PROGRAM = """
import json, os, sys
from nxtp.cli import main
os.chdir(cwd)
loaded = {}
for command in commands:
    sys.argv = ["nxtp", *command.split()]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, (command, stop.code)
    loaded[command] = sorted({name.split(".")[0] for name in sys.modules})
with open("modules.json", "w") as file:
    json.dump(loaded, file)
"""
# In a fork, for which nxtp and some libraries are modules not yet imported.
FORGET = """
import sys
for name in [name for name in sys.modules if name.split(".")[0] in forgotten]:
    del sys.modules[name]
"""


def imported(*commands: str, cwd: Path) -> dict[str, set[str]]:
    """Top-level modules that each `nxtp …` and those before it have imported when it ends."""
    program = f"cwd, commands = {str(cwd)!r}, {commands}\n{PROGRAM}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return modules(cwd)


def modules(cwd: Path) -> dict[str, set[str]]:
    return {command: set(names) for command, names in json.loads((cwd / "modules.json").read_text()).items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model directory, an image, one finished run of a sweep and a shard of one sample."""
    root = tmp_path_factory.mktemp("startup")
    recognizer().save_pretrained(root / "model")
    (root / "photo.jpg").write_bytes(jpeg((200, 40, 60)))
    record = {"status": "finished", "metrics": {"val/recall@10": 0.5}, "config": {}, "name": "seed=0", "seed": 0}
    record["format"] = 3
    (root / "runs" / "mine" / "seed=0").mkdir(parents=True)
    (root / "runs" / "mine" / "seed=0" / "run.json").write_text(json.dumps(record))
    return root


def test_help_and_status_import_no_heavy_library(place):
    """All in one process: of a library that is not to be imported, the first to do so is named."""
    commands = [
        "--help",
        "train --help",
        "evaluate --help",
        "calibrate --help",
        "describe --help",
        "sweep --help",
        "sweep status mine",
    ]
    commands += ["report --help", "report runs/mine", "data --help", "prepare --help", "predict --help"]
    commands += ["classify --help", "serve --help", "app --help", "export --help", "convert --help", "parity --help"]
    for command, loaded in imported(*commands, cwd=place).items():
        assert not loaded & HEAVY, command


PREDICT = "predict photo.jpg --model model"


def test_predict_imports_nothing_of_training(place):
    names = {"forgotten": {"nxtp", *NOT_OF_PREDICT}, "cwd": str(place), "commands": [PREDICT]}
    process = fork(exec, FORGET + PROGRAM, names)
    process.join()
    assert process.exitcode == 0
    (loaded,) = modules(place).values()
    assert {"torch", "nxtp"} <= loaded
    assert not loaded & NOT_OF_PREDICT


@pytest.mark.slow  # 10 s; as above, but for what PyTorch, transformers and open_clip import themselves
def test_predict_imports_what_a_model_needs(place):
    (loaded,) = imported(PREDICT, cwd=place).values()
    assert {"torch", "transformers", "open_clip"} <= loaded  # which import timm, scipy and wandb themselves
    assert not loaded & NOT_OF_PREDICT
