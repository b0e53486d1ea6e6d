"""Training with weights that stay in RAM and are streamed to the device at each use, as where a model is larger than
the card."""

import sys
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from gradients import MIXED, ClassSetting, Setting
from training_runs import images, request, run

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))


@pytest.fixture
def partly(comfy, monkeypatch):
    """The host loads every model with so many bytes of weights, as on a small card; all others are cast at each use."""
    import comfy.model_management

    def load(models, memory_required=0, force_full_load=False, **_):
        if force_full_load:
            return
        model = models[0]
        model.partially_load(model.load_device, max(load.bytes, 0.1) - model.loaded_size())

    load.bytes = 0.1
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load)
    return load


@pytest.mark.parametrize("share", [0, 0.3])
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "chroma", "z-image", "qwen-image", "krea2", "wan"])
def test_gradients_are_the_same_but_for_the_order_of_sums(comfy, partly, family, share):
    """A norm that casts its weight is one node of autograd, and else several: their gradients and that of the stream
    around it are added up in another order."""
    setting, found = Setting(family), []
    partly.bytes = share * sum(p.nbytes for p in setting.model.model.diffusion_model.parameters())
    for room in (None, 0):
        for checkpointing in (False, True):
            with setting.session(checkpointing, room):
                found.append(torch.cat([gradient.flatten() for gradient in setting.gradients(MIXED)]))
    cast = [m for m in setting.model.model.diffusion_model.modules() if getattr(m, "comfy_cast_weights", False)]
    assert len(cast) > 5, "some weights are not loaded"
    for whole, streamed in zip(found[:2], found[2:]):
        torch.testing.assert_close(streamed, whole, rtol=1e-12, atol=1e-16)


def test_output_preservation_streams_the_evaluation_without_adapters_too(comfy, partly):
    setting, found = ClassSetting("flux"), []
    for room in (None, 0):
        with setting.session(checkpointing=True, room=room):
            found.append(torch.cat([gradient.flatten() for gradient in setting.gradients(MIXED)]))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-16)


@contextmanager
def weights_on_device(model):
    """Within the block, gives a function for the most bytes of streamed weights that were on the device at once."""
    import comfy.ops

    cast, live, most = comfy.ops.cast_bias_weight, {}, [0]

    def counted(layer, *args, **kwargs):
        result = cast(layer, *args, **kwargs)
        for tensor in result[:2]:
            if tensor is not None and tensor.is_meta and tensor is not layer.weight and tensor is not layer.bias:
                storage = tensor.untyped_storage()
                live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, live.pop, storage._cdata, None)
        most[0] = max(most[0], sum(live.values()))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.ops, "cast_bias_weight", counted)
        yield lambda: most[0]


@pytest.mark.parametrize("family", ["sdxl", "flux", "z-image"])
@pytest.mark.parametrize("share", [0, 0.4])
def test_no_more_weights_are_on_the_device_than_allowed(comfy, monkeypatch, family, share):
    """Counted on the device "meta": of what is streamed, one layer's weight at a time, in both passes."""
    import memory
    import random_models

    make = {"sdxl": lambda **o: random_models.sdxl(64, (0, 1, 1), 64, **o)}.get(
        family, lambda **o: random_models.small(family, **o)
    )
    model = make(dtype=torch.bfloat16, device=memory.META)
    allowed = share * sum(p.nbytes for p in model.model.diffusion_model.parameters())
    monkeypatch.setattr(memory, "_BUDGET", max(allowed, 0.1))
    with memory.host_on_meta(), weights_on_device(model) as most:
        counted = memory.step(model, 20, 16, 8, "lowest")
    largest = max(p.nbytes for p in model.model.diffusion_model.parameters())
    in_ram = [p for p in model.model.diffusion_model.parameters() if p.device.type == "cpu"]
    assert in_ram and counted["weights"] <= allowed and (counted["weights"] > 0) is (share > 0)
    assert 0 < most() <= 1.01 * largest


def states(model):
    """Where each weight is, and what it holds."""
    return {
        path: (p.device, p.data_ptr(), p.detach().clone()) for path, p in model.model.diffusion_model.named_parameters()
    }


def failing_after(count, cast, error):
    """`cast`, but the call after so many raises an error."""
    calls = []

    def failing(*args, **kwargs):
        if len(calls) == count:
            raise error("injected")
        calls.append(args)
        return cast(*args, **kwargs)

    return failing


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt, RuntimeError])
def test_whatever_breaks_a_step_leaves_each_weight_where_and_as_it_was(comfy, partly, error):
    import comfy.ops

    setting = Setting("flux", torch.float32)
    model, cast, calls = setting.model, comfy.ops.cast_bias_weight, []
    with setting.session(True, 0):
        wanted = torch.cat([gradient.flatten() for gradient in setting.gradients(MIXED)])
    before = states(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.ops, "cast_bias_weight", lambda *a, **k: calls.append(1) or cast(*a, **k))
        with setting.session(True, 0):
            setting.gradients(MIXED)
    for moment in range(0, len(calls), 7):
        failing = failing_after(moment, cast, error)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(comfy.ops, "cast_bias_weight", failing)
            with pytest.raises(error), setting.session(True, 0):
                setting.gradients(MIXED)
        assert not [m for m in model.model.diffusion_model.modules() if "forward" in m.__dict__], moment
        for path, (device, pointer, values) in states(model).items():
            assert (device, pointer) == before[path][:2] and torch.equal(values, before[path][2]), (moment, path)
    with setting.session(True, 0):
        again = torch.cat([gradient.flatten() for gradient in setting.gradients(MIXED)])
    assert torch.equal(again, wanted)


@pytest.mark.parametrize("memory", ["auto", "lowest"])
def test_a_training_goes_on_with_streamed_weights_where_nothing_else_fits(base, partly, monkeypatch, memory):
    import comfy.model_management

    from tlora_core.hosts.comfy.training.personalize import Personalization

    def losses(memory):
        with torch.inference_mode():
            p = Personalization(*base, images(), request(3), memory=memory)
            p.train(3)
        return p, p.trainer.losses

    _, wanted = losses("low")
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *args, **kwargs: 1 << 20)
    p, got = losses(memory)
    assert str(p.fit) == "lowest" and p.fit.room > 0 and got == wanted
    weights = base[0].model_size()
    assert p.way[0] == "lowest" and 0.9 * weights < p.way[1] <= p.way[2] == weights


@pytest.mark.parametrize("is_dynamic, told", [(True, ("lowest", None)), (False, ("low", 0))])
def test_where_the_host_streams_by_itself_lowest_says_so(base, monkeypatch, is_dynamic, told):
    """On the CPU nothing is streamed."""
    from tlora_core.hosts.comfy.training.personalize import Personalization

    with torch.inference_mode():
        p = Personalization(*base, images(), request(1), memory="lowest")
        p.train(1)
    monkeypatch.setattr(base[0], "is_dynamic", lambda: is_dynamic, raising=False)
    assert p.way == (*told, base[0].model_size())


@pytest.mark.parametrize("memory", ["auto", "low"])
def test_the_page_is_told_how_memory_is_used(base, output, memory):
    from tlora_core.hosts.comfy.page.training import LiveRun

    run(base, request(2), memory=memory)
    way = LiveRun.states()[-1]["way"]
    assert way == {"memory": "fast" if memory == "auto" else "low", "in_ram": 0, "weights": base[0].model_size()}
