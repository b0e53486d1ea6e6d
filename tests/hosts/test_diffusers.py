"""T-LoRAs in diffusers' pipelines: the host's picture, the formula's rank at every evaluation, nothing left after
removal.

The models are small and random, the same in diffusers' and in the host's classes.
"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers_twins import LAYERS, evaluate, picture_in_comfyui, picture_in_diffusers, with_layers

import tlora_core
from tlora_core import TLoRAError

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; tools/host.py test installs it")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def sdxl(twins):
    """The U-Net's; for tests marked with `only_sdxl`, which may change the scheduler."""
    scheduler = twins.pipe.scheduler
    yield twins
    twins.pipe.scheduler = scheduler


only_sdxl = pytest.mark.parametrize("twins", ["sdxl"], indirect=True)


class Watch:
    """Within the block, records at each evaluation the timesteps that the denoiser is given and what LAYERS' layer adds
    to its own output."""

    def __init__(self, twins):
        self.denoiser = twins.denoiser
        self.layer = twins.denoiser.get_submodule(LAYERS[twins.kind][0])
        self.timesteps, self.seen = [], []

    def __enter__(self):
        def before(module, args, kwargs):
            self.timesteps.append(torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1]).float())

        def after(layer, args, output):
            self.seen.append((args[0], output - torch.nn.functional.linear(args[0], layer.weight, layer.bias)))

        self.hooks = [
            self.denoiser.register_forward_pre_hook(before, with_kwargs=True),
            self.layer.register_forward_hook(after),
        ]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def ranks(self, twins, tlora, tolerance=1e-4):
        """The rank with which the T-LoRA's own matrices give what was seen, at each evaluation."""
        _, name, row = LAYERS[twins.kind]
        layer, found = tlora.layers[name], []
        for x, added in self.seen:
            rows = slice(row, row + added.shape[-1])
            errors = []
            for r in range(layer.rank + 1):
                columns = r * layer.group
                want = x.double() @ (layer.up[rows, :columns].double() @ layer.down[:columns].double()).T
                errors.append(float((added.double() - want).norm() / x.norm()))
            found.append(errors.index(min(errors)))
            assert min(errors) < tolerance
        return found


def formula(t, T, rank=8, min_rank=2):
    return math.floor((rank - min_rank) * (T - t) / T) + min_rank


def is_bare(denoiser):
    hooks = len(denoiser._forward_pre_hooks) + len(denoiser._forward_hooks)
    return (
        not hooks and "_tlora" not in denoiser.__dict__ and not any("forward" in m.__dict__ for m in denoiser.modules())
    )


# Measured: 5e-6 for the U-Net, 2e-7 for FLUX; docs/FILE_FORMAT.md has the largest difference.
@pytest.mark.parametrize("split", [(), ("qkv", "linear1")], ids=["whole layers", "rows of layers"])
def test_the_picture_is_the_hosts(twins, split):
    from tlora_core.hosts.comfy.sampling import apply_tlora

    tlora, tolerance = twins.tlora(split=split), {"sdxl": 2e-5, "flux": 2e-6}[twins.kind]
    bare = picture_in_diffusers(twins.model, twins.pipe)
    with tlora_core.apply(twins.pipe, tlora):
        adapted = picture_in_diffusers(twins.model, twins.pipe)
    want = picture_in_comfyui(apply_tlora(twins.model, tlora), twins.pipe)
    print(f"{twins.kind}: largest difference {(adapted - want).abs().max():.2g} of {want.abs().max():.2g}")
    assert (adapted - want).norm() < tolerance * want.norm()
    assert (adapted - bare).norm() > 0.1 * bare.norm()
    # The mask counts: without it the picture is another one.
    with tlora_core.apply(twins.pipe, twins.tlora(min_rank=8, split=split)):
        assert (picture_in_diffusers(twins.model, twins.pipe) - adapted).norm() > 0.01 * bare.norm()


def test_the_rank_is_the_formulas_at_every_evaluation(twins):
    tlora, T = twins.tlora(), {"sdxl": 1000, "flux": 1}[twins.kind]
    with tlora_core.apply(twins.pipe, tlora), Watch(twins) as watch:
        picture_in_diffusers(twins.model, twins.pipe)
    ranks = watch.ranks(twins, tlora)
    assert ranks == [formula(float(t.flatten()[0]), T) for t in watch.timesteps]
    assert len(ranks) == 6 and len(set(ranks)) > 3


