"""The parts of tools/host.py gpu-check on the real ComfyUI, in miniature: all of them pass on a CPU, and each notices
what it is there to notice."""

import importlib
import os
import subprocess
import sys
import time

import pytest
import torch
from gpulib import plan, runner, sizes
from gpulib.running import Failed, Run, Skipped
from places import REPO

# The worker, with a T-LoRA that is put on at half its strength in float16: one part has to notice.
BROKEN = """
import sys
sys.path.insert(0, {tools!r})
from gpulib import worker

run_one = worker.run_one

def breaking(part, run):
    if part.name != "sampling error fp16":
        return run_one(part, run)
    from gpulib.checks import precision
    right = precision.apply_tlora
    precision.apply_tlora = lambda model, tlora, fold=None: right(model, tlora, 0.5, fold)
    try:
        return run_one(part, run)
    finally:
        precision.apply_tlora = right

worker.run_one = breaking
sys.exit(worker.main(*sys.argv[1:]))
"""


@pytest.fixture(scope="module", autouse=True)
def benchmarks(comfy):
    """What the parts import of benchmarks/."""
    sys.path.append(str(REPO / "benchmarks"))
    yield
    sys.path.remove(str(REPO / "benchmarks"))


@pytest.fixture
def tried():
    """tried(name): the Run in which the part of that name has run in this process. Raises what the part raises."""

    def tried(name, **changes):
        [part] = plan.chosen([name])
        run = Run(torch.device("cpu"), sizes.MINIATURE, {}, time.monotonic() + 600, **changes)
        module, function = part.call.split(":")
        getattr(importlib.import_module(f"gpulib.checks.{module}"), function)(run, **part.arguments)
        return run

    return tried


