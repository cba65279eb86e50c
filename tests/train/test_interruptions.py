"""Runs that are killed, stopped by a signal, or cannot write: they resume to the weights of an undisturbed run."""

import csv
import json
import os
import random
import signal
import time

import pytest
import torch
from helpers import TINY_OVERRIDES, call_nxtp, curve, nxtp_runs, start_nxtp, write_shards
from safetensors.torch import load_file

from nxtp.distributed.checkpoints import REST, BackgroundCheckpoints, read_file
from nxtp.inference.recognizer import Recognizer

pytestmark = pytest.mark.costly

CPU = ["trainer.accelerator=cpu", "trainer.precision=32-true"]
STRATEGIES = {"one": ([], 1), "ddp": (["trainer=ddp", *CPU], 2), "fsdp": (["trainer=fsdp", *CPU], 2)}
OFTEN, NEVER = "callbacks.last.every_n_train_steps=1", "callbacks.last.every_n_train_steps=1000"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("interruptions")
    write_shards(root / "train", [24, 24], labels=True)
    write_shards(root / "val", [3, 2], labels=True)
    return root


def command(name: str, strategy: str = "one", *overrides: str) -> tuple[list[str], int]:
    """12 steps of eight images, two epochs."""
    more, ranks = STRATEGIES[strategy]
    arguments = ["train", f"name={name}", "data.train=train", "+data.val.val=val", *TINY_OVERRIDES, *more]
    arguments += ["data.num_workers=0", f"data.batch_size={8 // ranks}", "data.val_batch_size=4", "optim.lr=3e-3"]
    return [*arguments, "trainer.log_every_n_steps=1", "trainer.max_epochs=2", NEVER, *overrides], ranks


def run(root, name: str, strategy: str = "one", *overrides: str, code: int = 0, **environment: str) -> str:
    arguments, ranks = command(name, strategy, *overrides)
    return nxtp_runs(*arguments, cwd=root, ranks=ranks, code=code, **environment)


def last_checkpoint(root, name: str):
    return root / "runs" / name / "checkpoints" / "last.ckpt"


def weights(root, name: str) -> dict[str, torch.Tensor]:
    return BackgroundCheckpoints().load_checkpoint(last_checkpoint(root, name))["state_dict"]


def record(root, name: str) -> dict:
    return json.loads((root / "runs" / name / "run.json").read_text())


def assert_same_run(root, name: str, other: str, epochs: int = 2) -> None:
    """To the bit: weights, samples seen, the metrics of the exported model."""
    expected, found = weights(root, name), weights(root, other)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key
    one, two = record(root, name), record(root, other)
    assert one["status"] == two["status"] == "finished"
    assert one["samples_seen"] == two["samples_seen"] == epochs * 48
    assert one["metrics"]["val/loss"] == two["metrics"]["val/loss"]


def assert_almost_same_run(root, name: str, other: str) -> None:
    """To rounding, under another strategy."""
    found = weights(root, other)
    for key, tensor in weights(root, name).items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")
    assert record(root, other)["samples_seen"] == 2 * 48


def losses(root, name: str) -> set[tuple[str, str]]:
    """Step and loss, as they are logged, of all starts of a run."""
    tables = (csv.DictReader(path.open()) for path in (root / "runs" / name).glob("csv/*/metrics.csv"))
    return {(row["step"], row["train/loss"]) for table in tables for row in table if row.get("train/loss")}


undisturbed_runs: set[str] = set()


def undisturbed(root, strategy: str, *overrides: str) -> str:
    name = f"whole_{strategy}{len(overrides)}"
    if name not in undisturbed_runs:
        output = run(root, name, strategy, *overrides)
        for noise in ("Tip:", "sync_dist", "weights_only` was not set"):
            assert noise not in output
        undisturbed_runs.add(name)
    return name


