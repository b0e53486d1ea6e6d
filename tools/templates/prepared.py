"""The templates that prepare one picture with models that the host ships nodes for: a mask, a caption and the class
word, or variations of the picture.

Names of files, folders and addresses, and the steps of an edit, are those of the host's own workflow templates.
"""

from .families import CLIP, KLEIN, UNET, VAE, hint
from .parts import (
    BLUE,
    BOTTOM,
    LOADER,
    PURPLE,
    SAMPLER,
    SDXL,
    Column,
    add_real_pictures,
    add_training,
)

BIREFNET = hint("Comfy-Org/BiRefNet", "background_removal/birefnet.safetensors")
QWEN3_VL = hint("Comfy-Org/Qwen3-VL", "text_encoders/qwen3vl_4b_fp8_scaled.safetensors")
_ASK_FOR_CLASS = (
    "What kind of thing is the main subject of this picture? Answer with one or two common English words in lower "
    "case, such as dog, mug or toy robot, and nothing else."
)
_ASK_FOR_SCENE = (
    "Where is the main subject of this picture, and what is around it? Answer with one phrase of at most twelve words "
    "that begins with on, in, at or before. Do not name or describe the subject itself."
)
_SCENES = ("on the beach at sunset", "in a snowy forest", "on a wooden table in a kitchen")
_QUESTION, _SIDE = 50, 1024
_SETTINGS = {
    "token": "sks",
    "framing": "keep aspect ratio",
    "file_name": "tlora/my_subject",
    "validation_prompts": "a photo of {token} {class_word} on the beach",
    "validate_every": 100,
}


def train_on_one_prepared_image(template):
    first = Column(template, 0, 280)
    first.note(
        360,
        """# SDXL, one picture, nothing by hand

1. Choose the models' files, and your picture in *Load Image*.
2. Press **Run**. Models find the subject's mask, its **class_word**, and a caption that names what is around it. \
*T-LoRA Images* shows the mask on the picture before the training begins; cancel if it is wrong.

The picture keeps its aspect ratio. Only what is inside the mask is learnt, and what the caption names does not become \
part of the subject. For one thing among several, take the mask of *SAM3 Detect*. To write your own words, disconnect \
the models' words from *Train T-LoRA*.""",
    )
    image = first.rest("LoadImage", "Your one picture", image="example.png")
    first.group("1  A picture", BLUE)
    models = Column(template, first.beside, 250)
    loaded = models.add("CheckpointLoaderSimple", LOADER, models=[SDXL], ckpt_name=SDXL["name"])
    finder = models.add(
        "LoadBackgroundRemovalModel", 110, "To find the subject", models=[BIREFNET], bg_removal_name=BIREFNET["name"]
    )
    reader = models.add(
        "CLIPLoader", CLIP, "To describe it", models=[QWEN3_VL], clip_name=QWEN3_VL["name"], type="ideogram4"
    )
    found = models.add("RemoveBackground", 50, folded=True, bg_removal_model=finder["bg_model"], image=image["IMAGE"])
    words = Column(template, models.beside, 250)
    class_word = _answer(words, reader, image, "What is it?", _ASK_FOR_CLASS, "[a-z]+([ -][a-z]+)?")
    scene = _answer(words, reader, image, "Where is it?", _ASK_FOR_SCENE, r"\w[^.\n]*")
    caption = words.add(
        "StringConcatenate", 230, "Caption", string_a="a photo of {token} {class_word}", string_b=scene, delimiter=" "
    )["STRING"]
    words.add("PreviewAny", 130, "class_word", source=class_word)
    words.rest("PreviewAny", "captions", source=caption)
    picture = {"image": image["IMAGE"], "mask": found["mask"], "captions": caption}
    models.rest("TLoRAImages", "The mask on the picture", **picture)
    models.group("2  Models, and the mask", BLUE)
    words.group("3  Class word and caption", PURPLE)
    column, trained = add_training(
        template,
        words.beside,
        "4  Train",
        model=loaded["MODEL"],
        clip=loaded["CLIP"],
        vae=loaded["VAE"],
        height=680,  # its words are sockets, too
        class_word=class_word,
        **picture,
        **_SETTINGS,
    )
    add_real_pictures(template, loaded, trained, column.beside, wide=250)


