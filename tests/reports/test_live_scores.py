"""Scores of a training at a step: what is measured on which picture, and their form in files."""

import json

import pytest
import torch
from torch.nn.functional import normalize

from tlora_core.errors import TLoRAError
from tlora_core.reports.live_scores import LiveScorer, PictureScores, Score, StepScores
from tlora_core.reports.picture_scores import Concept, WholePictureEncoder, copying, likeness, middle
from tlora_core.training.dataset import TrainingImage

PROMPTS = ["a photo of sks dog", "a sks dog at night"]


class Means(WholePictureEncoder):
    """Sees the mean colour of pictures, and likes long prompts."""

    name, why_no_text = "means", ""

    def images(self, pictures):
        return normalize(pictures.mean((1, 2)), dim=-1)

    def follows(self, pictures, prompts):
        return torch.tensor([len(prompt) / 100 for prompt in prompts])


def plain(*colours, count=1):
    return torch.tensor(colours, dtype=torch.float).repeat(count, 1)[:, None, None].expand(-1, 20, 24, 3).clone()


def subject_of(picture, box):
    mask = torch.zeros(picture.shape[:2])
    top, left, bottom, right = box
    mask[top:bottom, left:right] = 1
    return TrainingImage(picture, mask=mask)


def scorer_of(encoder=None, masked=True, neutral=PROMPTS[0]):
    """The training picture: a red subject in the left top corner on blue."""
    picture = plain((0, 0, 1))[0]
    picture[:10, :10] = torch.tensor([1.0, 0, 0])
    concept = subject_of(picture, (0, 0, 10, 10)) if masked else TrainingImage(picture)
    return LiveScorer(encoder or Means(), [concept], PROMPTS, neutral, "sks")


def test_each_measure_takes_the_pictures_of_its_prompts():
    scores = scorer_of().measure(40, [plain((1, 0, 0), (0, 0, 1)), plain((0, 0, 1), (0, 1, 0))])
    of_neutral, of_other = scores.pictures
    assert [one.copying for one in of_neutral] == [one.likeness for one in of_other] == [None, None]
    assert of_neutral[0].likeness > of_neutral[1].likeness, "the red picture is more like the red subject"
    assert of_other[0].copying > of_other[1].copying, "the blue picture is more like the blue rest"
    assert scores.step == 40 and scores.likeness.mean == pytest.approx(sum(p.likeness for p in of_neutral) / 2)
    apart = abs(of_neutral[0].likeness - of_neutral[1].likeness)
    assert scores.likeness.error == pytest.approx(apart / 2), "the standard error of two"


def test_prompts_are_read_without_the_token():
    scores = scorer_of().measure(0, [plain((1, 0, 0)), plain((1, 0, 0))])
    assert [one[0].obedience for one in scores.pictures] == pytest.approx([0.14, 0.14])  # "a photo of dog"


def test_mask_tells_subject_and_scene_apart():
    picture = scorer_of().concept
    red, blue = normalize(torch.tensor([[1.0, 0, 0], [0, 0, 1]]), dim=-1)
    assert picture.subjects @ red > picture.subjects @ blue and picture.scenes @ blue > picture.scenes @ red


def test_without_a_mask_the_scene_is_what_surrounds_the_middle():
    picture = plain((0, 0, 1))[0]
    picture[middle(picture) == 1] = torch.tensor([1.0, 0, 0])
    seen, blue = Concept.seen_by(Means(), [picture], [None]), torch.tensor([0, 0, 1.0])
    grey_and_blue = normalize(0.36 * torch.full((3,), 0.5) + 0.64 * blue, dim=-1)  # 60% of each side
    assert torch.allclose(seen.scenes[0], grey_and_blue, atol=0.02)
    assert torch.allclose(seen.subjects, Means().images(picture[None]))


def test_the_middle_is_as_wide_and_as_high_as_the_picture_asks():
    wanted = torch.zeros(10, 30)
    wanted[2:8, 6:24] = 1
    assert torch.equal(middle(torch.zeros(10, 30, 3)), wanted)


def test_all_training_pictures_count_for_likeness_and_the_nearest_one_for_copying():
    concept = Concept(subjects=torch.eye(3)[:2], scenes=torch.eye(3)[:2])
    assert likeness(Means(), concept, plain((1, 0, 0), (0, 0, 1))).tolist() == [0.5, 0]
    assert copying(Means(), concept, plain((1, 0, 0), (0, 0, 1))).tolist() == [1, 0]


