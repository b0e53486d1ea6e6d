"""Training pictures encoded by the host's own VAE, and the denoiser's use of them."""

import host_models as models
import pytest
import torch

DDCONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 64,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


@pytest.fixture(scope="module")
def vae(comfy):
    """SD's kind of VAE, whose posterior has a width; small, with random weights."""
    import comfy.sd

    torch.manual_seed(0)
    with torch.inference_mode():
        made = comfy.sd.VAE(sd={}, config={"params": {"ddconfig": DDCONFIG, "embed_dim": 4}})
        for parameter in made.first_stage_model.parameters():
            parameter.normal_(
                1.0 if parameter.ndim == 1 else 0.0, parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            )
    made.downscale_ratio = 2  # the host takes 8, as SD's own VAE has
    return made


def test_posterior_is_the_vaes_mean_and_deviation(vae):
    from tlora_core.hosts.comfy.training.encode import posterior

    pixels = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        mean, deviation = posterior(vae, pixels)
        moments = vae.first_stage_model.quant_conv(vae.first_stage_model.encoder(pixels.movedim(-1, 1) * 2 - 1))
        torch.testing.assert_close(mean, vae.encode(pixels)[0])
    wanted_mean, log_variance = moments.float()[0].chunk(2)
    torch.testing.assert_close(mean, wanted_mean)
    torch.testing.assert_close(deviation, torch.exp(log_variance / 2))
    assert not vae.first_stage_model.regularization._forward_hooks


def test_no_deviation_where_the_host_encodes_in_tiles(vae, monkeypatch):
    import comfy.model_management

    from tlora_core.hosts.comfy.training.encode import posterior

    encode, calls = vae.first_stage_model.encode, []

    def short_of_memory(pixels):
        calls.append(pixels)
        if len(calls) == 1:
            raise comfy.model_management.OOM_EXCEPTION("Allocation on device")
        return encode(pixels)

    monkeypatch.setattr(vae.first_stage_model, "encode", short_of_memory)
    with torch.inference_mode():
        mean, deviation = posterior(vae, torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1)))
    assert len(calls) > 2 and mean.isfinite().all() and deviation is None


def test_sdxl_receives_the_original_size_and_the_crop(vae):
    """Under the names of the host's CLIPTextEncodeSDXL, which BaseModel.encode_adm reads."""
    from tlora_core.hosts.comfy.training.encode import Encoder
    from tlora_core.training.dataset import Framed

    class Clip:
        tokenize = staticmethod(lambda text: text)

        def encode_from_tokens_scheduled(self, tokens):
            return [[torch.zeros(1, 1, 4), {"pooled_output": tokens}]]

    picture = Framed(torch.zeros(64, 96, 3), None, original=(1200, 700), crop=(40, 8))
    ((text, told),) = Encoder(Clip(), vae, told={"guidance": 1.0}).conditioning(picture, "a photo of a sks dog")
    assert text.shape == (1, 1, 4) and told == {
        "pooled_output": "a photo of a sks dog",
        "guidance": 1.0,
        "width": 1200,
        "height": 700,
        "crop_w": 40,
        "crop_h": 8,
        "target_width": 96,
        "target_height": 64,
    }
    ((_, told),) = Encoder(Clip(), vae).conditioning(picture, "a photo of a sks dog")
    assert "guidance" not in told, "Chroma and others, which ask for one too, have another by default"


def sample(mean, **changes):
    from tlora_core.hosts.comfy.training.encode import Sample

    return Sample(
        **{"mean": mean, "deviation": None, "weights": None, "conditioning": models.conditioning(), **changes}
    )


def denoiser(model, samples, **config):
    from tlora_core import Adapters, RankSchedule
    from tlora_core.hosts.comfy.training.denoiser import HostDenoiser
    from tlora_core.training.config import TrainConfig

    return HostDenoiser(model, Adapters({}), RankSchedule(4, 2), samples, TrainConfig(**config))


@pytest.fixture(scope="module")
def model(comfy):
    return models.random_unet()


