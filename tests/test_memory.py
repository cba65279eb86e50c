"""Memory before a run: against what PyTorch's allocator hands out in real training steps, and by hand."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from nxtp.decoder import DecoderConfig
from nxtp.encoder import EncoderConfig
from nxtp.layout import lay_out
from nxtp.memory import Memory, Step, memory
from nxtp.model import Model, ModelConfig
from nxtp.optim import OptimConfig, TrainsConfig, build_optimizer, choose_trained
from nxtp.parallel import ParallelConfig, arrange

SIDE = 84
PUBLISHED_LIKE = TrainsConfig(encoder=2, embedding=False)


def config() -> ModelConfig:
    """5 M parameters in narrow blocks, so that activations are no smaller than weights."""
    fields = {
        "model_type": "llama",
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "num_hidden_layers": 6,
        "vocab_size": 4000,
        "pad_token_id": None,
    }
    vision = {"layers": 6, "width": 128, "head_width": 32, "patch_size": 14}
    return ModelConfig(encoder=EncoderConfig(vision=vision, image_size=SIDE), decoder=DecoderConfig(config=fields))


def measured_peak(optim: OptimConfig, step: Step, parallel: ParallelConfig) -> int:
    """Most bytes that two real steps have allocated at a time, weights included, by PyTorch's account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = Model(config()).train()
        choose_trained(model, optim.trains)
        arrange(model, parallel)
        optimizer, _ = build_optimizer(model, optim, total_steps=10)
        layout = lay_out(
            [[(5, 6)] * 8] * step.batch, prompt=[1] * 7, delimiter=4, num_image_tokens=model.num_image_tokens
        )
        images = torch.zeros(step.batch, 3, SIDE, SIDE, dtype=torch.uint8)
        for _ in range(2):
            for _ in range(1 + step.accumulates):
                with torch.autocast("cpu", torch.bfloat16, enabled=step.precision == "bf16-mixed"):
                    loss = model(images, layout).total
                loss.backward()
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
            optimizer.step()
            optimizer.zero_grad()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@pytest.mark.parametrize(
    ("trains", "checkpointing", "accumulates", "precision"),
    [
        (TrainsConfig(), False, False, "32-true"),
        (PUBLISHED_LIKE, False, False, "32-true"),
        (PUBLISHED_LIKE, True, False, "32-true"),
        (TrainsConfig(), True, True, "32-true"),
        (PUBLISHED_LIKE, False, False, "bf16-mixed"),
    ],
)
def test_prediction_is_what_a_real_step_allocates(trains, checkpointing, accumulates, precision):
    optim, parallel = OptimConfig(trains=trains), ParallelConfig(activation_checkpointing=checkpointing)
    step = Step(batch=4, precision=precision, accumulates=accumulates)
    predicted = memory(config(), None, optim, step, parallel).total
    assert predicted == pytest.approx(measured_peak(optim, step, parallel), rel=0.02)