@only_sdxl
@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "DDIMScheduler", "LCMScheduler"]
)
def test_other_schedulers_count_timesteps_too(sdxl, name):
    options = {} if name in ("DDIMScheduler", "LCMScheduler") else {"use_karras_sigmas": True}
    tlora = sdxl.tlora()
    with tlora_core.apply(sdxl.pipe, tlora), Watch(sdxl) as watch:
        # Chosen after the T-LoRA was put on, as users do.
        sdxl.pipe.scheduler = getattr(diffusers, name).from_config(sdxl.pipe.scheduler.config, **options)
        picture_in_diffusers(sdxl.model, sdxl.pipe) if name != "LCMScheduler" else evaluate(sdxl, 499)
    ranks = watch.ranks(sdxl, tlora)
    assert ranks == [formula(float(t), 1000) for t in watch.timesteps] and ranks


def edm(name):
    options = (
        {"timestep_type": "continuous", "prediction_type": "v_prediction"} if name == "EulerDiscreteScheduler" else {}
    )
    return getattr(diffusers, name)(sigma_min=0.002, sigma_max=80.0, **options)


@only_sdxl
@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_edm_schedulers_give_log_sigma(sdxl, name):
    sdxl.pipe.scheduler = edm(name)
    sdxl.pipe.scheduler.set_timesteps(6)
    tlora, ranks = sdxl.tlora(), []
    with tlora_core.apply(sdxl.pipe, tlora), Watch(sdxl) as watch:
        for t, sigma in zip(sdxl.pipe.scheduler.timesteps, sdxl.pipe.scheduler.sigmas):
            evaluate(sdxl, float(t))
            place = (math.log(sigma) - math.log(0.002)) / (math.log(80) - math.log(0.002))
            ranks.append(formula(min(max(round(place, 5), 0), 1), 1))
    assert watch.ranks(sdxl, tlora) == ranks and len(set(ranks)) > 3


def test_samples_of_one_batch_have_ranks_of_their_own(twins):
    times = [999.0, 500.0, 0.0] if twins.kind == "sdxl" else [1.0, 0.5, 0.0]
    with tlora_core.apply(twins.pipe, twins.tlora()):
        together = evaluate(twins, times)
        for i, t in enumerate(times):
            apart = evaluate(twins, [t] * 3)[i]
            torch.testing.assert_close(together[i], apart, rtol=1e-4, atol=1e-4)


def test_removal_restores_the_very_same_output(twins):
    before = evaluate(twins, 0.5)
    handle = tlora_core.apply(twins.pipe, twins.tlora())
    assert not torch.equal(evaluate(twins, 0.5), before)
    assert not any("forward" in module.__dict__ for module in twins.denoiser.modules())
    handle.remove()
    assert torch.equal(evaluate(twins, 0.5), before) and is_bare(twins.denoiser)
    second = tlora_core.apply(twins.pipe, twins.tlora())
    handle.remove()
    assert not torch.equal(evaluate(twins, 0.5), before)
    second.remove()
    assert is_bare(twins.denoiser)


def test_strength_and_several_at_once_add_up(twins):
    first, second = twins.tlora(), twins.tlora(seed=1)
    added = []
    for parts in ([(first, 1.0)], [(second, 1.0)], [(first, 0.5), (second, -2.0)]):
        handles = [tlora_core.apply(twins.pipe, tlora, strength) for tlora, strength in parts]
        with Watch(twins) as watch:
            evaluate_layer(watch.layer, twins)
        added.append(watch.seen[0][1])
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(added[2], 0.5 * added[0] - 2 * added[1], rtol=1e-3, atol=1e-4)
    assert is_bare(twins.denoiser)


def evaluate_layer(layer, twins):
    """An evaluation in which `layer` gets an input that does not depend on the T-LoRA."""
    hook = layer.register_forward_pre_hook(lambda module, args: (torch.ones_like(args[0]),))
    evaluate(twins, 0.5)
    hook.remove()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_half_way_leaves_nothing(twins, error):
    before = evaluate(twins, 0.5)

    def fail(*_):
        raise error

    layer = twins.denoiser.get_submodule(LAYERS[twins.kind][0])
    with tlora_core.apply(twins.pipe, twins.tlora()), tlora_core.apply(twins.pipe, twins.tlora(seed=1)):
        adapted = evaluate(twins, 0.5)
        hook = layer.register_forward_pre_hook(fail)
        with pytest.raises(error):
            evaluate(twins, 0.5)
        hook.remove()
        if error is RuntimeError:  # torch tells of no other at once
            assert not any("forward" in module.__dict__ for module in twins.denoiser.modules())
        assert torch.equal(evaluate(twins, 0.5), adapted)
        hook = layer.register_forward_pre_hook(fail)
        with pytest.raises(error):
            evaluate(twins, 0.5)
        hook.remove()
    assert is_bare(twins.denoiser) and torch.equal(evaluate(twins, 0.5), before)


