"""The same mathematics everywhere: one process with the whole batch, DDP, FSDP, accumulation."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY_OVERRIDES, curve, nxtp_runs, tiny_config, write_shards
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from nxtp.distributed.checkpoints import read_file
from nxtp.distributed.parallelize import ParallelConfig, parallelize
from nxtp.errors import UserError
from nxtp.model.model import Model
from nxtp.model.tokenizer import train_tokenizer
from nxtp.train.module import RecognitionModule

pytestmark = pytest.mark.costly

CPU = ["trainer.accelerator=cpu", "trainer.precision=32-true"]
WAYS = {  # overrides and ranks: eight images a step in each
    "one": (["data.batch_size=8"], 1),
    "accumulated": (["data.batch_size=2", "trainer.accumulate_grad_batches=4"], 1),
    "ddp": (["trainer=ddp", *CPU, "data.batch_size=4"], 2),
    "ddp_accumulated": (["trainer=ddp", *CPU, "data.batch_size=2", "trainer.accumulate_grad_batches=2"], 2),
    "fsdp": (["trainer=fsdp", *CPU, "data.batch_size=4"], 2),
    "fsdp_accumulated": (["trainer=fsdp", *CPU, "data.batch_size=2", "trainer.accumulate_grad_batches=2"], 2),
    "checkpointed": (["parallel.activation_checkpointing=true", "data.batch_size=8"], 1),
}
PARTS = {
    "all": [],
    "mixed": ["optim.trainable.encoder=1", "optim.trainable.embedding=false"],
}
STEPS = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Shards; five validation images, which two ranks cannot share evenly."""
    root = tmp_path_factory.mktemp("strategies")
    write_shards(root / "train", [40, 40], labels=True)
    write_shards(root / "val", [3, 2], labels=True)
    return root


def train(root, name: str, way: str, *overrides: str, tiny=TINY_OVERRIDES):
    """The directory of a run."""
    more, ranks = WAYS[way]
    nxtp_runs(
        "train",
        f"name={name}",
        "data.train=train",
        "+data.val.val=val",
        *tiny,
        "data.num_workers=0",
        "data.val_batch_size=4",
        "trainer.log_every_n_steps=1",
        f"trainer.max_steps={STEPS}",
        "optim.lr=3e-3",
        "export=last",
        *more,
        *overrides,
        cwd=root,
        ranks=ranks,
    )
    return root / "runs" / name


@pytest.fixture(scope="module")
def reference(request, root):
    """One process with the whole batch: its name, its overrides, its run."""
    objective, parts = request.param
    overrides = [f"objective={objective}", *PARTS[parts]]
    return objective, overrides, train(root, f"{objective}_one", "one", *overrides)


def pairs():
    """References and ways. One has DDP, accumulation and frozen parts; FSDP and the other objective have the decoder in
    shards, below. The others are slow."""
    for objective, parts in (("matched", "all"), ("published", "mixed")):
        for way in WAYS:
            often = (objective, way) == ("published", "ddp_accumulated")
            if way != "one":
                marks = [] if often else [pytest.mark.slow]
                yield pytest.param((objective, parts), way, id=f"{objective}-{parts}-{way}", marks=marks)


@pytest.mark.parametrize(("reference", "way"), list(pairs()), indirect=["reference"])
def test_every_way_of_computing_gives_the_same_run(root, reference, way):
    objective, overrides, one = reference
    run = train(root, f"{objective}_{way}", way, *overrides)
    accumulated = {"accumulated": 4}.get(way, 2 if way.endswith("accumulated") else 1)
    losses = curve(run)
    if accumulated == 1:
        assert losses == pytest.approx(curve(one), rel=1e-5)
    assert len(losses) == STEPS
    expected, found = (load_file(path / "model" / "model.safetensors") for path in (one, run))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
    if way == "fsdp":
        assert_in_halves(run)
    assert_same_metrics(run, one)


def assert_in_halves(run) -> None:
    """Each rank keeps half of everything, frozen parts too."""
    parts = [path.stat().st_size for path in (run / "checkpoints" / "last.ckpt").glob("*.distcp")]
    assert len(parts) == 2
    assert max(parts) < 0.6 * sum(parts)


