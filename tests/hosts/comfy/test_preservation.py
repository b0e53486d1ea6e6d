"""Output preservation: the model's own prediction for the class, without the token, stays as it was."""

import numpy as np
import pytest
import torch
from training_runs import images, request, run

from tlora_core import TLoRAError
from tlora_core.tiny import world

ON = {"preservation_weight": 1.0}


def personalization(base, asked, pictures=None, memory="fast"):
    from tlora_core.hosts.comfy.training.personalize import Personalization

    with torch.inference_mode():
        return Personalization(*base, pictures or images(), asked, memory=memory)


@pytest.fixture
def evaluations(monkeypatch):
    """(whether adapters are on, whether autograd records) of each evaluation in training."""
    from tlora_core.hosts.comfy.training.denoiser import TrainingPatch

    seen, evaluation = [], TrainingPatch.evaluation

    def noting(patch, *args):
        found = evaluation(patch, *args)
        seen.append((bool(found[0]), torch.is_grad_enabled()))
        return found

    monkeypatch.setattr(TrainingPatch, "evaluation", noting)
    return seen


def test_a_step_has_two_more_evaluations_and_one_of_them_is_bare_and_not_recorded(base, evaluations):
    for config, expected in (({}, [(True, True)]), (ON, [(True, True), (False, False), (True, True)])):
        trained = personalization(base, request(2, config=config))
        evaluations.clear()  # of which some find the layers
        trained.train(2)
        assert evaluations == expected * 2


def test_it_is_nothing_at_the_start_and_draws_nothing_of_its_own(base):
    losses = []
    for config in ({}, ON, {"preservation_weight": 1e-12}):
        trained = personalization(base, request(6, config={**config, "batch_size": 2}), images(2))
        trained.train(6)
        losses.append(trained.trainer.losses)
    without, preserved, barely = losses
    assert preserved[0] == without[0] and preserved[1:] != without[1:]
    assert barely == pytest.approx(without, rel=1e-5)


def test_the_bare_prediction_is_that_of_the_model_alone(comfy):
    from gradients import MIXED, ClassSetting

    from tlora_core.hosts.comfy.training.session import training_session

    setting = ClassSetting("sdxl", torch.float32)
    with setting.session(), torch.no_grad():
        denoiser, drawn = setting.denoiser, setting.drawn(MIXED)
        of_class = [denoiser.of_class[sample] for sample in denoiser.samples]
        bare = denoiser.output_error(of_class, *drawn, is_bare=True)
        assert not torch.equal(bare, denoiser.output_error(of_class, *drawn))
        moved = denoiser.output_error(of_class, *drawn) - bare
        torch.testing.assert_close(setting.loss(MIXED), moved.square().mean())
    with torch.no_grad():
        for parameter in setting.parameters:
            parameter.add_(1.0)
    with training_session(setting.model), torch.no_grad():
        setting.denoiser.patch._placed = None
        assert torch.equal(setting.denoiser.output_error(of_class, *drawn, is_bare=True), bare)


