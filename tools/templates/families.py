"""The templates for models whose parts are files of their own: they train, and draw with the same model or with one
distilled from it for few steps.

File names, folders and addresses are those of the workflow templates that come with the host, and of the same
repositories where these have only the distilled model; sampler, steps and guidance too.
"""

from typing import NamedTuple

from .parts import (
    BLUE,
    HUB,
    LOADER,
    SDXL,
    Column,
    add_real_pictures,
    add_training,
    model_and_image,
)

UNET, CLIP, VAE, APPLY = 95, 120, 90, 230  # heights


def hint(repository: str, path: str) -> dict:
    """The host's hint for a file of a repository, which lies in the folder that it belongs in."""
    *_, directory, name = path.split("/")
    return {"name": name, "directory": directory, "url": f"{HUB}{repository}/resolve/main/{path}"}


class Parts(NamedTuple):
    """The files of a model, and the kind of text encoder as the host's Load CLIP names it."""

    model: dict
    clip: dict
    kind: str
    vae: dict


KLEIN = Parts(
    hint("Comfy-Org/flux2-klein", "split_files/diffusion_models/flux-2-klein-base-4b.safetensors"),
    hint("Comfy-Org/flux2-klein", "split_files/text_encoders/qwen_3_4b.safetensors"),
    "flux2",
    hint("Comfy-Org/flux2-dev", "split_files/vae/flux2-vae.safetensors"),
)
Z_IMAGE = Parts(
    hint("Comfy-Org/z_image", "split_files/diffusion_models/z_image_bf16.safetensors"),
    hint("Comfy-Org/z_image_turbo", "split_files/text_encoders/qwen_3_4b.safetensors"),
    "lumina2",
    hint("Comfy-Org/z_image_turbo", "split_files/vae/ae.safetensors"),
)
Z_IMAGE_TURBO = hint("Comfy-Org/z_image_turbo", "split_files/diffusion_models/z_image_turbo_bf16.safetensors")
QWEN_IMAGE = Parts(
    hint("Comfy-Org/Qwen-Image_ComfyUI", "split_files/diffusion_models/qwen_image_fp8_e4m3fn.safetensors"),
    hint("Comfy-Org/Qwen-Image_ComfyUI", "split_files/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors"),
    "qwen_image",
    hint("Comfy-Org/Qwen-Image_ComfyUI", "split_files/vae/qwen_image_vae.safetensors"),
)
KREA2 = Parts(
    hint("Comfy-Org/Krea-2", "diffusion_models/krea2_raw_fp8_scaled.safetensors"),
    hint("Comfy-Org/Krea-2", "text_encoders/qwen3vl_4b_fp8_scaled.safetensors"),
    "krea2",
    hint("Comfy-Org/Krea-2", "vae/qwen_image_vae.safetensors"),
)
KREA2_TURBO = hint("Comfy-Org/Krea-2", "diffusion_models/krea2_turbo_fp8_scaled.safetensors")
SDXL_LIGHTNING = {
    "name": "sdxl_lightning_4step.safetensors",
    "directory": "checkpoints",
    "url": HUB + "ByteDance/SDXL-Lightning/resolve/main/sdxl_lightning_4step.safetensors",
}
_NOTE, _LATENT = 335, "EmptySD3LatentImage"
_FIRST_STEPS = """1. Choose the model's files, and your picture in *Load Image*. The centre square is used; a plain \
background helps.
2. Set **class_word** to what the subject is: dog, mug, person.
3. Press **Run**."""


def train_klein_on_one_image(template):
    _train(
        template,
        KLEIN,
        f"""# FLUX.2 Klein, one picture

{_FIRST_STEPS}

The hints are for Klein 4B. Train on its **base** model: the distilled one has the same architecture, so the pack \
cannot tell them apart, and validation pictures are drawn as with the base, at CFG 5. For 9B, choose its base model \
and *qwen_3_8b_fp8mixed*.""",
        "EmptyFlux2LatentImage",
        steps=20,
        cfg=5.0,
        sampler_name="euler",
    )


def train_z_image_on_one_image(template):
    _train(
        template,
        Z_IMAGE,
        f"""# Z-Image, one picture

{_FIRST_STEPS}

Train on **Z-Image**, not on Z-Image Turbo: they have the same architecture, so the pack cannot tell them apart, and \
validation pictures are drawn as with the base, at CFG 4. Training on Turbo undoes its distillation. To draw with \
Turbo, see template 17.""",
        steps=25,
        cfg=4.0,
        sampler_name="res_multistep",
    )


def train_qwen_image_on_one_image(template):
    _train(
        template,
        QWEN_IMAGE,
        f"""# Qwen-Image, one picture

{_FIRST_STEPS}

With 20 billion parameters it is the largest of these models: **memory** auto streams its weights from RAM where they \
do not fit. If memory runs out all the same, set **rank** to 32 and **min_rank** to 16. Pictures are trained at 1024 \
pixels and drawn at 1328, the model's own size.""",
        side=1328,
        steps=30,
        cfg=4.0,
        sampler_name="euler",
    )


