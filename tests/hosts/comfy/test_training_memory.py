"""What a training step is said to keep, against what it keeps; and what is done when memory is short or runs out."""

import pytest
import torch
from training_runs import OutOfMemory, images, request, run, same


def denoiser_for(model, channels, side, **config):
    import random_models

    from tlora_core import RankSchedule, make_adapters
    from tlora_core.hosts.comfy.model.families import target_layers
    from tlora_core.hosts.comfy.training.denoiser import HostDenoiser
    from tlora_core.hosts.comfy.training.encode import Sample
    from tlora_core.training.config import TrainConfig

    shapes = {name: layer.shape for name, layer in target_layers(model).items()}
    adapters = make_adapters("tlora", "last_random", shapes, 8, 0)
    sample = Sample(torch.zeros(channels, side, side), None, None, random_models.conditioning(model, 20))
    return HostDenoiser(model, adapters, RankSchedule(8, 4), [sample], TrainConfig(**config))


@pytest.mark.parametrize("name", ["sdxl", "flux", "sd3"])
def test_it_is_foretold_from_small_pictures(comfy, name):
    import random_models

    from tlora_core.hosts.comfy.training.memory import _Kept, training_memory
    from tlora_core.hosts.comfy.training.session import checkpointed, training_session
    from tlora_core.layers.saving import saving

    model = {
        "sdxl": lambda: random_models.sdxl(64, (0, 1, 1), 64),
        "flux": lambda: random_models.flux(256, (2, 3), 64, 32),
        "sd3": lambda: random_models.small("sd3"),
    }[name]()
    with training_session(model):
        denoiser = denoiser_for(model, 4 if name == "sdxl" else 16, 48)
        said = training_memory(denoiser, 2)
        latents, sigmas = torch.zeros(2, *denoiser.samples[0].shape), torch.ones(2)
        with _Kept(model.model.diffusion_model) as kept:
            denoiser.output_error(denoiser.samples * 2, latents, latents, sigmas)
        assert said.plain == pytest.approx(kept.need().plain, rel=0.1)
        with checkpointed(model), saving(lambda t: seen.append(t) or t):
            seen = []
            denoiser.output_error(denoiser.samples * 2, latents, latents, sigmas)
    weights = {p.data_ptr() for p in model.model.diffusion_model.parameters()}
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in seen if t.data_ptr() not in weights}
    assert sum(held.values()) < 1.1 * said.checkpointed < said.plain


class TestFit:
    """The way to train that `fit_for` chooses on a device with so much memory."""

    @pytest.fixture
    def model(self, comfy, monkeypatch):
        import comfy.model_management
        import random_models

        # As on a GPU, where weights that do not fit stay in RAM.
        monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
        return random_models.flux(256, (1, 1), 64, 32)

    def fit(self, monkeypatch, model, free, **config):
        import comfy.model_management

        from tlora_core.hosts.comfy.training.memory import fit_for

        monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: int(free))
        return fit_for(denoiser_for(model, 16, 32, **config), 1)

    @pytest.fixture
    def need(self, model):
        """Bytes of a plain and of a checkpointed training with AdamW, beside the weights."""
        from tlora_core.hosts.comfy.training.memory import training_memory
        from tlora_core.hosts.comfy.training.session import training_session

        with training_session(model):
            denoiser = denoiser_for(model, 16, 32)
            return [1.25 * each + 3 * denoiser.adapter_bytes for each in training_memory(denoiser, 1)]

    @pytest.mark.parametrize("loaded", [True, False])
    def test_the_fastest_that_fits_is_chosen(self, model, need, monkeypatch, loaded):
        from tlora_core.hosts.comfy.training.session import training_session

        with training_session(model):
            if not loaded:
                model.partially_unload(torch.device("cpu"), 1e9)
            weights = model.model_size() - model.loaded_size()
            assert (weights > 0) is not loaded
            chosen = [
                self.fit(monkeypatch, model, each + weights + more) for each in need for more in (1 << 16, -(1 << 16))
            ]
            assert [str(each) for each in chosen] == ["fast", "low", "low", "lowest"]
            assert chosen[-1].room == pytest.approx(need[1], rel=1e-6)
            assert str(self.fit(monkeypatch, model, need[0] + weights + 65536, optimizer="prodigy")) == "low", (
                "which keeps twice as much as AdamW"
            )

    def test_what_dynamic_vram_can_push_out_counts_as_free(self, model, need, monkeypatch):
        import comfy.model_management
        import random_models

        from tlora_core.hosts.comfy.training.session import training_session

        other = random_models.flux(256, (1, 1), 64, 32)
        with training_session(model):
            monkeypatch.setattr(comfy.model_management, "loaded_models", lambda: [model, other])
            monkeypatch.setattr(other, "loaded_size", lambda: 1 << 22)
            assert str(self.fit(monkeypatch, model, need[0] - (1 << 21))) == "fast"
            monkeypatch.setattr(other, "loaded_size", lambda: 1 << 20)
            assert str(self.fit(monkeypatch, model, need[0] - (1 << 21))) == "low"

    def test_the_host_streams_by_itself_with_dynamic_vram_and_not_at_all_to_the_cpu(self, model, monkeypatch):
        import comfy.model_management

        from tlora_core.hosts.comfy.training.memory import leanest_fit

        assert str(leanest_fit(model, 5)) == "lowest"
        monkeypatch.setattr(model, "is_dynamic", lambda: True, raising=False)
        assert str(leanest_fit(model, 5)) == "low"
        monkeypatch.undo()
        assert comfy.model_management.is_device_cpu(model.load_device) and str(leanest_fit(model, 5)) == "low"


