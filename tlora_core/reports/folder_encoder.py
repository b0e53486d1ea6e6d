"""CLIP and DINO from transformers folders on disk. Nothing is downloaded, and none of their code runs."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from ..errors import TLoRAError
from ..files.untrusted import one_line
from .picture_scores import WholePictureEncoder

CLIP_TYPES = ("clip",)
DINO_TYPES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")  # DINO v1 is a plain ViT
_UNUSED = ("logit_scale", "pooler.", "embeddings.mask_token")  # DINO v1 is published without the pooler
_BATCH = 16  # pictures per forward pass


class FolderEncoder(WholePictureEncoder):
    """An image encoder from the transformers folder `folder` on `device`; CLIP also encodes texts.

    Raises TLoRAError when the folder lacks a file or weights, or holds a damaged file or another kind of model.
    """

    def __init__(self, folder: Path, types: Sequence[str], device: torch.device | str = "cpu"):
        self.folder, self.device, self.name = folder, device, folder.name
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
        self.why_no_text = "" if model_type(folder) in CLIP_TYPES else f'"{folder.name}" reads no text.'
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

    def follows(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """The cosines [N] of pictures [N, H, W, 3] with their prompts."""
        return (self.seen(pictures) * self.texts(prompts)).sum(1)

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


def _tensor(output):
    """The features as a tensor; some releases of transformers wrap them."""
    return output if isinstance(output, Tensor) else output.pooler_output
