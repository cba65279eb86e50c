"""Tracking, against the real W&B client offline: what it wrote is read back from its file."""

import csv
import json
import os
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import wandb
from helpers import COLOURS, TINY_OVERRIDES, call_nxtp, write_shards
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2 as proto

from nxtp.errors import UserError
from nxtp.runs.secrets import refuse_secrets
from nxtp.runs.tracking import Wandb

pytestmark = pytest.mark.costly

KEY = "0123456789abcdef0123456789abcdef01234567"
BLOCK, HEADER = 32768, 7
TENSORBOARD = "{_target_: lightning.pytorch.loggers.TensorBoardLogger, save_dir: runs/r/tb, name: '', version: ''}"


def written(directory: Path) -> list:
    """The records of an offline run: LevelDB's log format after a header of 7 bytes, each a protobuf message."""
    (path,) = directory.glob("*.wandb")
    data, place, records, parts = path.read_bytes(), HEADER, [], b""
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            records.append(proto.Record.FromString(parts))
            parts = b""
    return records


def items(messages) -> dict:
    """Key → value; nested keys joined by dots."""
    return {".".join(m.nested_key) or m.key: json.loads(m.value_json) for m in messages}


def of_kind(records: list, kind: str) -> list:
    return [getattr(r, kind) for r in records if r.WhichOneof("record_type") == kind]


def history(records: list) -> list[dict]:
    return [items(h.item) for h in of_kind(records, "history")]


def summary(records: list) -> dict:
    return {k: v for s in of_kind(records, "summary") for k, v in items(s.update).items()}


def config(records: list) -> dict:
    messages = [m.config for m in of_kind(records, "run")] + of_kind(records, "config")
    return {k: v for c in messages for k, v in items(c.update).items()}


def wandb_id(run: Path) -> str:
    return json.loads((run / "wandb-run.json").read_text())["id"]


