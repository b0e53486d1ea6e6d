"""T-LoRAs in diffusers' pipelines: the host's picture, the formula's rank at every evaluation, nothing left after removal.

The models are small and random, the same ones in diffusers' and in the host's classes.
"""

import copy
import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from foreign_files import generator, pairs
from safetensors.torch import save_file

import tlora_core
from tlora_core import RankSchedule, TLoRAError
from tlora_core.names import layer_of, plain_name

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; tools/host.py test installs it")
pytestmark = pytest.mark.usefixtures("one_thread")

README = Path(__file__).resolve().parents[1] / "README.md"
# A layer of each model: diffusers' name, ComfyUI's layer and its module, the layer's first row in that.
LAYERS = {
    "sdxl": ("down_blocks.2.attentions.1.transformer_blocks.1.attn2.to_k", "input_blocks.8.1.transformer_blocks.1.attn2.to_k", 0),
    "flux": ("single_transformer_blocks.1.attn.to_v", "single_blocks.1.linear1", 512),
}


@pytest.fixture(scope="module", params=LAYERS)
def twins(comfy, request):
    """Of one random model: kind, MODEL, pipe, denoiser, and tlora(...), a random T-LoRA of rank 8 and min_rank 2 on it."""
    import diffusers_twins
    import random_models

    model, pipe = getattr(diffusers_twins, f"{request.param}_twins")()

    def tlora(min_rank=2, size=1.0, seed=0, **options):
        return random_models.random_tlora(model, 8, min_rank, size, seed, **options)

    denoiser = pipe.unet if request.param == "sdxl" else pipe.transformer
    return SimpleNamespace(kind=request.param, model=model, pipe=pipe, denoiser=denoiser, tlora=tlora)


@pytest.fixture
def sdxl(twins):
    """The U-Net's; for tests marked with `only_sdxl`, which may change the scheduler."""
    scheduler = twins.pipe.scheduler
    yield twins
    twins.pipe.scheduler = scheduler


only_sdxl = pytest.mark.parametrize("twins", ["sdxl"], indirect=True)


def picture(twins):
    import diffusers_twins

    return diffusers_twins.picture_in_diffusers(twins.model, twins.pipe)


def evaluate(twins, timesteps):
    """One evaluation of the denoiser, on a batch with these timesteps or one for all of a batch of two."""
    g, size, dtype = generator(), len(timesteps) if isinstance(timesteps, list) else 2, next(twins.denoiser.parameters()).dtype
    timestep = torch.tensor(timesteps)

    def random(*shape):
        return torch.randn(size, *shape, generator=g).to(dtype)

    with torch.no_grad():
        if twins.kind == "sdxl":
            added = {"text_embeds": random(1280), "time_ids": torch.full((size, 6), 64.0)}
            return twins.denoiser(random(4, 8, 8), timestep, random(7, 64), added_cond_kwargs=added).sample
        return twins.denoiser(
            hidden_states=random(16, 64),
            encoder_hidden_states=random(7, 64),
            pooled_projections=random(32),
            timestep=timestep.expand(size),
            guidance=torch.full((size,), 3.5),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(7, 3),
        ).sample


class Watch:
    """Within the block, records at each evaluation the timesteps that the denoiser is given and what LAYERS' layer adds to
    its own output."""

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
    return not hooks and "_tlora" not in denoiser.__dict__ and not any("forward" in m.__dict__ for m in denoiser.modules())


# Measured: 5e-6 for the U-Net, 2e-7 for FLUX; docs/FILE_FORMAT.md has the largest difference.
@pytest.mark.parametrize("split", [(), ("qkv", "linear1")], ids=["whole layers", "rows of layers"])
def test_the_picture_is_the_hosts(twins, split):
    import diffusers_twins

    from tlora_core.comfy_host.sampling import apply_tlora

    tlora, tolerance = twins.tlora(split=split), {"sdxl": 2e-5, "flux": 2e-6}[twins.kind]
    bare = picture(twins)
    with tlora_core.apply(twins.pipe, tlora):
        adapted = picture(twins)
    want = diffusers_twins.picture_in_comfyui(apply_tlora(twins.model, tlora), twins.pipe)
    print(f"{twins.kind}: largest difference {(adapted - want).abs().max():.2g} of {want.abs().max():.2g}")
    assert (adapted - want).norm() < tolerance * want.norm()
    assert (adapted - bare).norm() > 0.1 * bare.norm()
    # The mask counts: without it the picture is another one.
    with tlora_core.apply(twins.pipe, twins.tlora(min_rank=8, split=split)):
        assert (picture(twins) - adapted).norm() > 0.01 * bare.norm()