def wait_for_steps(root, name: str, started, count: int) -> None:
    """Until the command has logged so many steps more than there were."""
    run_dir = root / "runs" / name
    before, end = len(curve(run_dir)), time.monotonic() + 120
    while len(curve(run_dir)) < before + count and started.ranks[0].is_alive() and time.monotonic() < end:
        time.sleep(0.02)


def strike(root, name: str, strategy: str, number: int, steps: int, delay: float, *overrides: str):
    """A signal, so many steps and seconds on, to a run that saves after every step; None where it had ended before."""
    arguments, ranks = command(name, strategy, OFTEN, *overrides)
    started = start_nxtp(*arguments, cwd=root, ranks=ranks)
    wait_for_steps(root, name, started, steps)
    time.sleep(delay)
    alive = started.ranks[0].is_alive()
    started.kill(number)
    for rank in started.ranks:
        rank.join()
    return started if alive else None


def kill_again_and_again(root, name: str, strategy: str, times: int, seed: int, *overrides: str) -> int:
    """SIGKILL at random moments until it ends by itself; the number of kills."""
    chance, struck = random.Random(seed), 0
    while struck < times:
        steps, delay = 1 + chance.randrange(3), chance.random() * 0.2
        if strike(root, name, strategy, signal.SIGKILL, steps, delay, *overrides) is None:
            break
        struck += 1
    run(root, name, strategy, OFTEN, *overrides)
    return struck


@pytest.mark.slow  # 7 s; as one run that is interrupted in every way, below, but at whatever moment it comes
def test_stopped_and_killed_from_outside(root):
    stopped = strike(root, "outside", "one", signal.SIGTERM, 2, 0)
    assert stopped.wait() == 128 + signal.SIGTERM, stopped.output[-3000:]
    assert "The same command continues it" in stopped.output
    assert strike(root, "outside", "one", signal.SIGKILL, 2, 0.03).wait() == -signal.SIGKILL
    run(root, "outside", "one", OFTEN)
    assert_same_run(root, undisturbed(root, "one"), "outside")


@pytest.mark.slow  # as above, of ranks: they share what is tested there, and their signals are tested below
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_killed_ranks_reach_the_same_weights(root, strategy):
    assert kill_again_and_again(root, f"killed_{strategy}", strategy, 2, seed=1) > 0
    assert_same_run(root, undisturbed(root, strategy), f"killed_{strategy}")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_killed_at_twenty_random_points(root, strategy, record_property):
    names, longer = [f"killed20_{strategy}_{i}" for i in range(5)], "trainer.max_epochs=4"
    struck = sum(kill_again_and_again(root, name, strategy, 4, 10 + i, longer) for i, name in enumerate(names))
    record_property("kills, weights equal to the bit", struck)
    assert struck >= 16
    for name in names:
        assert_same_run(root, undisturbed(root, strategy, longer), name, epochs=4)


DIE_WHILE_SAVING = """
import os
import lightning as L

class Die(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 5:
            write = os.fsync
            def die(file):
                os.ftruncate(file, os.fstat(file).st_size // 2)
                os._exit(9)
            os.fsync = die
"""


SIGNAL = """
import os, signal
import lightning as L

class Signal(L.Callback):
    # To this process, once: after an optimizer step, or in the validation that follows it.

    def __init__(self, number, step, name, all_ranks=True, validation=False):
        self.number, self.step, self.all_ranks, self.validation = number, step, all_ranks, validation
        self.done = f"signalled_{name}"

    def send(self, trainer):
        done = f"{self.done}_{trainer.global_rank}"
        concerned = self.all_ranks or trainer.global_rank == 0
        if trainer.global_step == self.step and concerned and not os.path.exists(done):
            open(done, "w").close()
            os.kill(os.getpid(), self.number)

    def on_train_batch_end(self, trainer, *_):
        if not self.validation:
            self.send(trainer)

    def on_validation_batch_start(self, trainer, *_):
        if self.validation:
            self.send(trainer)
"""


