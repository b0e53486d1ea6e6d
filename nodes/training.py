"""Optional inputs of a training beyond the Train node's own: more pictures and more settings."""

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
            description="Training settings that most people never need to change. The defaults are the paper's.",
            inputs=[
                io.Combo.Input(
                    "optimizer",
                    options=["auto", *OPTIMIZERS],
                    default="auto",
                    tooltip="auto: the model's default. prodigy finds its own learning rate (leave learning_rate at "
                    "0). adamw8bit is adamw with a quarter of its memory. schedule_free needs no lr_schedule.",
                ),
                io.Combo.Input(
                    "lr_schedule",
                    options=list(LR_SCHEDULES),
                    default=d.lr_schedule,
                    tooltip="How the learning rate changes after the warm-up. constant is the paper's; cosine and "
                    "linear end gently.",
                ),
                io.Int.Input(
                    "warmup_steps",
                    default=d.warmup_steps,
                    min=0,
                    max=100000,
                    tooltip="Steps over which the learning rate rises from 0. More: a gentler start.",
                ),
                io.Float.Input(
                    "weight_decay",
                    default=d.weight_decay,
                    min=0.0,
                    max=10.0,
                    step=1e-5,
                    round=False,
                    tooltip="Pulls the weights towards 0 at each step. More keeps the T-LoRA's weights smaller.",
                ),
                io.Int.Input(
                    "gradient_accumulation",
                    default=d.gradient_accumulation,
                    min=1,
                    max=1024,
                    tooltip="Batches per step. Like a larger batch_size, more is steadier and slower, but needs no "
                    "more memory.",
                ),
                io.Float.Input(
                    "max_grad_norm",
                    default=d.max_grad_norm,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip="Clips gradients to this norm to absorb spikes: 1 is usual, lower clips more. 0: no "
                    "clipping; with optimizer auto, 1 on FLUX, SD3 and similar models.",
                ),
                io.Float.Input(
                    "ema_decay",
                    default=d.ema_decay,
                    min=0.0,
                    max=0.9999,
                    step=0.001,
                    round=False,
                    tooltip="Uses a moving average of the weights as the result: 0.99 averages over about 100 "
                    "steps, higher values over more. 0: off.",
                ),
                io.Float.Input(
                    "orthogonality",
                    default=d.orthogonality,
                    min=0.0,
                    max=100.0,
                    step=0.001,
                    round=False,
                    tooltip="Weight of a loss that keeps the ranks orthogonal (equation 4 of the paper, its "
                    "alternative to the orthogonal start). More keeps them closer to it. 0: off.",
                ),
                io.Float.Input(
                    "min_snr_gamma",
                    default=d.min_snr_gamma,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    tooltip="Min-SNR weighting of noise levels, which gives nearly clean pictures less weight: 5 is "
                    "usual, lower gives them even less. For noise and v prediction. 0: off, as in the paper.",
                ),
                io.Combo.Input(
                    "timestep_density",
                    options=list(DENSITIES),
                    default=d.timestep_density,
                    tooltip="How noise levels are drawn. logit_normal and mode favour the middle and are for flow "
                    "models.",
                ),
                io.Float.Input(
                    "noise_from",
                    default=d.noise_from,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Cleanest noise level to train on, from 0 (clean) to 1 (pure noise). Higher leaves out "
                    "fine detail.",
                ),
                io.Float.Input(
                    "noise_to",
                    default=d.noise_to,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Noisiest level to train on, from 0 (clean) to 1 (pure noise). Lower leaves out the "
                    "levels where pose and layout are decided: less of the background is copied, and less "
                    "of the subject is learnt.",
                ),
                io.Boolean.Input(
                    "fresh_latents",
                    default=d.fresh_latents,
                    tooltip="On: draw a new sample from the VAE's distribution at each step, as in the paper. Off: "
                    "always use its mean.",
                ),
                io.Float.Input(
                    "outside_mask",
                    default=d.outside_mask,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Weight of the loss outside a picture's mask. 0: nothing there is learnt. 1: as much as "
                    "inside.",
                ),
                io.Float.Input(
                    "prior_weight",
                    default=d.prior_weight,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    tooltip="Weight of the loss on pictures of the class, so that other dogs stay as they are: 1 is "
                    "usual, more preserves them more. Doubles the training time. 0: off.",
                ),
                io.Int.Input(
                    "prior_count",
                    default=d.prior_count,
                    min=1,
                    max=1000,
                    tooltip="Pictures of the class that the model draws itself if none are connected. More show "
                    "more variety and take longer.",
                ),
                IMAGES.Input(
                    "prior_images",
                    optional=True,
                    tooltip="Pictures of the class (not of the subject) for prior preservation.",
                ),
            ],
            outputs=[OPTIONS.Output(display_name="options", tooltip="For Train T-LoRA.")],
        )

    @classmethod
    def execute(cls, prior_images=(), **settings):
        return io.NodeOutput((settings, prior_images))