def assert_same_metrics(run, one) -> None:
    metrics, same = (json.loads((path / "run.json").read_text())["metrics"] for path in (one, run))
    for name in ("val/recall@10", "val/precision@10", "val/f1@10", "val/loss"):
        assert same[name] == pytest.approx(metrics[name], rel=1e-4), name
    images = [sorted((path / "predictions.jsonl").read_text().splitlines()) for path in (one, run)]
    keys = [[json.loads(line)["key"] for line in lines] for lines in images]
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == len(keys[0]) > 0, "each image once"


def test_batches_of_unequal_tokens_weigh_by_their_tokens():
    """Sums of 6 and 4 over 3 and 7 tokens: a gradient of 10 / 10, though both were divided by 3, and by 2 batches."""
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.tensor([(6 / 3 + 4 / 3) / 2])
    trainer = SimpleNamespace(accumulate_grad_batches=2)
    tokens = {"_divisor": torch.tensor(3.0), "_step_sums": torch.tensor([1.0, 10.0])}
    module = SimpleNamespace(trainer=trainer, parameters=lambda: [weight], **tokens)
    RecognitionModule.on_before_optimizer_step(module, None)
    assert weight.grad.item() == pytest.approx(1)
    assert (module._divisor, module._step_sums) == (None, None)


def test_a_decoder_in_shards_is_filled_on_every_rank(root):
    """Built on the meta device, read tensor by tensor, adapters drawn: the run of one process that reads it whole."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["rose", "lemon", "leaf", "ocean", "stone"], vocab_size=400)
    fields = {"vocab_size": len(tokenizer) - 3, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    config = LlamaConfig(**fields, num_attention_heads=4, max_position_embeddings=512, pad_token_id=None)
    LlamaForCausalLM(config).save_pretrained(root / "llama", max_shard_size="30KB")
    tokenizer.save(root / "llama")
    assert len(list((root / "llama").glob("*.safetensors"))) > 2
    kept = ["model/decoder=llama2_7b", "model.decoder.source=llama", "model.decoder.blocks=[0,2]"]
    short = [*kept, "model.decoder.lora={r: 4}", "trainer.max_steps=2"]
    drop = [o for o in TINY_OVERRIDES if not o.startswith("model.decoder")]
    runs = [train(root, f"source_{way}", way, *short, tiny=drop) for way in ("one", "fsdp")]
    assert curve(runs[1]) == pytest.approx(curve(runs[0]), rel=1e-5)
    one, fsdp = (load_file(path / "model" / "model.safetensors") for path in runs)
    assert one.keys() == fsdp.keys()
    torch.testing.assert_close(list(fsdp.values()), list(one.values()), rtol=1e-3, atol=2e-5)
    assert_in_halves(runs[1])
    assert_same_metrics(*runs)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["one", "fsdp"])
def test_switches_train(root, way):
    """Compiled blocks with recomputed activations: the losses of the plain run."""
    switches = ["parallel.compile=true", "parallel.activation_checkpointing=true", "trainer.max_steps=3"]
    compiled = train(root, f"compiled_{way}", way, *switches)
    plain = train(root, f"plain_{way}", way, "trainer.max_steps=3")
    assert curve(compiled) == pytest.approx(curve(plain), rel=1e-4)


@pytest.mark.slow
def test_muon_orthogonalises_whole_matrices_of_shards(root):
    short = ["optim=muon", "trainer.max_steps=4"]
    runs = [train(root, f"muon_{way}", way, *short) for way in ("one", "fsdp")]
    assert curve(runs[1]) == pytest.approx(curve(runs[0]), rel=1e-4)


@pytest.mark.slow
def test_8_bit_state_trains(root):
    pytest.importorskip("torchao")  # not among the development requirements: transformers would import it always
    run = train(root, "eight", "one", "optim=adamw8bit", "optim.lr=1e-2")
    losses = curve(run)
    assert losses[-1] < 0.8 * losses[0]
    state = read_file(run / "checkpoints" / "last.ckpt")["optimizer_states"][0]["state"]
    assert any(type(part).__name__ == "OptimState8bit" for values in state.values() for part in values.values())


def test_a_precision_that_sharding_does_not_support_is_an_error():
    with pytest.raises(UserError, match=r"supports trainer.precision=32-true or bf16-mixed, got bf16-true"):
        parallelize(Model(tiny_config(), 60), ParallelConfig(), mesh=object(), precision="bf16-true")
