"""A T-LoRA together with other features of the host that affect a sampling. Each evaluation is compared with merged
weights."""

import host_models as models
import pytest
import sampling_runs as runs
import torch


@pytest.fixture
def evaluations(unet):
    yield runs.Evaluations(unet)
    assert models.is_untouched(unet)


class TestSamplers:
    def test_sigmas_that_go_back_up(self, evaluations, tlora):
        """As in restart samplers and chains of samplers."""
        runs.sample_sigmas(runs.apply(evaluations.model, tlora), *runs.texts(), [14.6, 4.0, 0.8, 6.0, 0.8, 9.0, 0.0])
        assert evaluations.sigmas == pytest.approx([14.6, 4.0, 0.8, 6.0, 0.8, 9.0])
        evaluations.assert_merged((tlora, 1.0))

    @pytest.mark.parametrize("sampler", ["dpmpp_sde", "dpm_adaptive", "heunpp2", "euler_ancestral"])
    def test_samplers_with_evaluations_in_between(self, evaluations, tlora, sampler):
        runs.sample(runs.apply(evaluations.model, tlora), *runs.texts(), sampler)
        evaluations.assert_merged((tlora, 1.0))

    def test_picture_to_picture(self, evaluations, tlora):
        latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(4))
        runs.sample(runs.apply(evaluations.model, tlora), *runs.texts(), steps=4, latent=latent, denoise=0.5)
        assert max(evaluations.sigmas) < 3
        evaluations.assert_merged((tlora, 1.0))

    def test_inpainting_with_a_mask(self, evaluations, tlora):
        latent, mask = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(4)), torch.zeros(1, 8, 8)
        mask[:, :, 4:] = 1
        out = runs.sample(runs.apply(evaluations.model, tlora), *runs.texts(), latent=latent, noise_mask=mask)
        evaluations.assert_merged((tlora, 1.0))
        assert torch.allclose(out[..., :4], latent[..., :4], atol=1e-5)

    def test_batch_of_pictures(self, evaluations, tlora):
        runs.sample(runs.apply(evaluations.model, tlora), *runs.texts(), latent=torch.zeros(3, 16, 8, 8))
        evaluations.assert_merged((tlora, 1.0))


class TestConditioning:
    def test_texts_that_start_and_end_midway(self, evaluations, tlora):
        """The input of the text's layers then changes from step to step, in number and in content."""
        early, late = models.conditioning(1), models.conditioning(4)
        early[0][1].update(start_percent=0.0, end_percent=0.5)
        late[0][1].update(start_percent=0.3, end_percent=1.0)
        runs.sample(runs.apply(evaluations.model, tlora), early + late, models.conditioning(2), steps=6)
        assert {len(call[0]) for call in evaluations.calls} == {2, 3}
        evaluations.assert_merged((tlora, 1.0))

    def test_without_guidance_the_negative_text_is_left_out(self, evaluations, tlora):
        import comfy.sample

        latent = torch.zeros(1, 16, 8, 8)
        with torch.inference_mode():
            comfy.sample.sample(
                runs.apply(evaluations.model, tlora),
                comfy.sample.prepare_noise(latent, 3),
                3,
                1.0,
                "euler",
                "normal",
                *runs.texts(),
                latent,
                disable_pbar=True,
                seed=3,
            )
        assert {len(call[0]) for call in evaluations.calls} == {1}
        evaluations.assert_merged((tlora, 1.0))

    def test_controlnet_for_part_of_the_way(self, evaluations, tlora, unet):
        positive = models.conditioning(1)
        control = models.random_controlnet().set_cond_hint(torch.rand(1, 3, 64, 64), 0.8, (0.0, 0.6))
        positive[0][1].update(control=control, control_apply_to_uncond=True)
        runs.sample(runs.apply(evaluations.model, tlora), positive, models.conditioning(2), steps=4)
        assert {bool(call[2][2]) for call in evaluations.calls} == {True, False}
        evaluations.assert_merged((tlora, 1.0))

    def test_context_windows(self, evaluations, tlora):
        import comfy.context_windows as windows

        model = runs.apply(evaluations.model, tlora)
        model.model_options["context_handler"] = windows.IndexListContextHandler(
            windows.get_matching_context_schedule(windows.ContextSchedules.STATIC_STANDARD),
            windows.get_matching_fuse_method(windows.ContextFuseMethods.PYRAMID),
            context_length=3,
            context_overlap=1,
            dim=0,
        )
        runs.sample(model, *runs.texts(), latent=torch.zeros(5, 16, 8, 8))
        assert len(evaluations.calls) > 3
        evaluations.assert_merged((tlora, 1.0))


