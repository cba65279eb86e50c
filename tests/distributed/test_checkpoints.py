"""Checkpoints as a file or as a directory of shards: written in the background, replaced whole, read without code."""

import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.fsdp import fully_shard

from nxtp.distributed import checkpoints
from nxtp.distributed.checkpoints import (
    INDEX,
    REST,
    BackgroundCheckpoints,
    StoredCheckpoint,
    TensorsOnly,
    read_checkpoint,
    read_file,
)
from nxtp.distributed.fsdp2 import FSDP2Strategy
from nxtp.errors import UserError
from nxtp.train.optim import refuse_other_groups


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def trained(mesh=None, steps: int = 2):
    """A small model, sharded with a mesh, and its optimizer, whose groups are not in the model's order."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    vectors, matrices = ([p for p in model.parameters() if p.ndim == n] for n in (1, 2))
    optimizer = torch.optim.AdamW([{"params": vectors, "weight_decay": 0.0}, {"params": matrices}], lr=0.1)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(8.0).view(2, 4)).square().sum().backward()
    optimizer.step()


def save(model, optimizer, path) -> None:
    io = BackgroundCheckpoints()
    io.save_checkpoint(
        {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()], "epoch": 3}, path
    )
    io.wait()


def load(model, optimizer, path) -> dict:
    """What Lightning does with FSDP2Strategy."""
    strategy = FSDP2Strategy()
    strategy._lightning_module, strategy.optimizers = model, [optimizer]
    strategy.broadcast = lambda path: path
    strategy.parallel_devices = [torch.device("cpu")]
    strategy.cluster_environment = SimpleNamespace(local_rank=lambda: 0)
    checkpoint = strategy.load_checkpoint(path)
    strategy.load_model_state_dict(checkpoint)
    strategy.load_optimizer_state_dict(checkpoint)
    return checkpoint


@pytest.mark.parametrize("form", ["file", "directory"])
@pytest.mark.parametrize("then", ["one process", "sharded"])
def test_either_form_resumes_either_way(tmp_path, one_rank, form, then):
    """Weights, moments, steps and groups: the next step is that of a run that was never stopped."""
    path, mesh = tmp_path / "last.ckpt", one_rank
    save(*trained(mesh if form == "directory" else None), path)
    assert path.is_dir() == (form == "directory")
    model, optimizer = trained(mesh if then == "sharded" else None, steps=0)
    if then == "sharded":
        assert load(model, optimizer, path)["epoch"] == 3
    else:
        checkpoint = BackgroundCheckpoints().load_checkpoint(path)
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.01]
    step(model, optimizer)
    expected, _ = trained(steps=3)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(getattr(found := model.state_dict()[name], "full_tensor", lambda: found)(), tensor)


def test_a_sharded_checkpoint_of_other_parameter_groups_is_refused(tmp_path, one_rank):
    save(*trained(one_rank), tmp_path / "last.ckpt")
    model, _ = trained(one_rank, steps=0)
    optimizer = torch.optim.AdamW([{"params": [p]} for p in model.parameters()])
    optimizer.register_load_state_dict_pre_hook(refuse_other_groups)
    with pytest.raises(
        UserError, match=r"has groups of \[2, 2\] parameters, that of this run \[1, 1, 1, 1\]: set optim"
    ):
        load(model, optimizer, tmp_path / "last.ckpt")


def test_a_sharded_checkpoint_is_copied_before_it_is_written(tmp_path, one_rank, monkeypatch):
    begin, write = threading.Event(), checkpoints._ShardWriter.write_data
    monkeypatch.setattr(checkpoints._ShardWriter, "write_data", lambda *a: begin.wait(10) and write(*a))
    model, optimizer = trained(one_rank)
    before = {name: tensor.full_tensor().clone() for name, tensor in model.state_dict().items()}
    io = BackgroundCheckpoints()
    for _ in range(2):  # the second copy reuses the memory of the first
        io.save_checkpoint({"state_dict": model.state_dict()}, tmp_path / "x.ckpt")
        before = {name: tensor.full_tensor().clone() for name, tensor in model.state_dict().items()}
        step(model, optimizer)
        begin.set()
        io.wait()
        found = read_checkpoint(tmp_path / "x.ckpt")["state_dict"]
        assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
        begin.clear()


def test_a_checkpoint_of_another_model_is_an_error(tmp_path, one_rank):
    for form, mesh in (("file", None), ("directory", one_rank)):
        save(*trained(mesh), tmp_path / form)
        other = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Linear(6, 3))
        fully_shard(other, mesh=one_rank)
        with pytest.raises(UserError, match="cannot be read as a checkpoint of this model"):
            load(other, torch.optim.AdamW(other.parameters()), tmp_path / form)


def test_an_index_that_names_anything_else_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / INDEX).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="does not need"):
        TensorsOnly(tmp_path).read_metadata()
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_a_tensors_place_is_refused(tmp_path):
    """PyTorch would unpickle, in full, whatever the index declares to be bytes."""
    ran, shards = tmp_path / "ran", tmp_path / "shards"
    dcp.save({"state_dict/x": Touch(str(ran))}, storage_writer=dcp.FileSystemWriter(shards), no_dist=True)
    torch.save({"state_dict": {}}, shards / REST)
    with pytest.raises(UserError, match="state_dict/x"):
        read_checkpoint(shards)
    assert not ran.exists()


class Touch:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_damaged_checkpoint_is_an_error(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"x\.ckpt.*cannot be read"):
        read_file(tmp_path / "x.ckpt")
    shards = tmp_path / "shards"
    shards.mkdir()
    torch.save({}, shards / REST)
    with pytest.raises(UserError, match="not a complete checkpoint"):
        StoredCheckpoint(shards)
    (shards / INDEX).write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match=r"shards.*cannot be read"):
        StoredCheckpoint(shards)


def test_training_does_not_change_what_is_being_written(tmp_path, monkeypatch):
    begin, write = threading.Event(), checkpoints._write_file
    monkeypatch.setattr(checkpoints, "_write_file", lambda *a: begin.wait(10) and write(*a))
    weight, io = torch.ones(2), BackgroundCheckpoints()
    io.save_checkpoint({"state_dict": {"x": weight}}, tmp_path / "x.ckpt")
    weight.zero_()
    begin.set()
    io.teardown()
    assert read_file(tmp_path / "x.ckpt")["state_dict"]["x"].tolist() == [1, 1]


def test_pytorchs_older_stagers_copy_once(tmp_path, one_rank, monkeypatch):
    """PyTorch 2.11 and 2.12 close a stager when it has made its first copy."""
    stage = DefaultStager.stage
    monkeypatch.setattr(checkpoints, "STAGERS_LAST", False)
    monkeypatch.setattr(DefaultStager, "stage", lambda self, *a: (stage(self, *a), self.close())[0])
    for mesh in (None, one_rank):
        model, _ = trained(mesh)
        io = BackgroundCheckpoints()
        for _ in range(2):
            io.save_checkpoint({"state_dict": model.state_dict()}, tmp_path / str(mesh))
        assert read_checkpoint(tmp_path / str(mesh))["state_dict"].keys() == model.state_dict().keys()
        io.teardown()


def test_an_error_while_writing_leaves_the_previous_one(tmp_path, one_rank, monkeypatch):
    """The next save or load raises it, once; in either form."""
    for form, mesh in (("file", None), ("directory", one_rank)):
        path, (model, optimizer) = tmp_path / form, trained(mesh)
        save(model, optimizer, path)
        io = BackgroundCheckpoints()
        with monkeypatch.context() as patched:
            patched.setattr(checkpoints, "replace", full_disk)
            io.save_checkpoint({"state_dict": model.state_dict()}, path)
            with pytest.raises(
                UserError, match=rf"{form}' could not be written: no space.* still in .*Free some space"
            ):
                io.load_checkpoint(path)
        assert [entry for entry in tmp_path.iterdir() if entry.name.endswith(".part")] == []
        assert io.load_checkpoint(path)["epoch"] == 3


def full_disk(*_):
    raise OSError("no space left on device")


@pytest.mark.parametrize("left", ["file", "directory"])
def test_remains_of_a_killed_save_of_the_other_form_are_no_obstacle(tmp_path, one_rank, left):
    """A run that is killed while it saves resumes with shards in place of a file, or the other way round."""
    path = tmp_path / "last.ckpt"
    for name in (".last.ckpt.part", ".last.ckpt.old"):
        (tmp_path / name).mkdir() if left == "directory" else (tmp_path / name).write_text("half")
    for _ in range(2):  # the second one moves the first aside
        save(*trained(one_rank if left == "file" else None), path)
    assert read_checkpoint(path)["epoch"] == 3
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.endswith(".part")] == []
