"""Image similarity, text similarity and diversity of generated pictures, measured as in the T-LoRA paper (section 4),
and copying. The scores of a training are measured by the same code."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..errors import TLoRAError
from ..training.dataset import TrainingImage
from ..training.images import check_images
from .live_scores import LiveScorer, StepScores
from .picture_scores import Concept, Encoder, likeness, masked, without_token
from .stopping import TOLERANCE, best_index, why


@dataclass(frozen=True)
class EvaluationProtocol:
    """The conditions of a measurement; fields have the names of their inputs. Only scores of equal protocols can be
    ranked.

    clip_model, dino_model: names of encoders; dino_model is None without DINO. prompts: as read, without the token.
    neutral_prompt: the prompts that count for image similarity. mask: whether masks were used. concept: digest of the
        masked concept pictures."""

    clip_model: str
    dino_model: str | None
    prompts: frozenset[str]
    neutral_prompt: frozenset[str]
    mask: bool
    concept: str


@dataclass(frozen=True)
class Scores:
    """The scores of one T-LoRA.

    image_similarity: mean cosine of every concept picture with every neutral picture. dino_similarity: the same with
        DINO, None without it. text_similarity: mean cosine of a picture and its prompt, None if the encoder reads no
        text. copying: mean cosine of a picture of another prompt with what is not the subject in the concept pictures,
        None if all prompts are neutral.
    diversity: 1 - mean cosine of two pictures of one prompt; None if no prompt has two. pictures: number of pictures.
        neutral: number of pictures for image similarity.
    steps: the same by picture, for the rule. why_no_text: of the encoder. protocol: the conditions of the
        measurement."""

    label: str
    image_similarity: float | None
    text_similarity: float | None
    copying: float | None
    diversity: float | None
    dino_similarity: float | None
    pictures: int
    neutral: int
    steps: StepScores
    why_no_text: str
    protocol: EvaluationProtocol


def evaluate(
    label: str,
    pictures: Sequence[Tensor],
    prompts: Sequence[str],
    concept: Tensor,
    encoder: Encoder,
    dino: Encoder | None = None,
    neutral_prompt: str = "",
    token: str = "",
    masks: Sequence[Tensor | None] = (),
    concept_mask: Tensor | None = None,
) -> Scores:
    """Scores of `pictures`, a batch [N, H, W, 3] in 0..1 for each prompt, against `concept` [M, H, W, 3], the training
    pictures.

    neutral_prompt: the prompt whose pictures count for image similarity; "" counts all. token: a word unknown to the
    encoder, removed from the prompts. masks [N, H, W] for each batch and concept_mask [M, H, W]: the subject; for image
    similarity, the rest does not count. Raises TLoRAError for inputs that do not match.
    """
    check_images(concept, "concept")
    masks = list(masks) or [None] * len(pictures)
    if len(masks) != len(pictures):
        raise TLoRAError(
            f"mask is given for {len(masks)} batches of {len(pictures)}; connect one for each batch of images."
        )
    scorer = LiveScorer(encoder, _subjects(concept, concept_mask), prompts, neutral_prompt, token)
    for batch, mask in zip(pictures, masks):
        check_mask(check_images(batch, "images"), mask, "mask")
    steps = scorer.measure(0, pictures, masks)
    neutral = [(batch, mask) for batch, mask, use in zip(pictures, masks, scorer.is_neutral) if use]
    read = [without_token(prompt, token) for prompt in prompts]
    protocol = EvaluationProtocol(
        encoder.name,
        None if dino is None else dino.name,
        frozenset(read),
        frozenset(prompt for prompt, use in zip(read, scorer.is_neutral) if use),
        any(mask is not None for mask in masks),
        _digest(masked(concept, concept_mask)),
    )
    return Scores(
        label,
        _mean_of(steps.likeness),
        _mean_of(steps.obedience),
        _mean_of(steps.copying),
        diversity([encoder.subjects(batch) for batch in pictures], prompts),
        None if dino is None else _likeness(dino, concept, concept_mask, neutral),
        sum(len(batch) for batch in pictures),
        sum(len(batch) for batch, _ in neutral),
        steps,
        encoder.why_no_text,
        protocol,
    )


def _subjects(concept: Tensor, mask: Tensor | None) -> list[TrainingImage]:
    check_mask(concept, mask, "concept_mask")
    return [
        TrainingImage(picture, mask=None if mask is None else mask[i % len(mask)]) for i, picture in enumerate(concept)
    ]


def _likeness(encoder, concept, concept_mask, neutral):
    seen = Concept.seen_by(encoder, list(concept), [one.mask for one in _subjects(concept, concept_mask)])
    return float(torch.cat([likeness(encoder, seen, batch, mask) for batch, mask in neutral]).mean())


def _mean_of(score):
    return None if score is None else score.mean


def check_mask(pictures: Tensor, mask: Tensor | None, name: str) -> None:
    """Raises TLoRAError when a mask [N or 1, H, W] is not of the size of its pictures [N, H, W, 3]."""
    if mask is None:
        return
    if tuple(mask.shape[-2:]) != tuple(pictures.shape[1:3]) or len(mask) not in (1, len(pictures)):
        raise TLoRAError(
            f"{name} is {len(mask)} x {mask.shape[-1]}x{mask.shape[-2]} pixels but its images are {len(pictures)} x "
            f"{pictures.shape[2]}x{pictures.shape[1]}; give one of the same size for all or for each."
        )


def diversity(vectors: Sequence[Tensor], prompts: Sequence[str]) -> float | None:
    """1 - mean cosine of all pairs of pictures of one prompt; vectors: unit vectors [N, d] for each batch. None if no
    prompt has two pictures."""
    by_prompt: dict[str, list[Tensor]] = {}
    for batch, prompt in zip(vectors, prompts):
        by_prompt.setdefault(prompt, []).append(batch)
    cosines = []
    for batches in by_prompt.values():
        together = torch.cat(batches)
        upper = torch.triu_indices(len(together), len(together), 1)
        cosines.append((together @ together.T)[upper[0], upper[1]])
    found = torch.cat(cosines)
    return float(1 - found.mean()) if len(found) else None


def check_comparable(scores: Sequence[Scores]) -> None:
    """Raises TLoRAError when two scores have the same label or different protocols."""
    label, times = Counter(score.label for score in scores).most_common(1)[0]
    if times > 1:
        raise TLoRAError(
            f'label "{label}" is given to {times} of the compared scores; give each a label of its own, since it '
            "names the best."
        )
    first = scores[0]
    for score in scores[1:]:
        for field in fields(EvaluationProtocol):
            if getattr(score.protocol, field.name) != getattr(first.protocol, field.name):
                raise TLoRAError(
                    f'{field.name} differs between "{first.label}" and "{score.label}", so their scores cannot be '
                    "compared; give both the same, or disconnect before."
                )


def best(scores: Sequence[Scores], tolerance: float = TOLERANCE) -> Scores:
    """The best of scores in the order of their steps, the bare model first, by the rule of `stopping`. Raises like
    check_comparable."""
    check_comparable(scores)
    return scores[best_index([score.steps for score in scores], tolerance)]


def table(scores: Sequence[Scores], tolerance: float = TOLERANCE) -> str:
    """The scores as lines of text, with the best marked, and what there is to say. Raises like check_comparable."""
    chosen = best(scores, tolerance)
    width = max(len("checkpoint"), *(len(score.label) for score in scores))
    lines = [f"{'checkpoint':{width}}  IS     DINO-IS  TS     copying  diversity  pictures (for IS)"]
    for s in scores:
        mark = "  <- best" if s is chosen and len(scores) > 1 else ""
        lines.append(
            f"{s.label:{width}}  {_number(s.image_similarity)}  {_number(s.dino_similarity):7}  "
            f"{_number(s.text_similarity):5}  {_number(s.copying):7}  {_number(s.diversity):9}  {s.pictures} "
            f"({s.neutral}){mark}"
        )
    return "\n".join([*lines, *_said(scores, chosen), *dict.fromkeys(s.why_no_text for s in scores if s.why_no_text)])


def _said(scores, chosen):
    """Sentences on the best of several scores."""
    if len(scores) == 1:
        return []
    first, place = scores[0].label, scores.index(chosen)
    reason = why([s.steps for s in scores], place) if place else "none of the others is better."
    return [f"{chosen.label}: {reason}", f"All is counted from {first}, the first, best the model without a T-LoRA."]


def _digest(pictures):
    return hashlib.sha256(pictures.float().contiguous().cpu().numpy().tobytes()).hexdigest()


def _number(value):
    return "-" if value is None else f"{value:.3f}"
