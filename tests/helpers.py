"""Small shards and small models for the tests."""

from __future__ import annotations

import csv
import gc
import io
import multiprocessing
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from contextlib import chdir, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict
from PIL import Image
from sites import serving  # noqa: F401  for the tests that import it from here
from small_shards import COLOURS, jpeg, sample, write_shards  # noqa: F401  for the tests that import them from here

from nxtp import config
from nxtp.cli import main
from nxtp.data.config import DataConfig
from nxtp.data.datamodule import WebDatasetDataModule
from nxtp.data.transforms import ImageTransform
from nxtp.inference.recognizer import Recognizer
from nxtp.model.decoder import DecoderConfig
from nxtp.model.encoder import EncoderConfig
from nxtp.model.model import Model, ModelConfig
from nxtp.model.tokenizer import LabelTokenizer, train_tokenizer


def tiny_config(image_size: int = 32, **decoder) -> ModelConfig:
    """A ViT of two blocks and width 32 with 16 image tokens, and LLaMA blocks of width 32."""
    fields = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
        "pad_token_id": None,
    }
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": image_size // 4, "mlp_ratio": 2.0}
    return ModelConfig(
        encoder=EncoderConfig(vision=vision, image_size=image_size),
        decoder=DecoderConfig(config=fields | decoder),
        vocab_size=400,
    )


@cache
def colour_tokenizer() -> LabelTokenizer:
    return train_tokenizer([*COLOURS, "stone"], vocab_size=400)


def shard_data(train=None, val=None, **settings) -> WebDatasetDataModule:
    """Shards as images of 32 pixels, in small batches."""
    settings = {"batch_size": 4, "val_batch_size": 4, "num_workers": 0} | settings
    config = DataConfig(train=train, val=val or {}, **settings)
    return WebDatasetDataModule(config, colour_tokenizer(), transform=ImageTransform(32), num_image_tokens=16)


# Commands as fresh processes, forked from one that has imported the libraries: a second each instead of ten.

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["preloaded"])


def start_fork_server() -> None:
    """It finds preloaded.py in its working directory. Started by anything else, it would preload nothing."""
    with chdir(Path(__file__).parent):
        forkserver.ensure_running()


def become_fork_server(path: bytes, arguments: list[str], descriptors: list[int]) -> int:
    """In place of multiprocessing's ``spawnv_passfds``: the server is a fork of this process, with its imports."""
    if pid := os.fork():
        return pid
    pipe = os.fstat(descriptors[1]).st_ino
    for descriptor in range(3, 256):  # the pipe's other end, so that the server ends with this process
        with suppress(OSError):
            if descriptor != descriptors[1] and os.fstat(descriptor).st_ino == pipe:
                os.close(descriptor)
    try:
        exec(arguments[-1], {})  # of python -c
    finally:
        os._exit(0)


def fork(function, *arguments) -> multiprocessing.Process:
    """A started process."""
    start_fork_server()
    process = forks.Process(target=function, args=arguments)
    process.start()
    return process


