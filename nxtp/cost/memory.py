"""Memory per rank before a run: a training step and a batch of validation run on fake tensors in a fake process group,
their allocations counted.

Optimiser state is added by formula; DDP's gradients are views into its buckets. Not counted: the CUDA context and the
buffers of cuBLAS and NCCL (1 to 2 GB), fragmentation, the encoder of semantic metrics.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nxtp.config import rank_count, to_dataclass
from nxtp.distributed.parallelize import ParallelConfig, parallelize, unsharded
from nxtp.errors import UserError
from nxtp.model.attention_rule import branch_mask
from nxtp.model.flops import LABEL_TOKENS, PROMPT_TOKENS, typical_layout
from nxtp.model.meta import meta_model
from nxtp.model.model import Model, ModelConfig
from nxtp.sampling.one_shot import first_tokens, likeliest_
from nxtp.train.checks import PRECISIONS, full_precision, strategy_name
from nxtp.train.optim import OptimConfig, local, state_bytes

PARTS = ("weights", "gradients", "optimizer", "activations", "working")


@dataclass(frozen=True)
class Step:
    """What a step's memory depends on, besides the model and its trained parts.

    ``strategy``     single, ddp or fsdp, over ``ranks``
    ``batch``        images per rank and micro-batch
    ``accumulates``  whether an optimiser step has several micro-batches
    ``features``     whether a frozen encoder's features are read instead of images
    ``val_batch``    images per rank and batch of validation, of which ``top_k`` labels are predicted; 0: none
    """

    strategy: str = "single"
    ranks: int = 1
    batch: int = 64
    accumulates: bool = False
    precision: str = "32-true"
    on_gpu: bool = False
    features: bool = False
    val_batch: int = 0
    top_k: int = 10


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by part (:data:`PARTS`).

    ``most``  the maximum of each part
    ``peak``  the parts at the moment when their sum is largest
    ``when``  that is: forward, backward, update or validation
    """

    most: dict[str, int]
    peak: dict[str, int]
    when: str

    @property
    def total(self) -> int:
        return sum(self.peak.values())


def step_of(cfg: DictConfig) -> Step:
    """The :class:`Step` of a composed configuration.

    Raises:
        UserError: the memory of the strategy is not known.
    """
    trainer, ranks, name = cfg.trainer, rank_count(cfg.trainer), strategy_name(cfg.trainer)
    if name == "FSDP2Strategy":
        strategy = "fsdp"
    elif name.lower().startswith("ddp"):
        strategy = "ddp"
    elif name in ("auto", "SingleDeviceStrategy"):
        strategy = "single" if ranks == 1 else "ddp"
    else:
        raise UserError(
            f"The memory of trainer.strategy '{name}' is not known. "
            "Use auto, ddp or nxtp.distributed.fsdp2.FSDP2Strategy (trainer=fsdp)."
        )
    return Step(
        strategy,
        ranks,
        batch=int(cfg.data.batch_size),
        accumulates=int(trainer["accumulate_grad_batches"]) > 1,
        precision=str(trainer["precision"]),
        on_gpu=trainer["accelerator"] != "cpu",
        features=bool(cfg.data.get("features")),
        val_batch=int(cfg.data.val_batch_size) if cfg.data.val and trainer.get("limit_val_batches") != 0 else 0,
        top_k=int(cfg.validation.top_k),
    )


def sections(cfg: DictConfig) -> tuple[ModelConfig, int | None, OptimConfig, ParallelConfig]:
    """Of a composed configuration: model, rows of its vocabulary (None: the decoder's own), optimizer, parallel."""
    config = to_dataclass(ModelConfig, cfg.model, "model")
    optim = to_dataclass(OptimConfig, cfg.optim, "optim")
    parallel = to_dataclass(ParallelConfig, cfg.get("parallel"), "parallel")
    return config, None if config.decoder.source else config.vocab_size, optim, parallel


