"""A T-LoRA on weights that the host casts, quantises, streams, compiles or copies to another device."""

import host_models as models
import pytest
import sampling_runs as runs
import torch


@pytest.fixture(scope="module")
def flux(comfy):
    """(MODEL, T-LoRA, texts) of a model with few layers."""
    import random_models

    model = random_models.small("flux")
    tlora = random_models.random_tlora(model, runs.RANK, runs.MIN_RANK, size=0.3, split=("qkv", "linear1"))
    return model, tlora, tuple(random_models.conditioning(model, 6, seed) for seed in (1, 2))


class TestCompiled:
    """With a backend that compiles nothing, but counts its calls."""

    @pytest.fixture
    def counter(self):
        import torch._dynamo.testing

        torch._dynamo.reset()
        yield torch._dynamo.testing.CompileCounter()
        torch._dynamo.reset()

    @pytest.mark.parametrize(
        "part,first", [("diffusion_model", "tlora"), ("diffusion_model.double_blocks.0", "compile")]
    )
    def test_every_evaluation_has_its_rank_and_none_compiles_again(
        self, flux, counter, part, first, monkeypatch, recwarn
    ):
        import comfy.model_management
        from comfy_api.torch_helpers import set_torch_compile_wrapper
        from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

        def compiled(model):
            """As the host's node TorchCompileModel does it."""
            model = model.clone()
            set_torch_compile_wrapper(model, counter, {"guard_filter_fn": skip_torch_compile_dict}, keys=[part])
            return model

        # The host's own attention compiles anew when other programs change how much memory is free.
        free = 1 << 34
        monkeypatch.setattr(
            comfy.model_management,
            "get_free_memory",
            lambda device=None, torch_free_too=False: (free, free) if torch_free_too else free,
        )
        model, tlora, texts = flux
        recorded, graphs = runs.Evaluations(model), []
        both = (
            runs.apply(compiled(recorded.model), tlora)
            if first == "compile"
            else compiled(runs.apply(recorded.model, tlora))
        )
        runs.sample(both, *texts, steps=5, callback=lambda *args: graphs.append(counter.frame_count))
        assert 0 < graphs[1] == graphs[-1]  # some versions of the host compile again for the second step themselves
        recorded.assert_merged((tlora, 1.0))
        assert not [str(each.message) for each in recwarn if "Dynamo" in str(each.message)]


class TestStoredSmaller:
    """The same model with weights of eight or sixteen bits, and with the values of those weights in float32."""

    @pytest.mark.parametrize("storage, way", [(torch.float8_e4m3fn, "product"), (torch.float16, "weight")])
    def test_and_cast_by_the_host(self, family, storage, way, monkeypatch):
        import random_models

        stored, worth = random_models.small(family, storage=storage), random_models.small(family)
        worth.model.diffusion_model.load_state_dict(
            {k: v.float() for k, v in stored.model.diffusion_model.state_dict().items()}
        )
        self.assert_same(stored, worth, monkeypatch, way)

    def test_quantised_by_layer(self, family, monkeypatch):
        """Layers of a class of the host's own, with a scale each."""
        import random_models

        worth = random_models.small(family)
        weights = random_models.quantise(worth)
        with torch.inference_mode():  # as in the host, where the layers cannot leave it again
            stored = random_models.small(family, quantised=weights)
        assert not isinstance(next(iter(random_models.attention_layers(stored).values())), torch.nn.Linear)
        self.assert_same(stored, worth, monkeypatch)

    @pytest.fixture(params=["flux", "sd15"])
    def family(self, request, comfy):
        return request.param

    def assert_same(self, stored, worth, monkeypatch, way="product"):
        import random_models

        tlora = random_models.random_tlora(worth, runs.RANK, runs.MIN_RANK, size=0.3)
        texts = [random_models.conditioning(worth, 6, seed) for seed in (1, 2)]
        ways, empty = runs.Ways(monkeypatch), random_models.latent(worth)
        got = runs.sample(runs.apply(stored, tlora), *texts, latent=empty)
        assert ways.used == {way} | ({"output"} if "context_dim" in worth.model.model_config.unet_config else set())
        assert models.relative_error(got, runs.sample(runs.apply(worth, tlora), *texts, latent=empty)) < 1e-5
        assert models.relative_error(got, runs.sample(stored, *texts, latent=empty)) > 1e-3


