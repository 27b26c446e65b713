"""The benchmark of generation: that it runs, and that what it compares with is the published schedule."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from conftest import COMPILES, ROOT
from miniature import STRESS
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(ROOT / "benchmarks"))
import generation
import live_memory
import training
from published_generation import PublishedSchedule

from pose2id.ipg import weights

CPU = torch.device("cpu")


def test_flops_of_the_published_schedule():
    schedule = PublishedSchedule(generation.empty_parts("full"), weights.published_scheduler())
    poses = 2  # of 8: each goes all the way
    shapes = [(1, 3, 256, 128), (1, 3, 512, 256), (poses, 3, 512, 256), (poses, 4, 64, 32)]
    inputs = [torch.zeros(shape, device="meta") for shape in shapes]

    def gflop(steps):
        with FlopCounterMode(display=False) as counter:
            schedule(*inputs, num_inference_steps=steps)
        return counter.get_total_flops() / poses / 1e9

    around, first = gflop(1), gflop(2) - gflop(1)
    # Counted on the published modules: 881.07 GFLOP for a picture's two rows of a step, 20.24 TFLOP for a picture.
    assert first == pytest.approx(881.07, abs=0.01)
    assert around + 19 * first == pytest.approx(20243.88, abs=0.01)


def test_both_schedules_give_the_same_pictures():
    parts = generation.random_parts("tiny", CPU, torch.float32)
    generator = generation.generator_of(generation.sharing(parts, "tiny"), "tiny")
    schedule = PublishedSchedule(parts, weights.published_scheduler())
    inputs = generation.Inputs(1, 3).tensors(generator)
    published = schedule(*inputs, num_inference_steps=4)
    torch.testing.assert_close(generation.sample(generator, inputs, 4), published, atol=2e-4, rtol=0)
    assert published.std() > 0.1
    # And it would be seen if they did not.
    guided = schedule(*inputs, num_inference_steps=4, guidance_scale=3.4)
    with pytest.raises(SystemExit, match="pictures: the outputs differ"):
        generation.check_agreement(lambda: published, lambda: guided, "pictures")


def test_weights_are_the_same_in_every_dtype():
    full, half = (generation.random_parts("tiny", CPU, dtype) for dtype in (torch.float32, torch.bfloat16))
    for name, part in full.items():
        for key, tensor in part.state_dict().items():
            torch.testing.assert_close(half[name].state_dict()[key], tensor.bfloat16(), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ("--throughput --baseline --offload --dtype fp32 bf16 --batch 2 --poses 2 --steps 2 --runs 1", 4),
        ("--step --runs 1", 2),
        pytest.param("--count-memory --batch 8 16 --dtype bf16 fp32", 4, marks=STRESS),
        pytest.param("--count-operators --dtype bf16", 2, marks=STRESS),
    ],
)
@pytest.mark.filterwarnings(*COMPILES)
def test_every_table(options, rows, tmp_path, capsys, monkeypatch):
    # Processes of their own take seconds to start.
    monkeypatch.setattr(generation, "resident_peak", lambda *_: None)
    generation.main([*options.split(), "--size", "tiny", "--device", "cpu", "--json", str(tmp_path / "rows.json")])
    written = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(written) == rows
    assert len(capsys.readouterr().out.splitlines()) == rows + 2
    assert all(row.get("speedup", 1) > 0 and row.get("psnr_db", 99) > 20 for row in written)


def test_operators_as_the_documentation_has_them():
    rows = list(generation.count_operators(generation.parsed(["--count-operators", "--dtype", "fp16"])))
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for row in rows:
        assert f"| {' | '.join(map(str, list(row.values())[1:]))} |" in page
        assert row["copies"] == row["for group norms"] + row["after transformers"] + row["of dtype"]
    unet = generation.empty_parts("full")["denoising_unet"]
    kinds = [type(module).__name__ for module in unet.modules()]
    # Each of these asks for one, and nothing of ours for any: see "One denoising step, operator by operator".
    for row in rows:
        assert row["for group norms"] == kinds.count("GroupNorm")
        assert row["after transformers"] == kinds.count("Transformer2DModel")
        assert row["divisions by 1"] == kinds.count("ResnetBlock2D")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_peak():
    args = generation.parsed(["--throughput", "--size", "tiny", "--device", "cpu", "--poses", "2", "--steps", "1"])
    peak = generation.resident_peak(args, "fp32", "eager", 2, 1)
    assert 0.01 < peak < 1


def test_memory_is_counted_while_it_is_held():
    layer = torch.nn.Linear(1000, 1000, bias=False, device="meta")
    inputs = torch.zeros(250, 1000, device="meta")
    kept = []

    def call():
        result = layer(inputs)
        result = layer(result)
        kept.append(layer(torch.cat([result, result])))

    # The first result is gone when the third one is made, of an input twice as long: 1 + 2 + 2 million bytes.
    assert live_memory.peaks(call, {"layer": layer})["layer"] == 5_000_000


def test_memory_of_attention_has_no_matrix():
    query = torch.zeros(1, 8, 4096, 40, device="meta")
    peak = live_memory.peaks(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query), {})
    assert max(peak.values()) == query.nbytes


def test_memory_of_a_step():
    inputs = torch.zeros(250, 1000, device="meta", requires_grad=True)  # a million bytes, as each result is
    layers = torch.nn.Sequential(*[torch.nn.Linear(1000, 1000, bias=False, device="meta") for _ in range(2)])
    # At the first layer: its gradient and the second one's, of 4 million bytes, its result's and that of its inputs.
    assert live_memory.step_peak(lambda: layers(inputs).sum()) == 10_000_000 + 2 * 4
    # Gradients that were there are not counted: at the second layer its new one, its input, and the gradient of that.
    inputs.grad = None
    assert live_memory.step_peak(lambda: layers(inputs).sum()) == 6_000_000 + 2 * 4
    inputs.grad = None
    layers = torch.nn.Sequential(*[torch.nn.ReLU() for _ in range(8)])
    # The results of all layers, and a gradient.
    assert live_memory.step_peak(lambda: layers(inputs).sum()) == 9_000_000 + 2 * 4
    inputs.grad = None

    def checkpointed():
        return torch.utils.checkpoint.checkpoint_sequential(layers, 4, inputs, use_reentrant=False).sum()

    # Those of three pairs of layers, and the last pair's, which is not checkpointed; and a gradient.
    assert live_memory.step_peak(checkpointed) == 6_000_000 + 2 * 4


def test_memory_of_a_step_has_no_matrix_of_attention():
    """On the way back neither, where checkpointing computes it again."""
    query = torch.zeros(1, 8, 4096, 40, device="meta", requires_grad=True)

    def attention():
        return torch.nn.functional.scaled_dot_product_attention(query, query, query)

    # The output and a number for each of its rows, and gradients of query, key and value.
    peak = live_memory.step_peak(lambda: attention().sum())
    assert peak == 4 * query.nbytes + 8 * 4096 * 4 + 2 * 4
    query.grad = None

    def checkpointed():
        return torch.utils.checkpoint.checkpoint(attention, use_reentrant=False).sum()

    assert live_memory.step_peak(checkpointed) <= peak


def test_memory_of_training_as_the_documentation_has_it():
    table = {what: round(number / 1e9, 1) for what, number in training.counted(4).items()}
    assert list(table.values()) == [7.1, 14.2, 3.6, 0.7, 7.1, 8.5, 7.5, 14.9, 9.2, 7.1]
    page = " ".join((ROOT / "docs" / "training.md").read_text(encoding="utf-8").split())
    for line in (
        "| weights | 7.1 | 7.1 |",
        "| optimizer, two numbers a weight | 14.2 | 3.6 |",
        "| VAE and identity encoder, frozen | 0.7 | 0.7 |",
        "| gradients and activations of 4 samples, 512 x 256 | 8.5 | 7.5 |",
        "| sum | 30.5 | 18.8 |",
        "14.9 GB by default, 9.2 with gradient checkpointing",
    ):
        assert line in page
