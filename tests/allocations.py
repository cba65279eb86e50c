"""What training really allocates, in a module of its own so that processes of other ranks can import it."""

import gc
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

from nxtp.cost.memory import Step
from nxtp.distributed.parallelize import ParallelConfig, parallelize, unsharded
from nxtp.model.decoder import DecoderConfig
from nxtp.model.encoder import EncoderConfig
from nxtp.model.layout import lay_out
from nxtp.model.model import Model, ModelConfig
from nxtp.model.trainable import TrainableConfig, choose_trainable
from nxtp.sampling.one_shot import one_shot
from nxtp.train.optim import OptimConfig, build_optimizer

SIDE = 84
PUBLISHED_LIKE = TrainableConfig(encoder=1, embedding=False)


def config(blocks: int = 2) -> ModelConfig:
    """5 M parameters in narrow blocks, so that activations are no smaller than weights."""
    fields = {
        "model_type": "llama",
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "num_hidden_layers": blocks,
        "vocab_size": 4000,
        "pad_token_id": None,
    }
    vision = {"layers": blocks, "width": 128, "head_width": 32, "patch_size": 14}
    return ModelConfig(encoder=EncoderConfig(vision=vision, image_size=SIDE), decoder=DecoderConfig(config=fields))


def measured_peak(optim: OptimConfig, step: Step, parallel: ParallelConfig, mesh: DeviceMesh | None = None) -> int:
    """Peak of the bytes allocated in two real steps and before them, by PyTorch's account."""
    gc.collect()  # what another test has left would be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = Model(config()).train()
        choose_trainable(model, optim.trainable)
        parallelize(model, parallel, mesh, step.precision)
        optimizer, _ = build_optimizer(model, optim, total_steps=10)
        layout = lay_out(
            [[(5, 6)] * 8] * step.batch, prompt=[1] * 7, delimiter=4, num_image_tokens=model.num_image_tokens
        )
        images = torch.zeros(step.batch, 3, SIDE, SIDE, dtype=torch.uint8)
        called = DistributedDataParallel(model, gradient_as_bucket_view=True) if step.strategy == "ddp" else model
        with record_function("steps"):
            for _ in range(2):
                for is_first in (True, False) if step.accumulates else (True,):
                    with torch.autocast("cpu", torch.bfloat16, enabled=step.precision == "bf16-mixed"):
                        loss = called(images, layout).total
                    if is_first:
                        optimizer.zero_grad()  # where Lightning does
                    loss.backward()
                    del loss
                optimizer.step()
            if step.val_batch:  # as RecognitionModule validates
                validated, prompt = torch.zeros(step.val_batch, 3, SIDE, SIDE, dtype=torch.uint8), [1] * 7
                layout = lay_out(
                    [[(5, 6)] * 8] * step.val_batch, prompt=prompt, delimiter=4, num_image_tokens=model.num_image_tokens
                )
                dtype = torch.bfloat16 if step.precision == "bf16-mixed" else None
                with unsharded(model), torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
                    _, prefilled = model.eval().evaluate(validated, layout, prompt)
                    one_shot(model, validated, prompt=prompt, delimiter=4, top_k=10, max_tokens=3, prefilled=prefilled)
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    begun = next(event.start_ns() for event in events if event.name() == "steps")
    alive = peak = 0
    for event in events:
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive) if event.start_ns() >= begun else 0
    return peak


def rank_peak(rank: int, step: Step, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=step.ranks)
    mesh = None
    if step.strategy == "fsdp":
        mesh = dist.init_device_mesh("cpu", (step.ranks,))
    peak = measured_peak(OptimConfig(trainable=PUBLISHED_LIKE), step, ParallelConfig(), mesh)
    Path(directory, str(rank)).write_text(str(peak))
    dist.destroy_process_group()