class TestLittleMemory:
    """Some or all weights are moved off by the host, with another LoRA's patches to be added when they are fetched."""

    @pytest.fixture
    def patched(self, unet, tmp_path):
        import comfy.sd
        import comfy.utils

        models.random_tlora(unet, 4, 4, seed=9).save(tmp_path / "x.safetensors")
        weights = comfy.utils.load_torch_file(str(tmp_path / "x.safetensors"))
        return comfy.sd.load_lora_for_models(unet, None, weights, 1.0, 0)[0]

    def unload(self, model, megabytes):
        model.partially_unload(torch.device("cpu"), megabytes * 2**20)
        assert any(getattr(m, "weight_function", None) for m in model.model.diffusion_model.modules())

    @pytest.mark.parametrize("megabytes", [3, 1000])
    def test_before_the_sampling(self, patched, tlora, megabytes, monkeypatch):
        wanted = runs.sample(runs.apply(patched, tlora), *runs.texts())
        streamed, ways = runs.apply(patched, tlora), runs.Ways(monkeypatch)
        streamed.add_callback("on_pre_run", lambda model: self.unload(model, megabytes))
        got = runs.sample(streamed, *runs.texts())
        assert ways.used == {"weight", "output"}
        assert models.relative_error(got, wanted) < 1e-5

    def test_copies_are_kept_where_there_is_room_for_all_of_the_model_beside_them(self, comfy, monkeypatch):
        import comfy.model_management
        import random_models

        from tlora_core.hosts.comfy.model.layers import bytes_to_come
        from tlora_core.hosts.comfy.sampling import Folds

        model = random_models.flux(256, (1, 1), 64, 32, dtype=torch.float16)
        texts = [random_models.conditioning(model, 6, seed) for seed in (1, 2)]
        tlora = random_models.random_tlora(model, runs.RANK, runs.MIN_RANK)
        wanted = runs.sample(runs.apply(model, tlora), *texts)
        copies = sum(layer.weight.nbytes for layer in random_models.attention_layers(model).values())
        to_come, kept = [], []

        def unload(model):
            model.partially_unload(torch.device("cpu"), 1e9)
            to_come.append(bytes_to_come(model))

        def look(*_):
            kept.append(sum(fold.weight is not None for fold in Folds.of(model.model).layers.values()))

        monkeypatch.setattr(model.model, "memory_required", lambda *args, **kwargs: 0)
        for enough, count in ((1, len(tlora.layers)), (0, 0)):
            streamed = runs.apply(model, tlora)
            streamed.add_callback("on_pre_run", unload)

            def free(device=None, torch_free_too=False, enough=enough):
                number = copies + (to_come[-1] if to_come else 0) + enough
                return (number, number) if torch_free_too else number

            monkeypatch.setattr(comfy.model_management, "get_free_memory", free)
            got = runs.sample(streamed, *texts, callback=look)
            assert kept[-1] == count and to_come[-1] > 2 * copies
            assert models.relative_error(got, wanted) < 1e-3

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_model_that_is_moved_in_as_it_is_used_gives_the_same_picture(self, comfy, dtype):
        import random_models

        model = random_models.flux(256, (1, 1), 64, 32, dtype=dtype)
        texts = [random_models.conditioning(model, 6, seed) for seed in (1, 2)]
        tlora = random_models.random_tlora(model, runs.RANK, runs.MIN_RANK, split=("qkv", "linear1"))
        wanted = runs.sample(runs.apply(model, tlora), *texts)
        streamed = runs.apply(model, tlora)
        streamed.add_callback("on_pre_run", lambda model: model.partially_unload(torch.device("cpu"), 1e9))
        assert torch.equal(runs.sample(streamed, *texts), wanted)

    def test_in_the_middle_of_it(self, patched, tlora):
        """As when a node loads another model during the sampling."""
        wanted = runs.sample(runs.apply(patched, tlora), *runs.texts(), steps=4)
        model = runs.apply(patched, tlora)
        got = runs.sample(
            model, *runs.texts(), steps=4, callback=lambda i, *_: self.unload(model, 1000) if i == 1 else None
        )
        assert models.relative_error(got, wanted) < 1e-5


class TestSeveralDevices:
    """Set up like the host's MultiGPU node, with two names of the CPU as devices."""

    def test_each_conditioning_on_its_own_copy(self, comfy, tlora):
        unet = models.random_unet()
        if not hasattr(unet, "deepclone_multigpu"):
            pytest.skip("This ComfyUI has no multi-GPU sampling.")
        unet.cached_patcher_init = (models.random_unet, ())
        recorded = runs.Evaluations(unet)
        model = runs.apply(recorded.model, tlora)
        copy = model.deepclone_multigpu(torch.device("cpu", 0))
        copy.is_multigpu_base_clone = True
        model.set_additional_models("multigpu", [copy])
        runs.sample(model, *runs.texts())
        assert [len(call[0]) for call in recorded.calls] == [1] * 6
        recorded.assert_merged((tlora, 1.0))
        assert models.is_untouched(unet) and models.is_untouched(copy)
