"""Measures how good a T-LoRA is on the user's own pictures."""

from comfy_api.latest import io

from ..tlora_core.errors import TLoRAError
from ..tlora_core.hosts.comfy.encoders import (
    FOLDER,
    NONE,
    TINY_WORLD,
    VisionEncoder,
    encoder_names,
    load_encoder,
    load_scorer,
)
from ..tlora_core.reports.evaluation import best, evaluate, table
from ..tlora_core.reports.folder_encoder import CLIP_TYPES, DINO_TYPES
from ..tlora_core.reports.stopping import TOLERANCE
from .sockets import CATEGORY

SCORES = io.Custom("TLORA_SCORES")


class TLoRAEvaluate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TLoRAEvaluate",
            display_name="T-LoRA Evaluate",
            category=CATEGORY,
            is_input_list=True,
            search_aliases=["image similarity", "text similarity", "clip score", "dino", "best checkpoint"],
            description="Measures how much generated pictures look like the subject (IS), how well they follow the "
            "prompts (TS), how much else of the training picture they copy and how diverse they are, and says which "
            "T-LoRA file of a training to keep. Needs a CLIP model: from Load CLIP Vision, or in the transformers "
            "layout in models/clip_vision.",
            inputs=[*_pictures(), *_models(), *_comparison(), *_optional()],
            outputs=[
                io.String.Output(display_name="report", tooltip="A table of all scores, for Preview as Text."),
                io.String.Output(display_name="best", tooltip="The label of the best result."),
                io.Float.Output(display_name="IS", tooltip="Image similarity of these pictures."),
                io.Float.Output(display_name="TS", tooltip="Text similarity of these pictures."),
                SCORES.Output(display_name="scores", tooltip="For the next T-LoRA Evaluate."),
                io.Float.Output(
                    display_name="copying",
                    tooltip="How much else of the training picture is in the pictures of other prompts than "
                    "neutral_prompt.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        images,
        prompts,
        concept,
        clip_model,
        dino_model,
        label,
        token,
        neutral_prompt,
        tolerance,
        mask=(),
        concept_mask=(None,),
        before=((),),
        clip_vision=(None,),
        clip=(None,),
    ):
        if len(concept) != 1:
            raise TLoRAError(f"concept is a list of {len(concept)}; connect one picture or one batch.")
        encoder = _encoder(clip_model[0], clip_vision[0], clip[0])
        dino = None if dino_model[0] == NONE else load_encoder(dino_model[0], DINO_TYPES)
        done = evaluate(
            label[0], images, prompts, concept[0], encoder, dino, neutral_prompt[0], token[0], mask, concept_mask[0]
        )
        scores = (*before[0], done)
        return io.NodeOutput(
            table(scores, tolerance[0]),
            best(scores, tolerance[0]).label,
            done.image_similarity,
            done.text_similarity,
            scores,
            done.copying,
        )


def _encoder(name, vision, clip):
    if vision is not None:
        return VisionEncoder(vision, clip)
    if name == NONE:
        raise TLoRAError(
            "clip_model is none; connect clip_vision, or put a CLIP model for transformers into a folder of its own "
            f"in models/{FOLDER}, press R and choose it."
        )
    return load_scorer(name)


def _pictures():
    return [
        io.Image.Input("images", tooltip="Generated pictures, one batch for each prompt."),
        io.String.Input("prompts", force_input=True, tooltip="The prompt of each batch, from Prompts (T-LoRA)."),
        io.Image.Input("concept", tooltip="The pictures the T-LoRA was trained on."),
    ]


def _models():
    return [
        io.Combo.Input(
            "clip_model",
            options=[*encoder_names(CLIP_TYPES), NONE, TINY_WORLD],
            tooltip=f"Folder of a CLIP model in models/{FOLDER}: config.json, model.safetensors or "
            "pytorch_model.bin, preprocessor_config.json and its tokenizer. The paper uses ViT-B/32. tiny world: for "
            "pictures of the pack's own small model. Not used while clip_vision is connected.",
        ),
        io.Combo.Input(
            "dino_model",
            options=[NONE, *encoder_names(DINO_TYPES)],
            tooltip="Folder of a DINO model in the same place, for a second measure of likeness that weighs "
            "details more. none: no second measure.",
        ),
    ]


def _comparison():
    return [
        io.String.Input(
            "label",
            default="checkpoint",
            tooltip="Name of what made these pictures, for example the T-LoRA file. It names the best "
            "result, so it must differ from the other labels.",
        ),
        io.String.Input("token", default="sks", tooltip="Removed from the prompts, because CLIP does not know it."),
        io.String.Input(
            "neutral_prompt",
            default="",
            tooltip='The prompt whose pictures count for IS, for example "a photo of sks dog". Changes that '
            "other prompts ask for then do not lower IS, as in the paper. The other pictures count for copying. Empty: "
            "all pictures count for IS.",
        ),
        io.Float.Input(
            "tolerance",
            default=TOLERANCE,
            min=0.0,
            max=1.0,
            step=0.005,
            round=False,
            tooltip="A later result is better only if the balance of likeness, TS and copying is higher by more than "
            "its noise and by more than this. 0: by more than its noise.",
        ),
    ]


def _optional():
    return [
        io.Mask.Input(
            "mask",
            optional=True,
            tooltip="Where the subject is in each batch. The background becomes grey for IS, as in the paper.",
        ),
        io.Mask.Input("concept_mask", optional=True, tooltip="The same for the pictures of concept."),
        SCORES.Input(
            "before",
            optional=True,
            tooltip="Scores of another T-LoRA Evaluate node to compare with. Both nodes must use the same "
            "models, prompts, neutral_prompt and concept; both or neither must use masks. The first of a chain is what "
            "the others are counted from: best the model without a T-LoRA.",
        ),
        io.ClipVision.Input(
            "clip_vision",
            optional=True,
            tooltip="From Load CLIP Vision, instead of clip_model. With SigLIP and DINO, TS is not measured.",
        ),
        io.Clip.Input(
            "clip",
            optional=True,
            tooltip="The checkpoint's CLIP, for TS. Measured if its text encoder belongs to clip_vision: CLIP ViT-L "
            "with FLUX, CLIP ViT-bigG with SDXL.",
        ),
    ]