def memory(
    config: ModelConfig,
    vocab_size: int | None,
    optim: OptimConfig,
    step: Step,
    parallel: ParallelConfig | None = None,
) -> Memory:
    """Memory of a training step that is not the first, so that the optimiser's state exists, and of a validation.

    The step is not compiled: compilation keeps no more than is kept without it.

    Raises:
        UserError: an unknown precision, or one that the strategy does not support.
    """
    precision = full_precision(step.precision)
    weights_dtype, autocast_dtype = PRECISIONS[precision]
    model = meta_model(config, vocab_size, optim.trainable)
    side, tokens = config.encoder.image_size, (model.num_image_tokens, model.encoder.width)
    shape, dtype = (tokens, torch.float16) if step.features else ((3, side, side), torch.uint8)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        mesh = stack.enter_context(_fake_mesh(step)) if step.strategy == "fsdp" else None
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        _allocate(model, weights_dtype)
        parallel = replace(parallel or ParallelConfig(), compile=False)
        model = parallelize(model, parallel, mesh, precision)
        if step.on_gpu and autocast_dtype is not None:
            stack.enter_context(_cuda_autocast())
        live = stack.enter_context(_LiveBytes([*model.parameters(), *model.buffers()]))
        gradients = _bytes(p for p in model.parameters() if p.requires_grad)
        moments: dict[str, dict[str, int]] = {}
        for is_last in (False, True) if step.accumulates else (True,):  # the first's gradients exist in the second
            if mesh is not None:
                model.set_requires_gradient_sync(is_last)
            live.part = "activations"
            images = torch.empty(step.batch, *shape, dtype=dtype)
            with torch.autocast("cpu", autocast_dtype, enabled=autocast_dtype is not None):
                loss = model(images, typical_layout(model, step.batch)).total
            live.mark(model.parameters(), "weights")  # gathered and not yet freed
            saved = live.bytes["activations"]
            # Lightning frees the last step's gradients after the forward pass.
            moments.setdefault("forward", live.peak | {"gradients": gradients})
            live.part = "working"
            loss.backward()
        live.mark((p.grad for p in model.parameters() if p.grad is not None), "gradients")
        moments["backward"] = live.peak
        if step.val_batch:  # the last step's gradients still exist
            del images, loss
            live.restart()
            with unsharded(model, parallel.reshard_after_forward), torch.no_grad():
                images = torch.empty(step.val_batch, *shape, dtype=dtype)
                with torch.autocast("cpu", autocast_dtype, enabled=autocast_dtype is not None):
                    _validate(model, images, step.top_k)
            moments["validation"] = live.peak
    return _sum_up(live, moments, model, optim, step, saved, scales_loss=precision == "16-mixed")


def _validate(model: Model, images: Tensor, top_k: int) -> None:
    """The loss, and labels of typical length as :func:`nxtp.sampling.one_shot.one_shot` predicts them."""
    _, (logits_BV, cache) = model.evaluate(images, typical_layout(model, len(images)), [0] * PROMPT_TOKENS)
    prefix = model.num_image_tokens + 1 + PROMPT_TOKENS
    tokens = first_tokens(logits_BV, top_k)[1]
    for step in range(1, LABEL_TOKENS + 1):
        likeliest_(model.step(tokens, prefix + step - 1, branch_mask(prefix, tokens.shape[1], step), cache))


