"""Optional parts of a training run on the tiny base: prior, several pictures, curves, other methods."""

import pytest
import torch
from training_runs import images, request, run


def test_prior_is_drawn_by_the_model_or_given(base, output):
    alone = run(base, request(2, config={"prior_weight": 1.0, "prior_count": 2}))
    given = run(base, request(2, config={"prior_weight": 1.0}), prior=images(2))
    without = run(base, request(2), file_name="run/without")
    assert len({tuple(x.losses) for x in (alone, given, without)}) == 3
    assert alone.losses[0] > without.losses[0] and given.losses[0] > without.losses[0]


def test_pictures_of_several_shapes_masks_and_captions_train_together(base, output):
    from tlora_core.training.dataset import training_images

    generator = torch.Generator().manual_seed(1)
    wide, tall = torch.rand(2, 48, 96, 3, generator=generator), torch.rand(1, 90, 40, 3, generator=generator)
    mask = torch.zeros(48, 96)
    mask[10:30, 30:60] = 1
    pictures = [*training_images(wide, "{token} left\n{token} right", mask), *training_images(tall)]
    done = run(base, request(6, framing="keep aspect ratio", flip=True, config={"batch_size": 2}), pictures=pictures)
    assert len(done.losses) == 6 and done.tlora.training["images"] == 3


def test_training_uses_the_curve_and_the_file_stores_it(base, output):
    done = run(base, request(2, curve="0:4, 0.5:4, 1:1"))
    assert done.tlora.schedule.points == ((0.0, 4), (0.5, 4), (1.0, 1)) and done.tlora.schedule.min_rank == 1


def test_methods_without_a_mask_need_no_min_rank(comfy):
    from tlora_core.hosts.comfy.training.personalize import TrainRequest

    assert [TrainRequest("sks", "dog", method=method, rank=8).schedule.min_rank for method in ("lora", "oft")] == [8, 8]


@pytest.mark.parametrize("method", ["tlora", "svdiff"])
def test_what_decomposes_weights_has_one_of_them_at_a_time_in_float32(base, monkeypatch, method):
    import weakref

    from tlora_core.hosts.comfy.model.families import TargetLayer
    from tlora_core.hosts.comfy.training.personalize import Personalization

    made, most, weight = [], [], TargetLayer.weight.fget

    def counted(layer):
        copy = weight(layer).clone()  # as it is of a model in half precision
        made.append(weakref.ref(copy))
        most.append(sum(known() is not None for known in made))
        return copy

    monkeypatch.setattr(TargetLayer, "weight", property(counted))
    with torch.inference_mode():
        p = Personalization(*base, images(), request(method=method, start="principal_weight"))
    assert len(made) == len(p.adapters) > 9 and max(most) <= 3


def test_adamw_learns_the_same_with_a_state_in_8_bits(base):
    from tlora_core.hosts.comfy.training.personalize import Personalization

    learnt = []
    for optimizer in ("adamw", "adamw8bit"):
        asked = request(60, rate=1e-3, config={"optimizer": optimizer})
        with torch.inference_mode():
            trained = Personalization(*base, images(), asked, memory="fast")
            trained.train(60)
            layers = trained.tlora().layers.values()
        learnt.append((sum(trained.trainer.losses[-30:]), torch.cat([(x.up @ x.down).flatten() for x in layers])))
    (loss, update), (other_loss, other_update) = learnt
    assert other_loss == pytest.approx(loss, rel=0.03)
    assert (update - other_update).norm() < 0.2 * update.norm()


@pytest.mark.parametrize("method, rank", [("oft", 4), ("gsoft", 4), ("svdiff", 1)])
def test_baselines_train_save_and_draw_by_the_same_code(base, output, method, rank):
    from tlora_core.hosts.comfy.draw import draw
    from tlora_core.hosts.comfy.sampling import apply_tlora
    from tlora_core.hosts.comfy.training.personalize import Personalization

    asked = request(6, method=method, rank=rank, min_rank=rank)
    with torch.inference_mode():
        p = Personalization(*base, images(), asked)
        p.train(6)
        [drawn] = p.draw(p.tlora(), ["a photo of sks heart"], [0])
        tlora = p.tlora()
        tlora.save(output / "loras" / "baseline.safetensors")
        from tlora_core import TLoRAFile

        stored = TLoRAFile.load(output / "loras" / "baseline.safetensors")
        [again] = draw(apply_tlora(base[0], stored), base[1], base[2], ["a photo of sks heart"], 64, [0])
        [bare] = draw(*base, ["a photo of sks heart"], 64, [0])
    assert stored.schedule.is_constant and (drawn - bare).abs().max() > 0.01
    assert (drawn - again).abs().max() < 1e-3
