"""The inputs of Train T-LoRA from Image, in groups.

Saved workflows store values in the order of the inputs, so a new input must come last.
"""

from comfy_api.latest import io

from ..tlora_core.hosts.comfy.encoders import scorer_names
from ..tlora_core.hosts.comfy.training.keeping import KEEPS, LAST, NO_SCORER, RERUNS, Keeping
from ..tlora_core.hosts.comfy.training.personalize import MEMORY
from ..tlora_core.method.adapters import METHODS
from ..tlora_core.method.starts import STARTS
from ..tlora_core.training.dataset import FRAMINGS
from .sockets import (
    IMAGES,
    OPTIONS,
    alpha_input,
    captions_input,
    curve_input,
    file_name_input,
    mask_input,
    rank_inputs,
)


def train_inputs():
    return [
        *_models_and_subject(),
        _method(),
        *rank_inputs(),
        *_steps(),
        file_name_input(),
        alpha_input(),
        *_start_and_batch(),
        mask_input(),
        *_more_data(),
        captions_input(advanced=True),
        curve_input(),
        *_layers_and_framing(),
        *_validation(),
        *_saving(),
        *_host_and_files(),
        *_scores(),
    ]


def _models_and_subject():
    return [
        io.Model.Input(
            "model",
            tooltip="The model to train for. It is used in place, without a second copy, and its own weights stay "
            "unchanged.",
        ),
        io.Clip.Input("clip", tooltip="The model's text encoder. It is not trained."),
        io.Vae.Input("vae", tooltip="The model's VAE. It is not trained."),
        io.Image.Input(
            "image",
            tooltip="One picture of the subject, or several as a batch or list. The centre square is used unless "
            "framing says otherwise.",
        ),
        io.String.Input("token", default="sks", tooltip="A rare word that stands for the subject in your prompts."),
        io.String.Input(
            "class_word",
            default="dog",
            tooltip='What kind of thing the subject is. Use both words in your prompts: "sks dog".',
        ),
    ]


def _method():
    return io.Combo.Input(
        "method",
        options=[*METHODS, "auto"],
        default="auto",
        advanced=True,
        tooltip="auto: the model's default: tlora on U-Nets (SD1.5, SD2, SDXL), vanilla_tlora (plain start with "
        "the mask) on FLUX, SD3 and similar models. ortho_lora: orthogonal start without the mask. "
        "lora: neither. oft, gsoft (rank is the number of blocks) and svdiff (no rank): for comparison; "
        "large files.",
    )


def _steps():
    return [
        io.Int.Input(
            "steps",
            default=0,
            min=0,
            max=100000,
            tooltip="Number of training steps. 0: the model's default, from the paper: 800 on U-Nets (lora, "
            "vanilla_tlora 500), 500 on FLUX and similar models (lora 400). Fewer may not learn the "
            "subject; more may copy the picture.",
        ),
        io.Float.Input(
            "learning_rate",
            default=0.0,
            min=0.0,
            max=1.0,
            step=1e-6,
            round=False,
            advanced=True,
            tooltip="Size of each step. 0: the model's default: 1e-4 on U-Nets; on FLUX and similar models Prodigy "
            "finds it, and any other value selects AdamW. Higher learns faster and diverges sooner; lower "
            "needs more steps.",
        ),
        io.Int.Input(
            "resolution",
            default=0,
            min=0,
            max=4096,
            step=8,
            advanced=True,
            tooltip="Side of the square training picture, in pixels. 0: the model's own, which is best. Lower needs "
            "less memory and learns less detail.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**32 - 1,
            control_after_generate=False,
            advanced=True,
            tooltip="The same seed trains the same T-LoRA. A different seed gives a different T-LoRA.",
        ),
    ]


def _start_and_batch():
    return [
        io.Combo.Input(
            "start",
            options=list(STARTS),
            default="last_random",
            advanced=True,
            tooltip="Source of the orthogonal factors: the last, middle or principal singular vectors of a random "
            "matrix or of the layer's weight. last_random is as the paper describes it, "
            "last_random_published as its authors' code draws it.",
        ),
        io.Int.Input(
            "batch_size",
            default=1,
            min=1,
            max=64,
            advanced=True,
            tooltip="Samples per step, each with its own noise level. More is steadier, but slower, and needs more "
            "memory.",
        ),
    ]


def _more_data():
    return [
        IMAGES.Input(
            "more_images",
            optional=True,
            tooltip="More pictures of the subject, from T-LoRA Images, with their own sizes, captions and masks.",
        ),
        OPTIONS.Input(
            "options", optional=True, tooltip="From T-LoRA Training Options. Unconnected: the paper's settings."
        ),
    ]