def test_it_stays_on_when_offloading_comes_and_goes(twins):
    hooks = pytest.importorskip(
        "accelerate.hooks", reason="accelerate is not installed; tools/host.py test installs it"
    )
    bare = evaluate(twins, 0.5)
    hooks.add_hook_to_module(twins.denoiser, hooks.ModelHook())
    with tlora_core.apply(twins.pipe, twins.tlora()):
        adapted = evaluate(twins, 0.5)
        hooks.remove_hook_from_module(twins.denoiser)
        assert torch.equal(evaluate(twins, 0.5), adapted) and not torch.equal(adapted, bare)
        hooks.add_hook_to_module(twins.denoiser, hooks.ModelHook())
        assert torch.equal(evaluate(twins, 0.5), adapted)
    hooks.remove_hook_from_module(twins.denoiser)
    assert torch.equal(evaluate(twins, 0.5), bare)
    del twins.denoiser.forward  # which the second library leaves


def test_the_t_lora_follows_the_models_dtype(twins):
    denoiser = copy.deepcopy(twins.denoiser).bfloat16()
    pipe = SimpleNamespace(unet=denoiser, scheduler=twins.pipe.scheduler)
    half, tlora = SimpleNamespace(kind=twins.kind, denoiser=denoiser), twins.tlora()
    with tlora_core.apply(pipe, tlora):
        for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float32, 1e-4)):
            denoiser.to(dtype)
            with Watch(half) as watch:
                assert evaluate(half, 0.5).dtype == dtype
            assert watch.ranks(half, tlora, tolerance) == [formula(0.5, {"sdxl": 1000, "flux": 1}[twins.kind])]


# --- what does not fit ---


def test_a_pipeline_or_t_lora_of_another_kind_is_refused(twins, comfy):
    tlora = twins.tlora()
    with pytest.raises(TLoRAError, match="pipe is a SimpleNamespace, whose model T-LoRA does not know"):
        tlora_core.apply(SimpleNamespace(unet=torch.nn.Linear(2, 2)), tlora)
    with pytest.raises(TLoRAError, match="pipe is a NoneType"):
        tlora_core.apply(None, tlora)
    other = next(iter(tlora.layers.values()))
    name = "blocks.0.attn.qkv"
    with pytest.raises(
        TLoRAError,
        match=rf"made for another model .* layers are not in this one, the first being "
        rf"{name}",
    ):
        tlora_core.apply(twins.pipe, with_layers(tlora, {name: other}))
    name = next(iter(tlora.layers))
    small = tlora_core.LowRank(other.up[:-1], other.down, other.group)
    with pytest.raises(TLoRAError, match=f"its layer {name} is .* and the model's .*; use the kind of model"):
        tlora_core.apply(twins.pipe, with_layers(tlora, {name: small}))
    assert is_bare(twins.denoiser)


def test_compiled_and_fused_models_are_refused(twins):
    tlora = twins.tlora()
    with pytest.raises(TLoRAError, match="compiled"):
        tlora_core.apply(SimpleNamespace(unet=torch.compile(twins.denoiser)), tlora)
    twins.denoiser.fuse_qkv_projections()
    with pytest.raises(TLoRAError, match="fused; call pipe.unfuse_qkv_projections"):
        tlora_core.apply(twins.pipe, tlora)
    twins.denoiser.unfuse_qkv_projections()
    tlora_core.apply(twins.pipe, tlora).remove()


@pytest.mark.parametrize("timestep", [-1.0, 1000.5, float("nan")])
def test_a_timestep_out_of_range_is_refused_and_not_guessed(twins, timestep):
    with tlora_core.apply(twins.pipe, twins.tlora()):
        with pytest.raises(TLoRAError, match="noise level is unknown"):
            evaluate(twins, timestep)
    assert is_bare(twins.denoiser)


@only_sdxl
def test_a_scheduler_that_does_not_tell_its_range_is_refused(sdxl):
    options = dict(timestep_type="continuous", prediction_type="v_prediction")
    sdxl.pipe.scheduler = diffusers.EulerDiscreteScheduler(**options)
    with tlora_core.apply(sdxl.pipe, sdxl.tlora()):
        with pytest.raises(TLoRAError, match="EulerDiscreteScheduler, does not tell its sigma_min"):
            evaluate(sdxl, 0.5)
        sdxl.pipe.scheduler = None
        with pytest.raises(TLoRAError, match="not in 0 to None"):
            evaluate(sdxl, 0.5)


@only_sdxl
def test_a_u_net_with_other_blocks_is_refused(sdxl):
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=32,
        attention_head_dim=2,
        cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    with pytest.raises(TLoRAError, match="1 residual blocks a level"):
        tlora_core.apply(SimpleNamespace(unet=unet, scheduler=None), sdxl.tlora())
