"""The templates that run with the tiny base, without a download."""

from .parts import (
    BASE,
    BLUE,
    CONCEPT,
    GREEN,
    IMAGES,
    LATENT,
    PURPLE,
    RED,
    SCENES,
    TEXT,
    TINY,
    TRAIN,
    WIDTH,
    Column,
    add_comparison,
    add_sampler,
    add_samplers,
    add_sheet,
    add_tiny_subject,
    add_training,
    model_and_image,
)


def quickstart(template):
    column, base, concept = add_tiny_subject(
        template,
        """# T-LoRA quickstart

Press **Run**. During training, the panel on *Train T-LoRA* shows the loss and what the model draws. Then the sheet \
on the right shows an object the model had never seen, in four new scenes, learnt from the **one** picture above it. \
To see how like the object the pictures are, step by step, press *More settings* and set **scorer** to *tiny world*.

1. *Sample Concept* draws the training picture.
2. *Train T-LoRA* teaches it to the tiny base model of the pack. The object becomes **sks circle**.
3. *Apply T-LoRA* gives the sampler the ranks of each noise level.
4. The same prompts and seed run with and without the T-LoRA.

For your own model and picture, open *02 SDXL, train on one picture* or *03 FLUX, train on one picture*.""",
        430,
        shown=False,
    )
    column, trained = add_training(
        template,
        column.beside,
        "2  Train",
        **model_and_image(base, concept),
        **{**TINY, "batch_size": 4},
        file_name="tlora/quickstart",
        validate_every=100,
        validation_prompts="a photo of {token} {class_word} in the snow\na photo of {token} {class_word} in a meadow",
    )
    column = Column(template, column.beside, 260)
    applied = column.add("TLoRAApply", 230, "3  Apply T-LoRA", model=base["MODEL"], tlora=trained["T-LoRA"])
    prompts, latents = add_samplers(
        column,
        base,
        [("with the T-LoRA", applied), ("without it", base)],
        opened=0,
        scenes=SCENES + "\na photo of {} under the sea",
        scheduler="normal",
    )
    column.rest("PreviewImage", "Loss", images=trained["loss"])
    sheets = Column(template, column.beside, WIDTH - column.beside)
    picture = Column(template, sheets.x, 300)
    picture.add("PreviewImage", 464, "The one training picture", images=concept["IMAGE"])
    beside = Column(template, picture.beside, sheets.width - 340)
    sheet = add_sheet(beside, base, prompts, latents, "One training picture, same prompts, same seed")
    sheets.y = beside.y
    sheets.rest("SaveImage", "The sheet", images=sheet["sheet"], filename_prefix="tlora/quickstart")
    sheets.group("Side by side", RED)


def compare_lora_with_tlora(template):
    column, base, concept = add_tiny_subject(
        template,
        """# LoRA against T-LoRA

Press **Run**: two trainings on the **one** picture below, a few minutes in total, then the same prompts with each \
and with neither.

A plain LoRA has all its ranks on while the picture is still noise, and tends to copy the training picture's pose \
and background. A T-LoRA has few ranks on there.""",
    )
    common = model_and_image(base, concept)
    first, plain = add_training(
        template, column.beside, "", "LoRA", **common, **{**TINY, "method": "lora", "file_name": "tlora/compared_lora"}
    )
    second, masked = add_training(
        template, first.beside, "", "T-LoRA", **common, **TINY, file_name="tlora/compared_tlora"
    )
    first.group("2  Two methods, same settings", GREEN, second)
    add_comparison(
        template,
        base,
        [("LoRA", plain), ("T-LoRA", masked), ("without", base)],
        second.beside,
        "One training picture, same prompts, same seed",
        "tlora/compare",
    )


def min_rank_sweep(template):
    column, base, concept = add_tiny_subject(
        template,
        """# How low should min_rank be?

Press **Run**: four trainings that differ only in **min_rank**, a few minutes in total, then the same prompts with \
each.

**min_rank** ranks stay on at pure noise. Fewer follow the prompt more freely; too few lose the subject. At 32, the \
rank, the mask is off. This small model decides most of a picture late, so the four results look much alike. Three of \
the four Train nodes are folded: click the dot before a title to open one.""",
        300,
    )
    common = model_and_image(base, concept)

    def of(least):
        return {**common, **TINY, "min_rank": least, "file_name": f"tlora/min_rank_{least}"}

    first, node = add_training(template, column.beside, "", "min_rank 4", **of(4))
    settings, others = [("min_rank 4", node)], Column(template, first.beside, 240)
    for least in (8, 16, 32):
        node = others.add("TLoRATrainFromImage", TRAIN[1], f"min_rank {least}", folded=True, **of(least))
        settings.append((f"min_rank {least}", node))
    first.group("2  Four values of min_rank", GREEN, others)
    add_comparison(template, base, settings, others.beside, "Rank 32, same prompts, same seed", "tlora/min_rank")


