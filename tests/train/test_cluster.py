"""On a cluster: what is handed to SLURM, a run under torchrun."""

import json
import os
import subprocess
import sys

import pytest
from helpers import TINY_OVERRIDES, nxtp_runs, write_shards

SBATCH = """#!/bin/sh
cp "$1" {root}/batch.sh
echo "sbatch: no cluster here" >&2
exit 1
"""


def test_slurm_gets_a_task_for_each_gpu(tmp_path):
    for name in ("sbatch", "srun", "sacct"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(SBATCH.format(root=tmp_path))
        program.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    sizes = ["trainer.num_nodes=4", "trainer.devices=8", "hydra.launcher.partition=gpu"]
    told = nxtp_runs(
        "train", "-m", "hydra/launcher=slurm", "experiment=g3m", "name=a", *sizes, cwd=tmp_path, code=1, PATH=path
    )
    assert "no cluster here" in told
    lines = (tmp_path / "batch.sh").read_text().splitlines()
    asked = dict(
        line.removeprefix("#SBATCH --").split("=", 1) for line in lines if line.startswith("#SBATCH --") and "=" in line
    )
    assert asked["nodes"] == "4"
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] == "8"
    assert asked["partition"] == "gpu"
    assert asked["job-name"] == "a"
    assert asked["signal"].endswith("@180")


def test_a_machine_without_slurm_or_gpu_is_told_in_one_line(tmp_path):
    told = nxtp_runs("train", "-m", "hydra/launcher=slurm", "name=a", cwd=tmp_path, code=1, PATH="/nowhere")
    assert told.strip() == "error: hydra/launcher=slurm: no srun on this machine: start it on a login node."
    told = nxtp_runs("train", "name=a", "trainer=gpu", cwd=tmp_path, code=1, CUDA_VISIBLE_DEVICES="")
    assert told.startswith("error: trainer.accelerator is 'gpu' and PyTorch sees none here")


@pytest.mark.slow
def test_torchrun_starts_the_ranks(tmp_path):
    write_shards(tmp_path / "train", [32])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nxtp"]
    command += ["train", "name=r", "data.train=train", *TINY_OVERRIDES, "data.num_workers=0", "data.batch_size=4"]
    command += ["trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.max_steps=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "runs" / "r" / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["samples_seen"] == 24