def signalled(root, name: str, strategy: str, number: int, step: int, *overrides: str, **options: bool) -> str:
    """Run until the signal at ``step`` stops it; its output."""
    (root / "signalling.py").write_text(SIGNAL)
    settings = {"_target_": "signalling.Signal", "number": int(number), "step": step, "name": name, **options}
    sending = [f"+callbacks.signal.{key}={value}" for key, value in settings.items()]
    output = run(root, name, strategy, *sending, *overrides, code=128 + number)
    assert output.count("The same command continues it") == 1
    assert "Traceback" not in output
    assert record(root, name)["status"] == "interrupted"
    return output


@pytest.mark.parametrize(
    ("strategy", "number", "all_ranks"),
    [
        pytest.param("one", signal.SIGINT, True, marks=pytest.mark.slow),  # as in every way, below
        ("ddp", signal.SIGTERM, False),
        pytest.param("fsdp", signal.SIGUSR1, True, marks=pytest.mark.slow),  # as ddp, but for what is saved
        pytest.param("fsdp", signal.SIGTERM, False, marks=pytest.mark.slow),
        pytest.param("one", signal.SIGTERM, True, marks=pytest.mark.slow),  # so is this
    ],
)
def test_a_signal_saves_and_stops(root, strategy, number, all_ranks):
    """A signal to one rank is enough; the same command resumes to the same weights."""
    name = f"signal_{strategy}_{number}"
    signalled(root, name, strategy, number, 2, all_ranks=all_ranks)
    assert record(root, name)["samples_seen"] in (3 * 8, 4 * 8)  # the next step's all-reduce, read a step later
    run(root, name, strategy)
    if strategy == "ddp":  # to the bit in the slow tests, which need an undisturbed run of two ranks
        assert_almost_same_run(root, undisturbed(root, "one"), name)
    else:
        assert_same_run(root, undisturbed(root, strategy), name)


WAIT = """
import os, time
import lightning as L

class Wait(L.Callback):
    # After the second step, once, until the test has done its part.

    def __init__(self, name):
        self.name = name

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2 and not os.path.exists(f"{self.name}.reached"):
            open(f"{self.name}.reached", "w").close()
            while not os.path.exists(f"{self.name}.go"):
                time.sleep(0.02)
"""


def start_and_wait(root, name: str, *overrides: str, **environment: str):
    """The command, which waits after its second step until ``name``.go exists."""
    (root / "waiting.py").write_text(WAIT)
    arguments, _ = command(name, "one", "+callbacks.wait._target_=waiting.Wait", f"+callbacks.wait.name={name}")
    started = start_nxtp(*arguments, *overrides, cwd=root, **environment)
    wait_until(lambda: (root / f"{name}.reached").exists() or not started.ranks[0].is_alive())
    return started