def train_krea2_on_one_image(template):
    _train(
        template,
        KREA2,
        f"""# Krea 2, one picture

{_FIRST_STEPS}

Train on **Raw**, the base model; validation pictures are drawn with it, at CFG 4.5. Raw is made for training, and \
Turbo for drawing: see template 18.""",
        steps=30,
        cfg=4.5,
        sampler_name="euler",
    )


def draw_with_z_image_turbo(template):
    _train(
        template,
        Z_IMAGE,
        _distilled("Z-Image", "Turbo", "8 steps", "32, 33, 35, 37, 40, 43, 48 and 54"),
        distilled=Z_IMAGE_TURBO,
        steps=8,
        sampler_name="res_multistep",
    )


def draw_with_krea2_turbo(template):
    _train(
        template,
        KREA2,
        _distilled("Krea 2 Raw", "Turbo", "8 steps", "32, 33, 35, 37, 39, 43, 47 and 54"),
        distilled=KREA2_TURBO,
        steps=8,
        sampler_name="euler",
    )


def draw_with_sdxl_lightning(template):
    column = Column(template, 0, 320)
    column.note(_NOTE, _distilled("SDXL", "Lightning", "4 steps", "32, 40, 48 and 56"))
    image = column.rest("LoadImage", "Your one picture", image="example.png")
    column.group("1  A picture", BLUE)
    column = Column(template, column.beside, 280)
    loaded = column.add("CheckpointLoaderSimple", LOADER, "To train on", models=[SDXL], ckpt_name=SDXL["name"])
    fast = column.add(
        "CheckpointLoaderSimple", LOADER, "To draw with", models=[SDXL_LIGHTNING], ckpt_name=SDXL_LIGHTNING["name"]
    )
    trained, x = _training(template, column.beside, model_and_image(loaded, image))
    adapted = _applied(column, trained, fast)
    sampling = {"steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "sgm_uniform"}
    add_real_pictures(template, loaded, adapted, x, negative=False, **sampling)


def _distilled(base: str, fast: str, steps: str, ranks: str) -> str:
    """The note of a template that draws with a model other than the one that it trains on. ranks: those that its steps
    use of a T-LoRA with rank 64 and min_rank 32."""
    return f"""# Train on {base}, draw with {fast}

{_FIRST_STEPS} It trains on {base}; *Apply T-LoRA* puts the result on {fast}.

**What changes:** few steps meet few ranks. {fast}'s {steps} use {ranks} of the 64 ranks, mostly those of high noise; \
the last ranks, which learn at low noise alone, stay off. If the likeness is too weak, raise **strength** in *Apply \
T-LoRA* to 1.2, or train with a higher **min_rank**. Draw at CFG 1, without a negative prompt."""


def _train(
    template, parts: Parts, note: str, latent=_LATENT, side=1024, distilled: dict | None = None, cfg=1.0, **sampling
) -> None:
    """Trains on the parts of a model, and draws with it or with the `distilled` one."""
    column = Column(template, 0, 320)
    column.note(_NOTE, note)
    image = column.rest("LoadImage", "Your one picture", image="example.png")
    column.group("1  A picture", BLUE)
    column = Column(template, column.beside, 280)
    title = "To train on" if distilled else ""
    model = column.add("UNETLoader", UNET, title, models=[parts.model], unet_name=parts.model["name"])
    clip = column.add("CLIPLoader", CLIP, models=[parts.clip], clip_name=parts.clip["name"], type=parts.kind)
    vae = column.add("VAELoader", VAE, models=[parts.vae], vae_name=parts.vae["name"])
    fast = distilled and column.add("UNETLoader", UNET, "To draw with", models=[distilled], unet_name=distilled["name"])
    loaded = {"MODEL": model["MODEL"], "CLIP": clip["CLIP"], "VAE": vae["VAE"]}
    trained, x = _training(template, column.beside, model_and_image(loaded, image))
    adapted = _applied(column, trained, fast)
    sampling = {"scheduler": "simple", "cfg": cfg, **sampling}
    add_real_pictures(template, loaded, adapted, x, latent, negative=cfg != 1, side=side, **sampling)


def _training(template, x, inputs):
    column, trained = add_training(
        template,
        x,
        "3  Train",
        **inputs,
        token="sks",
        class_word="dog",
        file_name="tlora/my_subject",
        validation_prompts="a photo of {token} {class_word} on the beach",
        validate_every=100,
    )
    return trained, column.beside


def _applied(column, trained, fast):
    """MODEL and T-LoRA to draw with: those of the training, or its T-LoRA on `fast`, a second model in the column."""
    if not fast:
        column.group("2  A model", BLUE)
        return trained
    applied = column.add("TLoRAApply", APPLY, "The T-LoRA on it", model=fast["MODEL"], tlora=trained["T-LoRA"])
    column.group("2  Two models", BLUE)
    return {"MODEL": applied["MODEL"], "T-LoRA": trained["T-LoRA"]}