def test_all_parts_pass_on_a_cpu_but_the_one_that_is_broken(host, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(BROKEN.format(tools=str(REPO / "tools")))
    found = runner.run_parts(plan.parts(), runner.Settings("cpu", "miniature", str(host.comfyui)), 600, worker=worker)
    by_status = {}
    for result in found:
        by_status.setdefault(result.status, {})[result.name] = result
    assert list(by_status["failed"]) == ["sampling error fp16"], by_status["failed"]
    assert "with the T-LoRA" in by_status["failed"]["sampling error fp16"].message
    assert by_status.keys() == {"passed", "failed", "skipped"}
    assert all("dynamic" in result.message or "a CPU" in result.message for result in by_status["skipped"].values())
    figures = {name: result.figures for name, result in by_status["passed"].items()}
    assert figures["machine"]["torch"] == torch.__version__
    assert figures["quickstart"]["base_bit_identical"] and figures["quickstart"]["resume_bit_identical"]
    assert {f"train {weights}" for weights in plan.FORMATS} <= figures.keys()
    for kind in ("sdxl", "flux"):
        assert (
            figures[f"sampling speed {kind}"]["tlora_ratio"] > 0 < figures[f"training speed {kind}"]["tlora_to_floor"]
        )
        assert figures[f"peak {kind}"]["checkpointing_counted_gib"] < figures[f"peak {kind}"]["plain_counted_gib"]
    assert figures["train sdxl in 8 GB"]["memory"] == "fast"


def test_without_a_card_it_says_so_in_one_sentence(host):
    tool = [sys.executable, str(REPO / "tools" / "gpu_check.py"), "--comfyui", str(host.comfyui)]
    done = subprocess.run(tool, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and "PyTorch finds no CUDA card here" in done.stderr and "Traceback" not in done.stderr


def test_weights_that_the_backward_pass_gets_wrong_are_noticed(tried, monkeypatch):
    from gpulib import train

    right = train.gradient
    count = iter(range(9))
    monkeypatch.setattr(train, "gradient", lambda *args: right(*args) * (1.5 if next(count) == 0 else 1))
    with pytest.raises(Failed, match="sdxl: the gradient's error is 0.5"):
        tried("train bf16")


def test_losses_that_a_sampling_changes_are_noticed(tried, monkeypatch):
    from gpulib import sample

    right = sample.latent

    def disturbing(model, shape):
        with torch.inference_mode(False), torch.no_grad():
            model.model.diffusion_model.out[2].weight.mul_(1.1)
        return right(model, shape)

    monkeypatch.setattr(sample, "latent", disturbing)
    with pytest.raises(Failed, match="changed the model's weights"):
        tried("train bf16")
    monkeypatch.setattr("gpulib.models.same_bytes", lambda before, after: True)
    with pytest.raises(Failed, match="after a sampling the losses are"):
        tried("train bf16")


def test_a_training_that_learns_nothing_is_noticed(tried, monkeypatch):
    from tlora_core.training.trainer import Trainer

    def idle(trainer):
        trainer.step += 1

    monkeypatch.setattr(Trainer, "_update", idle)
    with pytest.raises(Failed, match="nothing was learnt"):
        tried("quickstart")


def test_a_resumed_training_that_differs_is_noticed(tried, monkeypatch):
    from tlora_core.hosts.comfy.training.personalize import Personalization

    right = Personalization.go_on_from

    def forgetful(personalization, state):
        right(personalization, state)
        with torch.no_grad():
            personalization.trainer.parameters[0].mul_(1.01)

    monkeypatch.setattr(Personalization, "go_on_from", forgetful)
    with pytest.raises(Failed, match="resumed, it differs by"):
        tried("quickstart")


def test_a_peak_far_from_the_count_is_noticed():
    from gpulib.checks.memory_use import require_close

    run, gib = Run(torch.device("cpu"), sizes.MINIATURE), 2**30
    require_close(run, "plain", int(12.9 * gib), 12 * gib)
    for measured in (15 * gib, 8 * gib):
        with pytest.raises(Failed, match="12.00 counted"):
            require_close(run, "plain", measured, 12 * gib)


class Cuda:
    """In the place of a card of 24 GiB with 22 free."""

    def __init__(self, monkeypatch):
        self.fractions, self.taken = [], []
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (22 * 2**30, 24 * 2**30))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**30)
        set_fraction = lambda fraction, device: self.fractions.append(fraction)  # noqa: E731
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_fraction)
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda size, **options: self._take(empty(1, dtype=torch.uint8), size))

    def _take(self, tensor, size):
        self.taken.append(size)
        return tensor


def test_a_large_card_becomes_a_small_one_for_a_while(monkeypatch):
    from gpulib import card

    monkeypatch.setattr(card, "empty", lambda: None)
    cuda, run = Cuda(monkeypatch), Run(torch.device("cuda"), sizes.FULL)
    with card.small_card(run, 8):
        # Half a GiB is CUDA's own. All that is free counts for PyTorch's limit, since what is taken is PyTorch's too.
        assert cuda.taken == [int((22 - 7.5) * 2**30)] and cuda.fractions == [pytest.approx(23 / 24)]
    assert cuda.fractions[1:] == [1.0]
    with pytest.raises(Skipped, match="needs 23.5 GiB free, of which 22.0"), card.small_card(run, 24):
        pass


def test_a_step_that_is_too_slow_for_the_time_left_is_skipped():
    from gpulib.checks.speed import fitting

    run = Run(torch.device("cpu"), sizes.FULL, deadline=time.monotonic() + 60)
    assert fitting(run, 20, 0.1) == 20 and 3 <= fitting(run, 20, 4.0) <= 4
    with pytest.raises(Skipped, match="a round of one step takes 30 s"):
        fitting(run, 20, 30.0)


def test_models_too_large_for_card_or_ram_are_skipped(monkeypatch):
    Cuda(monkeypatch)
    run = Run(torch.device("cuda"), sizes.FULL)
    run.needs(22)
    with pytest.raises(Skipped, match="needs 23 GiB on the card, where 22.0 are free"):
        run.needs(23)
    with pytest.raises(Skipped, match="GiB of RAM"):
        run.needs_ram(1e6)
