"""A step that fails leaves nothing in memory, wherever it fails: no tensor that it made, no gradient."""

import gc

import pytest
import torch
from training_runs import Made, images, request


@pytest.fixture
def without_collector(monkeypatch):
    """Python's collector never runs, not even when it is asked to: what is held in a cycle stays."""
    gc.collect()
    asked = []
    monkeypatch.setattr(gc, "collect", lambda *args: asked.append(args) or 0)
    gc.disable()
    yield asked
    gc.enable()


def failing(monkeypatch, place, error, at=30):
    """The `at`-th pass through a layer's adapters raises `error`, forward or backward."""
    from tlora_core.layers.trained import _AddBranches

    passes, plain = [], getattr(_AddBranches, place)

    def short(*args):
        passes.append(1)
        if len(passes) == at:
            raise error
        return plain(*args)

    monkeypatch.setattr(_AddBranches, place, staticmethod(short))


def watched(monkeypatch):
    """Notes what each training up to a pause makes. Returns a list of these notes, which grows."""
    from tlora_core.training.trainer import Trainer

    notes, run = [], Trainer.run

    def noted(*args):
        notes.append(Made())
        with notes[-1]:
            return run(*args)

    monkeypatch.setattr(Trainer, "run", noted)
    return notes


def training(base, memory="auto", **changes):
    from tlora_core.hosts.comfy.training.personalize import Personalization

    return Personalization(*base, images(), request(**changes), memory=memory)


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_the_step_that_ran_out_of_memory_is_gone_before_it_is_made_again(base, monkeypatch, without_collector, place):
    import comfy.model_management

    from tlora_core.hosts.comfy.training import personalize
    from tlora_core.hosts.comfy.training.memory import FAST, LOW

    notes, emptied, at_retry = watched(monkeypatch), [], []
    entered, empty = personalize.training_session, comfy.model_management.soft_empty_cache
    monkeypatch.setattr(
        comfy.model_management, "soft_empty_cache", lambda: (emptied.append(notes and notes[-1].alive), empty())
    )

    def retry(model, *fit):
        if fit == LOW:
            gradients = sum(p.grad is not None for p in trained.trainer.parameters)
            at_retry.append((notes[0].alive, gradients, emptied[-1], len(without_collector)))
        return entered(model, *fit)

    monkeypatch.setattr(personalize, "training_session", retry)
    with torch.inference_mode():
        trained = training(base, steps=3, rank=8)
        trained.fit = FAST
        without_collector.clear()
        failing(monkeypatch, place, torch.OutOfMemoryError("injected"))
        trained.train(3)
    assert len(notes[0].made) > 300 and at_retry == [([], 0, [], 1)]
    assert len(trained.trainer.losses) == 3


@pytest.mark.parametrize("place, memory", [("forward", "fast"), ("backward", "fast"), ("backward", "low")])
@pytest.mark.parametrize("kind", ["cancel", "error", "memory"])
def test_while_a_failure_is_handled_its_step_is_gone_already(base, monkeypatch, without_collector, place, memory, kind):
    """Whoever catches the error has the memory for what it does then: saving, unloading, the next node."""
    from comfy.model_management import InterruptProcessingException

    errors = {"cancel": InterruptProcessingException(), "error": RuntimeError("x"), "memory": torch.OutOfMemoryError()}
    notes = watched(monkeypatch)
    with torch.inference_mode():
        trained = training(base, memory, steps=3)
        failing(monkeypatch, place, errors[kind])
        try:
            trained.train(3)
        except BaseException as error:
            assert kind != "cancel" or error is errors[kind]
            left = notes[0].alive
    assert left == [] and len(notes[0].made) > 300
    assert all(parameter.grad is None for parameter in trained.trainer.parameters)


def test_a_pause_holds_no_gradients(base, monkeypatch, without_collector):
    notes = watched(monkeypatch)
    with torch.inference_mode():
        trained = training(base, "fast", steps=3)
        trained.train(1)
    kept = {tuple(v.shape) for state in trained.trainer.optimizer.state.values() for v in state.values()}
    assert set(notes[0].alive) <= kept and all(p.grad is None for p in trained.trainer.parameters)


def test_the_measurement_of_a_step_leaves_nothing(base, monkeypatch, without_collector):
    from tlora_core.hosts.comfy.training import personalize

    notes, left, chosen = Made(), [], personalize.fit_for

    def measured(denoiser, *asked):
        denoiser.output_error(denoiser.samples, *[torch.zeros(1, *denoiser.samples[0].shape)] * 2, torch.ones(1))
        with notes:
            answer = chosen(denoiser, *asked)
        left.extend(notes.alive)
        return answer

    monkeypatch.setattr(personalize, "fit_for", measured)
    with torch.inference_mode():
        training(base, "auto", steps=3).train(1)
    assert len(notes.made) > 300 and left == [(1,)], "the timestep of the last evaluation alone"


def test_the_graph_of_one_part_of_a_loss_is_gone_when_the_next_is_computed(base, monkeypatch, without_collector):
    """With class pictures a step has two parts, and a checkpointed block's node holds what the block was given."""
    from tlora_core.hosts.comfy.training.denoiser import HostDenoiser
    from tlora_core.hosts.comfy.training.personalize import Personalization

    notes, left, loss = [], [], HostDenoiser._loss

    def noted(denoiser, samples, generator):
        left.append(notes and notes[-1].alive)
        notes.append(Made())
        with notes[-1]:
            return loss(denoiser, samples, generator)

    monkeypatch.setattr(HostDenoiser, "_loss", noted)
    with torch.inference_mode():
        asked = request(steps=2, config={"prior_weight": 1.0})
        Personalization(*base, images(), asked, images(), "low").train(2)
    # The timestep of the last evaluation is left. What the first step makes of captions is kept for the others.
    assert len(notes) == 4 and len(notes[2].made) > 300 and left[3] == [(1,)]
