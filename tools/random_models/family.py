"""What a family of models is made of, and what goes into it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# (number of tokens, random generator) -> the text of a CONDITIONING: its tokens' states, and what comes with them.
MakeText = Callable[[int, torch.Generator], tuple[Tensor, dict]]


@dataclass(frozen=True)
class Family:
    """One of the host's families.

    host_class: its class in comfy.supported_models. config: of its diffusion model, as the host detects it in a file.
    text: makes what its text encoders give. side: height and width of a latent that is large enough to be seen by
    every layer and small enough for tests. latents: shapes without a batch, where the model takes several latents in
    one (video and sound).
    """

    host_class: str
    config: dict
    text: MakeText
    side: int = 8
    latents: tuple[tuple[int, ...], ...] = field(default=())


def text(width: int, pooled: int | None = None, *, tokens: int | None = None, mask=False, **more) -> MakeText:
    """Texts of `width` columns, with a pooled text of `pooled` columns.

    tokens: how many, where the model takes one number alone. mask: whether an attention mask comes with them. more:
    further tensors by the name of the CONDITIONING's entry, each as its shape after the batch, where "tokens" stands
    for the number of tokens.
    """

    def make(count: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        count = tokens or count
        states, options = torch.randn(1, count, width, generator=generator), {}
        if pooled is not None:
            options["pooled_output"] = torch.randn(1, pooled, generator=generator)
        if mask:
            options["attention_mask"] = torch.ones(1, count, dtype=torch.long)
        for name, shape in more.items():
            sizes = [count if size == "tokens" else size for size in shape]
            options[name] = torch.randn(1, *sizes, generator=generator)
        return states, options

    return make


def hunyuan_dit_text(tokens: int, generator: torch.Generator) -> tuple[Tensor, dict]:
    """CLIP's 77 tokens and mT5's 256, of which the masks leave a few on."""
    masks = torch.zeros(1, 77), torch.zeros(1, 256)
    masks[0][:, : tokens + 1], masks[1][:, : tokens + 3] = 1, 1
    states = torch.randn(1, 77, 64, generator=generator)
    return states, {
        "attention_mask": masks[0],
        "conditioning_mt5xl": torch.randn(1, 256, 128, generator=generator),
        "attention_mask_mt5xl": masks[1],
        "pooled_output": None,
    }


def hidream_o1_text(tokens: int, generator: torch.Generator) -> tuple[Tensor, dict]:
    """The numbers of a chat's tokens: the model embeds them itself."""
    words = torch.randint(100, 5000, (tokens,), generator=generator).tolist()
    user, end, assistant, picture = [151644, 872, 198], [151645, 198], [151644, 77091, 198], [151669, 151673]
    ids = torch.tensor([[*user, *words, *end, *assistant, *picture]])
    return ids.unsqueeze(-1).float(), {"pooled_output": None, "text_input_ids": ids}


def anima_text(tokens: int, generator: torch.Generator) -> tuple[Tensor, dict]:
    """The states of one encoder, and the numbers and weights of T5's tokens, which the model embeds itself."""
    states = torch.randn(1, tokens, 1024, generator=generator)
    return states, {"t5xxl_ids": torch.randint(3, 1000, (5,), generator=generator), "t5xxl_weights": torch.ones(5)}


def pid_text(tokens: int, generator: torch.Generator) -> tuple[Tensor, dict]:
    """A text, and the latent that the model turns into pixels."""
    states, options = text(64, lq_latent=(16, 1, 1))(tokens, generator)
    return states, {**options, "degrade_sigma": torch.zeros(1)}
