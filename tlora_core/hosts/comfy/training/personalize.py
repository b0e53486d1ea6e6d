"""From one image to a T-LoRA: encodes with the host's VAE and CLIP, trains on its MODEL, packs the result."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from ....errors import TLoRAError, require_choice
from ....files.tlora_file import TLoRAFile
from ....files.untrusted import check_line
from ....method.adapters import METHODS, Adapters
from ....method.factory import make_adapters
from ....method.layer_name import LayerName
from ....method.schedule import RankSchedule
from ....method.starts import counted
from ....reports.report import B_KEY, effective_rank_of_b
from ....training.config import TrainConfig
from ....training.dataset import FRAMINGS, PROMPT, TrainingImage, caption_of, class_caption_of, frame
from ....training.masks import BORDER_IS_COVERED, covers_border
from ....training.trainer import Trainer
from ..draw import draw
from ..model.defaults import Defaults, defaults_for
from ..model.families import ATTENTION, WITH_FEED_FORWARD, TargetLayer, target_layers
from ..model.layers import bytes_to_come, is_dynamic
from ..model.noise import domain, draw_sigmas, min_snr_weight, num_timesteps, require_trainable
from ..progress import counting
from ..sampling import apply_tlora
from .blame import saying_what_failed
from .class_pictures import ClassPictures
from .denoiser import HostDenoiser, require_picture
from .encode import Encoder, Sample, Takes
from .failure import forget_failed_step, ran_out_of_memory
from .memory import FAST, LOW, Fit, fit_for, leanest_fit
from .session import training_session
from .targets import seen_layers

# "fast" keeps everything that the backward pass needs; "low" recomputes it block by block (gradient checkpointing);
# "lowest" also leaves in RAM the weights that do not fit beside the rest; "auto" is the fastest of them that fits.
MEMORY = ("auto", "fast", "low", "lowest")
_OF_A_FILE, _OF_A_LAYER = 8192, 1024  # at most so many bytes: a file's header, a layer's entry in it


@dataclass(frozen=True)
class TrainRequest:
    """What the user asks for. Together with the pictures and the model it determines the result.

    layers: see `families.chosen`. framing: one of dataset.FRAMINGS. flip: also trains on each picture mirrored.
    curve: see RankSchedule.from_text; "" for the formula. token, class_word: runs of white space become one space, as
        in captions.
    Raises TLoRAError if a field is out of range.
    """

    token: str
    class_word: str
    method: str = "tlora"
    rank: int = 64
    min_rank: int = 32
    alpha: float = 1.0
    start: str = "last_random"
    resolution: int = 1024
    config: TrainConfig = field(default_factory=TrainConfig)
    framing: str = FRAMINGS[0]
    flip: bool = False
    curve: str = ""
    layers: str = ATTENTION

    def __post_init__(self) -> None:
        for name in ("token", "class_word"):
            word = " ".join(getattr(self, name).split())
            check_line(name, word)  # the file checks this too, but only after the last step
            object.__setattr__(self, name, word)
        if not self.token and not self.class_word:
            raise TLoRAError('token and class_word are both empty; give for example "sks" and "dog".')
        require_choice("method", self.method, METHODS)
        require_choice("framing", self.framing, FRAMINGS)
        if self.config.preservation_weight and not (self.token and self.class_word):
            missing = "class_word" if self.token else "token"
            raise TLoRAError(
                f"{missing} is empty, but preservation_weight keeps what the model draws for class_word without token; "
                f"give {missing}, or set preservation_weight to 0."
            )
        _ = self.schedule  # which refuses ranks that cannot be

    @property
    def schedule(self) -> RankSchedule:
        """The rank schedule; methods without a mask keep all ranks on at every timestep."""
        if not METHODS[self.method].is_masked:
            return RankSchedule(self.rank, self.rank)
        return RankSchedule.from_text(self.rank, self.min_rank, self.alpha, self.curve)

    @property
    def prompt(self) -> str:
        return caption_of(PROMPT, self.token, self.class_word)

    def __str__(self) -> str:
        config = self.config
        return (
            f"{self.method}, {self.schedule}; {config.steps} steps of {config.optimizer} at {config.learning_rate:g}, "
            f"{self.resolution} pixels"
        )


def filled_in(model: ModelPatcher, config: Mapping, **fields) -> TrainRequest:
    """A TrainRequest with the model's defaults for a method or optimizer of "auto" and for steps, learning_rate or
    resolution of 0. With the optimizer "auto", max_grad_norm 0 takes the model's default too."""
    return completed(defaults_for(model), config, **fields)


