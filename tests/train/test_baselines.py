"""experiments/baselines/train.py: what next-token prediction is compared with."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from helpers import TINY_OVERRIDES, call_nxtp, tiny_config, write_shards

from nxtp.inference.recognizer import Recognizer
from nxtp.model.encoder import Encoder
from nxtp.runs.record import read_record
from nxtp.sweep.report.hits import read_hits

sys.path.append(str(Path(__file__).resolve().parents[2] / "experiments" / "baselines"))

import train as baselines

NAMES = ["rose", "lemon", "leaf", "ocean", "stone"]
SETTINGS = [*TINY_OVERRIDES, "data.train=shards", "+data.val.val=shards", "data.batch_size=8", "data.num_workers=0"]
SETTINGS += ["trainer=cpu", "trainer.max_epochs=-1", "validation.top_k=3"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    write_shards(tmp_path / "shards", [16], labels=True)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(method: str, *settings: str) -> str:
    done = CliRunner().invoke(baselines.main, [method, "--classes", "names.txt", *SETTINGS, *settings])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("method", ["sigmoid", "softmax", "contrastive"])
def test_a_baseline_learns_which_names_an_image_has(method):
    torch.manual_seed(0)
    encoder = Encoder(tiny_config().encoder)
    contrastive = method == "contrastive"
    model = (
        baselines.Contrastive(encoder, NAMES) if contrastive else baselines.Linear(encoder, NAMES, method == "softmax")
    )
    pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(1)).byte()
    labels = (
        [["rose"], ["lemon"], ["leaf"], ["ocean"]]
        if contrastive
        else [["rose"], ["lemon"], ["leaf", "unknown"], ["ocean", "stone"]]
    )
    batch = SimpleNamespace(images=pixels, labels=labels)
    if contrastive:
        model.text.token_embedding.requires_grad_(False)  # of 49,408 tokens: most of the time
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    for _ in range(15 if contrastive else 30):
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
    scores = model.eval().scores(pixels)
    assert scores.shape == (4, 5)
    for row, names in zip(scores.tolist(), labels, strict=True):
        best = sorted(NAMES, key=dict(zip(NAMES, row, strict=True)).get, reverse=True)
        known = [name for name in names if name in NAMES]
        assert sorted(best[: len(known)]) == sorted(known)


def test_a_run_leaves_what_a_report_reads(here):
    line = "name=b/laptop", "trainer.max_steps=2", "optim.lr=0.01", "seed=0,1"
    assert run("softmax", *line).count("2 steps") == 2
    out = here / "runs" / "b" / "laptop" / "method=softmax,seed=1"
    record = read_record(out)
    assert (record["status"], record["sweep"], record["seed"], record["samples_seen"]) == (
        "finished",
        "b/laptop",
        1,
        16,
    )
    assert (record["config"]["method"], record["config"]["optim"]["lr"]) == ("softmax", 0.01)
    rows = [json.loads(row) for row in (out / "predictions.jsonl").read_text().splitlines()]
    assert len({row["key"] for row in rows}) == len(rows) == 16
    for row in rows:
        scores = [score for _, score in row["predictions"]]
        assert len(scores) == 3
        assert scores == sorted(scores, reverse=True)
    assert set(read_hits(out / "predictions.jsonl", record)) == {"val"}, "the hits give the metrics"
    assert run("softmax", *line) == "", "finished runs are skipped"
    done = CliRunner().invoke(baselines.main, ["softmax", "--classes", "names.txt", *SETTINGS, *line, "optim.lr=0.02"])
    assert done.exit_code == 1
    assert "method=softmax,seed=0 is a run of other settings" in done.stderr


@pytest.mark.slow  # six runs; that each method learns, and what a run leaves, is looked at above
def test_ours_trains_as_nxtp_train_does_and_starts_the_encoder_of_the_others(here, monkeypatch):
    modules = {}
    trained = baselines.train

    def kept(cfg, config, *arguments):
        modules[config["method"]] = trained(cfg, config, *arguments)

    monkeypatch.setattr(baselines, "train", kept)
    run("ours", "name=a", "trainer.max_steps=3", "seed=3")
    done = call_nxtp("train", *SETTINGS, "name=b", "trainer.max_steps=3", "seed=3", "export=last", cwd=here)
    assert done.returncode == 0, done.stderr
    expected = Recognizer.from_pretrained("runs/b/model", device="cpu").model.state_dict()
    found = modules["ours"].method.model.state_dict()
    assert found.keys() == expected.keys()
    torch.testing.assert_close(dict(found), dict(expected), rtol=1e-4, atol=1e-5)

    for method in ("ours", "softmax", "contrastive"):
        run(method, "name=c", "trainer.max_steps=1", "optim.lr=0")
    first, *others = [modules[method].method for method in ("ours", "softmax", "contrastive")]
    for other in others:
        torch.testing.assert_close(
            dict(other.encoder.state_dict()), dict(first.model.encoder.state_dict()), rtol=0, atol=0
        )
