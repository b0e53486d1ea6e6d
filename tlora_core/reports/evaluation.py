"""Image similarity, text similarity and diversity of generated pictures, measured as in the T-LoRA paper (section 4).

CLIP and DINO are loaded from transformers folders on disk; nothing is downloaded, and none of their code runs.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..errors import TLoRAError
from ..training.images import check_images
from .folder_encoder import FolderEncoder
from .picture_scores import MASKED, without_token


@dataclass(frozen=True)
class EvaluationProtocol:
    """The conditions of a measurement; fields have the names of their inputs. Only scores of equal protocols can be
    ranked.

    clip_model, dino_model: folder names; dino_model is None without DINO. prompts: as read by CLIP, without the token.
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

    image_similarity: mean CLIP cosine of every concept picture with every neutral picture. dino_similarity: the same
        with DINO, None without it. text_similarity: mean CLIP cosine of a picture and its prompt.
    diversity: 1 - mean cosine of two pictures of one prompt; None if no prompt has two. pictures: number of pictures.
        neutral: number of pictures for image similarity.
    protocol: the conditions of the measurement."""

    label: str
    image_similarity: float
    text_similarity: float
    diversity: float | None
    dino_similarity: float | None
    pictures: int
    neutral: int
    protocol: EvaluationProtocol


def evaluate(
    label: str,
    pictures: Sequence[Tensor],
    prompts: Sequence[str],
    concept: Tensor,
    clip: FolderEncoder,
    dino: FolderEncoder | None = None,
    neutral_prompt: str = "",
    token: str = "",
    masks: Sequence[Tensor | None] = (),
    concept_mask: Tensor | None = None,
) -> Scores:
    """Scores of `pictures`, a batch [N, H, W, 3] in 0..1 for each prompt, against `concept` [M, H, W, 3], the training
    pictures.

    neutral_prompt: the prompt whose pictures count for image similarity; "" counts all. token: a word unknown to CLIP,
    removed from the prompts. masks [N, H, W] for each batch and concept_mask [M, H, W]: the subject; for image
    similarity, the rest becomes grey. Raises TLoRAError for inputs that do not match.
    """
    check_images(concept, "concept")
    for batch in pictures:
        check_images(batch, "images")
    if len(pictures) != len(prompts):
        raise TLoRAError(
            f"images are {len(pictures)} batches and prompts {len(prompts)} texts; connect a prompt for each batch of "
            "images."
        )
    is_neutral = [not neutral_prompt.strip() or prompt.strip() == neutral_prompt.strip() for prompt in prompts]
    if not any(is_neutral):
        raise TLoRAError(
            f'neutral_prompt is "{neutral_prompt}", which is not one of the prompts; add it to them, or leave it empty.'
        )
    masks = list(masks) or [None] * len(pictures)
    if len(masks) != len(pictures):
        raise TLoRAError(
            f"mask is given for {len(masks)} batches of {len(pictures)}; connect one for each batch of images."
        )
    real = masked(concept, concept_mask, "concept_mask")
    cut = [masked(batch, mask, "mask") for batch, mask, use in zip(pictures, masks, is_neutral) if use]
    embedded = [clip.images(batch) for batch in pictures]
    read = [without_token(prompt, token) for prompt in prompts]
    texts = clip.texts(read)
    cosines = torch.cat([vectors @ text for vectors, text in zip(embedded, texts)])
    protocol = EvaluationProtocol(
        clip.folder.name,
        None if dino is None else dino.folder.name,
        frozenset(read),
        frozenset(prompt for prompt, use in zip(read, is_neutral) if use),
        any(mask is not None for mask in masks),
        _digest(real),
    )
    return Scores(
        label,
        _similarity(clip, real, cut),
        float(cosines.mean()),
        diversity(embedded, prompts),
        None if dino is None else _similarity(dino, real, cut),
        len(cosines),
        sum(len(batch) for batch in cut),
        protocol,
    )


def masked(pictures: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """`pictures`, grey outside the mask [N or 1, H, W], on their device. Raises TLoRAError when the sizes differ."""
    if mask is None:
        return pictures
    if tuple(mask.shape[-2:]) != tuple(pictures.shape[1:3]) or len(mask) not in (1, len(pictures)):
        raise TLoRAError(
            f"{name} is {len(mask)} x {mask.shape[-1]}x{mask.shape[-2]} pixels but its images are {len(pictures)} x "
            f"{pictures.shape[2]}x{pictures.shape[1]}; give one of the same size for all or for each."
        )
    weight = mask.to(pictures.device).clamp(0, 1).unsqueeze(-1)
    return pictures * weight + MASKED * (1 - weight)


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


def best(scores: Sequence[Scores], tolerance: float) -> Scores:
    """The score with the highest text similarity among those within `tolerance` of the highest image similarity: the
    paper compares text similarity at equal image similarity. Raises like check_comparable."""
    check_comparable(scores)
    highest = max(score.image_similarity for score in scores)
    return max((s for s in scores if s.image_similarity >= highest - tolerance), key=lambda s: s.text_similarity)


def table(scores: Sequence[Scores], tolerance: float) -> str:
    """The scores as lines of text, with the best marked. Raises like check_comparable."""
    chosen, width = best(scores, tolerance), max(len("checkpoint"), *(len(score.label) for score in scores))
    lines = [f"{'checkpoint':{width}}  IS     DINO-IS  TS     diversity  pictures (for IS)"]
    for s in scores:
        mark = "  <- best" if s is chosen else ""
        lines.append(
            f"{s.label:{width}}  {s.image_similarity:.3f}  {_number(s.dino_similarity):7}  {s.text_similarity:.3f}  "
            f"{_number(s.diversity):9}  {s.pictures} ({s.neutral}){mark}"
        )
    lines.append(f"best: highest TS within {tolerance:g} of the highest IS")
    return "\n".join(lines)


def _similarity(encoder, real, batches):
    return float((encoder.images(real) @ torch.cat([encoder.images(batch) for batch in batches]).T).mean())


def _digest(pictures):
    return hashlib.sha256(pictures.float().contiguous().cpu().numpy().tobytes()).hexdigest()


def _number(value):
    return "-" if value is None else f"{value:.3f}"
