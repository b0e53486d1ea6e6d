"""How good a T-LoRA is, measured on the user's own pictures."""

from comfy_api.latest import io

from ..tlora_core.errors import TLoRAError
from ..tlora_core.hosts.comfy.encoders import FOLDER, encoder_names, load_encoder
from ..tlora_core.reports.evaluation import CLIP_TYPES, DINO_TYPES, best, evaluate, table
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
            description="Measures likeness to the subject (IS), obedience to the prompts (TS) and diversity of "
            "generated pictures, and "
            "says which checkpoint to keep. Needs a CLIP model in the layout of transformers in models/clip_vision.",
            inputs=[
                io.Image.Input("images", tooltip="Generated pictures: a batch for each prompt."),
                io.String.Input(
                    "prompts", force_input=True, tooltip="The prompt of each batch, from Prompts (T-LoRA)."
                ),
                io.Image.Input("concept", tooltip="The pictures that it was trained on."),
                io.Combo.Input(
                    "clip_model",
                    options=[*encoder_names(CLIP_TYPES), _NONE],
                    tooltip=f"A CLIP model's folder in models/{FOLDER}: config.json, model.safetensors or "
                    "pytorch_model.bin, preprocessor_config.json and its tokenizer. The paper uses ViT-B/32.",
                ),
                io.Combo.Input(
                    "dino_model",
                    options=[_NONE, *encoder_names(DINO_TYPES)],
                    tooltip="A DINO model's folder in the same place, for a second measure of likeness that looks "
                    "more at "
                    "details; none leaves it out.",
                ),
                io.String.Input(
                    "label",
                    default="checkpoint",
                    tooltip="What these pictures were made with, such as the T-LoRA's file; the best one is named by "
                    "it, so it has "
                    "to differ from the others.",
                ),
                io.String.Input("token", default="sks", tooltip="Left out of the prompts, since CLIP cannot know it."),
                io.String.Input(
                    "neutral_prompt",
                    default="",
                    tooltip='The prompt whose pictures count for IS, such as "a photo of sks dog", so that what other '
                    "prompts "
                    "change is not held against it, as in the paper. Empty: all pictures.",
                ),
                io.Float.Input(
                    "tolerance",
                    default=0.02,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    round=False,
                    tooltip="The best is the one with the highest TS among those whose IS is at most this much below "
                    "the highest. "
                    "More lets obedience count for more, 0 likeness alone.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the subject is in each batch: the background is grey for IS, as in the paper.",
                ),
                io.Mask.Input("concept_mask", optional=True, tooltip="The same for the concept's pictures."),
                SCORES.Input(
                    "before",
                    optional=True,
                    tooltip="Scores of another T-LoRA Evaluate node, with which these are compared. Both have to be "
                    "measured with "
                    "the same models, prompts, neutral_prompt and concept, and both or neither with masks.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="A table of all scores, for Preview as Text."),
                io.String.Output(display_name="best", tooltip="The label of the best checkpoint."),
                io.Float.Output(display_name="IS", tooltip="Image similarity by CLIP, of these pictures."),
                io.Float.Output(display_name="TS", tooltip="Text similarity by CLIP, of these pictures."),
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