def xy_sheet(template):
    column, base, concept = add_tiny_subject(
        template,
        """# An XY sheet

Press **Run**: one training of a minute or two, then a picture for each cell, with **strength** from left to right \
and **min_rank** from top to bottom.

*Sweep* outputs a model for each cell, the sampler runs once for each, and *Compare* takes labels and grid from \
**axes**. Choose *file* to compare T-LoRA files.""",
    )
    column, trained = add_training(
        template,
        column.beside,
        "2  Train",
        **model_and_image(base, concept),
        **TINY,
        file_name="tlora/xy_sheet",
    )
    column = Column(template, column.beside, 270)
    sweep = column.add(
        "TLoRASweep",
        345,
        model=base["MODEL"],
        tlora=trained["T-LoRA"],
        x="strength",
        x_values="0.5, 0.75, 1, 1.25",
        y="min_rank",
        y_values="4, 8, 16, 32",
    )
    positive = column.add("CLIPTextEncode", TEXT, "Prompt", clip=base["CLIP"], text="a photo of sks circle in a meadow")
    negative = column.add("CLIPTextEncode", TEXT, "Negative prompt (empty)", clip=base["CLIP"])
    latent = column.add("EmptyLatentImage", LATENT, width=64, height=64)
    column.group("3  What to vary", PURPLE)
    column = Column(template, column.beside, 270)
    parts = {"model": sweep, "positive": positive, "negative": negative, "latent": latent}
    sampled = add_sampler(column, "Once for each model", **parts, seed=2, steps=20, cfg=4.0)
    decoded = column.add("VAEDecode", 55, samples=sampled["LATENT"], vae=base["VAE"])
    sheet = column.add(
        "TLoRACompare",
        400,
        images_1=decoded["IMAGE"],
        axes=sweep["axes"],
        labels="",
        title="Rank 32, same prompt, same seed",
        cell=160,
    )
    last = Column(template, column.beside, 420)
    last.rest("SaveImage", "The sheet", images=sheet["sheet"], filename_prefix="tlora/xy_sheet")
    column.group("4  The sheet", RED, last)


def several_images_with_masks(template):
    column = Column(template, 0, 280)
    column.note(
        280,
        """# Several pictures, with masks

*T-LoRA Images* takes pictures with captions and masks; chain one for each picture size. Only the loss inside the \
mask counts, so the background is not learnt.

Here pictures and mask are drawn, so **Run** needs no files. For your own pictures: *Load Image*, right-click, **Open \
in Mask Editor**, paint over the subject, and connect the MASK output.""",
    )
    base = column.add("TLoRATinyBaseModel", BASE)
    empty = column.add("SolidMask", 120, "Outside the subject", folded=True, value=0.0, width=64, height=64)
    middle = column.add("SolidMask", 120, "The subject's place", value=1.0, width=48, height=48)
    mask = column.add("MaskComposite", 140, destination=empty["MASK"], source=middle["MASK"], x=8, y=8, operation="add")
    column.group("1  A model and a mask", BLUE)
    drawn, described = Column(template, column.beside, 240), Column(template, column.beside + 265, 240)
    images = None
    for background, words in (("beach", "on the beach"), ("brick", "before a brick wall")):
        concept = drawn.add("TLoRATinySampleConcept", CONCEPT, concept="lime circle", background=background, count=2)
        more = {"before": images["images"]} if images else {}
        images = described.add(
            "TLoRAImages",
            IMAGES,
            image=concept["IMAGE"],
            mask=mask["MASK"],
            captions="a photo of {token} {class_word} " + words,
            **more,
        )
    first = drawn.add("TLoRATinySampleConcept", CONCEPT, concept="lime circle", background="meadow")
    drawn.group("2  Pictures with captions", PURPLE, described)
    column = Column(template, described.beside, 300)
    trained = column.add(
        "TLoRATrainFromImage",
        680,
        **model_and_image(base, first),
        mask=mask["MASK"],
        more_images=images["images"],
        captions="a photo of {token} {class_word} in a meadow",
        **TINY,
        file_name="tlora/several_images",
    )
    column.group("3  Train", GREEN)
    add_comparison(
        template,
        base,
        [("T-LoRA", trained), ("without", base)],
        column.beside,
        "Five pictures with masks, same prompts, same seed",
        "tlora/several_images",
        265,
    )


def stop_and_go_on(template):
    column, base, concept = add_tiny_subject(
        template,
        """# Stop, keep, go on

1. Press **Run**, then **Stop and keep** in the training panel when you have seen enough. The sheet is made with \
what was learnt.
2. Press **Run** again: with **rerun** on *continue*, the training resumes there and runs to its last step. A cancel, \
a crash or a power cut costs at most the 50 steps since the run state was last saved.

**checkpoint_files** also saves a T-LoRA file each time, for *Load T-LoRA*.""",
        300,
    )
    column, trained = add_training(
        template,
        column.beside,
        "2  Train, in as many parts as you like",
        **model_and_image(base, concept),
        **TINY,
        file_name="tlora/stop_and_go_on",
        checkpoint_every=50,
        checkpoint_files=True,
        save_on_cancel=True,
        rerun="continue",
        validate_every=100,
        validation_prompts="a photo of {token} {class_word} in the snow",
    )
    add_comparison(
        template,
        base,
        [("T-LoRA", trained), ("without", base)],
        column.beside,
        "Learnt so far, same prompts, same seed",
        "tlora/stop_and_go_on",
        700,
    )
