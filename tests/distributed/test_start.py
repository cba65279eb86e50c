"""How ranks start: one that does not come, or has opened something else, ends all of them in one line."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
from helpers import TINY_OVERRIDES, free_port, start_nxtp, write_shards
from lightning.pytorch.plugins.environments import LightningEnvironment

from nxtp.distributed.start import StartTogether, difference

pytestmark = pytest.mark.costly

DDP = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.max_steps=2"]


def command(name: str, *overrides: str) -> list[str]:
    arguments = ["train", f"name={name}", "data.train=train", *TINY_OVERRIDES, "data.num_workers=0"]
    return [*arguments, "data.batch_size=4", *DDP, *overrides]


def test_the_first_difference_is_named():
    one = {"configuration": {"seed": 0, "optim": {"lr": 1.0}}, "data": {"train": {"a.tar": "3 samples", "b.tar": "4"}}}
    assert difference(one, one) is None
    two = {"configuration": {"seed": 0, "optim": {"lr": 2.0}}, "data": {}}
    assert difference(one, two) == "configuration.optim.lr: 2.0 instead of 1.0"
    three = {**one, "data": {"train": {"a.tar": "3 samples", "c.tar": "4"}}}
    assert difference(one, three) == "data.train.b.tar: nothing instead of 4"
    assert difference(three, one) == "data.train.c.tar: nothing instead of 4"


def test_an_error_of_the_training_is_not_one_of_the_start():
    strategy = SimpleNamespace(cluster_environment=LightningEnvironment(), _timeout=timedelta(minutes=30))
    start = StartTogether(strategy, 5, {})
    assert strategy._timeout == timedelta(seconds=5)
    start.setup(SimpleNamespace(world_size=1), None, "fit")
    with pytest.raises(RuntimeError, match="of the training"), start.waiting():
        raise RuntimeError("of the training")


def test_a_rank_that_waits_in_vain_reports_for_what(tmp_path):
    """The first one and the other, each alone."""
    write_shards(tmp_path / "train", [16], labels=True)
    started = []
    for rank in ("0", "1"):
        port = str(free_port())
        cluster = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
        alone = command(f"alone{rank}", "parallel.start_timeout=1")
        started.append((rank, port, start_nxtp(*alone, cwd=tmp_path, LOCAL_RANK=rank, **cluster)))
    for rank, port, waiting in started:
        assert waiting.wait() == 1
        start = f"error: Rank {rank} waited 1 s (parallel.start_timeout) for 2 ranks to meet at 127.0.0.1:{port}:"
        assert waiting.output.splitlines()[-1].startswith(start), waiting.output[-3000:]
        assert "Traceback" not in waiting.output


@pytest.mark.parametrize(
    ("ranks", "last"),
    [
        pytest.param(2, [16], id="a missing shard"),
        pytest.param(4, [16, 30], id="another shard", marks=pytest.mark.slow),  # of as many processes
    ],
)
def test_ranks_with_other_data_train_nothing(tmp_path, ranks, last):
    """Each on a machine of its own, on which the same path has other shards."""
    for rank in range(ranks):
        write_shards(tmp_path / f"node{rank}" / "train", last if rank == ranks - 1 else [16, 8], labels=True)
    (tmp_path / "node.py").write_text("import os\nos.chdir(f'node{os.environ[\"LOCAL_RANK\"]}')\n")
    run_dir = f"hydra.run.dir={tmp_path}/run"
    overrides = [run_dir, f"trainer.devices={ranks}"]
    started = start_nxtp(*command("two", *overrides), cwd=tmp_path, ranks=ranks, NXTP_IMPORT="node")
    assert started.wait() == 1
    errors = {line for line in started.output.splitlines() if line.startswith("error")}
    shard = "train/part-00001.tar"
    text = f"error: Rank {ranks - 1} has opened something else than rank 0: data.train.{shard}: "
    sizes = [path.stat().st_size for rank in (0, ranks - 1) if (path := tmp_path / f"node{rank}" / shard).exists()]
    there = [f"{size:,} bytes" for size in sizes] + ["nothing"] * (2 - len(sizes))
    assert errors == {text + f"{there[1]} instead of {there[0]}."}, started.output
    assert not (tmp_path / "run" / "checkpoints").exists()
