"""The pictures that a run draws for its scores: which, how, and where they and the scores are shown and kept."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from scored_runs import drawn_at_once, scored_by
from training_runs import PROMPTS, folders, images, request, run, same

NEUTRAL = "a photo of sks heart"
SCORED = {"scorer": "table", "validate_every": 2}


@pytest.fixture
def table(base, monkeypatch):
    return scored_by(monkeypatch, {2: 0.3, 4: 0.6, 6: 0.5})


def test_a_seed_gives_one_picture_alone_and_beside_others(base):
    from tlora_core.hosts.comfy.draw import draw

    model, clip, vae = base
    with torch.inference_mode():
        together = draw(model, clip, vae, ["a red heart", "a star"], 64, [0, 1, 2])
        alone = draw(model, clip, vae, ["a star"], 64, [1])
    assert [tuple(batch.shape) for batch in together] == [(3, 128, 128, 3)] * 2
    assert torch.allclose(together[1][1], alone[0][0], atol=1e-3)
    assert (together[1][1] - together[1][2]).abs().mean() > 0.02


def test_scores_have_a_batch_of_each_prompt_and_change_nothing(base, output, table, monkeypatch):
    from tlora_core.hosts.comfy.page.training import LiveRun
    from tlora_core.hosts.comfy.training.personalize import Personalization

    asked, draw = [], Personalization.draw
    monkeypatch.setattr(Personalization, "draw", lambda self, *what: (asked.append(what[1:]), draw(self, *what))[1])
    plain = run(base, request(3), rerun="restart")
    done = run(base, request(3), rerun="restart", validation_prompts=PROMPTS[:1], **{**SCORED, "validate_every": 2})
    assert done.losses == plain.losses and same(done.tlora, plain.tlora)
    prompts = [NEUTRAL, "a photo of sks heart on snow"]
    assert asked == [(prompts, range(2))] * 3  # of steps 0, 2 and 3
    # All in the run's folder; the first of each prompt on the page, with its scores.
    sheet = Image.open(folders(output)[-1] / "validation" / "step_000002.png").convert("RGB")
    # The longer caption takes two lines.
    assert sheet.width == 256 and 256 + 2 * 11 < sheet.height < 256 + 4 * 11
    assert json.loads(sheet.info["tlora_prompts"]) == prompts
    live = LiveRun.find(LiveRun.states()[-1]["id"])
    assert live is not None
    bare, shown, _ = live.state()["pictures"]
    assert shown["captions"] == tuple(prompts) and (bare["step"], shown["step"]) == (0, 2)
    assert shown["scores"] == (
        {"likeness": 0.3, "obedience": 0.5, "copying": None},
        {"likeness": None, "obedience": 0.25, "copying": 0.02},
    )
    first = live.picture(shown["index"])
    page = Image.open(io.BytesIO(first.content if first else b"")).convert("RGB")
    assert page.tobytes() == sheet.crop((0, 0, 256, 128)).tobytes()
    assert sheet.crop((0, 128, 256, 256)).tobytes() != page.tobytes()


def test_pictures_that_do_not_fit_together_are_drawn_singly(base, output, table, monkeypatch):
    asked, draw = [], drawn_at_once(monkeypatch)
    from tlora_core.hosts.comfy.training.personalize import Personalization

    at_once = Personalization.draw

    def short_of_memory(self, tlora, prompts, seeds):
        asked.append(list(seeds))
        if len(seeds) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return at_once(self, tlora, prompts, seeds)

    monkeypatch.setattr(Personalization, "draw", short_of_memory)
    done = run(base, request(4), **SCORED)
    assert asked == [[0, 1], [0], [1], [0], [1], [0], [1]] and table.measured == [0, 2, 4] and len(done.scores) == 3
    assert len(done.scores[0].pictures[0]) == 2 and draw


def test_without_prompts_scenes_are_drawn_and_no_prompt_twice(base, output, table, monkeypatch):
    asked = drawn_at_once(monkeypatch)
    run(base, request(2), **SCORED)
    prompts, seeds = asked[0]
    assert prompts[0] == NEUTRAL and seeds == [0, 1]
    assert len(prompts) >= 3 and all(prompt.startswith(NEUTRAL + " ") for prompt in prompts[1:])
    run(base, request(2), rerun="restart", validation_prompts=("{} on snow", "a photo of {}"), **SCORED)
    assert asked[-1][0] == [NEUTRAL, "sks heart on snow"]


def test_the_files_picture_is_of_the_users_first_prompt(base, output, table, monkeypatch):
    from tlora_core.files.card import read_thumbnail
    from tlora_core.hosts.comfy.training.personalize import Personalization

    levels = {NEUTRAL: 0.0, "sks heart on snow": 1.0, "a star": 0.0}
    monkeypatch.setattr(
        Personalization,
        "draw",
        lambda self, tlora, prompts, seeds: [torch.full((len(seeds), 32, 32, 3), levels[prompt]) for prompt in prompts],
    )
    done = run(base, request(2), validation_prompts=("{} on snow", "a star"), **SCORED)
    assert Image.open(io.BytesIO(read_thumbnail(done.path) or b"")).getpixel((9, 9)) == (255, 255, 255)


def test_the_scorer_sees_the_pictures_as_they_are_trained(base, output):
    from tlora_core.hosts.comfy.training.keeping import Keeping
    from tlora_core.hosts.comfy.training.personalize import Personalization
    from tlora_core.hosts.comfy.training.scored import live_scorer

    class Seen:
        name, why_no_text = "seen", ""
        pictures, masks = [], []

        def subjects(self, pictures, masks=None):
            self.pictures.append(pictures)
            self.masks.append(masks)
            return torch.ones(len(pictures), 1)

        scenes = subjects

        def follows(self, pictures, prompts):
            return torch.ones(len(pictures))

    mask = torch.zeros(96, 64)
    mask[32:64] = 1
    [picture] = images(size=96)
    cut = type(picture)(picture.pixels[:, :64], picture.caption, mask)
    seen, (model, clip, vae) = Seen(), base
    with torch.inference_mode():
        personalization = Personalization(model, clip, vae, [cut], request(2))
        live_scorer(seen, personalization, [cut], Keeping(scorer="seen", validate_every=1))
    assert torch.equal(seen.pictures[0][0], cut.pixels[16:80])
    assert torch.equal(seen.masks[0][0], mask[16:80])


def test_scores_are_recorded_for_tensorboard_and_weights_and_biases(base, output, table, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from tlora_core.training.run_folder import Recorder

    class Service:
        def __init__(self):
            self.logged = []

        def log(self, values, step):
            self.logged.append((step, sorted(values)))

        def finish(self):
            pass

    drawn_at_once(monkeypatch)
    service, begin = Service(), Recorder.__init__

    def with_service(self, *args):
        begin(self, *args)
        self.wandb = service

    monkeypatch.setattr(Recorder, "__init__", with_service)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Image=lambda picture: picture))
    run(base, request(4), **SCORED)
    events = EventAccumulator(str(folders(output)[-1])).Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("scores/likeness")] == [*((0, 0), (2, 0.3), (4, 0.6))]
    assert [e.step for e in events.Scalars("scores/copying")] == [0, 2, 4]
    assert [step for step, names in service.logged if names == ["copying", "likeness", "obedience"]] == [0, 2, 4]


def test_no_step_is_marked_as_the_best_while_none_is_better_than_the_bare_model(comfy):
    from tlora_core.hosts.comfy.training.scored import shown
    from tlora_core.reports.live_scores import PictureScores, StepScores

    def scores(step, likeness):
        return StepScores.of(step, [[PictureScores(likeness, 0.5, None)], [PictureScores(None, 0.5, 0.1)]])

    steps = [scores(0, 0.5), scores(2, 0.4), scores(4, 0.8)]
    assert [shown(steps[:count])["best"] for count in range(4)] == [None, None, None, 4]
