"""Optional inputs of a training beyond the Train node's own: more pictures and more settings."""

from comfy_api.latest import io

from ..tlora_core.hosts.comfy.page.pictures import kept_for_page
from ..tlora_core.training.config import DENSITIES, LR_SCHEDULES, OPTIMIZERS, TrainConfig
from ..tlora_core.training.dataset import training_list
from .sockets import CATEGORY, IMAGES, OPTIONS, captions_input, mask_input, unlisted

_DEFAULT = TrainConfig()


class TLoRAImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TLoRAImages",
            display_name="T-LoRA Images",
            category=CATEGORY,
            is_input_list=True,
            is_output_node=True,  # it shows its pictures, so it runs alone, and before a training that takes long
            search_aliases=["dataset", "caption"],
            description="Pictures with their captions and masks for Train T-LoRA. Chain several of these nodes for "
            "pictures of different sizes.",
            inputs=[
                io.Image.Input("image", tooltip="One picture or several: a batch of one size, or a list of any sizes."),
                mask_input(),
                captions_input(),
                IMAGES.Input(
                    "before",
                    optional=True,
                    tooltip="Pictures of another T-LoRA Images node, to which this node adds its own.",
                ),
            ],
            outputs=[IMAGES.Output(display_name="images", tooltip="For Train T-LoRA or the next T-LoRA Images.")],
        )

    @classmethod
    def execute(cls, image, mask=(), captions=("",), before=((),)):
        before = unlisted({"before": before})["before"]
        own = training_list(image, captions, mask)
        return io.NodeOutput((*before, *own), ui=kept_for_page(own))


class TLoRATrainingOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TLoRATrainingOptions",
            display_name="T-LoRA Training Options",
            category=CATEGORY,
            search_aliases=["optimizer", "learning rate schedule", "prior preservation"],
            description="Training settings that most people never need to change. The defaults are the paper's.",
            inputs=[*_optimizer(), *_gradients(), *_noise_levels(), *_latents_and_mask(), *_prior(), *_preservation()],
            outputs=[OPTIONS.Output(display_name="options", tooltip="For Train T-LoRA.")],
        )

    @classmethod
    def execute(cls, prior_images=(), **settings):
        return io.NodeOutput((settings, prior_images))


def _float(name: str, limits: tuple[float, float, float], tooltip: str, **more):
    """limits: smallest value, largest value, step."""
    least, most, step = limits
    default = getattr(_DEFAULT, name)
    return io.Float.Input(name, default=default, min=least, max=most, step=step, tooltip=tooltip, **more)


def _int(name: str, limits: tuple[int, int], tooltip: str):
    """limits: smallest value, largest value."""
    default = getattr(_DEFAULT, name)
    return io.Int.Input(name, default=default, min=limits[0], max=limits[1], tooltip=tooltip)


def _optimizer():
    return [
        io.Combo.Input(
            "optimizer",
            options=["auto", *OPTIMIZERS],
            default="auto",
            tooltip="auto: the model's default. prodigy finds its own learning rate (leave learning_rate at 0). "
            "adamw8bit is adamw with a quarter of its memory. schedule_free needs no lr_schedule.",
        ),
        io.Combo.Input(
            "lr_schedule",
            options=list(LR_SCHEDULES),
            default=_DEFAULT.lr_schedule,
            tooltip="How the learning rate changes after the warm-up. constant is the paper's; cosine and linear end "
            "gently.",
        ),
        _int(
            "warmup_steps",
            (0, 100000),
            "Steps over which the learning rate rises from 0. More: a gentler start.",
        ),
        _float(
            "weight_decay",
            (0.0, 10.0, 1e-5),
            "Pulls the weights towards 0 at each step. More keeps the T-LoRA's weights smaller.",
            round=False,
        ),
    ]


def _gradients():
    return [
        _int(
            "gradient_accumulation",
            (1, 1024),
            "Batches per step. Like a larger batch_size, more is steadier and slower, but needs no more memory.",
        ),
        _float(
            "max_grad_norm",
            (0.0, 1000.0, 0.1),
            "Clips gradients to this norm to absorb spikes: 1 is usual, lower clips more. 0: no clipping; with "
            "optimizer auto, 1 on FLUX, SD3 and similar models.",
        ),
        _float(
            "ema_decay",
            (0.0, 0.9999, 0.001),
            "Uses a moving average of the weights as the result: 0.99 averages over about 100 steps, higher values "
            "over more. 0: off.",
            round=False,
        ),
        _float(
            "orthogonality",
            (0.0, 100.0, 0.001),
            "Weight of a loss that keeps the ranks orthogonal (equation 4 of the paper, its alternative to the "
            "orthogonal start). More keeps them closer to it. 0: off.",
            round=False,
        ),
    ]


def _noise_levels():
    return [
        _float(
            "min_snr_gamma",
            (0.0, 100.0, 0.5),
            "Min-SNR weighting of noise levels, which gives nearly clean pictures less weight: 5 is usual, lower "
            "gives them even less. For noise and v prediction. 0: off, as in the paper.",
        ),
        io.Combo.Input(
            "timestep_density",
            options=list(DENSITIES),
            default=_DEFAULT.timestep_density,
            tooltip="How noise levels are drawn. logit_normal and mode favour the middle and are for flow models.",
        ),
        _float(
            "noise_from",
            (0.0, 1.0, 0.01),
            "Cleanest noise level to train on, from 0 (clean) to 1 (pure noise). Higher leaves out fine detail.",
        ),
        _float(
            "noise_to",
            (0.0, 1.0, 0.01),
            "Noisiest level to train on, from 0 (clean) to 1 (pure noise). Lower leaves out the levels where pose and "
            "layout are decided: less of the background is copied, and less of the subject is learnt.",
        ),
    ]


def _latents_and_mask():
    return [
        io.Boolean.Input(
            "fresh_latents",
            default=_DEFAULT.fresh_latents,
            tooltip="On: draw a new sample from the VAE's distribution at each step, as in the paper. Off: always use "
            "its mean.",
        ),
        _float(
            "outside_mask",
            (0.0, 1.0, 0.05),
            "Weight of the loss outside a picture's mask. 0: nothing there is learnt. 1: as much as inside.",
        ),
    ]


def _prior():
    return [
        _float(
            "prior_weight",
            (0.0, 10.0, 0.1),
            "Weight of the loss on pictures of the class, so that other dogs stay as they are: 1 is usual, more "
            "preserves them more. Doubles the training time. 0: off.",
        ),
        _int(
            "prior_count",
            (1, 1000),
            "Pictures of the class that the model draws itself if none are connected. More show more variety and take "
            "longer.",
        ),
        IMAGES.Input(
            "prior_images",
            optional=True,
            tooltip="Pictures of the class (not of the subject) for prior preservation.",
        ),
    ]


def _preservation():
    return [
        _float(
            "preservation_weight",
            (0.0, 10.0, 0.1),
            "Weight of a loss that keeps what the model draws for the caption without the token, so that other dogs "
            "stay as they are: like prior_weight, without pictures of the class. Takes 2.5 times the training time. 0: "
            "off.",
        ),
    ]