def wait_until(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow  # 8 s; as the one below, between accumulated batches
def test_a_signal_in_validation_within_a_step(root):
    """Accumulated batches are not lost: the run stops after a step, the one after the signal was shared."""
    within = ["data.batch_size=4", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=5"]
    run(root, "within_whole", "one", *within)
    signalled(root, "within", "one", signal.SIGTERM, 2, *within, validation=True)
    assert record(root, "within")["samples_seen"] == 4 * 8
    run(root, "within", "one", *within)
    assert_same_run(root, "within_whole", "within")


INTERRUPT = """
import lightning as L

class Interrupt(L.Callback):
    def on_fit_start(self, *_):
        raise KeyboardInterrupt
"""


def test_ctrl_c_before_the_first_step(root):
    """Lightning handles it, with exit code 1."""
    (root / "interrupting.py").write_text(INTERRUPT)
    output = run(root, "early", "one", "+callbacks.interrupt._target_=interrupting.Interrupt", code=130)
    assert (
        output.replace(f"{root}/", "")
        == "runs/early has no checkpoint yet, stopped by SIGINT. The same command continues it.\n"
    )
    assert record(root, "early")["status"] == "interrupted"


HANDLER = """
import signal
import lightning as L

class Scheduler(L.Callback):
    def __init__(self):
        signal.signal(signal.SIGUSR2, lambda number, frame: open("requeued", "w").close())
"""


DISK_FULL = """
import resource, signal
import lightning as L

class Full(L.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.strategy.checkpoint_io.wait()
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
"""


def fill_the_disk(root, name: str, strategy: str, step: int) -> None:
    """Run until the save after ``step`` fails; the checkpoint before it stays."""
    (root / "filling.py").write_text(DISK_FULL)
    full = ["+callbacks.full._target_=filling.Full", f"+callbacks.full.step={step}"]
    output = run(root, name, strategy, *full, OFTEN, code=1)
    assert "could not be written: File too large. " in output
    assert "still in" in output
    assert "Traceback" not in output
    last = last_checkpoint(root, name)
    assert (read_file(last / REST) if last.is_dir() else read_file(last))["global_step"] == step - 1


@pytest.mark.slow  # as below, but for what is saved
def test_a_disk_that_is_full_leaves_the_shards_before(root):
    fill_the_disk(root, "full_fsdp", "fsdp", 4)
    run(root, "full_fsdp", "fsdp")
    assert_same_run(root, undisturbed(root, "fsdp"), "full_fsdp")


def test_one_run_is_interrupted_in_every_way(root):
    """At each step the loss of a run that nothing interrupts, and in the end its weights."""
    whole, name = undisturbed(root, "one"), "every"
    first = start_and_wait(root, name, "data.num_workers=1", OWN_GROUP="1")

    # a second command is refused, or waits until the first is gone: as the job that a scheduler starts again
    refused = run(root, name, "one", "optim.lr=1", "lock_timeout=0", code=1)
    assert f"error: 'runs/{name}' is in use by 'nxtp train name={name}" in refused.replace(f"{root}/", "")
    (root / "die.py").write_text(DIE_WHILE_SAVING)
    second = start_nxtp(*command(name, "one", "+callbacks.die._target_=die.Die", OFTEN)[0], cwd=root)
    wait_until(lambda: "waiting up to" in second.output or not second.ranks[0].is_alive())

    # a signal to the group, so also to the loader's worker, and to the run twice: as `timeout` sends it
    first.kill_first(signal.SIGTERM)
    time.sleep(0.05)
    os.killpg(first.ranks[0].pid, signal.SIGTERM)
    (root / f"{name}.go").touch()
    assert first.wait() == 128 + signal.SIGTERM, first.output[-3000:]
    assert "Traceback" not in first.output
    assert first.output.count("The same command continues it") == 1

    # killed in the middle of a save
    assert second.wait() == 9, second.output[-3000:]
    assert list(last_checkpoint(root, name).parent.glob(".*.part"))
    assert losses(root, name) < losses(root, whole)

    # a signal in validation, for which there was a handler: submitit's requeues the job, after the save
    (root / "scheduler.py").write_text(HANDLER)
    scheduler = "+callbacks.scheduler._target_=scheduler.Scheduler"
    signalled(root, name, "one", signal.SIGUSR2, 6, scheduler, validation=True)
    assert record(root, name)["samples_seen"] == 48
    assert (root / "requeued").exists()
    assert losses(root, name) < losses(root, whole)

    # killed from outside, where the disk had been full
    fill_the_disk(root, name, "one", 9)
    assert strike(root, name, "one", signal.SIGKILL, 1, 0).wait() == -signal.SIGKILL
    run(root, name)
    assert losses(root, name) <= losses(root, whole)  # a process that dies takes some lines with it
    assert_same_run(root, whole, name)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        pytest.param("one", "fsdp", marks=pytest.mark.slow),  # tests/distributed/test_checkpoints.py: in one process
        pytest.param("fsdp", "one", marks=pytest.mark.slow),
        pytest.param("ddp", "fsdp", marks=pytest.mark.slow),
        pytest.param("fsdp", "ddp", marks=pytest.mark.slow),
    ],
)
def test_a_run_continues_under_another_strategy(root, first, then):
    """With its weights and the optimizer's state: it ends where it would have ended, to rounding."""
    name = f"{first}_then_{then}"
    signalled(root, name, first, signal.SIGTERM, 5)
    batch = f"data.batch_size={8 // STRATEGIES[first][1]}"
    arguments, ranks = command(name, then, batch, f"resume={last_checkpoint(root, name)}")
    if ranks != STRATEGIES[first][1]:  # the same eight images per step
        arguments.append(f"data.batch_size={8 // ranks}")
    nxtp_runs(*arguments, cwd=root, ranks=ranks)
    assert_almost_same_run(root, undisturbed(root, first), name)
    assert last_checkpoint(root, name).is_dir() == (then == "fsdp")
    assert_exports(root, name)