def _allocate(model: nn.Module, dtype: torch.dtype) -> None:
    """Move a model from the meta device to (fake) memory; shared tensors stay shared."""
    allocated: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for owned in (module._parameters, module._buffers):
            for name, old in owned.items():
                if old is None or not old.is_meta:
                    continue
                if old not in allocated:
                    new = torch.empty(old.shape, dtype=dtype if old.is_floating_point() else old.dtype)
                    allocated[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                owned[name] = allocated[old]


@contextmanager
def _fake_mesh(step: Step) -> Iterator[DeviceMesh]:
    """A mesh of all ranks as rank 0 sees it, without the others."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("the memory of sharded training is measured before a process group exists")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=step.ranks)
    concatenate = DeviceMesh._concatenate

    def outside(meshes: list[DeviceMesh]) -> DeviceMesh:
        with unset_fake_temporarily():  # a mesh looks its own rank up among real numbers
            return concatenate(meshes)

    try:
        with patch.object(DeviceMesh, "_concatenate", outside):
            yield dist.init_device_mesh("cpu", (step.ranks,))
    finally:
        dist.destroy_process_group()


@contextmanager
def _cuda_autocast() -> Iterator[None]:
    """Compute in float32 what CUDA's autocast widens and a CPU's does not, of the functions that these models call."""

    def in_float32(function):
        def call(*args, **kwargs):
            widened = (a.float() if isinstance(a, Tensor) else a for a in args)
            return function(*widened, **{k: v.float() if isinstance(v, Tensor) else v for k, v in kwargs.items()})

        return call

    with patch.multiple(F, layer_norm=in_float32(F.layer_norm), group_norm=in_float32(F.group_norm)):
        yield


class _LiveBytes(TorchDispatchMode):
    """Follows each storage from the operator that allocates it to its end; those of ``before`` are not counted.

    ``part``           of storages allocated from now on
    ``bytes``          alive now, by part
    ``peak``           the same at the moment when most were alive, with the parts that are known now
    ``most_gathered``  the maximum of FSDP's gathered weights
    """

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self._before = {local(tensor).untyped_storage()._cdata for tensor in before}
        self.part = "working"
        self.bytes = dict.fromkeys(PARTS, 0)
        self.most_gathered = 0
        self._alive: dict[int, int] = {}  # number → bytes
        self._part_of: dict[int, str] = {}  # of all storages, freed ones too
        self._number: dict[int, int] = {}  # by address; addresses are reused
        self._peak: dict[int, int] = {}
        self._peak_bytes = 0

    @property
    def peak(self) -> dict[str, int]:
        parts = dict.fromkeys(PARTS, 0)
        for number, size in self._peak.items():
            parts[self._part_of[number]] += size
        return parts

    def mark(self, tensors: Iterable[Tensor], part: str) -> None:
        """Set the part of those of ``tensors`` that were allocated here."""
        for tensor in tensors:
            number = self._number.get(local(tensor).untyped_storage()._cdata)
            if number is not None:
                self.bytes[self._part_of[number]] -= self._alive[number]
                self.bytes[part] += self._alive[number]
                self._part_of[number] = part
        self.most_gathered = max(self.most_gathered, self.bytes["weights"])

    def restart(self) -> None:
        """Begin a new peak."""
        self._peak_bytes = 0

    def __enter__(self) -> _LiveBytes:
        resize = torch.UntypedStorage.resize_

        def followed(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            """FSDP frees and reallocates the memory of gathered weights in the same storage."""
            result = resize(storage, size)
            self._follow(storage, "weights")
            return result

        self._patch = patch.object(torch.UntypedStorage, "resize_", followed)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # called again with this rank's tensors
        if function is torch.ops.aten.logsumexp.default:  # it keeps exp(x - max) until it ends
            self._follow(torch.empty_like(args[0]).untyped_storage(), "working")
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._number and storage._cdata not in self._before:
                    self._follow(storage, self.part)
        return result

    def _follow(self, storage: torch.UntypedStorage, part: str) -> None:
        address = storage._cdata
        if address not in self._number:
            self._number[address] = len(self._part_of)
            weakref.finalize(storage, self._forget, address)
        number = self._number[address]
        self.bytes[self._part_of.get(number, part)] -= self._alive.get(number, 0)
        self._alive[number], self._part_of[number] = storage.nbytes(), part
        self.bytes[part] += storage.nbytes()
        self.most_gathered = max(self.most_gathered, self.bytes["weights"])
        total = sum(self.bytes.values())
        if total > self._peak_bytes:
            self._peak_bytes, self._peak = total, dict(self._alive)

    def _forget(self, address: int) -> None:
        number = self._number.pop(address)
        self.bytes[self._part_of[number]] -= self._alive.pop(number)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(part.nbytes for part in map(local, tensors))


def _sum_up(
    live: _LiveBytes,
    moments: dict[str, dict[str, int]],
    model: Model,
    optim: OptimConfig,
    step: Step,
    saved: int,
    scales_loss: bool,
) -> Memory:
    """Add what exists all the time, and check whether the optimiser's update needs more than the other ``moments``."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = _bytes(trained)
    always = {
        "weights": _bytes([*model.parameters(), *model.buffers()]),
        "optimizer": state_bytes(model, optim),
    }
    # Fused AdamW and torchao's AdamW work in place. With a loss scaler AdamW is not fused: on a GPU the roots of all
    # second moments exist at once, on a CPU those of one parameter.
    roots = 0
    if scales_loss and optim.optimizer["_target_"] == "torch.optim.AdamW":
        roots = gradients if step.on_gpu else max(_bytes([p]) for p in trained)
    moments = {**moments, "update": {"gradients": gradients, "working": roots}}
    if step.strategy == "ddp":  # its buckets, of which the gradients are views, are never freed
        moments = {when: moment | {"gradients": gradients} for when, moment in moments.items()}
    totals = {
        when: {part: moment.get(part, 0) + always.get(part, 0) for part in PARTS} for when, moment in moments.items()
    }
    when = max(totals, key=lambda name: sum(totals[name].values()))
    most = {
        "weights": always["weights"] + live.most_gathered,
        "gradients": gradients,
        "optimizer": always["optimizer"],
        "activations": saved,
    }
    return Memory(most, totals[when], when)
