"""A denoising step on a GPU: nothing in it waits for the host, and its tensors stay where they are."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import tiny
import torch

from pose2id.ipg import sampler
from pose2id.poses import standard

pytestmark = [
    pytest.mark.gpu,
    # What PyTorch says of its debug mode, once.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning"),
]


@pytest.fixture
def people():
    return list(np.random.default_rng(1).integers(0, 256, (2, 100, 50, 3), dtype=np.uint8))


@pytest.fixture
def watched():
    """A sampler whose waiting is an error: from the first step's network on, until latents are decoded.

    What comes before is done once. Its `steps` are counted.
    """
    steps = []

    def before_a_step(*_):
        steps.append("step")
        torch.cuda.set_sync_debug_mode("error")

    def watched(unet, *args, **options):
        hook = unet.register_forward_pre_hook(before_a_step)
        try:
            return sampler.denoise(unet, *args, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            hook.remove()

    watched.steps = steps
    return watched


@pytest.mark.parametrize("how", ["resident", "offloaded"])
@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_step_waits_for_the_host(dtype, guidance, how, people, watched):
    generator = tiny.generator(dtype, sampler=watched).to("cuda")
    if how == "offloaded":
        generator.enable_model_cpu_offload()
    generator.generate(people, standard()[:2], num_inference_steps=4, guidance_scale=guidance, progress=False)
    assert len(watched.steps) == 4


@pytest.mark.parametrize("scheduler", ["HeunDiscrete", "LMSDiscrete", "PNDM", "DPMSolverMultistep"])
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_other_schedulers_do_not_wait_either(scheduler, people, watched):
    kind = getattr(diffusers, f"{scheduler}Scheduler")
    generator = tiny.generator(torch.float16, scheduler=kind.from_config(tiny.SCHEDULER), sampler=watched).to("cuda")
    generator.generate(people[:1], standard()[:2], num_inference_steps=5, progress=False)
    assert len(watched.steps) >= 5


class Waiting(diffusers.DDIMScheduler):
    """Looks at a number of the prediction in each step."""

    def step(self, prediction, *args, **options):
        assert float(prediction.mean()) < 1e9
        return super().step(prediction, *args, **options)


class Elsewhere(diffusers.DDIMScheduler):
    """Computes its step on the CPU."""

    def step(self, prediction, timestep, sample, **options):
        (latents,) = super().step(prediction.cpu(), timestep, sample.cpu(), **options)[:1]
        return (latents.to(sample.device),)


@pytest.mark.parametrize("scheduler", [Waiting, Elsewhere])
def test_a_step_that_waits_is_noticed(scheduler, people, watched):
    generator = tiny.generator(scheduler=scheduler(**tiny.SCHEDULER), sampler=watched).to("cuda")
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        generator.generate(people[:1], standard()[:2], num_inference_steps=2, progress=False)
