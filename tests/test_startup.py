"""Which modules a command imports: commands start fast because they import only what they use."""

import json
import subprocess
import sys

import pytest
from helpers import jpeg, recognizer

HEAVY = {"torch", "transformers", "lightning", "open_clip", "timm", "torchmetrics", "scipy", "wandb", "matplotlib"}
PROGRAM = """
import atexit, json, sys
loaded = lambda: sys.stderr.write("\\n" + json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
atexit.register(loaded)
sys.argv = ["nxtp", *sys.argv[1:]]
from nxtp.cli import main
main()
"""


def imported(*arguments: str, cwd) -> set[str]:
    """Top-level modules that `nxtp …` has imported when it ends."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(json.loads(done.stderr.splitlines()[-1]))


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


@pytest.mark.parametrize(
    "command",
    [
        *("--help", "train --help", "evaluate --help", "describe --help", "sweep --help", "sweep status mine"),
        *("report --help", "report runs/mine", "data --help", "prepare --help", "predict --help", "classify --help"),
        *("serve --help", "app --help", "export --help", "convert --help", "parity --help"),
    ],
)
def test_help_and_status_import_no_heavy_library(place, command):
    assert not imported(*command.split(), cwd=place) & HEAVY


def test_predict_imports_what_a_model_needs(place):
    modules = imported("predict", "photo.jpg", "--model", "model", cwd=place)
    assert {"torch", "transformers", "open_clip"} <= modules  # which import timm, scipy and wandb themselves
    unused = {"lightning", "torchmetrics", "matplotlib", "hydra", "webdataset", "optuna", "pandas", "HanTa"}
    assert not modules & unused