def test_fresh_latents_have_the_posteriors_mean_and_width(model):
    mean, deviation = torch.randn(16, 8, 8), torch.rand(16, 8, 8) + 0.1
    one = sample(mean, deviation=deviation)
    generator = torch.Generator().manual_seed(0)
    fresh = denoiser(model, [one])
    drawn = torch.stack([fresh._latent(one, generator) for _ in range(2000)])
    wanted = model.model.process_latent_in(mean[None])[0]
    width = model.model.process_latent_in(mean[None] + deviation)[0] - wanted
    assert (drawn.mean(0) - wanted).abs().max() < 0.15 * width.max()
    assert (drawn.std(0) / width).mean() == pytest.approx(1, abs=0.02)
    fixed = denoiser(model, [one], fresh_latents=False)
    assert torch.equal(fixed._latent(one, generator), wanted)


def test_loss_counts_inside_the_mask_only(model, monkeypatch):
    from tlora_core.hosts.comfy.training.denoiser import HostDenoiser

    weights = torch.zeros(8, 8)
    weights[:4] = 2.0
    error = torch.zeros(2, 16, 8, 8)
    error[0, :, 4:] = 100.0
    error[1] = 3.0
    monkeypatch.setattr(HostDenoiser, "output_error", lambda *args: error)
    samples = [sample(torch.zeros(16, 8, 8), weights=weights), sample(torch.zeros(16, 8, 8))]
    (loss,) = denoiser(model, samples).losses([0, 1], torch.Generator())
    assert loss.item() == pytest.approx((0 + 9) / 2)


def test_min_snr_weighs_each_sample_by_its_own_sigma(model, monkeypatch):
    from tlora_core.hosts.comfy.training import denoiser as module

    sigmas = torch.tensor([0.1, 0.5, 2.0])
    monkeypatch.setattr(module.HostDenoiser, "output_error", lambda self, s, latents, *args: torch.ones_like(latents))
    monkeypatch.setattr(module, "draw_sigmas", lambda *args: sigmas)
    samples = [sample(torch.zeros(16, 8, 8))] * 3
    (loss,) = denoiser(model, samples, min_snr_gamma=5.0).losses([0, 1, 2], torch.Generator())
    snr = sigmas**-2
    assert loss.item() == pytest.approx((snr.clamp(max=5.0) / snr).mean().item())


def test_timesteps_follow_interval_and_density(comfy):
    import comfy.model_sampling as ms

    from tlora_core import TLoRAError
    from tlora_core.hosts.comfy.model.noise import draw_sigmas, min_snr_weight

    class Discrete(ms.ModelSamplingDiscrete, ms.EPS):
        pass

    class Flow(ms.ModelSamplingFlux, ms.CONST):
        pass

    generator = torch.Generator().manual_seed(0)
    discrete, flow = Discrete(), Flow()
    drawn = discrete.timestep(draw_sigmas(discrete, 4000, generator, "uniform", 0.25, 0.5))
    assert 250 <= drawn.min() < 260 and 490 < drawn.max() <= 499
    assert discrete.timestep(draw_sigmas(discrete, 4000, generator)).float().mean() == pytest.approx(500, abs=20)
    uniform, normal, mode = (draw_sigmas(flow, 4000, generator, name) for name in ("uniform", "logit_normal", "mode"))
    assert uniform.std() > mode.std() > 0.2 > 0.21 - 0.02 and normal.std() == pytest.approx(0.2, abs=0.02)
    part = draw_sigmas(flow, 1000, generator, "logit_normal", 0.5, 1.0)
    assert 0.5 <= part.min() and part.max() <= 1.0 and part.mean() == pytest.approx(0.75, abs=0.02)
    with pytest.raises(TLoRAError, match="timestep_density"):
        draw_sigmas(discrete, 1, generator, "mode")
    with pytest.raises(TLoRAError, match="min_snr_gamma"):
        min_snr_weight(flow, torch.ones(1), 5.0)


def test_pictures_meet_in_a_batch_only_where_their_texts_are_as_long(comfy):
    from tlora_core.hosts.comfy.training.encode import buckets

    def text(tokens):
        return [[torch.zeros(1, tokens, 8), {}]]

    square, wide = torch.zeros(4, 8, 8), torch.zeros(4, 8, 12)
    made = [
        sample(square, conditioning=text(23)),
        sample(square, conditioning=text(27)),
        sample(wide, conditioning=text(23)),
        sample(square, conditioning=text(23)),
    ]
    assert buckets(made) == [[0, 3], [1], [2]]
