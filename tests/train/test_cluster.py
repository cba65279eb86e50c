"""On a cluster: what is submitted to SLURM, a run under torchrun."""

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
    output = nxtp_runs(
        "train", "-m", "hydra/launcher=slurm", "experiment=g3m", "name=a", *sizes, cwd=tmp_path, code=1, PATH=path
    )
    assert "no cluster here" in output
    lines = (tmp_path / "batch.sh").read_text().splitlines()
    requested = dict(
        line.removeprefix("#SBATCH --").split("=", 1) for line in lines if line.startswith("#SBATCH --") and "=" in line
    )
    assert requested["nodes"] == "4"
    assert requested["ntasks-per-node"] == requested["gpus-per-node"] == "8"
    assert requested["partition"] == "gpu"
    assert requested["job-name"] == "a"
    assert requested["signal"].endswith("@180")


def test_a_machine_without_slurm_or_gpu_is_an_error_in_one_line(tmp_path):
    output = nxtp_runs("train", "-m", "hydra/launcher=slurm", "name=a", cwd=tmp_path, code=1, PATH="/nowhere")
    assert output.strip() == "error: hydra/launcher=slurm: no srun on this machine: start it on a login node."
    output = nxtp_runs("train", "name=a", "trainer=gpu", cwd=tmp_path, code=1, CUDA_VISIBLE_DEVICES="")
    assert output.startswith("error: trainer.accelerator is 'gpu' and PyTorch finds no GPU")


@pytest.mark.slow
def test_torchrun_starts_the_ranks(tmp_path):
    write_shards(tmp_path / "train", [32], labels=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nxtp"]
    command += ["train", "name=r", "data.train=train", *TINY_OVERRIDES, "data.num_workers=0", "data.batch_size=4"]
    command += ["trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.max_steps=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "runs" / "r" / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["samples_seen"] == 24