def _answer(column, reader, image, heading: str, question: str, pattern: str):
    """What the model says to a question about the picture: of its answer, the first match of `pattern`."""
    said = column.add(
        "TextGenerate",
        _QUESTION,
        heading,
        folded=True,
        clip=reader["CLIP"],
        image=image["IMAGE"],
        prompt=question,
        max_length=64,
        sampling_mode="off",
    )
    found = column.add(
        "RegexExtract", 50, f"{heading} In short", folded=True, string=said["generated_text"], regex_pattern=pattern
    )
    return found["STRING"]


def train_on_variations_of_one_image(template):
    first = Column(template, 0, 280)
    first.note(
        360,
        """# FLUX.2 Klein, one picture and variations

1. Choose the model's files, and your picture in *Load Image*.
2. Set **class_word** to what the subject is, in *Train T-LoRA* and, after "the same", in **subject** of *Edits*.
3. Press **Run**. The model edits the picture into other scenes, *T-LoRA Images* shows the variations, and the \
training learns from all of them.

Look at the variations first: select *T-LoRA Images* alone and run it. What the edits change on the subject is learnt \
too. **captions** has a line for each edit, in the same order, so that the scenes do not become part of the subject.""",
    )
    image = first.rest("LoadImage", "Your one picture", image="example.png")
    first.group("1  A picture", BLUE)
    models = Column(template, first.beside, 250)
    model = models.add("UNETLoader", UNET, models=[KLEIN.model], unet_name=KLEIN.model["name"])
    clip = models.add("CLIPLoader", CLIP, models=[KLEIN.clip], clip_name=KLEIN.clip["name"], type=KLEIN.kind)
    vae = models.add("VAELoader", VAE, models=[KLEIN.vae], vae_name=KLEIN.vae["name"])
    loaded = {"MODEL": model["MODEL"], "CLIP": clip["CLIP"], "VAE": vae["VAE"]}
    edits = models.add(
        "TLoRAPrompts",
        BOTTOM - models.y,
        "Edits",
        subject="the same dog",
        prompts="\n".join(
            f"{{}} {scene}, seen from another side, its shape and colours unchanged" for scene in _SCENES
        ),
    )
    models.group("2  A model, and what it makes", BLUE)
    column = Column(template, models.beside, 250)
    edited = _edited(column, loaded, image, edits)
    more = column.rest(
        "TLoRAImages",
        "The variations",
        image=edited,
        captions="\n".join(f"a photo of {{token}} {{class_word}} {scene}" for scene in _SCENES),
    )
    column.group("3  Variations", PURPLE)
    column, trained = add_training(
        template,
        column.beside,
        "4  Train on all of them",
        model=loaded["MODEL"],
        clip=loaded["CLIP"],
        vae=loaded["VAE"],
        image=image["IMAGE"],
        more_images=more["images"],
        class_word="dog",
        **_SETTINGS,
    )
    add_real_pictures(
        template,
        loaded,
        trained,
        column.beside,
        "EmptyFlux2LatentImage",
        wide=250,
        steps=20,
        cfg=5.0,
        sampler_name="euler",
        scheduler="simple",
    )


def _edited(column, loaded, image, edits):
    """The picture as the model edits it, once for each prompt of `edits`."""
    scaled = column.add(
        "ImageScaleToTotalPixels", 110, folded=True, image=image["IMAGE"], upscale_method="lanczos", megapixels=1.0
    )
    known = column.add("VAEEncode", 50, folded=True, pixels=scaled["IMAGE"], vae=loaded["VAE"])
    conditioning = {}
    for name, text in (("positive", edits["prompts"]), ("negative", "")):
        encoded = column.add("CLIPTextEncode", 50, f"Edit, {name}", folded=True, clip=loaded["CLIP"], text=text)
        reference = {"conditioning": encoded["CONDITIONING"], "latent": known["LATENT"]}
        conditioning[name] = column.add("ReferenceLatent", 50, folded=True, **reference)["CONDITIONING"]
    size = column.add("EmptyFlux2LatentImage", 110, folded=True, width=_SIDE, height=_SIDE)
    sampled = column.add(
        "KSampler",
        SAMPLER,
        "Edit",
        model=loaded["MODEL"],
        latent_image=size["LATENT"],
        seed=7,
        steps=20,
        cfg=5.0,
        sampler_name="euler",
        scheduler="simple",
        **conditioning,
    )
    return column.add("VAEDecode", 50, folded=True, samples=sampled["LATENT"], vae=loaded["VAE"])["IMAGE"]