def test_the_rank_is_the_formulas_at_every_evaluation(twins):
    tlora, T = twins.tlora(), {"sdxl": 1000, "flux": 1}[twins.kind]
    with tlora_core.apply(twins.pipe, tlora), Watch(twins) as watch:
        picture(twins)
    ranks = watch.ranks(twins, tlora)
    assert ranks == [formula(float(t.flatten()[0]), T) for t in watch.timesteps]
    assert len(ranks) == 6 and len(set(ranks)) > 3


@only_sdxl
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "DDIMScheduler", "LCMScheduler"])
def test_other_schedulers_count_timesteps_too(sdxl, name):
    options = {} if name in ("DDIMScheduler", "LCMScheduler") else {"use_karras_sigmas": True}
    tlora = sdxl.tlora()
    with tlora_core.apply(sdxl.pipe, tlora), Watch(sdxl) as watch:
        # Chosen after the T-LoRA was put on, as users do.
        sdxl.pipe.scheduler = getattr(diffusers, name).from_config(sdxl.pipe.scheduler.config, **options)
        picture(sdxl) if name != "LCMScheduler" else evaluate(sdxl, 499)
    ranks = watch.ranks(sdxl, tlora)
    assert ranks == [formula(float(t), 1000) for t in watch.timesteps] and ranks


def edm(name):
    options = {"timestep_type": "continuous", "prediction_type": "v_prediction"} if name == "EulerDiscreteScheduler" else {}
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
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed; tools/host.py test installs it")
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
    with pytest.raises(TLoRAError, match=f"made for another model .* its layer {name} is not in pipe's"):
        tlora_core.apply(twins.pipe, with_layers(tlora, {name: other}))
    name = next(iter(tlora.layers))
    small = tlora_core.LowRank(other.up[:-1], other.down, other.group)
    with pytest.raises(TLoRAError, match=f"its layer {name} is .* and pipe's .*; use a pipeline of the kind"):
        tlora_core.apply(twins.pipe, with_layers(tlora, {name: small}))
    assert is_bare(twins.denoiser)


def with_layers(tlora, layers):
    from dataclasses import replace

    return replace(tlora, layers=layers)


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
        block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=32, attention_head_dim=2, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    with pytest.raises(TLoRAError, match="1 residual blocks a level"):
        tlora_core.apply(SimpleNamespace(unet=unet, scheduler=None), sdxl.tlora())


# --- files ---


def peft_file(twins, path):
    """A plain LoRA of rank 2 in PEFT's names on all of the denoiser's attention projections."""
    shapes = {
        name: (layer.out_features, layer.in_features)
        for name, layer in twins.denoiser.named_modules()
        if re.search(r"attn\d?\.(to_[qkv]|to_out\.0|add_[qkv]_proj)$", name)
    }
    layers, part = pairs([(name, *shape) for name, shape in shapes.items()], 2), "unet" if twins.kind == "sdxl" else "transformer"
    state = {}
    for name, (up, down) in layers.items():
        state |= {f"{part}.{name}.lora_B.weight": up * 0.1, f"{part}.{name}.lora_A.weight": down}
    save_file(state, path)
    return layers