def out_of_memory_once(monkeypatch, base, step, error=None):
    """The model has no memory left in a backward pass of that step, the first time."""
    from tlora_core.hosts.comfy.training.denoiser import HostDenoiser

    losses, calls = HostDenoiser.losses, []

    def failing(denoiser, rows, generator):
        calls.append(denoiser)
        for loss in losses(denoiser, rows, generator):
            if len(calls) == step:
                loss.register_hook(lambda gradient: (_ for _ in ()).throw(error or torch.OutOfMemoryError("injected")))
            yield loss

    monkeypatch.setattr(HostDenoiser, "losses", failing)


@pytest.mark.parametrize("memory, step", [("auto", 1), ("auto", 4), ("fast", 4)])
def test_when_memory_runs_out_auto_goes_on_with_checkpointing_and_others_say_what_to_do(
    base, output, monkeypatch, memory, step
):
    from tlora_core import TLoRAError

    whole = run(base, file_name="run/whole", memory="low")
    out_of_memory_once(monkeypatch, base, step)
    if memory == "fast":
        with pytest.raises(
            TLoRAError,
            match='step 4; set memory to "auto", or lower rank .now 4. and min_rank, or '
            "start ComfyUI with --fp8_e4m3fn-unet, or lower resolution .now 64. or the number of layers.$",
        ):
            run(base, rerun="restart", memory=memory)
    else:
        done = run(base, rerun="restart", memory=memory)
        assert len(done.losses) == 6 and done.losses == pytest.approx(whole.losses, rel=1e-3)


@pytest.mark.parametrize("optimizer, operation", [("adamw", 9), ("prodigy", 9), ("adafactor", 9), ("schedule_free", 9)])
def test_when_memory_runs_out_for_the_optimizers_state_the_step_is_made_again(
    base, output, monkeypatch, optimizer, operation
):
    asked = request(3, rate=1.0 if optimizer == "prodigy" else 0.01, config={"optimizer": optimizer})
    whole = run(base, asked, file_name="run/whole", memory="low")
    shortage = OutOfMemory(monkeypatch, 1, operation)
    done = run(base, asked, rerun="restart", memory="auto")
    assert shortage.happened and done.losses == whole.losses and same(done.tlora, whole.tlora)


def test_when_memory_runs_out_half_way_through_an_update_the_run_can_be_taken_up_before_it(base, output, monkeypatch):
    from tlora_core import TLoRAError

    asked = request(config={"optimizer": "prodigy"}, rate=1.0)
    whole = run(base, asked, file_name="run/whole", memory="low")
    with monkeypatch.context() as patch:
        OutOfMemory(patch, 4, 9)
        with pytest.raises(TLoRAError, match='^Memory ran out in step 4; set memory to "low", or'):
            run(base, asked, rerun="restart", checkpoint_every=2)
    done = run(base, asked, memory="low")
    assert done.losses == pytest.approx(whole.losses, rel=1e-3) and len(done.losses) == 6


