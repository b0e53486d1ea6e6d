"""Train T-LoRA from Image."""

from comfy_api.latest import io

from ..tlora_core.hosts.comfy.files import told_of
from ..tlora_core.hosts.comfy.page.rank import show_active_rank
from ..tlora_core.hosts.comfy.page.training import shown_when_it_fails
from ..tlora_core.hosts.comfy.sampling import apply_tlora
from ..tlora_core.hosts.comfy.training.before_run import wrong_training
from ..tlora_core.hosts.comfy.training.personalize import MEMORY, filled_in
from ..tlora_core.hosts.comfy.training.run import RERUNS, Keeping, stopped_runs, train_or_find
from ..tlora_core.method.adapters import METHODS
from ..tlora_core.method.starts import STARTS
from ..tlora_core.reports.plot import loss_curve
from ..tlora_core.training.dataset import FRAMINGS, training_list
from ..tlora_core.training.images import to_tensor
from .sockets import (
    CATEGORY,
    IMAGES,
    OPTIONS,
    SEARCH,
    TLORA,
    alpha_input,
    captions_input,
    curve_input,
    file_name_input,
    mask_input,
    rank_inputs,
    unlisted,
)


class TrainTLoRAFromImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TLoRATrainFromImage",
            display_name="Train T-LoRA from Image",
            category=CATEGORY,
            is_input_list=True,  # one training of a list of pictures, not one of each
            is_output_node=True,  # it saves a file: a graph may end here
            search_aliases=[*SEARCH, "lora training", "dreambooth", "personalize", "finetune"],
            description="Teaches the model a new object, pet or character from a single image (or a few), without "
            "copying "
            "that image's pose and background.",
            # Saved workflows keep values by the order of inputs: a new one comes last.
            inputs=[*_models_and_subject(), *_training(), *_data(), *_run()],
            outputs=[
                TLORA.Output(display_name="T-LoRA", tooltip="For Apply, Save, Export, Bake, Info, Sweep and Prompts."),
                io.Model.Output(tooltip="The model with the T-LoRA, ready for a sampler."),
                io.String.Output(display_name="file", tooltip="The name in Load T-LoRA's list."),
                io.Image.Output(display_name="loss", tooltip="The loss curve."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, rerun=RERUNS[:1], **others):
        """To the host a graph that has not changed need not be run again; a training that was stopped is to go on all
        the same."""
        return stopped_runs() if "continue" in rerun else 0

    @classmethod
    def validate_inputs(
        cls,
        token=None,
        class_word=None,
        method=None,
        rank=None,
        min_rank=None,
        file_name=None,
        curve="",
        validation_prompts="",
        validate_every=0,
    ):
        return (
            wrong_training(
                {
                    "token": token,
                    "class_word": class_word,
                    "method": method,
                    "rank": rank,
                    "min_rank": min_rank,
                    "file_name": file_name,
                    "curve": curve,
                    "validation_prompts": validation_prompts,
                    "validate_every": validate_every,
                }
            )
            or True
        )

    @classmethod
    @shown_when_it_fails
    def execute(cls, image, captions=("",), mask=(), **lists):
        return _trained(cls.hidden.unique_id, training_list(image, captions, mask), **unlisted(lists))


def _trained(
    node_id,
    images,
    model,
    clip,
    vae,
    token,
    class_word,
    method,
    rank,
    min_rank,
    steps,
    learning_rate,
    resolution,
    seed,
    file_name,
    alpha,
    start,
    batch_size,
    more_images=(),
    options=({}, ()),
    curve="",
    layers="attention",
    framing=FRAMINGS[0],
    flip=False,
    **keeping,
):
    settings, prior = options
    request = filled_in(
        model,
        token=token,
        class_word=class_word,
        method=method,
        rank=rank,
        min_rank=min_rank,
        alpha=alpha,
        start=start,
        resolution=resolution,
        framing=framing,
        flip=flip,
        curve=curve,
        layers=layers,
        config={**settings, "steps": steps, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed},
    )
    prompts = tuple(line.strip() for line in keeping.pop("validation_prompts", "").splitlines() if line.strip())
    done = train_or_find(
        model,
        clip,
        vae,
        [*images, *more_images],
        request,
        Keeping(validation_prompts=prompts, **keeping),
        file_name,
        node_id,
        prior,
    )
    return io.NodeOutput(
        done.tlora,
        show_active_rank(apply_tlora(model, done.tlora), done.tlora.schedule, node_id),
        done.file,
        to_tensor(loss_curve(done.losses)),
        ui=told_of([done.file], done.file),
    )


def _models_and_subject():
    """What is trained, and on what."""
    return [
        io.Model.Input(
            "model",
            tooltip="The model to train for. It is trained in place, without a second copy, and "
            "its own weights stay as they are.",
        ),
        io.Clip.Input("clip", tooltip="The model's text encoder; it is not trained."),
        io.Vae.Input("vae", tooltip="The model's VAE; it is not trained."),
        io.Image.Input(
            "image",
            tooltip="One picture of the subject, or a batch or list of several. Its centre square is used; see "
            "framing.",
        ),
        io.String.Input("token", default="sks", tooltip="A rare word that will stand for the subject in your prompts."),
        io.String.Input(
            "class_word", default="dog", tooltip='What kind of thing it is. Prompt later with both: "sks dog".'
        ),
    ]


def _training():
    """How it is trained: what every training needs."""
    return [
        io.Combo.Input(
            "method",
            options=[*METHODS, "auto"],
            default="auto",
            advanced=True,
            tooltip="auto: tlora for U-Nets (SD1.5, SD2, SDXL), vanilla_tlora (plain start with the mask) for FLUX, "
            "SD3 and "
            "their like. ortho_lora: orthogonal start without the mask. lora: neither. oft, gsoft (rank: their "
            "blocks), svdiff (no rank): to compare with; large files.",
        ),
        *rank_inputs(),
        io.Int.Input(
            "steps",
            default=0,
            min=0,
            max=100000,
            tooltip="Training steps. 0: the paper's, 800 on U-Nets (lora, vanilla_tlora 500), 500 on FLUX and the "
            "like (lora 400). "
            "Fewer may not learn the subject, more may copy the image.",
        ),
        io.Float.Input(
            "learning_rate",
            default=0.0,
            min=0.0,
            max=1.0,
            step=1e-6,
            round=False,
            advanced=True,
            tooltip="Size of the steps; 0: 1e-4 on U-Nets, found by Prodigy on FLUX and the like, where a value of "
            "your own means AdamW. "
            "Higher learns faster and breaks sooner; lower needs more steps.",
        ),
        io.Int.Input(
            "resolution",
            default=0,
            min=0,
            max=4096,
            step=8,
            advanced=True,
            tooltip="Side of the square training picture in pixels. 0: the model's own, which is best. "
            "Lower needs less memory and learns less detail.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**32 - 1,
            control_after_generate=False,
            advanced=True,
            tooltip="The same seed trains the same T-LoRA; another one another.",
        ),
        file_name_input(),
        alpha_input(),
        io.Combo.Input(
            "start",
            options=list(STARTS),
            default="last_random",
            advanced=True,
            tooltip="Where the orthogonal factors come from: the last, middle or principal singular vectors of a "
            "random "
            "matrix or of the layer's weight. last_random is the paper's; last_random_published is as its authors' "
            "code draws it.",
        ),
        io.Int.Input(
            "batch_size",
            default=1,
            min=1,
            max=64,
            advanced=True,
            tooltip="Samples a step, each with its own noise level. More is steadier, slower and needs more memory.",
        ),
    ]


def _data():
    """Optional: more about the data and the adapter."""
    return [
        mask_input(),
        IMAGES.Input(
            "more_images",
            optional=True,
            tooltip="More pictures of the subject, from T-LoRA Images: of other sizes, with captions or masks of "
            "their own.",
        ),
        OPTIONS.Input(
            "options", optional=True, tooltip="From T-LoRA Training Options; unconnected, the paper's settings."
        ),
        captions_input(advanced=True),
        curve_input(),
        io.String.Input(
            "layers",
            default="attention",
            optional=True,
            advanced=True,
            tooltip='attention (the paper), "attention+feed-forward", or patterns of layer names such as "*.attn2.*", '
            "with "
            "commas between. More layers learn more and copy more.",
        ),
        io.Combo.Input(
            "framing",
            options=list(FRAMINGS),
            default=FRAMINGS[0],
            optional=True,
            advanced=True,
            tooltip="centre square: cut square, as in the paper. keep aspect ratio: as much area in the picture's own "
            "shape, with next to nothing cut off.",
        ),
        io.Boolean.Input(
            "flip",
            default=False,
            optional=True,
            advanced=True,
            tooltip="Learn from each picture mirrored, too. Not for subjects with writing or a parting on one side.",
        ),
    ]


def _run():
    """Optional: what is seen and kept on the way."""
    return [
        io.String.Input(
            "validation_prompts",
            default="",
            multiline=True,
            optional=True,
            tooltip="Prompts to draw while training, one a line; {token} and {class_word} stand for these inputs, {} "
            "for both.",
        ),
        io.Int.Input(
            "validate_every",
            default=0,
            min=0,
            max=100000,
            optional=True,
            tooltip="Steps between such drawings. More often shows more and takes longer. 0: never.",
        ),
        io.Int.Input(
            "checkpoint_every",
            default=100,
            min=0,
            max=100000,
            optional=True,
            advanced=True,
            tooltip="Steps between checkpoints, from which a training goes on after a cancel, a crash or a restart. "
            "Fewer: less is "
            "lost then, and it writes more often. 0: none.",
        ),
        io.Boolean.Input(
            "checkpoint_files",
            default=False,
            optional=True,
            advanced=True,
            tooltip="Save a T-LoRA file at each checkpoint too, to compare them later.",
        ),
        io.Boolean.Input(
            "save_on_cancel",
            default=False,
            optional=True,
            advanced=True,
            tooltip="A cancel saves what has been learnt, as a file and as a checkpoint. Stop and keep always does.",
        ),
        io.Combo.Input(
            "rerun",
            options=list(RERUNS),
            default=RERUNS[0],
            optional=True,
            advanced=True,
            tooltip="When the same training was run before. auto: take its result, or go on with it if it did not end. "
            "continue: go on also if it was stopped. restart: train anew, once for each change of the graph; then set "
            "it "
            "back to auto, as otherwise an interrupted training starts over.",
        ),
        io.Boolean.Input(
            "wandb",
            default=False,
            optional=True,
            advanced=True,
            tooltip="Send the loss and the drawings to Weights & Biases too; needs the package wandb and your login.",
        ),
        io.Combo.Input(
            "memory",
            options=list(MEMORY),
            default=MEMORY[0],
            optional=True,
            advanced=True,
            tooltip="fast keeps what a step needs. low computes parts of it again: less memory, more time. "
            "auto: fast where it fits, else low.",
        ),
        io.Boolean.Input(
            "thumbnail",
            default=True,
            optional=True,
            advanced=True,
            tooltip="Put the last picture of the first validation prompt into the file, where all who get it can see "
            "it. A "
            "training picture is never put there.",
        ),
    ]
