"""Image similarity, text similarity and diversity of generated pictures, measured as in the T-LoRA paper (section 4).

CLIP and DINO are loaded from transformers folders on disk; nothing is downloaded, and none of their code runs.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from ..errors import TLoRAError
from ..files.untrusted import one_line
from ..training.images import check_images

CLIP_TYPES = ("clip",)
DINO_TYPES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")  # DINO v1 is a plain ViT
MASKED = 0.5  # grey value of the background outside a mask
_UNUSED = ("logit_scale", "pooler.", "embeddings.mask_token")  # DINO v1 is published without the pooler
_BATCH = 16  # pictures per forward pass


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


class ImageEncoder:
    """An image encoder from the transformers folder `folder` on `device`; CLIP also encodes texts.

    Raises TLoRAError when the folder lacks a file or weights, or holds a damaged file or another kind of model.
    """

    def __init__(self, folder: Path, types: Sequence[str], device: torch.device | str = "cpu"):
        self.folder, self.device = folder, device
        if model_type(folder) not in types:
            raise TLoRAError(
                f'"{folder.name}" holds a model of type {model_type(folder)}; choose one of type {" or ".join(types)}.'
            )
        try:
            self.model, missing, self.side, self.mean, self.std = _load(folder)
        except Exception as error:  # damaged files raise different exceptions by release, even a bare Exception
            raise TLoRAError(
                f'"{folder.name}" cannot be loaded ({one_line(error) or type(error).__name__}); its folder needs '
                "config.json, model.safetensors (or pytorch_model.bin) and preprocessor_config.json, complete, as "
                "published for transformers: download them again (git clone without git-lfs fetches no weights)."
            ) from error
        if missing:  # these would keep their random initial values
            raise TLoRAError(
                f'"{folder.name}" lacks {len(missing)} of the weights of its model, for example {missing[0]}; download '
                "the whole model as published for transformers (a clip_vision file of ComfyUI holds only CLIP's image "
                "encoder)."
            )
        # Cast here, since from_pretrained's argument for the dtype differs between the releases that the host allows.
        self.model.eval().to(device, torch.float32)

    @torch.inference_mode()
    def images(self, pictures: Tensor) -> Tensor:
        """Unit vectors [N, d], on the CPU, of pictures [N, H, W, 3] in 0..1 on any device. The shorter side is resized
        and the centre cropped on the CPU, so that scores do not depend on the device of the host's pictures."""
        found = []
        for batch in pictures.movedim(-1, 1).split(_BATCH):
            pixels = ((self._framed(batch.cpu().float()) - self.mean) / self.std).to(self.device)
            if hasattr(self.model, "get_image_features"):
                vectors = _tensor(self.model.get_image_features(pixel_values=pixels))
            else:
                vectors = self.model(pixel_values=pixels).last_hidden_state[:, 0]
            found.append(normalize(vectors.float().cpu(), dim=-1))
        return torch.cat(found)

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors [N, d], on the CPU. Raises TLoRAError when the folder's tokenizer is missing, damaged or for
        another model."""
        tokens = self._tokens(prompts).to(self.device)
        vectors = self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return normalize(_tensor(vectors).float().cpu(), dim=-1)

    def _tokens(self, prompts):
        from transformers import AutoTokenizer

        config = self.model.config.text_config
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            # In some releases, a folder without the files gives an empty tokenizer. vocab_size may be padded, but not
            # to twice the size.
            if len(tokenizer) < config.vocab_size / 2:
                raise ValueError(f"{len(tokenizer)} tokens found, {config.vocab_size} in the model")
            tokens = tokenizer(
                list(prompts),
                padding=True,
                truncation=True,
                max_length=config.max_position_embeddings,
                return_tensors="pt",
            )
            if int(tokens["input_ids"].max()) >= config.vocab_size:
                raise ValueError(
                    f"token {int(tokens['input_ids'].max())} found, {config.vocab_size} tokens in the model"
                )
        except Exception as error:  # damaged files raise a bare Exception
            raise TLoRAError(
                f'"{self.folder.name}" has no tokenizer for its model ({one_line(error) or type(error).__name__}); add '
                "the files published with it: tokenizer.json, or vocab.json and merges.txt, and tokenizer_config.json."
            ) from error
        return tokens

    def _framed(self, pictures):
        height, width = pictures.shape[-2:]
        scale = self.side / min(height, width)
        size = (max(self.side, round(height * scale)), max(self.side, round(width * scale)))
        resized = interpolate(pictures, size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        return resized[..., top : top + self.side, left : left + self.side]


def model_type(folder: Path) -> str:
    """The model type in config.json; "" if it cannot be read."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(found.get("model_type", "")) if isinstance(found, dict) else ""
    except (OSError, ValueError):
        return ""


def evaluate(
    label: str,
    pictures: Sequence[Tensor],
    prompts: Sequence[str],
    concept: Tensor,
    clip: ImageEncoder,
    dino: ImageEncoder | None = None,
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


def without_token(prompt: str, token: str) -> str:
    """The prompt without the token: "a sks dog in the snow" becomes "a dog in the snow"."""
    if not token.strip():
        return prompt
    return re.sub(r"\s+", " ", re.sub(rf"(?<!\w){re.escape(token.strip())}(?!\w)", "", prompt)).strip()


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


def _load(folder):
    """(model, names of missing weights, side of its input pictures, mean and standard deviation [3, 1, 1]) from
    `folder`. Raises any exception for damaged files."""
    from transformers import AutoModel

    # OpenAI's CLIP is published as pytorch_model.bin; with weights_only, none of its code runs.
    model, found = AutoModel.from_pretrained(folder, local_files_only=True, weights_only=True, output_loading_info=True)
    missing = sorted(name for name in found["missing_keys"] if not name.startswith(_UNUSED))
    side = getattr(model.config, "vision_config", model.config).image_size
    if not isinstance(side, int):
        raise ValueError(f"image_size in config.json is {side}, not a whole number")
    preparation = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    mean, std = (
        torch.tensor(preparation[name], dtype=torch.float32).view(3, 1, 1) for name in ("image_mean", "image_std")
    )
    if not bool(mean.isfinite().all() and (std > 0).all()):
        raise ValueError("image_mean or image_std in preprocessor_config.json is not valid")
    return model, missing, side, mean, std


def _similarity(encoder, real, batches):
    return float((encoder.images(real) @ torch.cat([encoder.images(batch) for batch in batches]).T).mean())


def _digest(pictures):
    return hashlib.sha256(pictures.float().contiguous().cpu().numpy().tobytes()).hexdigest()


def _number(value):
    return "-" if value is None else f"{value:.3f}"


def _tensor(output):
    """The features as a tensor; some releases of transformers wrap them."""
    return output if isinstance(output, Tensor) else output.pooler_output