def test_a_checkpoint_becomes_a_model_directory(root):
    name = undisturbed(root, "one")
    target = assert_exports(root, name)
    for checkpoint, out, reason in ((last_checkpoint(root, name), target, "exists"), ("nowhere", "x", "No checkpoint")):
        done = call_nxtp("export", str(checkpoint), "--out", str(out), cwd=root)
        assert done.returncode == 1
        assert reason in done.stderr


def assert_exports(root, name: str):
    """A model directory with the checkpoint's weights."""
    target = root / f"exported_{name}"
    assert call_nxtp("export", str(last_checkpoint(root, name)), "--out", str(target), cwd=root).returncode == 0
    recognizer = Recognizer.from_pretrained(target, device="cpu")
    assert recognizer.provenance["run"] == name
    stored = {key.removeprefix("model."): tensor for key, tensor in weights(root, name).items()}
    exported = load_file(target / "model.safetensors")
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[key], stored[key]) for key in stored)
    return target


EMA = ["callbacks=ema", "callbacks.ema.decay=0.9"]


def assert_averaged(root, name: str, checkpoint: str) -> None:
    """The model directory and the exported checkpoint have the averaged weights, whose metrics are the run's."""
    path = last_checkpoint(root, name).with_name(checkpoint)
    averaged = {key.removeprefix("model."): tensor for key, tensor in read_file(path)["state_dict"].items()}
    nxtp_runs("export", str(path), "--out", f"{name}_{checkpoint}", cwd=root)
    for directory in (root / "runs" / name / "model", root / f"{name}_{checkpoint}"):
        exported = load_file(directory / "model.safetensors")
        assert exported.keys() == averaged.keys()
        assert all(torch.equal(exported[key], averaged[key]) for key in exported), directory
    *during, final = curve(root / "runs" / name, "val/loss")
    assert final == record(root, name)["metrics"]["val/loss"]
    assert final in during


@pytest.mark.slow  # five runs
def test_a_resumed_run_averages_on(root):
    run(root, "ema_whole", "one", *EMA)
    signalled(root, "ema_signal", "one", signal.SIGTERM, 6, *EMA, validation=True)  # averages and weights are swapped
    run(root, "ema_signal", "one", *EMA)
    assert_same_run(root, "ema_whole", "ema_signal")
    assert_averaged(root, "ema_signal", "best.ckpt")
    run(root, "ema_last", "one", *EMA, "export=last")
    assert_averaged(root, "ema_last", "last.ckpt")
    raw = weights(root, undisturbed(root, "one"))
    assert any(not torch.equal(tensor, raw[key]) for key, tensor in weights(root, "ema_last").items())


def test_averaging_of_sharded_weights_is_refused(root):
    arguments, _ = command("ema_fsdp", "one", *EMA, "trainer=fsdp", *CPU, "trainer.devices=1")
    done = call_nxtp(*arguments, cwd=root)
    assert done.returncode == 1
    assert "averages whole weights: use trainer=ddp" in done.stderr.splitlines()[-1]
