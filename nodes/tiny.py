"""The bundled tiny base model and its sample concepts, for a first try without a download."""

import numpy as np
import torch
from comfy_api.latest import io

from ..tlora_core.tiny import WEIGHTS, world
from ..tlora_core.tiny import comfy as tiny_base
from .sockets import CATEGORY


class TinyBaseModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TLoRATinyBaseModel",
            display_name="Tiny Base Model (T-LoRA)",
            category=CATEGORY,
            description="A small text-to-image model of the SDXL family, included in the pack so that you can try "
            "T-LoRA without a download. It draws 128x128 pictures of simple objects. Use it with the "
            "stock nodes.",
            outputs=[
                io.Model.Output(tooltip="The diffusion model."),
                io.Clip.Output(tooltip="Its text encoder."),
                io.Vae.Output(tooltip="Its VAE."),
            ],
        )

    @classmethod
    def execute(cls):
        return io.NodeOutput(*tiny_base.load(str(WEIGHTS)))


class TinySampleConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TLoRATinySampleConcept",
            display_name="Sample Concept (T-LoRA)",
            category=CATEGORY,
            description="A picture of an object that the tiny base model has never seen.",
            inputs=[
                io.Combo.Input("concept", options=[c.name for c in world.CONCEPTS], tooltip="The object to draw."),
                io.Combo.Input(
                    "background",
                    options=list(world.BACKGROUNDS),
                    default="meadow",
                    tooltip="The background behind the object.",
                ),
                io.Combo.Input(
                    "place", options=list(world.PLACES), default="centre", tooltip="Where the object is in the picture."
                ),
                io.Int.Input(
                    "count", default=1, min=1, max=16, tooltip="Number of pictures, each with a different pose."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=False,
                    tooltip="A different seed gives different poses.",
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="The pictures, 64 x 64 pixels."),
                io.String.Output(display_name="class_word", tooltip="What kind of thing the object is."),
            ],
        )

    @classmethod
    def execute(cls, concept, background, place, count, seed):
        found = next(c for c in world.CONCEPTS if c.name == concept)
        scenes = world.concept_scenes(found, count, np.random.default_rng(seed), background, place)
        return io.NodeOutput(torch.from_numpy(world.render(scenes)), found.shape)
