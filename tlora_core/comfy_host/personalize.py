"""One image in, a T-LoRA out: encode with the host's VAE and CLIP, train on its MODEL, pack the result."""
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from ..adapters import METHODS, make_adapters
from ..errors import TLoRAError
from ..file import TLoRAFile
from ..images import check_images, square
from ..report import B_KEY, effective_rank_of_b
from ..schedule import RankSchedule
from ..trainer import TrainConfig, TrainingDiverged, train
from .denoiser import HostDenoiser
from .families import target_layers
from .noise import domain, noise_level
from .training import training_session


@dataclass(frozen=True)
class TrainRequest:
    """What the user asks for. Raises TLoRAError when a field is out of its range."""

    token: str
    class_word: str
    method: str = "tlora"
    rank: int = 64
    min_rank: int = 32
    alpha: float = 1.0
    start: str = "last_random"
    resolution: int = 1024
    config: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if not self.token.strip() and not self.class_word.strip():
            raise TLoRAError('token and class_word are both empty; give for example "sks" and "dog".')
        if self.method not in METHODS:
            raise TLoRAError(f'method is "{self.method}"; choose one of {", ".join(METHODS)}.')
        RankSchedule(self.rank, self.min_rank, self.alpha)

    @property
    def schedule(self) -> RankSchedule:
        """Methods without a mask have all ranks on at every timestep."""
        masked = METHODS[self.method].is_masked
        return RankSchedule(self.rank, self.min_rank if masked else self.rank, self.alpha)

    @property
    def prompt(self) -> str:
        return " ".join(f"a photo of {self.token} {self.class_word}".split())


@dataclass(frozen=True)
class Trained:
    tlora: TLoRAFile
    losses: list[float]
    stopped: TrainingDiverged | None = None  # set when the loss diverged and `tlora` is the last good state


def train_from_images(model: ModelPatcher, clip: CLIP, vae: VAE, images: Tensor, request: TrainRequest,
                      on_step: Callable[[int, float], None]) -> Trained:
    """Train a T-LoRA for the subject of `images` [N, H, W, 3] in 0..1.

    Raises TLoRAError for input that cannot work, before the model is touched; lets the host's interrupt through. In
    every case `model` ends as it began.
    """
    check_images(images)
    layers = target_layers(model)
    sampling = model.get_model_object("model_sampling")
    _, num_timesteps = noise_level(sampling, sampling.sigma_max.reshape(1))
    latents = encode_images(vae, images, request.resolution)
    conditioning = _size_conditioning(clip, request.prompt, images, request.resolution)
    losses, stopped = [], None

    def record(step, loss):
        losses.append(loss)
        on_step(step, loss)

    with training_session(model):
        sources = {path: layer.weight for path, layer in layers.items()} if "weight" in request.start \
            else {path: layer.shape for path, layer in layers.items()}
        adapters = make_adapters(request.method, request.start, sources, request.rank, request.config.seed,
                                 device=model.load_device)
        denoiser = HostDenoiser(model, adapters, request.schedule, latents, [conditioning])
        try:
            train(adapters, denoiser, request.config, record)
        except TrainingDiverged as error:
            stopped = error
    tlora = TLoRAFile(
        layers={path: adapter.detach().to("cpu") for path, adapter in adapters.items()}, method=request.method,
        schedule=request.schedule, num_timesteps=num_timesteps, noise_domain=domain(sampling),
        base_model=type(model.model.model_config).__name__.lower(), token=request.token, class_word=request.class_word,
        training={**asdict(request.config), "start": request.start, "resolution": request.resolution,
                  "images": len(images), "steps_done": stopped.kept_step if stopped else len(losses),
                  B_KEY: effective_rank_of_b(adapters)})
    return Trained(tlora, losses, stopped)


def encode_images(vae: VAE, images: Tensor, resolution: int) -> Tensor:
    """Latents [N, C, h, w] of the centre squares of `images`, in the VAE's scale."""
    unit = vae.spacial_compression_encode()
    if resolution % unit:
        raise TLoRAError(f"resolution is {resolution}; set it to a multiple of {unit}, as this VAE needs.")
    return vae.encode(square(images, resolution))


def _size_conditioning(clip: CLIP, prompt: str, images: Tensor, resolution: int):
    """CONDITIONING of the prompt with SDXL's sizes as in the paper: original (crop, crop), crop at (0, 0), target
    (resolution, resolution). Models without size conditioning ignore them."""
    side = min(images.shape[1:3])
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    sizes = {"width": side, "height": side, "crop_w": 0, "crop_h": 0, "target_width": resolution, "target_height": resolution}
    return [[tensor, {**options, **sizes}] for tensor, options in conditioning]