class TestPatches:
    def test_attention_patch_that_gives_new_text(self, evaluations, tlora):
        model = evaluations.model
        model.set_model_attn2_patch(lambda q, k, v, options: (q, k * 1.1, v * 0.9))
        runs.sample(runs.apply(model, tlora), *runs.texts())
        evaluations.assert_merged((tlora, 1.0))

    def test_attention_patch_that_writes_into_the_text(self, evaluations, tlora):
        """The text's layers then get one and the same tensor throughout. The first layer finds it as in the last step;
        the other layers do not."""

        def write(q, k, v, options):
            return q, k if options["block"] == ("input", 1) else k.mul_(1 + options["sigmas"][0] / 100), v

        model = evaluations.model
        model.set_model_attn2_patch(write)
        runs.sample(runs.apply(model, tlora), *runs.texts())
        evaluations.assert_merged((tlora, 1.0))

    def test_attention_replaced(self, evaluations, tlora):
        """As IP-Adapter does: the layer's own keys and values, and further ones."""
        from comfy.ldm.modules.attention import optimized_attention

        def replacement(q, k, v, options):
            return optimized_attention(q, torch.cat([k, -k], 1), torch.cat([v, v * 0.5], 1), options["n_heads"])

        model = evaluations.model
        for block, number in (("input", 1), ("middle", 0), ("output", 0)):
            model.set_model_attn2_replace(replacement, block, number)
        runs.sample(runs.apply(model, tlora), *runs.texts())
        evaluations.assert_merged((tlora, 1.0))

    def test_hosts_freeu_and_perturbed_attention(self, evaluations, tlora):
        from comfy_extras.nodes_freelunch import FreeU_V2
        from comfy_extras.nodes_pag import PerturbedAttentionGuidance

        model = runs.apply(evaluations.model, tlora)
        model = FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2)[0]
        model = PerturbedAttentionGuidance.execute(model, 3.0)[0]
        runs.sample(model, *runs.texts())
        assert len(evaluations.calls) == 6  # each step, and again with attention perturbed
        evaluations.assert_merged((tlora, 1.0))

    def test_model_merge_before(self, unet, evaluations, tlora):
        """A merge afterwards is refused: test_weights.py."""
        from comfy_extras.nodes_model_merging import ModelMergeSimple

        model = runs.apply(ModelMergeSimple().merge(evaluations.model, models.random_unet(seed=3), 0.7)[0], tlora)
        runs.sample(model, *runs.texts())
        evaluations.assert_merged((tlora, 1.0))  # on the weights that the host has merged
        evaluations.calls.clear()
        runs.sample(runs.apply(evaluations.model, tlora), *runs.texts())
        evaluations.assert_merged((tlora, 1.0))

    def test_chain_of_clones_keeps_each_its_own(self, evaluations, tlora, unet):
        second = models.random_tlora(unet, 6, 1, seed=4, alpha=2.0)
        one = runs.apply(evaluations.model, tlora, 0.5)
        both = runs.apply(one.clone().clone(), second, -0.8).clone()
        for model, applied in (
            (both, [(tlora, 0.5), (second, -0.8)]),
            (one, [(tlora, 0.5)]),
            (evaluations.model, []),
            (both, [(tlora, 0.5), (second, -0.8)]),
        ):
            evaluations.calls.clear()
            runs.sample(model, *runs.texts())
            evaluations.assert_merged(*applied)

    def test_layer_that_a_node_has_replaced(self, evaluations, tlora, unet):
        """An object patch replaces a module that existed when the T-LoRA was applied."""
        path = next(iter(tlora.layers))
        model = runs.apply(evaluations.model, tlora)
        old = model.get_model_object(f"diffusion_model.{path}")
        new = torch.nn.Linear(old.in_features, old.out_features, bias=old.bias is not None).requires_grad_(False)
        model.add_object_patch(f"diffusion_model.{path}", new)
        runs.sample(model, *runs.texts())
        evaluations.assert_merged((tlora, 1.0))

    def test_layers_are_folded_again_after_a_lora_that_the_host_injects_beside_them(self, tlora, tmp_path, monkeypatch):
        """When it is removed, each layer keeps its own forward as an attribute, as if it were replaced."""
        import comfy.sd
        import comfy.utils

        from tlora_core.hosts.comfy.training.session import training_session

        unet = models.random_unet()
        models.random_tlora(unet, 4, 4, seed=9).save(tmp_path / "x.safetensors")
        bypassed = comfy.sd.load_bypass_lora_for_models(
            unet, None, comfy.utils.load_torch_file(str(tmp_path / "x.safetensors")), 1.0, 0
        )[0]
        wanted = runs.sample(runs.apply(unet, tlora), *runs.texts())
        runs.sample(bypassed, *runs.texts())
        ways = runs.Ways(monkeypatch)
        assert torch.equal(runs.sample(runs.apply(unet, tlora), *runs.texts()), wanted) and ways.used == {
            "weight",
            "output",
        }
        with training_session(unet):
            assert all(
                "Frozen" in repr(unet.get_model_object(f"diffusion_model.{path}").forward) for path in tlora.layers
            )


class TestHiddenTimestep:
    def test_sigma_that_is_not_a_number_stops_the_sampling(self, unet, tlora):
        from tlora_core import TLoRAError

        with pytest.raises(TLoRAError, match="NaN"):
            models.evaluate(runs.apply(unet, tlora), [float("nan")])
        assert models.is_untouched(unet)

    def test_distilled_models_count_in_the_timesteps_of_the_model_they_come_from(self, evaluations, tlora):
        """The host's LCM sampling has 50 of the 1000 sigmas in its table."""
        from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

        model = ModelSamplingDiscrete().patch(runs.apply(evaluations.model, tlora), "lcm", False)[0]
        sigmas = evaluations.sampling.sigmas[[999, 759, 499, 259, 19]]
        runs.sample_sigmas(model, *runs.texts(), [*sigmas.tolist(), 0.0], "lcm")
        assert len(evaluations.calls) == 5
        evaluations.assert_merged((tlora, 1.0))