def completed(usual: Defaults, config: Mapping, **fields) -> TrainRequest:
    """As filled_in, with the defaults `usual` of a kind of model."""
    config = dict(config)
    if config.get("optimizer", "auto") == "auto":
        # The user's own learning rate is meant for AdamW; for Prodigy it would be a factor of the rate it finds.
        config["optimizer"] = "adamw" if config.get("learning_rate") else usual.optimizer
        config["max_grad_norm"] = config.get("max_grad_norm") or usual.max_gradient
    config["learning_rate"] = config.get("learning_rate") or (
        1.0 if config["optimizer"] == "prodigy" else usual.learning_rate
    )
    fields["method"] = usual.method if fields["method"] == "auto" else fields["method"]
    config["steps"] = config.get("steps") or usual.steps_of.get(fields["method"], usual.steps)
    fields["resolution"] = fields["resolution"] or usual.resolution
    return TrainRequest(config=TrainConfig(**config), **fields)


class Personalization:
    """A T-LoRA in training on the host's model, which is unchanged whenever `train` is not running.

    images: the subject's pictures. prior: pictures of its class; if there are none and the request has a prior_weight,
    class_pictures provides them. memory: one of MEMORY. node_id: the node that shows the progress. Raises TLoRAError
    for unusable input, before it touches the model. Lets the host's interrupt through.
    """

    def __init__(
        self,
        model: ModelPatcher,
        clip: CLIP,
        vae: VAE,
        images: Sequence[TrainingImage],
        request: TrainRequest,
        prior: Sequence[TrainingImage] = (),
        memory: str = "auto",
        class_pictures: ClassPictures | None = None,
        node_id: str | None = None,
    ):
        require_choice("memory", memory, MEMORY)
        self.memory = memory
        # None: decided by a measurement on the model.
        self.fit: Fit | None = {"fast": FAST, "low": LOW}.get(memory)
        self._leanest = memory == "lowest"
        self.model, self.clip, self.vae, self.request, self.node_id = model, clip, vae, request, node_id
        if request.layers not in (ATTENTION, WITH_FEED_FORWARD):
            target_layers(model, request.layers)  # refuses a wrong pattern before anything is encoded
        self.sampling = model.get_model_object("model_sampling")
        self.num_timesteps = num_timesteps(self.sampling)
        require_trainable(self.sampling)
        require_picture(model.model)
        self._check_config()
        self.guidance = defaults_for(model).guidance
        told_in_training = self.guidance.told_in_training
        told = None if told_in_training is None else {"guidance": told_in_training}
        encoder = Encoder(clip, vae, request.config.outside_mask, told, Takes.of(model))
        encoder.check_resolution(request.resolution)
        if request.config.prior_weight and not prior:
            seeds = range(request.config.seed, request.config.seed + request.config.prior_count)
            prior = (class_pictures or ClassPictures()).of(
                model, clip, vae, request.class_word, request.resolution, seeds
            )
        self.remark = ""  # for the user, on what is doubtful about the pictures
        self.samples = self._encode(encoder, images, bool(request.config.preservation_weight))
        self.prior = self._encode(encoder, prior) if request.config.prior_weight else []
        layers, self.layers_in_words = seen_layers(model, self.samples[0], request.config, request.layers)
        self.images, self.shapes = len(images), {name: layer.shape for name, layer in layers.items()}
        self.heights = {name.path: layer.module.out_features for name, layer in layers.items() if name.is_part}
        # Nodes run in inference mode; autograd refuses tensors made in it.
        with torch.inference_mode(False), torch.enable_grad():
            self.adapters = self._adapters(layers)
            self.trainer = Trainer(self.adapters, request.config)

    def train(self, until: int, on_step: Callable[[int, float], bool | None] = lambda step, loss: None) -> bool:
        """Trains up to step `until`; see Trainer.run, whose errors it raises. If memory runs out, "auto" continues with
        what takes less. If nothing does, or an update was cut short, raises TLoRAError."""
        while True:
            try:
                return self._train(until, on_step)
            except BaseException as error:
                forget_failed_step(error)
                if not ran_out_of_memory(error):
                    raise
                if self.memory != "auto" or not self.trainer.is_whole or not self._can_take_less():
                    raise TLoRAError(self._out_of_memory()) from error
            # The failed step has changed nothing.
            self.fit, self._leanest = (LOW, False) if self.fit == FAST else (None, True)
            logging.warning(
                '[T-LoRA] memory ran out in step %d; going on with "%s"', self.trainer.step + 1, self.fit or "lowest"
            )

    def _train(self, until: int, on_step: Callable[[int, float], bool | None]) -> bool:
        if self.fit is None:
            self.fit = self._measured()
        with self._session(*self.fit) as denoiser:
            try:
                return self.trainer.run(denoiser, until, on_step)
            finally:
                self.trainer.optimizer.zero_grad()  # gradients are of no use in a pause, nor after a failed step

    @contextmanager
    def _session(self, checkpointing: bool = False, room: int | None = None) -> Iterator[HostDenoiser]:
        """A training session on the model, whose errors say what failed."""
        with training_session(self.model, checkpointing, room):
            denoiser = HostDenoiser(
                self.model, self.adapters, self.schedule, self.samples, self.request.config, self.prior
            )
            with saying_what_failed(denoiser, lambda: self.trainer.step + 1, checkpointing):
                yield denoiser

    def _measured(self) -> Fit:
        """How to train, found by a measurement on small latents."""
        batch = self.request.config.batch_size
        largest = max((sample.mean.shape for sample in self.samples), key=math.prod)
        # Enough for the measurement: what the host takes one evaluation to need.
        with self._session(room=self.model.memory_required([batch, *largest])) as denoiser:
            return fit_for(denoiser, batch, self._leanest)

    @property
    def way(self) -> tuple[str, int | None, int]:
        """How it trains, one of MEMORY but "auto"; of the weights, the bytes that stay in RAM, or None where only the
        host knows; and all their bytes."""
        if self._leanest and self.fit == LOW and is_dynamic(self.model):
            return "lowest", None, self.model.model_size()  # the host streams by itself; see `leanest_fit`
        streamed = 0 if self.fit is None or self.fit.room is None else bytes_to_come(self.model)
        return str(self.fit), streamed, self.model.model_size()

    def _can_take_less(self) -> bool:
        return self.fit == FAST or (self.fit == LOW and leanest_fit(self.model, 0) != LOW)

    def _out_of_memory(self) -> str:
        """The error message. What saves most memory comes first (counted in benchmarks/README.md); with gradient
        checkpointing a lower resolution saves little."""
        request, batch = self.request, self.request.config.batch_size
        leaner = "lowest" if self.fit == LOW else "low" if self.memory == "auto" else "auto"
        ways = [
            *([f'set memory to "{leaner}"'] if self._can_take_less() else []),
            *([f"lower batch_size (now {batch})"] if batch > 1 else []),
            *([f"lower rank (now {request.rank}) and min_rank"] if request.rank > 1 else []),
            *(["start ComfyUI with --fp8_e4m3fn-unet"] if self.model.model_dtype().itemsize > 1 else []),
            f"lower resolution (now {request.resolution}) or the number of layers",
        ]
        return f"Memory ran out in step {self.trainer.step + 1}; {', or '.join(ways)}."

    @property
    def schedule(self) -> RankSchedule:
        """The request's schedule; for a method without ranks, all ranks of the widest layer at every timestep."""
        if not METHODS[self.request.method].of_weight:
            return self.request.schedule
        widest = max(adapter.rank for adapter in self.adapters.values())
        return RankSchedule(widest, widest)

    def file_bytes(self, dtype: torch.dtype) -> int:
        """An upper bound of the size in bytes of the T-LoRA's file in dtype."""
        values = sum(adapter.group * adapter.rank * sum(self.shapes[name]) for name, adapter in self.adapters.items())
        return values * dtype.itemsize + _OF_A_LAYER * len(self.adapters) + _OF_A_FILE

    def go_on_from(self, state: Mapping) -> None:
        """Resumes a run of the same request from its run state; see Trainer.load_state_dict."""
        with torch.inference_mode(False):
            self.trainer.load_state_dict(state)

    def tlora(self) -> TLoRAFile:
        """The current T-LoRA, in float32 on the CPU."""
        request = self.request
        with torch.inference_mode(False), torch.no_grad(), self.trainer.result() as adapters:
            layers = {path: adapter.detach().to("cpu") for path, adapter in adapters.items()}
            ranks = effective_rank_of_b(adapters)
        training = {
            **asdict(request.config),
            "start": request.start,
            "resolution": request.resolution,
            "framing": request.framing,
            "flip": request.flip,
            "layers": request.layers,
            "images": self.images,
            "steps_done": self.trainer.step,
            B_KEY: ranks,
        }
        return TLoRAFile(
            layers=layers,
            method=request.method,
            schedule=self.schedule,
            num_timesteps=self.num_timesteps,
            noise_domain=domain(self.sampling),
            base_model=type(self.model.model.model_config).__name__.lower(),
            token=request.token,
            class_word=request.class_word,
            training=training,
            heights=self.heights,
        )

    def draw(self, tlora: TLoRAFile, prompts: Sequence[str], seeds: Sequence[int]) -> list[Tensor]:
        """The pictures that the model draws with a T-LoRA; see `draw`."""
        model = apply_tlora(self.model, tlora)
        return draw(model, self.clip, self.vae, prompts, self.request.resolution, seeds)

    def _check_config(self) -> None:
        """Raises TLoRAError for settings that this model cannot use, now instead of in the middle of a step."""
        config = self.request.config
        if config.orthogonality and METHODS[self.request.method].of_weight:
            raise TLoRAError(f"orthogonality is for low-rank methods; set it to 0 with {self.request.method}.")
        draw_sigmas(self.sampling, 1, torch.Generator(), config.timestep_density, config.noise_from, config.noise_to)
        if config.min_snr_gamma:
            min_snr_weight(self.sampling, self.sampling.sigma_max.reshape(1), config.min_snr_gamma)

    def _encode(self, encoder: Encoder, images: Sequence[TrainingImage], with_class: bool = False) -> list[Sample]:
        """with_class: also each caption without the token."""
        request, samples = self.request, []
        for image in counted(images, counting("encoding pictures", self.node_id, "picture")):
            picture = frame(image, request.framing, request.resolution, encoder.unit)
            if picture.mask is not None and covers_border(picture.mask) and not self.remark:
                self.remark = BORDER_IS_COVERED
                logging.warning("[T-LoRA] %s", self.remark)
            caption = caption_of(image.caption, request.token, request.class_word)
            of_class = class_caption_of(image.caption, request.token, request.class_word) if with_class else None
            samples.append(encoder.sample(picture, caption, of_class))
            if request.flip:
                mirrored = replace(
                    picture, pixels=picture.pixels.flip(1), mask=None if picture.mask is None else picture.mask.flip(1)
                )
                samples.append(encoder.sample(mirrored, caption, of_class))
        return samples

    def _adapters(self, layers: Mapping[LayerName, TargetLayer]) -> Adapters:
        request, method = self.request, METHODS[self.request.method]
        by_name: dict[str, TargetLayer] = {name: layer for name, layer in layers.items()}
        progress = counting("making the start", self.node_id, "layer")
        settings = request.method, request.start, by_name, request.rank, request.config.seed
        if not method.of_weight and not (method.is_orthogonal and "weight" in request.start):
            return make_adapters(*settings, self.model.load_device, progress)
        with training_session(self.model):
            return make_adapters(*settings, self.model.load_device, progress)
