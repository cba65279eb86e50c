"""Evaluation over ranks: the files of one process, to the last digit, whatever the sets' sizes."""

import json
import shutil
import signal

import pytest
from helpers import call_nxtp, ending_recognizer, nxtp_runs, start_nxtp, write_shards

SETS = ["model=model", "+data.val.uneven=uneven", "+data.val.few=few", "data.num_workers=0", "data.val_batch_size=2"]
GIVEN = ["evaluate", *SETS, "semantic=null", "grid=3", "data.max_skip_fraction=0.5"]
OWN = ["+metrics.order._target_=order.Order"]
TWO = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
ORDER = """import os, signal, torch
from torchmetrics import Metric
class Order(Metric):  # its value depends on the order and the size of the batches
    def __init__(self):
        super().__init__()
        self.add_state("value", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
    def update(self, predictions, targets):
        self.value = self.value / 3 + len(predictions) + sum(len("".join(labels)) for labels in predictions + targets)
    def compute(self):
        return self.value
"""
ONLY_FIRST = """import os
from nxtp.data import mixture
if os.environ["LOCAL_RANK"] == "1":
    mixture.expand_shards = mixture.listed_counts = None
"""
ELSEWHERE = """import os
if os.environ["LOCAL_RANK"] == "1":
    os.chdir("other")
"""
FAIL = """import os, signal
from nxtp.errors import UserError
from nxtp.inference.recognizer import Recognizer
predict = Recognizer.predict_pixels
def fail(self, images, *arguments):
    if os.environ["LOCAL_RANK"] == "1":
        {}
    return predict(self, images, *arguments)
Recognizer.predict_pixels = fail
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    ending_recognizer().save_pretrained(root / "model")
    write_shards(root / "uneven", [3, 4], labels=True)
    write_shards(root / "few", [1], labels=True)
    shard = root / "uneven" / "part-00001.tar"
    shard.write_bytes(shard.read_bytes().replace(b"\xff\xd8\xff", b"no jpeg"[:3], 2))  # two are skipped, on some rank
    (root / "order.py").write_text(ORDER)
    assert call_nxtp(*GIVEN, *OWN, "out=one", cwd=root).returncode == 0
    return root


def metrics(directory) -> dict[str, float]:
    return {k: v for k, v in json.loads((directory / "metrics.json").read_text()).items() if "per_s" not in k}


def test_two_ranks_give_what_one_process_gives(place):
    """The sets are listed and counted by the first one."""
    (place / "only_first.py").write_text(ONLY_FIRST)
    nxtp_runs(*GIVEN, *OWN, *TWO, "out=two", cwd=place, ranks=2, NXTP_IMPORT="only_first")
    one, two = place / "one", place / "two"
    assert metrics(two) == metrics(one)
    assert (metrics(one)["uneven/images"], metrics(one)["uneven/skipped"]) == (5, 2)
    assert metrics(one)["few/images"] == 1, "less than a batch: one rank has none"
    for name in ("predictions.jsonl", "predictions.png", "predictions_few.png"):
        assert (two / name).read_bytes() == (one / name).read_bytes()
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    records = [json.loads((directory / "run.json").read_text()) for directory in (one, two)]
    assert records[1]["samples_skipped"] == records[0]["samples_skipped"] == {"bad image": 2}
    assert records[1]["config"]["trainer"] == {"accelerator": "cpu", "devices": 2, "num_nodes": 1}
    assert records[1]["status"] == "finished"


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("raise UserError('It is cold.')", "error: Rank 1: It is cold."),
        ("os.kill(os.getpid(), signal.SIGKILL)", "error: Another rank has ended, or does not answer ("),
    ],
)
def test_a_rank_that_fails_or_dies_ends_all_in_one_line(place, how, line):
    name = f"fail{len(how)}"
    (place / f"{name}.py").write_text(FAIL.format(how))
    command = start_nxtp(*GIVEN, *TWO, f"out={name}", cwd=place, ranks=2, NXTP_IMPORT=name)
    assert command.wait(60) == 1
    assert command.ranks[1].exitcode == (-signal.SIGKILL if "KILL" in how else 1)
    errors = [text for text in command.output.splitlines() if text.startswith("error")]
    assert len(errors) == 1, command.output
    assert errors[0].startswith(line)
    assert not (place / name / "metrics.json").exists()


def test_a_rank_without_a_shard_evaluates_nothing(place):
    """On a machine where the same path has another one: it was a skipped sample there."""
    (place / "elsewhere.py").write_text(ELSEWHERE)
    shutil.copytree(place / "few", place / "other" / "few")
    (place / "other" / "model").symlink_to(place / "model")
    write_shards(place / "other" / "uneven", [3], labels=True)
    command = start_nxtp(*GIVEN, *TWO, "out=other", cwd=place, ranks=2, NXTP_IMPORT="elsewhere")
    assert command.wait(60) == 1
    errors = {text for text in command.output.splitlines() if text.startswith("error")}
    size = (place / "uneven" / "part-00001.tar").stat().st_size
    where = "data.val.uneven.uneven/part-00001.tar"
    assert errors == {
        f"error: Rank 1 has opened something else than rank 0: {where}: nothing instead of {size:,} bytes."
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer=fsdp", "trainer.accelerator=cpu"], "Evaluation shares out samples, not weights: use trainer=ddp."),
        ([*TWO, "trainer.max_epochs=2"], "trainer.num_nodes: omit trainer.max_epochs."),
        ([*TWO, "device=cpu"], "trainer.num_nodes: omit device."),
        (["trainer=ddp"], "trainer cannot be instantiated: "),
    ],
)
def test_what_evaluation_cannot_use_is_refused(place, arguments, message):
    done = call_nxtp(*GIVEN, *arguments, "out=refused", cwd=place)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