def test_the_copy_is_the_mean_of_all_training_pictures():
    concept = [TrainingImage(plain(colour)[0]) for colour in ((1, 0, 0), (1, 0, 0), (0, 0, 1))]
    copy = LiveScorer(Means(), concept, PROMPTS, PROMPTS[0], "sks").copy
    assert copy.likeness == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)


def test_the_copy_is_the_training_picture_drawn_for_every_prompt():
    scorer = scorer_of(masked=False)
    picture = plain((0, 0, 1))
    picture[:, :10, :10] = torch.tensor([1.0, 0, 0])
    drawn = scorer.measure(0, [picture, picture])
    assert drawn.copy == PictureScores(drawn.likeness.mean, drawn.obedience.mean, drawn.copying.mean)
    assert drawn.copy.likeness == pytest.approx(1)


def test_an_empty_neutral_prompt_counts_all_for_likeness_and_none_for_copying():
    scores = scorer_of(neutral="").measure(0, [plain((1, 0, 0)), plain((0, 1, 0))])
    assert scores.copying is None and None not in [one[0].likeness for one in scores.pictures]


def test_without_text_there_is_no_obedience_and_a_sentence_says_why():
    class Mute(Means):
        why_no_text = "It reads no text."

    scorer = scorer_of(Mute())
    scores = scorer.measure(0, [plain((1, 0, 0)), plain((1, 0, 0))])
    assert scores.obedience is None and scores.copy.obedience is None and scorer.remark == "It reads no text."


def test_prompts_that_ask_for_nothing_seen_have_no_obedience():
    class Blind(Means):
        def follows(self, pictures, prompts):
            return torch.tensor([0.5 if "night" in prompt else torch.nan for prompt in prompts])

    scores = scorer_of(Blind()).measure(0, [plain((1, 0, 0)), plain((1, 0, 0))])
    assert [one[0].obedience for one in scores.pictures] == [None, 0.5] and scores.obedience == Score(0.5, 0.0)


def test_pictures_are_encoded_once_for_all_measures():
    class Counting(Means):
        calls = 0

        def images(self, pictures):
            self.calls += 1
            return super().images(pictures)

        def follows(self, pictures, prompts):
            return self.seen(pictures).sum(1)

    scorer = scorer_of(counted := Counting())
    before = counted.calls
    scorer.measure(0, [plain((1, 0, 0)), plain((0, 1, 0))])
    assert counted.calls - before == 2


@pytest.mark.parametrize(
    "pictures, words",
    [([plain((1, 0, 0))], "1 batches and prompts 2 texts"), ([plain((1, 0, 0)), torch.zeros(0, 9, 9, 3)], "empty")],
)
def test_batches_that_do_not_fit_are_refused(pictures, words):
    with pytest.raises(TLoRAError, match=words):
        scorer_of().measure(0, pictures)


def test_a_neutral_prompt_that_is_not_drawn_is_refused():
    with pytest.raises(TLoRAError, match="a cat"):
        scorer_of(neutral="a cat")
    assert scorer_of(neutral=f" {PROMPTS[0]}\n").is_neutral == [True, False], "spaces around it do not matter"


def test_scores_come_back_from_json_as_they_were():
    scores = scorer_of().measure(40, [plain((1, 0, 0), (0, 0, 1)), plain((0, 0, 1), (0, 1, 0))])
    assert StepScores.from_json(json.loads(json.dumps(scores.to_json()))) == scores


@pytest.mark.parametrize(
    "change, words",
    [
        ({"step": -1}, "step is -1"),
        ({"step": True}, "step is True"),
        ({"pictures": 5}, "int"),
        ({"pictures": [[{"likeness": "0.5", "obedience": None, "copying": None}]]}, "likeness is '0.5'"),
        ({"pictures": [[{"likeness": float("nan"), "obedience": None, "copying": None}]]}, "likeness is nan"),
        ({"pictures": [[{"likeness": float("inf"), "obedience": None, "copying": None}]]}, "likeness is inf"),
        ({"pictures": [[{"likeness": 0.5}]]}, "obedience is missing"),
        ({"copy": None}, "likeness is missing"),
    ],
)
def test_json_of_anything_else_is_refused(change, words):
    good = scorer_of().measure(40, [plain((1, 0, 0)), plain((0, 1, 0))]).to_json()
    with pytest.raises(TLoRAError, match=words):
        StepScores.from_json({**good, **change})
    with pytest.raises(TLoRAError, match="pictures is missing"):
        StepScores.from_json([])