def test_a_lora_of_peft_acts_as_merged(twins, tmp_path, caplog):
    layers = peft_file(twins, tmp_path / "a.safetensors")
    with caplog.at_level(logging.WARNING):
        tlora = tlora_core.load(tmp_path / "a.safetensors", twins.pipe)
    assert len(tlora.layers) == len(layers) and tlora.schedule == RankSchedule(2, 2)
    assert "a.safetensors" in caplog.text and "set min_rank" in caplog.text
    with tlora_core.apply(twins.pipe, tlora):
        adapted = evaluate(twins, 0.5)
    kept = {name: twins.denoiser.get_submodule(name).weight.data.clone() for name in layers}
    for name, (up, down) in layers.items():
        twins.denoiser.get_submodule(name).weight.data += up * 0.1 @ down
    merged = evaluate(twins, 0.5)
    for name, weight in kept.items():
        twins.denoiser.get_submodule(name).weight.data.copy_(weight)
    torch.testing.assert_close(adapted, merged, rtol=1e-3, atol=1e-4)
    scheduled = tlora_core.load(tmp_path / "a.safetensors", twins.pipe, min_rank=1)
    assert scheduled.schedule == RankSchedule(2, 1)


def test_diffusers_own_loader_reads_our_file_as_a_plain_lora(twins, tmp_path):
    tlora = twins.tlora(split=("qkv",))
    if twins.kind == "flux":  # rows of fused modules only, as trained on diffusers' projections
        tlora = with_layers(tlora, {name: layer for name, layer in tlora.layers.items() if "linear1" not in name})
    tlora.save(tmp_path / "a.safetensors")
    options = {"unet_config": twins.pipe.unet.config} if twins.kind == "sdxl" else {}
    state = twins.pipe.lora_state_dict(str(tmp_path / "a.safetensors"), **options)
    state = state[0] if isinstance(state, tuple) else state
    loaded = {}
    for key, tensor in state.items():
        module, part = re.fullmatch(r"(.+?)[._](lora_A|lora_B|lora\.down|lora\.up)\.weight", key).groups()
        loaded.setdefault(layer_of(plain_name(module)), {})[part.replace("lora.down", "lora_A").replace("lora.up", "lora_B")] = tensor
    assert len(loaded) == len(tlora.layers)
    for place, parts in loaded.items():
        layer = tlora.layers[place.layer(parts["lora_A"].shape[1])]
        torch.testing.assert_close(parts["lora_B"] @ parts["lora_A"], layer.up @ layer.down, rtol=1e-4, atol=1e-4)


def test_lycoris_base_terms_come_from_the_pipelines_weights(twins, tmp_path):
    name, comfy_name, row = LAYERS[twins.kind]
    weight = twins.denoiser.get_submodule(name).weight.detach()
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    key = "lycoris_" + name.replace(".", "_")
    trained = {"q_layer.weight": Vh[:3] + 0.01, "p_layer.weight": U[:, :3] - 0.01, "lambda_layer": S[None, :3] * 1.1}
    save_file({f"{key}.{part}": value.float().contiguous() for part, value in trained.items()}, tmp_path / "a.safetensors")
    told = []
    tlora = tlora_core.load(tmp_path / "a.safetensors", twins.pipe, progress=lambda *count: told.append(count))
    (layer,) = tlora.layers.values()
    assert list(tlora.layers) == [comfy_name + (f"@{row}" if row else "")] and told == [(0, 1), (1, 1)]
    want = (U[:, :3] - 0.01) * (S[:3] * 1.1) @ (Vh[:3] + 0.01) - U[:, :3] * S[:3] @ Vh[:3]
    assert ((layer.up @ layer.down).double() - want).norm() < 1e-4 * want.norm()


def test_the_readmes_example_runs(twins, tmp_path, monkeypatch):
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
                  if "tlora_core.apply" in block)
    ours = [line for line in example.splitlines() if "tlora_core" in line or line.startswith("handle")]
    assert len(ours) == 4 and ours[0].startswith("import"), ours
    twins.tlora().save(tmp_path / "my_subject.safetensors")
    monkeypatch.chdir(tmp_path)
    bare, names = evaluate(twins, 0.5), {"pipe": twins.pipe}
    exec("\n".join(ours[:3]), names)
    assert not torch.equal(evaluate(twins, 0.5), bare)
    exec(ours[3], names)
    assert torch.equal(evaluate(twins, 0.5), bare)