def here(root, *arguments: str, code: int = 0, **environment: str) -> str:
    """A command in this process, which imports what W&B needs once; what it printed."""
    quick = {"WANDB_MODE": "offline", "WANDB_X_SAVE_REQUIREMENTS": "false"}  # reads of all packages, at each start
    launch = mock.patch.object(wandb.Run, "_detect_and_apply_job_inputs")  # its import takes seconds
    with mock.patch.dict(os.environ, quick | environment), launch:
        try:
            done = call_nxtp(*arguments, cwd=root)
        finally:
            wandb.teardown()  # until all is written; the next one reads the environment again
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run that stopped after 4 steps and went on to 6, with all three loggers and a key in the environment."""
    root = tmp_path_factory.mktemp("work")
    write_shards(root / "train", [24, 24], labels=True)
    write_shards(root / "val", [3, 2], labels=True)
    command = ["train", "name=r", "sweep=my/study", "data.train=train", "+data.val.val=val", *TINY_OVERRIDES]
    command += ["data.num_workers=0", "data.batch_size=8", "data.val_batch_size=4", "trainer.log_every_n_steps=1"]
    command += ["trainer.max_epochs=1", "trainer.val_check_interval=2", "callbacks.predictions.every_n_steps=4"]
    command += ["logger=wandb", f"+logger.tensorboard={TENSORBOARD}", "logger.wandb.model_artifact=true"]
    command += ["callbacks.predictions.images=2", "hydra.run.dir=runs/r"]
    stop = "+callbacks.stop={_target_: stopping.Stop}"
    (root / "stopping.py").write_text(
        "import os, signal, lightning as L\n"
        "class Stop(L.Callback):\n"
        "    def on_train_batch_end(self, trainer, *_):\n"
        "        if trainer.global_step == 4: os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    outputs = [here(root, *command, stop, code=143, WANDB_API_KEY=KEY)]
    stopped_after = json.loads((root / "runs/r/run.json").read_text())["wall_time_s"]
    outputs.append(here(root, *command, WANDB_API_KEY=KEY))
    run = root / "runs" / "r"
    sessions = sorted(run.glob("wandb/offline-run-*"))
    record = json.loads((run / "run.json").read_text())
    return SimpleNamespace(
        run=run, record=record, sessions=sessions, outputs=outputs, root=root, stopped_after=stopped_after
    )


def test_without_a_key_a_run_is_offline(tmp_path):
    write_shards(tmp_path / "train", [16], labels=True)
    command = ["train", "name=r", "data.train=train", *TINY_OVERRIDES, "data.num_workers=0", "trainer.max_steps=1"]
    nowhere = {"WANDB_MODE": "online", "NETRC": str(tmp_path / "netrc"), "HOME": str(tmp_path)}
    output = here(tmp_path, *command, "data.batch_size=8", "logger=wandb", **nowhere)
    assert "wandb: WARNING" not in output
    (session,) = (tmp_path / "runs" / "r").glob("wandb/offline-run-*")
    assert summary(written(session))["status"] == "finished"


def test_a_run_is_grouped_named_and_described(tracked):
    (started,) = of_kind(written(tracked.sessions[-1]), "run")[:1]
    assert (started.run_group, started.display_name, started.project) == ("my/study", "r", "nxtp")
    logged = config(written(tracked.sessions[-1]))
    for key in ("seed", "optim", "data", "model", "trainer", "sweep"):
        assert logged[key] == tracked.record["config"][key]
    assert logged["record"]["code"] == tracked.record["code"]
    assert logged["record"]["overrides"] == tracked.record["overrides"]


def test_the_time_of_a_continued_run_is_that_of_all_its_starts(tracked):
    started, updated = (datetime.fromisoformat(tracked.record[key]) for key in ("started", "updated"))
    assert tracked.record["wall_time_s"] > tracked.stopped_after + (updated - started).total_seconds() - 1.5


def test_a_continued_run_is_the_same_run(tracked):
    assert len(tracked.sessions) == 2
    first, second = (written(session) for session in tracked.sessions)
    ids = {r.run_id for records in (first, second) for r in of_kind(records, "run")}
    assert ids == {wandb_id(tracked.run)}
    steps = [[row["trainer/global_step"] for row in history(r) if "train/loss" in row] for r in (first, second)]
    assert steps == [[0, 1, 2, 3], [4, 5]]
    last = max(row["_step"] for row in history(first))
    assert min(row["_step"] for row in history(second)) > last, "of one run W&B keeps rows in rising order only"
    assert of_kind(first, "preempting")
    assert of_kind(first, "exit")[0].exit_code == 1
    assert of_kind(second, "exit")[0].exit_code == 0


def test_three_loggers_say_the_same(tracked):
    rows = [row for session in tracked.sessions for row in history(written(session))]
    names = {k for row in rows for k, v in row.items() if isinstance(v, (int, float)) and "/" in k}
    names = {name for name in names - {"trainer/global_step"} if not name.startswith("val/predictions.")}
    assert {"train/loss", "val/recall@10", "val/loss", "perf/images_per_s"} <= names
    events = EventAccumulator(str(tracked.run / "tb")).Reload()
    assert set(events.Tags()["scalars"]) - {"epoch", "hp_metric"} == names
    files = sorted(tracked.run.glob("csv/*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1]))
    table = [row for file in files for row in csv.DictReader(file.open())]
    for name in names:
        wandb_says = [(row["trainer/global_step"], row[name]) for row in rows if name in row]
        board_says = [(event.step, event.value) for event in events.Scalars(name)]
        csv_says = [(int(row["step"]), float(row[name])) for row in table if row.get(name)]
        assert wandb_says == [(s, pytest.approx(v, rel=1e-5)) for s, v in csv_says], name
        assert wandb_says == [(s, pytest.approx(v, rel=1e-5)) for s, v in board_says], name
    final = {k: v for k, v in tracked.record["metrics"].items() if k.startswith("val/")}
    assert "val/recall@10" in final
    for name, value in final.items():
        assert [row[name] for row in rows if name in row][-1] == pytest.approx(value, rel=1e-6)


def test_the_record_goes_with_the_run(tracked):
    records = written(tracked.sessions[-1])
    assert "run.json" in {f.path for files in of_kind(records, "files") for f in files.files}
    copy = tracked.sessions[-1] / "files" / "run.json"
    assert not copy.is_symlink()
    assert json.loads(copy.read_text()) == tracked.record
    ended = summary(records)
    assert ended["status"] == "finished"
    assert ended["code"] == tracked.record["code"]
    assert {k: ended[k] for k in tracked.record["metrics"]} == pytest.approx(tracked.record["metrics"])
    assert summary(written(tracked.sessions[0]))["status"] == "interrupted"


def test_pictures_are_shown_with_their_labels(tracked):
    tables = []
    for session in tracked.sessions:
        records = written(session)
        steps = [row["trainer/global_step"] for row in history(records) if "val/predictions.path" in row]
        kept = [a.manifest.contents for a in of_kind(records, "artifact") if a.type == "run_table"]
        for step, contents in zip(steps, kept, strict=True):
            files = {entry.path: Path(entry.local_path) for entry in contents}  # the client's, until they are synced
            table = json.loads(files["val/predictions.table.json"].read_text())
            tables.append((step, table))
            for number, row in enumerate(table["data"]):
                picture = np.asarray(Image.open(files[row[1]["path"]]).convert("RGB"), dtype=float)
                colour = list(COLOURS.values())[number % len(COLOURS)]
                assert np.abs(picture.mean((0, 1)) - colour).max() < 12, "each row has its own picture"
    assert [step for step, _ in tables] == [2, 4, 6], "first, first after the resume, and the exported weights"
    for _, table in tables:
        assert table["columns"] == ["key", "image", "truth", "labels", "hits", "true labels"]
        assert [row[0] for row in table["data"]] == [f"{i:06d}" for i in range(2)], "the same pictures each time"
        for _, _, truth, labels, hits, number in table["data"]:
            shown = [line.split(" ", 1) for line in labels.splitlines()]
            assert 1 <= len(shown) <= 10
            assert [float(p) for p, _ in shown] == sorted((float(p) for p, _ in shown), reverse=True)
            assert hits == len(set(truth.split(", ")) & {label for _, label in shown})
            assert number == 2
            assert truth.endswith("stone")
    events = EventAccumulator(str(tracked.run / "tb"), size_guidance={"images": 0}).Reload()
    pictures = events.Images("val/predictions")
    assert [picture.step for picture in pictures] == [2, 4, 6]
    assert all(picture.width > 400 and picture.height > 200 for picture in pictures)


def test_the_model_directory_is_an_artifact_on_request(tracked):
    artifacts = [a for a in of_kind(written(tracked.sessions[-1]), "artifact") if a.type == "model"]
    (artifact,) = artifacts
    assert artifact.name == "model-" + wandb_id(tracked.run)
    files = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    assert set(files) == {p.name for p in (tracked.run / "model").iterdir()}
    assert files["model.safetensors"].resolve() == (tracked.run / "model" / "model.safetensors").resolve()
    assert not [a for a in of_kind(written(tracked.sessions[0]), "artifact") if a.type == "model"], "not finished"


def test_the_log_and_the_record_contain_the_command(tracked):
    log = (tracked.run / "train.log").read_text()
    assert log.count(" INFO nxtp train name=r sweep=my/study data.train=train ") == 2, "and of the resumed run"
    assert log.count("is saved, ") == log.count("Model directory: ") == 1
    assert {"name=r", "data.train=train", "+data.val.val=val"} <= set(tracked.record["overrides"])


def test_no_secret_is_written(tracked):
    files = [path for path in tracked.run.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert KEY not in "".join(tracked.outputs)


@pytest.mark.parametrize("sweep", [(), ("-m", "seed=0,1")])
def test_a_key_in_the_configuration_is_refused(tracked, sweep):
    command = ["train", *sweep, "name=s", "data.train=train", "logger=wandb", f"+logger.wandb.api_key={KEY}"]
    output = here(tracked.root, *command, code=1)
    assert "logger.wandb.api_key contains a secret" in output
    assert "WANDB_API_KEY" in output
    assert KEY not in output
    assert [path for path in (tracked.root / "runs" / "s").rglob("*") if path.is_file()] == []


def test_the_value_of_a_secret_variable_is_refused_anywhere(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    refuse_secrets({"model": {"tokenizer": "x", "token": None}, "api_key": None, "notes": ["harmless"]})
    with pytest.raises(UserError, match=r"^notes\[1\] contains a secret \(the value of WANDB_API_KEY\)") as error:
        refuse_secrets({"notes": ["harmless", f"my key: {KEY}"]})
    assert KEY not in str(error.value)


def test_an_evaluation_is_tracked(tracked):
    """By the loggers of training; without one, as before, in files only."""
    command = ["evaluate", f"model={tracked.run}/model", "+data.val.val=val", "semantic=null", "grid=0", "out=runs/e"]
    here(tracked.root, *command, "data.num_workers=0", "logger=wandb", "name=mine")
    metrics = json.loads((tracked.root / "runs/e/metrics.json").read_text())
    (session,) = (tracked.root / "runs/e").glob("wandb/offline-run-*")
    records = written(session)
    (row,) = [row for row in history(records) if "val/recall@10" in row]
    assert {key: row[key] for key in metrics} == metrics
    assert of_kind(records, "run")[0].display_name == "mine"
    assert config(records)["top_k"] == 10
    assert summary(records)["status"] == "finished"
    (row,) = csv.DictReader((tracked.root / "runs/e/csv/version_0/metrics.csv").open())
    assert float(row["val/recall@10"]) == pytest.approx(metrics["val/recall@10"])
    record = json.loads((tracked.root / "runs/e/run.json").read_text())
    assert record["samples_read"] == record["samples_seen"] == metrics["val/images"]

    training = {file: file.read_bytes() for file in tracked.run.rglob("*.json")}
    done = call_nxtp(*command[:-1], f"out={tracked.run}", "logger=wandb", cwd=tracked.root)
    assert done.returncode == 1
    assert "contains a training run, which a logger would continue" in done.stderr
    assert {file: file.read_bytes() for file in tracked.run.rglob("*.json")} == training


def test_checkpoints_cannot_be_uploaded_offline(tmp_path):
    with pytest.raises(UserError, match="model_artifact=true"):
        Wandb(save_dir=tmp_path, offline=True, log_model=True)
