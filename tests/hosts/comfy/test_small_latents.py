"""Models that cannot be evaluated on latents as small as those of the measurements before a training."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trial(comfy):
    """PixArt, which divides by its size in steps of 64 cells: 0 up to 32."""
    from family_checks import Trial

    return Trial("pixart-sigma")


def test_a_training_measures_on_larger_ones_then(trial):
    from family_checks import personalization

    with torch.inference_mode():
        training = personalization(trial, "auto", cells=40, method="tlora")
        training.train(1)
    assert len(training.trainer.losses) == 1 and training.fit is not None


def test_pictures_below_that_size_are_refused_with_what_to_do(trial):
    from family_checks import personalization

    from tlora_core import TLoRAError

    with pytest.raises(TLoRAError, match="PixArtMS in step 1 .*; raise resolution; "):
        personalization(trial, "auto", cells=24, method="tlora")


class TestAtSmallest:
    @pytest.fixture
    def failing(self, comfy):
        def fail(error, below):
            def run(side):
                tried.append(side)
                if side < below:
                    raise error
                return side * 10

            tried = []
            return run, tried

        return fail

    def test_the_first_side_that_works_is_taken(self, failing):
        from tlora_core.hosts.comfy.training.failure import at_smallest

        for below, expected, sides in ((0, 160, [16]), (32, 320, [16, 32]), (40, 640, [16, 32, 64])):
            run, tried = failing(IndexError("no patch"), below)
            assert at_smallest((16, 32, 64), run) == expected and tried == sides

    def test_the_error_at_the_last_side_is_raised(self, failing):
        from tlora_core.hosts.comfy.training.failure import at_smallest

        run, tried = failing(IndexError("no patch"), 100)
        with pytest.raises(IndexError, match="no patch"):
            at_smallest((16, 32), run)
        assert tried == [16, 32]

    @pytest.mark.parametrize("kind", ["memory", "cancel", "sentence"])
    def test_what_another_size_does_not_change_is_raised_at_once(self, failing, kind):
        from comfy.model_management import InterruptProcessingException

        from tlora_core import TLoRAError
        from tlora_core.hosts.comfy.training.failure import at_smallest

        errors = {
            "memory": torch.OutOfMemoryError("none left"),
            "cancel": InterruptProcessingException(),
            "sentence": TLoRAError("Connect another."),
        }
        run, tried = failing(errors[kind], 100)
        with pytest.raises(type(errors[kind])):
            at_smallest((16, 32), run)
        assert tried == [16]


def test_a_mean_flow_model_is_told_the_same_sigma_as_the_next_for_each_sample(comfy):
    """To the same sigma, its mean flow is the flow that the loss compares with. In a batch, the host would look up one
    next sigma for all."""
    from comfy.ldm.flux.layers import timestep_embedding
    from gradients import Setting

    setting = Setting("hunyuan-image21-distilled")
    network, told = setting.model.model.diffusion_model, []
    hook = network.time_r_in.register_forward_pre_hook(lambda module, args: told.append(args[0]))
    sigmas = torch.tensor([0.25, 0.75])
    try:
        with setting.session(), torch.no_grad():
            denoiser, latents, noise = setting.denoiser, setting.latents, setting.noise
            both = denoiser.output_error(denoiser.samples, latents, noise, sigmas)
            each = [
                denoiser.output_error([sample], latents[i : i + 1], noise[i : i + 1], sigmas[i : i + 1])
                for i, sample in enumerate(denoiser.samples)
            ]
    finally:
        hook.remove()
    assert torch.equal(both, torch.cat(each)) and len(told) == 4
    for given, sigma in zip(told, sigmas.repeat(2)):
        expected = timestep_embedding(sigma.reshape(1).double(), 256, time_factor=1000.0)
        torch.testing.assert_close(given.double(), expected.double(), rtol=1e-4, atol=1e-4)