@pytest.mark.parametrize("family", ["sdxl", "flux", "wan"])
def test_gradients_are_those_of_finite_differences(comfy, family):
    """Also where blocks are computed again in the backward pass, after an evaluation without adapters."""
    from gradients import MIXED, ClassSetting, slope

    setting = ClassSetting(family)
    names = list(setting.adapters)
    with setting.session():
        plain = [gradient.clone() for gradient in setting.gradients(MIXED)]
        for name in (names[0], names[len(names) // 2]):
            said, done = slope(setting, name, MIXED)
            assert said == pytest.approx(done, rel=3e-3), name
    with setting.session(checkpointing=True):
        for one, other in zip(plain, setting.gradients(MIXED)):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_pictures_of_the_class_stay_nearer_to_the_models_own(base, monkeypatch):
    """Nearer than without it, and by more than the subject's are: learning less would do that too."""
    from tlora_core.hosts.comfy.sampling import apply_tlora
    from tlora_core.training.dataset import training_images

    monkeypatch.setattr("tlora_core.hosts.comfy.draw.STEPS", 12)
    concept = world.CONCEPTS[2]
    prompts = [f"a photo of a sks {concept.shape}", f"a photo of a {concept.shape}"]
    scene = torch.from_numpy(world.render(world.concept_scenes(concept, 1, np.random.default_rng(0))))
    own = [drawn(base[0], base, prompt) for prompt in prompts]
    moved = []
    for weight in (0.0, 4.0):
        asked = request(60, 3e-3, rank=16, min_rank=8, class_word=concept.shape, config={"preservation_weight": weight})
        trained = personalization(base, asked, training_images(scene, "a photo of a {}"))
        trained.train(60)
        with torch.inference_mode():
            model = apply_tlora(base[0], trained.tlora())
        moved.append([float((drawn(model, base, p) - o).abs().mean()) for p, o in zip(prompts, own)])
    (subject, of_class), (preserved_subject, preserved_class) = moved
    assert preserved_class < 0.75 * of_class and preserved_class / preserved_subject < 0.9 * of_class / subject


def drawn(model, base, prompt):
    """Two pictures of the prompt."""
    from tlora_core.hosts.comfy.draw import draw

    with torch.inference_mode():
        return draw(model, *base[1:], [prompt], 64, range(2))[0]


def test_mask_min_snr_mirrored_and_captions_of_several_lengths_train_together(base, output):
    from tlora_core.training.dataset import training_images

    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(48, 96)
    mask[10:30, 30:60] = 1
    wide = torch.rand(2, 48, 96, 3, generator=generator)
    pictures = [
        *training_images(wide, "{token} left\nsks heart, and one sks more", mask),
        *training_images(torch.rand(1, 90, 40, 3, generator=generator)),
    ]
    config = {**ON, "batch_size": 2, "min_snr_gamma": 5.0}
    done = run(base, request(4, framing="keep aspect ratio", flip=True, config=config), pictures=pictures)
    assert len(done.losses) == 4 and done.tlora.training["preservation_weight"] == 1.0


@pytest.mark.parametrize("memory", ["low", "lowest"])
def test_memory_changes_no_loss(base, memory):
    losses = []
    for each in ("fast", memory):
        trained = personalization(base, request(4, config=ON), memory=each)
        trained.train(4)
        losses.append(trained.trainer.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_captions_of_one_batch_have_one_length_with_the_token_and_without(comfy):
    from tlora_core.hosts.comfy.training.encode import Sample, buckets

    def text(length):
        return [[torch.zeros(1, length, 4), {}]]

    latent = torch.zeros(4, 8, 8)
    lengths = ((7, 5), (7, 6), (7, 5), (6, 5))
    assert buckets([Sample(latent, None, None, text(a), text(b)) for a, b in lengths]) == [[0, 2], [1], [3]]
    assert buckets([Sample(latent, None, None, text(a)) for a, _ in lengths]) == [[0, 1, 2], [3]]


def test_each_caption_is_encoded_once_with_the_token_and_once_without(base, monkeypatch):
    encoded, encode = [], base[1].encode_from_tokens_scheduled
    monkeypatch.setattr(
        base[1], "encode_from_tokens_scheduled", lambda tokens: (encoded.append(tokens), encode(tokens))[1]
    )
    personalization(base, request(1, flip=True, config=ON), images(2))
    assert len(encoded) == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"config": {**ON, "prior_weight": 1.0}}, "^prior_weight and preservation_weight are both on"),
        ({"class_word": "", "config": ON}, "^class_word is empty, but preservation_weight"),
        ({"token": "", "config": ON}, "^token is empty, but preservation_weight"),
        ({"config": {"preservation_weight": -1.0}}, "^preservation_weight is -1.0; set it to 0 or more"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(comfy, changes, message):
    with pytest.raises(TLoRAError, match=message):
        request(1, **changes)


def test_a_caption_without_the_token_is_refused_by_name(base):
    from tlora_core.training.dataset import training_images

    pictures = training_images(torch.rand(2, 64, 64, 3), "a photo of {token} {class_word}\na heart on snow")
    with pytest.raises(TLoRAError, match='^captions has "a heart on snow" without the token'):
        personalization(base, request(1, config=ON), pictures)


def test_a_run_without_it_is_known_by_the_hash_that_it_had_before(comfy):
    from dataclasses import asdict

    from tlora_core.hosts.comfy.training.fingerprint import fingerprint
    from tlora_core.training.config import TrainConfig

    before = {name: value for name, value in asdict(TrainConfig()).items() if name != "preservation_weight"}
    assert fingerprint(TrainConfig()) == fingerprint(before)
    assert fingerprint(TrainConfig(**ON)) == fingerprint({**before, **ON})
