"""Trainings on the tiny base as the Train node makes them. Import inside tests that use `comfy`."""

import json
import weakref
from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PROMPTS = ("a photo of {token} {class_word} on snow", "a photo of a heart")


def images(count=1, size=64):
    from tlora_core.training.dataset import training_images

    generator = torch.Generator().manual_seed(5)
    return training_images(torch.rand(count, size, size, 3, generator=generator))


def request(steps=6, rate=0.01, **changes):
    from tlora_core.hosts.comfy.training.personalize import TrainRequest
    from tlora_core.training.config import TrainConfig

    config = TrainConfig(steps=steps, learning_rate=rate, **changes.pop("config", {}))
    return TrainRequest(
        **{"token": "sks", "class_word": "heart", "rank": 4, "min_rank": 2, "resolution": 64, **changes}, config=config
    )


def run(base, asked=None, file_name="run/heart", pictures=None, prior=(), **keeping):
    """Runs a training as the host runs a node: in inference mode."""
    from tlora_core.hosts.comfy.training.found import train_or_find
    from tlora_core.hosts.comfy.training.keeping import Keeping

    with torch.inference_mode():
        return train_or_find(
            *base, pictures or images(), asked or request(), Keeping(**keeping), file_name, None, prior
        )


def folders(output):
    """The folders of the runs, oldest first."""
    return sorted(
        (output / "tlora_runs").iterdir(), key=lambda path: json.loads((path / "run.json").read_text())["started"]
    )


def record(output, index=-1):
    return json.loads((folders(output)[index] / "run.json").read_text())


def same(one, two):
    return one.layers.keys() == two.layers.keys() and all(
        torch.equal(one.layers[k].up, two.layers[k].up) and torch.equal(one.layers[k].down, two.layers[k].down)
        for k in one.layers
    )


class Wish:
    """Does something after a step of a run."""

    def __init__(self, monkeypatch, step, do):
        from tlora_core.hosts.comfy.page.training import LiveRun

        self.runs, report = [], LiveRun.report

        def reporting(live, at, loss):
            self.runs.append(live)
            report(live, at, loss)
            if at == step and len(set(self.runs)) == 1:
                do(live)

        monkeypatch.setattr(LiveRun, "report", reporting)


def cancel(live):
    import comfy.model_management

    comfy.model_management.interrupt_current_processing()


def shown():
    """State and message of the last run, as the page shows them."""
    from tlora_core.hosts.comfy.page.training import LiveRun

    last = LiveRun.states()[-1]
    return last["state"], last["message"]


def nan_after(monkeypatch, steps):
    """After so many steps, every loss is NaN."""
    from tlora_core.hosts.comfy.training.denoiser import HostDenoiser

    losses, calls = HostDenoiser.losses, []

    def failing(denoiser, rows, generator):
        calls.append(rows)
        for loss in losses(denoiser, rows, generator):
            yield loss * (float("nan") if len(calls) > steps else 1)

    monkeypatch.setattr(HostDenoiser, "losses", failing)


def train(adapters, denoiser, config, on_step=lambda step, loss: None):
    """All steps of a training loop alone, without the node's run around it. Returns the loss of each."""
    from tlora_core.training.trainer import Trainer

    trainer = Trainer(adapters, config)
    trainer.run(denoiser, config.steps, on_step)
    return trainer.losses


class OutOfMemory(TorchDispatchMode):
    """Memory runs out once: at one operation, counted from 0, of the update that makes step `step`. Needs torch
    only."""

    def __init__(self, monkeypatch, step, operation):
        from tlora_core.training.trainer import Trainer

        super().__init__()
        self.left, update = operation, Trainer._update

        def short_of_memory(trainer):
            with self if trainer.step + 1 == step else nullcontext():
                update(trainer)

        monkeypatch.setattr(Trainer, "_update", short_of_memory)

    @property
    def happened(self):
        return self.left < 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == -1:
            raise torch.OutOfMemoryError("injected")
        return func(*args, **(kwargs or {}))


class Made(TorchDispatchMode):
    """Within the block, notes the memory of tensors that come into being. `alive`: the sizes of what is still held."""

    def __init__(self):
        super().__init__()
        self.made, self.known = [], set()

    @property
    def alive(self):
        return [tuple(shape) for held, shape in self.made if held() is not None]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._note((args, kwargs), is_new=False)
        result = func(*args, **(kwargs or {}))
        self._note(result, is_new=True)
        return result

    def _note(self, values, is_new):
        for tensor in (t for t in tree_leaves(values) if isinstance(t, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                weakref.finalize(storage, self.known.discard, storage._cdata)
                if is_new:
                    self.made.append((weakref.ref(storage), tensor.shape))
