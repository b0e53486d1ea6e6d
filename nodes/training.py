"""What a training may be given beyond the Train node's own inputs: more pictures, and settings."""

from comfy_api.latest import io

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
            search_aliases=["dataset", "caption"],
            description="Pictures with their captions and masks for Train T-LoRA. Chain several of these nodes for "
            "pictures of "
            "different sizes.",
            inputs=[
                io.Image.Input(
                    "image", tooltip="One picture, or several: a batch of one size, or a list of any sizes."
                ),
                mask_input(),
                captions_input(),
                IMAGES.Input(
                    "before", optional=True, tooltip="Pictures of another T-LoRA Images node, to which these are added."
                ),
            ],
            outputs=[IMAGES.Output(display_name="images", tooltip="For Train T-LoRA, or the next T-LoRA Images.")],
        )

    @classmethod
    def execute(cls, image, mask=(), captions=("",), before=((),)):
        before = unlisted({"before": before})["before"]
        return io.NodeOutput((*before, *training_list(image, captions, mask)))


class TLoRATrainingOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        d = _DEFAULT
        return io.Schema(
            node_id="TLoRATrainingOptions",
            display_name="T-LoRA Training Options",
            category=CATEGORY,
            search_aliases=["optimizer", "learning rate schedule", "prior preservation"],
            description="Settings of the training that most people never need to change. As they stand they are the "
            "paper's.",
            inputs=[
                io.Combo.Input(
                    "optimizer",
                    options=["auto", *OPTIMIZERS],
                    default="auto",
                    tooltip="auto: what suits the model. prodigy finds its own learning rate (leave learning_rate at "
                    "0). "
                    "adamw8bit saves memory and needs bitsandbytes. schedule_free needs no lr_schedule.",
                ),
                io.Combo.Input(
                    "lr_schedule",
                    options=list(LR_SCHEDULES),
                    default=d.lr_schedule,
                    tooltip="How the learning rate goes on after the warm-up. constant is the paper's; cosine and "
                    "linear end gently.",
                ),
                io.Int.Input(
                    "warmup_steps",
                    default=d.warmup_steps,
                    min=0,
                    max=100000,
                    tooltip="Steps over which the learning rate rises from 0. More is gentler at the start.",
                ),
                io.Float.Input(
                    "weight_decay",
                    default=d.weight_decay,
                    min=0.0,
                    max=10.0,
                    step=1e-5,
                    round=False,
                    tooltip="Pull of the weights towards 0 at each step. More holds the T-LoRA smaller.",
                ),
                io.Int.Input(
                    "gradient_accumulation",
                    default=d.gradient_accumulation,
                    min=1,
                    max=1024,
                    tooltip="Batches in one step. As a larger batch_size: steadier and slower, but without more "
                    "memory.",
                ),
                io.Float.Input(
                    "max_grad_norm",
                    default=d.max_grad_norm,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip="Limit of the gradients' norm, against single wild steps: 1 is usual, less holds them "
                    "back more. 0: none; "
                    "with optimizer auto, 1 on FLUX, SD3 and their like.",
                ),
                io.Float.Input(
                    "ema_decay",
                    default=d.ema_decay,
                    min=0.0,
                    max=0.9999,
                    step=0.001,
                    round=False,
                    tooltip="Keeps a moving average of the weights as the result: 0.99 averages over about 100 steps, "
                    "more "
                    "over more. 0: off.",
                ),
                io.Float.Input(
                    "orthogonality",
                    default=d.orthogonality,
                    min=0.0,
                    max=100.0,
                    step=0.001,
                    round=False,
                    tooltip="Weight of a loss that holds the ranks orthogonal (equation 4 of the paper, its "
                    "alternative to "
                    "the orthogonal start). More holds them closer to it. 0: off.",
                ),
                io.Float.Input(
                    "min_snr_gamma",
                    default=d.min_snr_gamma,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    tooltip="Min-SNR weighting of noise levels, 5 is usual: less weight for nearly clean pictures; "
                    "lower takes more away. "
                    "For noise and v prediction. 0: off, as in the paper.",
                ),
                io.Combo.Input(
                    "timestep_density",
                    options=list(DENSITIES),
                    default=d.timestep_density,
                    tooltip="How noise levels are drawn. logit_normal and mode prefer the middle and are for flow "
                    "models.",
                ),
                io.Float.Input(
                    "noise_from",
                    default=d.noise_from,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Cleanest noise level to train on, from 0 (clean) to 1 (pure noise). Higher leaves fine "
                    "detail out.",
                ),
                io.Float.Input(
                    "noise_to",
                    default=d.noise_to,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Noisiest level to train on, from 0 (clean) to 1 (pure noise). Lower leaves out where "
                    "pose and layout are "
                    "decided: less of the background is taken over, and less of the subject is learnt.",
                ),
                io.Boolean.Input(
                    "fresh_latents",
                    default=d.fresh_latents,
                    tooltip="On: a fresh sample of what the VAE sees at each step, as in the paper. Off: always its "
                    "mean.",
                ),
                io.Float.Input(
                    "outside_mask",
                    default=d.outside_mask,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Weight of the loss outside a picture's mask. 0 learns nothing of it, 1 as much as inside.",
                ),
                io.Float.Input(
                    "prior_weight",
                    default=d.prior_weight,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    tooltip="Weight of the loss on pictures of the class, so that other dogs stay dogs: 1 is usual, "
                    "more holds them "
                    "more. It doubles the time. 0: off.",
                ),
                io.Int.Input(
                    "prior_count",
                    default=d.prior_count,
                    min=1,
                    max=1000,
                    tooltip="Pictures of the class that the model draws for this itself, where none are connected. "
                    "More show more kinds of it "
                    "and take longer.",
                ),
                IMAGES.Input(
                    "prior_images", optional=True, tooltip="Pictures of the class (not of the subject) for the prior."
                ),
            ],
            outputs=[OPTIONS.Output(display_name="options", tooltip="For Train T-LoRA.")],
        )

    @classmethod
    def execute(cls, prior_images=(), **settings):
        return io.NodeOutput((settings, prior_images))