def _layers_and_framing():
    return [
        io.String.Input(
            "layers",
            default="attention",
            optional=True,
            advanced=True,
            tooltip='Layers to train: attention (the paper\'s choice), "attention+feed-forward", or patterns of '
            'layer names separated by commas, such as "*.attn2.*". More layers learn more and copy more.',
        ),
        io.Combo.Input(
            "framing",
            options=list(FRAMINGS),
            default=FRAMINGS[0],
            optional=True,
            advanced=True,
            tooltip="centre square: crop to a square, as in the paper. keep aspect ratio: keep the picture's shape "
            "at the same area and crop almost nothing.",
        ),
        io.Boolean.Input(
            "flip",
            default=False,
            optional=True,
            advanced=True,
            tooltip="Also learn from each picture mirrored. Not for subjects with writing or other asymmetry.",
        ),
    ]


def _validation():
    return [
        io.String.Input(
            "validation_prompts",
            default="",
            multiline=True,
            optional=True,
            tooltip="Prompts to draw during training, one per line. {token} and {class_word} stand for these "
            "inputs, {} for both.",
        ),
        io.Int.Input(
            "validate_every",
            default=0,
            min=0,
            max=100000,
            optional=True,
            tooltip="Steps between validation pictures. Fewer show more and take longer. 0: never.",
        ),
    ]


def _saving():
    return [
        io.Int.Input(
            "checkpoint_every",
            default=100,
            min=0,
            max=100000,
            optional=True,
            advanced=True,
            tooltip="Steps between saves of the run state, from which training resumes after a cancel, a crash or a "
            "restart. Fewer: less is lost, and it writes more often. 0: never.",
        ),
        io.Boolean.Input(
            "checkpoint_files",
            default=False,
            optional=True,
            advanced=True,
            tooltip="Also save a T-LoRA file each time the run state is saved, to compare the files later.",
        ),
        io.Boolean.Input(
            "save_on_cancel",
            default=False,
            optional=True,
            advanced=True,
            tooltip="On cancel, save what was learnt as a T-LoRA file and as the run state. Stop and keep always does.",
        ),
        io.Combo.Input(
            "rerun",
            options=list(RERUNS),
            default=RERUNS[0],
            optional=True,
            advanced=True,
            tooltip="What to do if the same training was run before. auto: use its result, or resume it if it did "
            "not finish. continue: resume it even if it was stopped. restart: train again, once for each "
            "change of the graph; then set it back to auto, or an interrupted training starts over.",
        ),
    ]


def _host_and_files():
    return [
        io.Boolean.Input(
            "wandb",
            default=False,
            optional=True,
            advanced=True,
            tooltip="Also send the loss, the scores and the validation pictures to Weights & Biases. Needs the wandb "
            "package and your login.",
        ),
        io.Combo.Input(
            "memory",
            options=list(MEMORY),
            default=MEMORY[0],
            optional=True,
            advanced=True,
            tooltip="fast: keep all that a step needs. low: recompute parts of it (gradient checkpointing), for about "
            "a third more time. lowest: also leave in RAM the weights that do not fit beside the rest. auto: the "
            "fastest that fits.",
        ),
        io.Boolean.Input(
            "thumbnail",
            default=True,
            optional=True,
            advanced=True,
            tooltip="Store the last picture of the first validation prompt in the file, where everyone who gets the "
            "file can see it. A training picture is never stored.",
        ),
    ]


def _scores():
    return [
        io.ClipVision.Input(
            "clip_vision",
            optional=True,
            tooltip="From Load CLIP Vision. Scores the pictures of each validation: likeness to the subject, and "
            "copying of its background. Unconnected: scorer decides.",
        ),
        io.Combo.Input(
            "scorer",
            options=scorer_names(),
            default=NO_SCORER,
            optional=True,
            advanced=True,
            tooltip="Scores the pictures of each validation: a CLIP or DINO folder in models/clip_vision, or tiny "
            "world for the pack's own small model. Without validation_prompts, it draws scenes of its own. none: no "
            "scores.",
        ),
        io.Combo.Input(
            "keep",
            options=list(KEEPS),
            default=LAST,
            optional=True,
            advanced=True,
            tooltip="Which step the file holds. last: the last one. best: the best by the scores. stop when past it: "
            "the best, and training ends when patience validations in a row have brought no gain.",
        ),
        io.Int.Input(
            "patience",
            default=Keeping.patience,
            min=1,
            max=1000,
            optional=True,
            advanced=True,
            tooltip="For keep: validations without gain after which the training ends. More is surer and takes longer.",
        ),
        io.Int.Input(
            "score_seeds",
            default=Keeping.score_seeds,
            min=1,
            max=64,
            optional=True,
            advanced=True,
            tooltip="Pictures of each prompt that are scored. More make the scores steadier and take longer to draw.",
        ),
    ]
