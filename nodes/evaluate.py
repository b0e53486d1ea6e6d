"""Measures how good a T-LoRA is on the user's own pictures."""

from comfy_api.latest import io

from ..tlora_core.errors import TLoRAError
from ..tlora_core.hosts.comfy.encoders import FOLDER, encoder_names, load_encoder
from ..tlora_core.reports.evaluation import best, evaluate, table
from ..tlora_core.reports.folder_encoder import CLIP_TYPES, DINO_TYPES
from .sockets import CATEGORY

SCORES = io.Custom("TLORA_SCORES")
_NONE = "none"


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
            "prompts (TS) and how diverse they are, and says which T-LoRA file of a training to keep. "
            "Needs a CLIP model in the transformers layout in models/clip_vision.",
            inputs=[*_pictures(), *_models(), *_comparison(), *_optional()],
            outputs=[
                io.String.Output(display_name="report", tooltip="A table of all scores, for Preview as Text."),
                io.String.Output(display_name="best", tooltip="The label of the best result."),
                io.Float.Output(display_name="IS", tooltip="CLIP image similarity of these pictures."),
                io.Float.Output(display_name="TS", tooltip="CLIP text similarity of these pictures."),
                SCORES.Output(display_name="scores", tooltip="For the next T-LoRA Evaluate."),
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
    ):
        if clip_model[0] == _NONE:
            raise TLoRAError(
                f"clip_model is none; put a CLIP model for transformers into a folder of its own in models/{FOLDER}, "
                "press R and choose it."
            )
        if len(concept) != 1:
            raise TLoRAError(f"concept is a list of {len(concept)}; connect one picture or one batch.")
        clip = load_encoder(clip_model[0], CLIP_TYPES)
        dino = None if dino_model[0] == _NONE else load_encoder(dino_model[0], DINO_TYPES)
        done = evaluate(
            label[0], images, prompts, concept[0], clip, dino, neutral_prompt[0], token[0], mask, concept_mask[0]
        )
        scores = (*before[0], done)
        return io.NodeOutput(
            table(scores, tolerance[0]),
            best(scores, tolerance[0]).label,
            done.image_similarity,
            done.text_similarity,
            scores,
        )


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
            options=[*encoder_names(CLIP_TYPES), _NONE],
            tooltip=f"Folder of a CLIP model in models/{FOLDER}: config.json, model.safetensors or "
            "pytorch_model.bin, preprocessor_config.json and its tokenizer. The paper uses ViT-B/32.",
        ),
        io.Combo.Input(
            "dino_model",
            options=[_NONE, *encoder_names(DINO_TYPES)],
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
            "other prompts ask for then do not lower IS, as in the paper. Empty: all pictures count.",
        ),
        io.Float.Input(
            "tolerance",
            default=0.02,
            min=0.0,
            max=1.0,
            step=0.005,
            round=False,
            tooltip="The best result is the one with the highest TS among those whose IS is at most this "
            "far below the highest IS. Higher values favour following the prompt; 0 counts likeness "
            "alone.",
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
            "models, prompts, neutral_prompt and concept; both or neither must use masks.",
        ),
    ]