def nxtp_here(arguments: list[str], cwd: str, out: str, error: str, environment: dict[str, str]) -> None:
    for number, path in ((1, out), (2, error)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    gc.enable()  # off while tests are imported
    multiprocessing.set_start_method("fork", force=True)  # as in a user's process: loader workers import nothing
    os.chdir(cwd)
    os.environ.update(environment)
    if "OWN_GROUP" in environment:
        os.setpgrp()
    sys.argv = ["nxtp", *arguments]
    import nxtp.__main__

    sys.modules["__main__"] = nxtp.__main__  # from which Lightning starts the other ranks

    code = 1
    try:
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        if "wandb" in sys.modules:  # at exit it waits until its service has written all
            sys.modules["wandb"].teardown()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def kernel_here(arguments: list[str], cwd: str, environment: dict[str, str]) -> None:
    """A notebook's kernel."""
    os.setpgrp()  # it is stopped by a signal to its group
    os.chdir(cwd)
    os.environ.update(environment)
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance(argv=[*arguments, "--matplotlib=inline"])  # as where Matplotlib is imported later


@dataclass
class Command:
    """One command on one or several ranks."""

    ranks: list[multiprocessing.Process]
    log: Path

    def wait(self, timeout: float = 240) -> int:
        """The first rank's exit code, as a shell gives it; the others are ended when it has gone."""
        self.ranks[0].join(timeout)
        for process in self.ranks:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()
                raise AssertionError(f"a rank hangs:\n{self.output[-3000:]}")
        return self.ranks[0].exitcode

    def kill(self, number: int) -> None:
        """Send a signal to every rank."""
        for process in self.ranks:
            if process.pid and process.is_alive():
                os.kill(process.pid, number)

    def kill_first(self, number: int) -> None:
        """Send a signal to the first rank only."""
        os.kill(self.ranks[0].pid, number)

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def free_port() -> int:
    """A port of 127.0.0.1 that is not in use."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_nxtp(*arguments: str, cwd: Path, ranks: int = 1, **environment: str) -> Command:
    """`nxtp …` in ``cwd``; with several ranks each as a launcher would start it."""
    log = cwd / f"{time.monotonic_ns()}.log"
    if ranks > 1:
        port = str(free_port())
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    environment = {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", **environment}
    processes = []
    for rank in range(ranks):
        own = {**environment, "LOCAL_RANK": str(rank)} if ranks > 1 else environment
        processes.append(fork(nxtp_here, list(arguments), str(cwd), str(log), str(log), own))
    return Command(processes, log)


def run_nxtp(*arguments: str, cwd: Path, fresh: bool = False, **environment: str) -> subprocess.CompletedProcess:
    """`nxtp …` in ``cwd`` to its end, with what it printed.

    Args:
        fresh: by an interpreter of its own, as a user starts it: for runs that start further processes themselves.
    """
    environment = {"WANDB_MODE": "offline", **environment}
    if fresh:
        command = [sys.executable, "-m", "nxtp", *arguments]
        every = os.environ | environment
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=every)
    with tempfile.TemporaryDirectory() as directory:
        logs = [Path(directory, name) for name in ("out", "error")]
        process = fork(nxtp_here, list(arguments), str(cwd), *map(str, logs), environment)
        process.join(300)
        if process.is_alive():
            process.kill()
            raise AssertionError("it hangs")
        printed = [log.read_text() if log.exists() else "" for log in logs]
    return subprocess.CompletedProcess(list(arguments), process.exitcode, *printed)


def call_nxtp(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """`nxtp …` in this process, with what it printed."""
    out, error = io.StringIO(), io.StringIO()
    code = 0
    environment = mock.patch.dict(os.environ)  # a command changes it for the ranks that it starts
    given = mock.patch.object(sys, "argv", ["nxtp", *arguments])
    with chdir(cwd), redirect_stdout(out), redirect_stderr(error), environment, given:
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return subprocess.CompletedProcess(list(arguments), code, out.getvalue(), error.getvalue())


def reports_a_taken_port_and_a_missing_model(command: str, cwd: Path) -> None:
    """`nxtp app` and `nxtp serve` do so in one line."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = call_nxtp(command, "nowhere", "--port", str(taken.getsockname()[1]), cwd=cwd)
    assert done.returncode == 1
    assert "choose another --port" in done.stderr
    done = call_nxtp(command, "nowhere", "--port", str(free_port()), cwd=cwd)
    assert (done.returncode, done.stderr) == (1, "error: No model directory 'nowhere'.\n")


def nxtp_runs(*arguments: str, cwd: Path, ranks: int = 1, code: int = 0, **environment: str) -> str:
    """Run to its end and check the exit code; what it printed."""
    command = start_nxtp(*arguments, cwd=cwd, ranks=ranks, **environment)
    status = command.wait()
    assert status == code, f"exit code {status}:\n{command.output[-3000:]}"
    return command.output


def curve(run: Path, column: str = "train/loss") -> list[float]:
    """A logged quantity, step by step, of a run directory."""
    rows = [row for path in sorted(run.glob("csv/*/metrics.csv")) for row in csv.DictReader(path.open())]
    return [float(row[column]) for row in rows if row.get(column)]


# The same model as Hydra overrides, for commands run in a subprocess.
TINY_OVERRIDES = [
    "model/encoder=vit_tiny",
    "model.encoder.vision.layers=2",
    "model.encoder.vision.width=32",
    "model.encoder.vision.head_width=16",
    "model.encoder.vision.mlp_ratio=2.0",
    "model.encoder.image_size=32",
    "model.decoder.config.hidden_size=32",
    "model.decoder.config.intermediate_size=64",
    "model.decoder.config.num_attention_heads=4",
    "model.decoder.config.num_key_value_heads=4",
    "model.decoder.depth=2",
    "model.vocab_size=400",
]


PERF = [f"perf/{n}" for n in ("images_per_s", "tokens_per_s", "data_wait", "padding", "tflops", "peak_memory_gb")]
WORDS = ["rose", "lemon", "leaf", "ocean", "stone", "hot dog", "sunflower", "mirror"]


def recognizer(surplus: int = 0, **decoder) -> Recognizer:
    """A tiny model of random weights; the same each time. ``surplus`` vocabulary rows that the tokenizer lacks."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(WORDS, vocab_size=400)
    config = tiny_config(**decoder)
    return Recognizer(Model(config, len(tokenizer) + surplus), tokenizer, config, {"run": "test"})


def ending_recognizer(**decoder) -> Recognizer:
    """Random weights hardly ever write a delimiter; these do, after lengths that differ."""
    made = recognizer(**decoder)
    torch.manual_seed(3)
    head = made.model.decoder.lm.lm_head.weight
    with torch.no_grad():
        head[made.tokenizer.delimiter_id] = 6 * head.abs().mean() * torch.randn(head.shape[1]).sign()
    return made


def huge_png(width: int, height: int) -> bytes:
    """The header of a PNG, without pixels: if it were decoded the message would be another."""
    buffer = io.BytesIO()
    Image.new("1", (1, 1)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def composed(tmp_path, *overrides):
    cfg = config.composed("train", ["name=test", f"hydra.run.dir={tmp_path}", *overrides])
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = str(tmp_path)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg
