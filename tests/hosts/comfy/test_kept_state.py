"""What a model keeps between evaluations never meets other weights or adapters than those that it was computed with."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trial(comfy):
    """HiDream-O1, which keeps the keys and values of its prompts."""
    from family_checks import Trial

    return Trial("hidream-o1")


@pytest.fixture
def network(trial):
    network = trial.model.model.diffusion_model
    network.clear_kv_cache()
    return network


def test_pictures_with_and_without_a_tlora_are_the_same_in_any_order(trial, network):
    import sampling_runs as runs

    tlora = trial.tlora()
    base = trial.sample(trial.model)
    network.clear_kv_cache()
    drawn = trial.sample(runs.apply(trial.model, tlora, 1.0))
    assert torch.equal(trial.sample(trial.model), base), "after a picture with the T-LoRA"
    assert torch.equal(trial.sample(runs.apply(trial.model, tlora, 1.0)), drawn), "after a picture without it"
    assert (drawn - base).norm() > 1e-3 * base.norm()


def test_what_the_base_has_kept_stays_for_the_base(trial, network):
    import sampling_runs as runs

    trial.sample(trial.model)
    kept = network._kv_cache_entries
    before = [(entry, list(entry["kv"])) for entry in kept]
    assert before
    trial.sample(runs.apply(trial.model, trial.tlora(), 1.0))
    assert network._kv_cache_entries is kept
    assert [(entry, list(entry["kv"])) for entry in kept] == before


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("is_used", [False, True])
def test_every_training_step_starts_with_nothing_kept(trial, network, checkpointing, is_used):
    from gradients import ALIKE, Setting

    setting = Setting("hidream-o1", model=trial.model)
    if is_used:  # with the prompts of the training
        with setting.session():
            texts = [sample.conditioning for sample in setting.denoiser.samples]
        trial_texts, trial.texts = trial.texts, texts
        trial.sample(trial.model)
        trial.texts = trial_texts
    kept = network._kv_cache_entries
    with setting.session(checkpointing):
        first, second = ([g.clone() for g in setting.gradients(ALIKE)] for _ in range(2))
        for one, other in zip(first, second):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert sum(float(g.abs().sum()) for g in first) > 0
    assert network._kv_cache_entries is kept


class Keeping(nn.Module):
    """Keeps whatever the host's models do, and more."""

    def __init__(self):
        super().__init__()
        self.kv_cache, self._Cache, self.prefix_cache = [torch.ones(2)], {"k": torch.ones(2)}, object()
        self.prefix_cache_enabled, self.cache_size, self.other = True, 5, torch.ones(2)
        self.register_buffer("cached_table", torch.ones(2))


def test_attributes_that_say_that_they_are_caches_are_emptied_and_put_back(comfy):
    from tlora_core.hosts.comfy.model.kept_state import nothing_kept

    network = nn.Sequential(Keeping(), nn.Linear(2, 2))
    network[0].teacache = [1]  # of a node pack that skips steps
    module, before = network[0], dict(vars(network[0]))
    with pytest.raises(ValueError), nothing_kept(SimpleNamespace(diffusion_model=network)):
        assert (module.kv_cache, module._Cache, module.prefix_cache) == ([], {}, None)
        assert module.prefix_cache_enabled is False and module.cache_size == 5
        assert module.other is before["other"] and module.cached_table is before["_buffers"]["cached_table"]
        assert module.teacache == [1]
        module.kv_cache.append(1)
        raise ValueError
    assert vars(module) == before and len(module.kv_cache) == 1


def test_results_that_a_node_has_put_into_the_options_are_left_out_of_evaluations_with_a_tlora(trial):
    import sampling_runs as runs

    class Recorder:
        def __call__(self, executor, *args, **kwargs):
            seen.append(args[-1])
            return executor(*args, **kwargs)

    seen, applied = [], []
    for model in (trial.model.clone(), runs.apply(trial.model, trial.tlora(), 1.0)):
        options = model.model_options.setdefault("transformer_options", {})
        options.update(animate2_cache=object(), other_cache=1)
        model.add_wrapper_with_key("apply_model", "recorder", Recorder())
        trial.sample(model)
        applied.append(seen.pop())
    assert "animate2_cache" in applied[0] and "animate2_cache" not in applied[1] and applied[1]["other_cache"] == 1