@pytest.mark.parametrize("memory", ["auto", "fast"])
@pytest.mark.parametrize("known", [True, False])
def test_every_error_that_the_host_takes_for_memory_is_one_in_the_first_step_too(
    base, output, monkeypatch, memory, known
):
    """CUDA has two, of which hosts without is_oom know one."""
    import comfy.model_management

    from tlora_core import TLoRAError

    error = torch.OutOfMemoryError("injected")
    if not known:
        monkeypatch.delattr(comfy.model_management, "is_oom", raising=False)
    elif hasattr(comfy.model_management, "is_oom"):
        error = getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory")
    out_of_memory_once(monkeypatch, base, 1, error)
    if memory == "auto":
        assert len(run(base, request(2), memory=memory).losses) == 2
    else:
        with pytest.raises(TLoRAError, match="^Memory ran out in step 1; "):
            run(base, request(2), memory=memory)


@pytest.mark.parametrize("free, expected", [(1 << 20, True), (1 << 50, False)])
def test_auto_takes_checkpointing_beforehand_where_memory_is_short(base, output, monkeypatch, free, expected):
    import comfy.model_management

    from tlora_core.hosts.comfy.training.personalize import Personalization

    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *args, **kwargs: free)
    with torch.inference_mode():
        p = Personalization(*base, images(), request(2))
        p.train(2)
    assert p.fit.checkpointing is expected and len(p.trainer.losses) == 2


@pytest.mark.parametrize("memory", ["auto", "low", "fast"])
def test_a_training_lets_go_of_the_model(comfy, memory):
    import gc
    import weakref

    import comfy.model_management
    from host_models import tiny_base

    from tlora_core.hosts.comfy.training.personalize import Personalization

    base = tiny_base()
    network = weakref.ref(base[0].model.diffusion_model)
    with torch.inference_mode():
        Personalization(*base, images(), request(1), memory=memory).train(1)
    del base
    comfy.model_management.unload_all_models()
    gc.collect()
    assert network() is None


@pytest.mark.parametrize("memory", ["auto", "low", "fast"])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_quantised_model_is_trained(output, comfy, memory, loaded):
    import comfy.model_management
    import random_models
    from host_models import tiny_base

    worth = tiny_base()
    quantised = tiny_base(random_models.quantise(worth[0]))
    if loaded:  # as by a sampling before
        with torch.inference_mode():
            comfy.model_management.load_models_gpu([quantised[0]])
    losses = [
        run(base, request(3, start=start), memory=memory, rerun="restart").losses
        for base in (quantised, worth)
        for start in ("last_random", "principal_weight")
    ]
    assert losses[0] == pytest.approx(losses[2], rel=1e-3) and losses[1] == pytest.approx(losses[3], rel=1e-3)


def test_inputs_of_the_latents_size_are_those_of_each_size(comfy):
    """An inpainting model gets the masked picture beside the latents."""
    import random_models

    from tlora_core.hosts.comfy.training.memory import training_memory
    from tlora_core.hosts.comfy.training.session import training_session

    model = random_models.small("sd15-inpaint")
    with training_session(model):
        denoiser = denoiser_for(model, 4, 40)
        assert training_memory(denoiser, 1).plain > 0
        sample, sigmas = denoiser.samples[0], torch.ones(2)
        for count in (1, 2):
            latents = torch.zeros(count, *sample.shape)
            assert denoiser.output_error([sample] * count, latents, latents, sigmas[:count]).shape == latents.shape


def test_each_prior_picture_has_the_same_chance_whatever_its_shape(comfy, monkeypatch):
    import random_models

    from tlora_core import RankSchedule, make_adapters
    from tlora_core.hosts.comfy.model.families import target_layers
    from tlora_core.hosts.comfy.training.denoiser import HostDenoiser
    from tlora_core.hosts.comfy.training.encode import Sample
    from tlora_core.hosts.comfy.training.session import training_session
    from tlora_core.training.config import TrainConfig

    model = random_models.flux(256, (1, 1), 64, 32)
    texts = random_models.conditioning(model, 8)
    prior = [Sample(torch.zeros(16, 8, 8 if i else 12), None, None, texts) for i in range(4)]
    adapters = make_adapters(
        "lora", "last_random", {name: layer.shape for name, layer in target_layers(model).items()}, 2, 0
    )
    with training_session(model):
        denoiser = HostDenoiser(model, adapters, RankSchedule(2, 2), prior[:1], TrainConfig(prior_weight=1.0), prior)
        seen = []
        monkeypatch.setattr(denoiser, "_loss", lambda samples, drawn: seen.append(samples) or torch.zeros(()))
        generator = torch.Generator().manual_seed(0)
        for _ in range(400):
            list(denoiser.losses([0], generator))
    share = sum(samples[0].shape[-1] == 12 for samples in seen[1::2]) / 400
    assert 0.18 < share < 0.32
