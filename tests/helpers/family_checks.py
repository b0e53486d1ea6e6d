"""Trainings, samplings and files of the host's small random models. Import inside tests that use `comfy`."""

from fnmatch import fnmatchcase
from functools import cached_property

import random_models
import sampling_runs as runs
import torch
from family_table import TABLE, Row

RANK, MIN_RANK = 8, 3  # no rank changes at a third of the way, where a sampling of three steps is


class Trial:
    """A family's small model, made once, with what several checks need of it."""

    def __init__(self, name: str):
        self.name, self.row = name, TABLE[name]
        self.model = random_models.small(name)
        self.texts = [random_models.conditioning(self.model, 6, seed) for seed in (1, 2)]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each expected target."""
        from tlora_core.hosts.comfy.model.layers import linear_modules

        linear = linear_modules(self.model)
        return {
            name: (stop - start, linear[path].in_features)
            for name, (path, start, stop) in expected_targets(self.row, linear).items()
        }

    def tlora(self, min_rank: int = MIN_RANK):
        return random_models.random_tlora(self.model, RANK, min_rank, 0.3, shapes=self.shapes)

    def sample(self, model) -> torch.Tensor:
        picture = runs.sample(
            model, *self.texts, latent=random_models.own_latent(self.model), scheduler="simple", steps=3
        )
        return flat(picture)

    def weights(self) -> dict[str, tuple[torch.Tensor, int]]:
        return {key: (value.clone(), value.data_ptr()) for key, value in self._network.state_dict().items()}

    def assert_untouched(self, before: dict[str, tuple[torch.Tensor, int]]) -> None:
        """Weights are those of `before` in value and place, and no layer has a forward of ours."""
        for key, value in self._network.state_dict().items():
            assert torch.equal(value, before[key][0]) and value.data_ptr() == before[key][1], key
        assert not [path for path, module in self._network.named_modules() if "forward" in module.__dict__]

    @property
    def _network(self) -> torch.nn.Module:
        return self.model.model.diffusion_model


def expected_targets(row: Row, linear) -> dict[str, tuple[str, int, int]]:
    """Name of each target that the row tells of -> (module's path, first row, row behind the last)."""
    found = {}
    for pattern, count in row.layers.items():
        path_pattern, _, cuts = pattern.partition("@")
        names = {}
        for path in (path for path in linear if fnmatchcase(path, path_pattern)):
            rows = [int(cut) for cut in cuts.split("-")] if cuts else [0, linear[path].out_features]
            for start, stop in zip(rows, rows[1:]):
                names[f"{path}@{start}" if cuts else path] = (path, start, stop)
        assert len(names) == count, (pattern, sorted(names))
        found.update(names)
    return found


def flat(latent) -> torch.Tensor:
    """All numbers of a latent, also of several in one."""
    return torch.cat([part.flatten() for part in latent.unbind()]) if latent.is_nested else latent


class Clip:
    """Encodes each text to another random CONDITIONING of the family's."""

    def __init__(self, model):
        self.model = model

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> list:
        return random_models.conditioning(self.model, 6, sum(map(ord, text)) % 97)


class Vae:
    """Encodes each picture to another random latent of the family's shape."""

    first_stage_model = None

    def __init__(self, model):
        kind = model.model.latent_format
        self.shape = kind.process_out(random_models.latent(model)).shape[1:]  # some formats pack what a VAE gives
        self.unit = kind.spacial_downscale_ratio

    def spacial_compression_encode(self) -> int:
        return self.unit

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(pixels.sum()))
        sides = [size // self.unit for size in pixels.shape[1:3]]
        return torch.randn(1, *self.shape[:-2], *sides, generator=generator)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, ..., height, width, 3], of the size that the latents stand for."""
        assert latents.isfinite().all()
        frames, sides = latents.shape[2:-2], [side * self.unit for side in latents.shape[-2:]]
        return torch.zeros(len(latents), *frames, *sides, 3)


def personalization(trial: Trial, memory: str, cells: int | None = None, **changes):
    """A training of two steps on two pictures, ready to start. cells: side of their latents."""
    from tlora_core.hosts.comfy.training.personalize import Personalization, filled_in
    from tlora_core.training.dataset import training_images

    vae = Vae(trial.model)
    side = (cells or random_models.SMALL[trial.name].side) * vae.unit
    generator = torch.Generator().manual_seed(1)
    pictures = training_images(torch.rand(2, side, side, 3, generator=generator), "a {}\nthe {}")
    asked = {
        "token": "sks",
        "class_word": "dog",
        "rank": 4,
        "min_rank": 1,
        "resolution": side,
        "layers": trial.row.patterns,
    }
    config = {"steps": 2, "learning_rate": 0.0, "optimizer": "auto", **changes.pop("config", {})}
    request = filled_in(trial.model, config, **{**asked, **changes})
    return Personalization(trial.model, Clip(trial.model), vae, pictures, request, memory=memory)
