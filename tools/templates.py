"""The contents of the pack's templates, which `make_workflows.py` writes. Lengths are in the graph's pixels.

The interface fits a template into the window when it opens it, and draws no text on nodes that become too small. On a
screen of 1366 x 768 a template can be WIDTH x HEIGHT at most. It consists of columns; a Train node has a column of its
own, because it grows during training.
"""

WIDTH, HEIGHT = 1772, 988  # of all nodes with their titles
TOP, BOTTOM = 80, 1030  # of the nodes, without their titles
GAP, UNDER, FOLDED = 40, 45, 42  # between columns; below a node; below a folded node
TRAIN = (340, 600)
SAMPLER, TEXT, LATENT, CONCEPT, BASE, LOADER, PICTURE = 275, 105, 120, 220, 100, 126, 350  # heights
SCENES = "a photo of {} in a meadow\na photo of {} in the snow\na photo of {} on a plain yellow background"
# Settings with which the tiny base learns an object.
TINY = {
    "token": "sks",
    "class_word": "circle",
    "rank": 32,
    "min_rank": 16,
    "steps": 350,
    "learning_rate": 0.0015,
    "resolution": 64,
    "batch_size": 2,
    "method": "tlora",
}
BLUE, GREEN, PURPLE, RED = "#3f789e", "#8A8", "#88A", "#A88"
HUB = "https://huggingface.co/"
SDXL = {
    "name": "sd_xl_base_1.0.safetensors",
    "directory": "checkpoints",
    "url": HUB + "stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
}
FLUX = {
    "name": "flux1-dev-fp8.safetensors",
    "directory": "checkpoints",
    "url": HUB + "Comfy-Org/flux1-dev/resolve/main/flux1-dev-fp8.safetensors",
}


class Column:
    """A column of nodes."""

    def __init__(self, template, x, width, y=TOP):
        self.template, self.x, self.width, self.y, self.top = template, x, width, y, y

    @property
    def beside(self):
        """x of the next column."""
        return self.x + self.width + GAP

    def add(self, class_type, tall, heading="", folded=False, **inputs):
        tall = 30 if folded else tall  # a folded node is assumed to be this tall until it is unfolded
        node = self.template.add(class_type, (self.x, self.y), (self.width, tall), heading, folded=folded, **inputs)
        self.y += FOLDED if folded else tall + UNDER
        return node

    def rest(self, class_type, heading="", **inputs):
        """Adds a node that fills the rest of the column."""
        return self.add(class_type, BOTTOM - self.y, heading, **inputs)

    def note(self, height, text):
        self.template.note((self.x, self.y), (self.width, height), text)
        self.y += height + UNDER + 45  # leaves room for a group's title
        self.top = self.y

    def group(self, title, color, until=None):
        """Frames the nodes below the note and the columns up to `until`."""
        right = (until or self).x + (until or self).width
        self.template.group(title, (self.x - 15, self.top - 75, right - self.x + 30, BOTTOM - self.top + 90), color)


def _tiny_subject(template, text, height=265):
    """The note, and below it the tiny base and one picture."""
    column = Column(template, 0, 300)
    column.note(height, text)
    base = column.add("TLoRATinyBaseModel", BASE)
    concept = column.add("TLoRATinySampleConcept", CONCEPT, concept="lime circle", background="beach")
    column.rest("PreviewImage", "The one training picture", images=concept["IMAGE"])
    column.group("1  One picture and a model", BLUE)
    return column, base, concept


def _train(template, x, group="", heading="", **inputs):
    column = Column(template, x, TRAIN[0])
    node = column.add("TLoRATrainFromImage", TRAIN[1], heading, **inputs)
    if group:
        column.group(group, GREEN)
    return column, node


def _sampled(column, base, settings, opened=1, scenes=SCENES, scheduler="simple"):
    """A column with the prompts and a sampler for each (label, MODEL), all but the first `opened` folded. Returns
    (prompts, latents by label)."""
    prompts = column.add("TLoRAPrompts", 200, "Scenes", prompts=scenes, subject="sks circle")
    positive = column.add("CLIPTextEncode", TEXT, "Prompts", clip=base["CLIP"], text=prompts["prompts"])
    negative = column.add("CLIPTextEncode", TEXT, "Negative prompt (empty)", folded=True, clip=base["CLIP"])
    latent = column.add("EmptyLatentImage", LATENT, folded=True, width=64, height=64)
    latents = {}
    for i, (label, model) in enumerate(settings):
        sampled = column.add(
            "KSampler",
            SAMPLER,
            label,
            folded=i >= opened,
            model=model,
            positive=positive["CONDITIONING"],
            negative=negative["CONDITIONING"],
            latent_image=latent["LATENT"],
            seed=7,
            steps=20,
            cfg=4.0,
            scheduler=scheduler,
        )
        latents[label] = sampled["LATENT"]
    column.group("Same prompts and seed", PURPLE)
    return prompts, latents


def _sheet(column, base, prompts, latents, title):
    """The sheet of all latents."""
    decoded = [
        column.add("VAEDecode", 55, f"Decode: {label}", folded=True, samples=each, vae=base["VAE"])
        for label, each in latents.items()
    ]
    return column.add(
        "TLoRACompare",
        380,
        labels="\n".join(latents),
        prompts=prompts["prompts"],
        title=title,
        cell=160,
        **{f"images_{i}": node["IMAGE"] for i, node in enumerate(decoded, 1)},
    )


def _compared(template, base, settings, x, title, file_name, sheet_width=370):
    """From `x` on: prompts, a sampler and a decoder for each (label, MODEL), and the sheet of all pictures."""
    column = Column(template, x, 260)
    prompts, latents = _sampled(column, base, settings)
    sheets = Column(template, column.beside, sheet_width)
    sheet = _sheet(sheets, base, prompts, latents, title)
    sheets.rest("SaveImage", "The sheet", images=sheet["sheet"], filename_prefix=file_name)
    sheets.group("Side by side", RED)


def quickstart(template):
    column = Column(template, 0, 300)
    column.note(
        430,
        """# T-LoRA quickstart

Press **Run**. During training, the panel on *Train T-LoRA* shows the loss and what the model draws. Then the sheet \
on the right shows an object the model had never seen, in four new scenes, learnt from the **one** picture above it.

1. *Sample Concept* draws the training picture.
2. *Train T-LoRA* teaches it to the tiny base model of the pack. The object becomes **sks circle**.
3. *Apply T-LoRA* gives the sampler the ranks of each noise level.
4. The same prompts and seed run with and without the T-LoRA.

For your own model and picture, open *02 SDXL, train on one picture* or *03 FLUX, train on one picture*.""",
    )
    base = column.add("TLoRATinyBaseModel", BASE)
    concept = column.add("TLoRATinySampleConcept", CONCEPT, concept="lime circle", background="beach")
    column.group("1  One picture and a model", BLUE)
    column, trained = _train(
        template,
        column.beside,
        "2  Train",
        model=base["MODEL"],
        clip=base["CLIP"],
        vae=base["VAE"],
        image=concept["IMAGE"],
        **{**TINY, "batch_size": 4},
        file_name="tlora/quickstart",
        validate_every=100,
        validation_prompts="a photo of {token} {class_word} in the snow\na photo of {token} {class_word} in a meadow",
    )
    column = Column(template, column.beside, 260)
    applied = column.add("TLoRAApply", 230, "3  Apply T-LoRA", model=base["MODEL"], tlora=trained["T-LoRA"])
    prompts, latents = _sampled(
        column,
        base,
        [("with the T-LoRA", applied["MODEL"]), ("without it", base["MODEL"])],
        opened=0,
        scenes=SCENES + "\na photo of {} on a plain grey background",
        scheduler="normal",
    )
    column.rest("PreviewImage", "Loss", images=trained["loss"])
    sheets = Column(template, column.beside, WIDTH - column.beside)
    picture = Column(template, sheets.x, 300)
    picture.add("PreviewImage", 464, "The one training picture", images=concept["IMAGE"])
    beside = Column(template, picture.beside, sheets.width - 340)
    sheet = _sheet(beside, base, prompts, latents, "One training picture, same prompts, same seed")
    sheets.y = beside.y
    sheets.rest("SaveImage", "The sheet", images=sheet["sheet"], filename_prefix="tlora/quickstart")
    sheets.group("Side by side", RED)


def compare_lora_with_tlora(template):
    column, base, concept = _tiny_subject(
        template,
        """# LoRA against T-LoRA

Press **Run**: two trainings on the **one** picture below, a few minutes in total, then the same prompts with each \
and with neither.

A plain LoRA has all its ranks on while the picture is still noise, and tends to copy the training picture's pose \
and background. A T-LoRA has few ranks on there.""",
    )
    common = {"model": base["MODEL"], "clip": base["CLIP"], "vae": base["VAE"], "image": concept["IMAGE"]}
    first, plain = _train(
        template, column.beside, "", "LoRA", **common, **{**TINY, "method": "lora", "file_name": "tlora/compared_lora"}
    )
    second, masked = _train(template, first.beside, "", "T-LoRA", **common, **TINY, file_name="tlora/compared_tlora")
    first.group("2  Two methods, same settings", GREEN, second)
    _compared(
        template,
        base,
        [("LoRA", plain["MODEL"]), ("T-LoRA", masked["MODEL"]), ("without", base["MODEL"])],
        second.beside,
        "One training picture, same prompts, same seed",
        "tlora/compare",
    )


def min_rank_sweep(template):
    column, base, concept = _tiny_subject(
        template,
        """# How low should min_rank be?

Press **Run**: four trainings that differ only in **min_rank**, a few minutes in total, then the same prompts with \
each.

**min_rank** ranks stay on at pure noise. Fewer follow the prompt more freely; too few lose the subject. At 32, the \
rank, the mask is off. This small model decides most of a picture late, so the four results look much alike. Three of \
the four Train nodes are folded: click the dot before a title to open one.""",
        300,
    )
    common = {"model": base["MODEL"], "clip": base["CLIP"], "vae": base["VAE"], "image": concept["IMAGE"]}

    def of(least):
        return {**common, **TINY, "min_rank": least, "file_name": f"tlora/min_rank_{least}"}

    first, node = _train(template, column.beside, "", "min_rank 4", **of(4))
    settings, others = [("min_rank 4", node["MODEL"])], Column(template, first.beside, 240)
    for least in (8, 16, 32):
        node = others.add("TLoRATrainFromImage", TRAIN[1], f"min_rank {least}", folded=True, **of(least))
        settings.append((f"min_rank {least}", node["MODEL"]))
    first.group("2  Four values of min_rank", GREEN, others)
    _compared(template, base, settings, others.beside, "Rank 32, same prompts, same seed", "tlora/min_rank")


def xy_sheet(template):
    column, base, concept = _tiny_subject(
        template,
        """# An XY sheet

Press **Run**: one training of a minute or two, then a picture for each cell, with **strength** from left to right \
and **min_rank** from top to bottom.

*Sweep* outputs a model for each cell, the sampler runs once for each, and *Compare* takes labels and grid from \
**axes**. Choose *file* to compare T-LoRA files.""",
    )
    column, trained = _train(
        template,
        column.beside,
        "2  Train",
        model=base["MODEL"],
        clip=base["CLIP"],
        vae=base["VAE"],
        image=concept["IMAGE"],
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
    sampled = column.add(
        "KSampler",
        SAMPLER,
        "Once for each model",
        model=sweep["MODEL"],
        seed=2,
        steps=20,
        cfg=4.0,
        positive=positive["CONDITIONING"],
        negative=negative["CONDITIONING"],
        latent_image=latent["LATENT"],
    )
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
            CONCEPT,
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
        model=base["MODEL"],
        clip=base["CLIP"],
        vae=base["VAE"],
        image=first["IMAGE"],
        mask=mask["MASK"],
        more_images=images["images"],
        captions="a photo of {token} {class_word} in a meadow",
        **TINY,
        file_name="tlora/several_images",
    )
    column.group("3  Train", GREEN)
    _compared(
        template,
        base,
        [("T-LoRA", trained["MODEL"]), ("without", base["MODEL"])],
        column.beside,
        "Five pictures with masks, same prompts, same seed",
        "tlora/several_images",
        265,
    )


def stop_and_go_on(template):
    column, base, concept = _tiny_subject(
        template,
        """# Stop, keep, go on

1. Press **Run**, then **Stop and keep** in the training panel when you have seen enough. The sheet is made with \
what was learnt.
2. Press **Run** again: with **rerun** on *continue*, the training resumes there and runs to its last step. A cancel, \
a crash or a power cut costs at most the 50 steps since the run state was last saved.

**checkpoint_files** also saves a T-LoRA file each time, for *Load T-LoRA*.""",
        300,
    )
    column, trained = _train(
        template,
        column.beside,
        "2  Train, in as many parts as you like",
        model=base["MODEL"],
        clip=base["CLIP"],
        vae=base["VAE"],
        image=concept["IMAGE"],
        **TINY,
        file_name="tlora/stop_and_go_on",
        checkpoint_every=50,
        checkpoint_files=True,
        save_on_cancel=True,
        rerun="continue",
        validate_every=50,
        validation_prompts="a photo of {token} {class_word} in the snow",
    )
    _compared(
        template,
        base,
        [("T-LoRA", trained["MODEL"]), ("without", base["MODEL"])],
        column.beside,
        "Learnt so far, same prompts, same seed",
        "tlora/stop_and_go_on",
        700,
    )


def _real_pictures(template, model, clip, vae, prompts, x, side, latent="EmptyLatentImage", negative=True, **sampling):
    """Prompts (a text, or a T-LoRA whose subject they name), sampler and saved pictures for a full-size model, as wide
    as the remaining room."""
    column = Column(template, x, 290)
    if not isinstance(prompts, str):
        prompts = column.add(
            "TLoRAPrompts",
            200,
            tlora=prompts,
            prompts="a photo of {} on the beach\na photo of {} in the snow\na painting of {} in a library",
        )["prompts"]
    positive = column.add("CLIPTextEncode", TEXT, "Prompts", clip=clip, text=prompts)
    conditioning = positive["CONDITIONING"]
    if negative:
        empty = column.add("CLIPTextEncode", TEXT, "Negative prompt", folded=True, clip=clip)["CONDITIONING"]
    else:
        empty = column.add("ConditioningZeroOut", 50, folded=True, conditioning=conditioning)["CONDITIONING"]
        conditioning = column.add("FluxGuidance", 80, folded=True, conditioning=conditioning, guidance=3.5)[
            "CONDITIONING"
        ]
    size = column.add(latent, LATENT, folded=not negative, width=side, height=side)
    sampled = column.add(
        "KSampler",
        SAMPLER,
        model=model,
        positive=conditioning,
        negative=empty,
        latent_image=size["LATENT"],
        seed=7,
        **sampling,
    )
    decoded = column.add("VAEDecode", 55, folded=True, samples=sampled["LATENT"], vae=vae)
    last = Column(template, column.beside, min(WIDTH - column.beside, 640))
    last.rest("SaveImage", images=decoded["IMAGE"], filename_prefix="tlora/picture")
    column.group("Prompts and a sampler", PURPLE)
    last.group("New pictures", RED)


def _train_on_one_image(template, model_file, note, subject, **settings):
    column = Column(template, 0, 320)
    column.note(335, note)
    loaded = column.add("CheckpointLoaderSimple", LOADER, models=[model_file], ckpt_name=model_file["name"])
    image = column.rest("LoadImage", "Your one picture", image="example.png")
    column.group("1  A model and one picture", BLUE)
    column, trained = _train(
        template,
        column.beside,
        "2  Train",
        model=loaded["MODEL"],
        clip=loaded["CLIP"],
        vae=loaded["VAE"],
        image=image["IMAGE"],
        token="sks",
        class_word=subject,
        file_name="tlora/my_subject",
        validation_prompts="a photo of {token} {class_word} on the beach",
        validate_every=100,
        **settings,
    )
    return loaded, trained, column.beside


def train_sdxl_on_one_image(template):
    loaded, trained, x = _train_on_one_image(
        template,
        SDXL,
        """# SDXL, one picture

1. Choose an SDXL model file, and your picture in *Load Image*. The centre square is used; a plain background helps.
2. Set **class_word** to what the subject is: dog, mug, person.
3. Press **Run**. The panel of *Train T-LoRA* shows the loss and validation pictures; **Stop and keep** ends early.

Steps, learning rate and resolution are 0, the model's defaults. **rank** 64 and **min_rank** 32 are the paper's. If \
memory runs out, set **rank** to 32 and **min_rank** to 16; then start ComfyUI with **--fp8_e4m3fn-unet**. For SD1.5 \
and SD2, set *Empty Latent Image* to 512 or 768.""",
        "dog",
    )
    _real_pictures(
        template, trained["MODEL"], loaded["CLIP"], loaded["VAE"], trained["T-LoRA"], x, 1024, steps=30, cfg=5.0
    )


def train_sdxl_on_several_images(template):
    column = Column(template, 0, 280)
    column.note(
        330,
        """# SDXL, several pictures with masks

1. Choose an SDXL model file, and your pictures in *Load Image*, of any sizes; two to five are plenty.
2. In each: right-click, **Open in Mask Editor**, paint over the subject, save. Only the loss inside the mask then \
counts. For no mask, disconnect it.
3. In **captions**, write what each picture shows besides the subject. What you name there does not become part of \
the subject.
4. Set **class_word**, and press **Run**.""",
    )
    loaded = column.add("CheckpointLoaderSimple", LOADER, models=[SDXL], ckpt_name=SDXL["name"])
    loads, described = Column(template, column.beside, 230), Column(template, column.beside + 255, 240)
    picture = {}
    for number, place in enumerate(("on a sofa", "in a garden", "on a street"), 1):
        image = (column if number == 1 else loads).add("LoadImage", PICTURE, f"Picture {number}", image="example.png")
        picture[number] = {
            "image": image["IMAGE"],
            "mask": image["MASK"],
            "captions": "a photo of {token} {class_word} " + place,
        }
    more = described.add("TLoRAImages", CONCEPT, **picture[2])
    more = described.add("TLoRAImages", CONCEPT, **picture[3], before=more["images"])
    column.group("1  A model and a picture", BLUE)
    loads.group("2  More pictures, with masks and captions", PURPLE, described)
    column = Column(template, described.beside, 300)
    trained = column.add(
        "TLoRATrainFromImage",
        680,
        model=loaded["MODEL"],
        clip=loaded["CLIP"],
        vae=loaded["VAE"],
        **picture[1],
        more_images=more["images"],
        framing="keep aspect ratio",
        token="sks",
        class_word="dog",
        file_name="tlora/my_subject",
        validation_prompts="a photo of {token} {class_word} on the beach",
        validate_every=100,
    )
    column.group("3  Train", GREEN)
    _real_pictures(
        template,
        trained["MODEL"],
        loaded["CLIP"],
        loaded["VAE"],
        trained["T-LoRA"],
        column.beside,
        1024,
        steps=30,
        cfg=5.0,
    )


def train_flux_on_one_image(template):
    loaded, trained, x = _train_on_one_image(
        template,
        FLUX,
        """# FLUX, one picture

1. Choose a FLUX.1 dev model file, and your picture in *Load Image*.
2. Set **class_word** to what the subject is: dog, mug, person.
3. Press **Run**. The panel of *Train T-LoRA* shows the loss and validation pictures; **Stop and keep** ends early.

**method** auto is *vanilla_tlora* here. Steps, learning rate and resolution are 0, the model's defaults. If memory \
runs out, set **rank** to 32 and **min_rank** to 16, then **resolution** to 512.""",
        "dog",
    )
    _real_pictures(
        template,
        trained["MODEL"],
        loaded["CLIP"],
        loaded["VAE"],
        trained["T-LoRA"],
        x,
        1024,
        "EmptySD3LatentImage",
        negative=False,
        steps=20,
        cfg=1.0,
        scheduler="simple",
    )


def generate_with_a_file(template):
    column = Column(template, 0, 320)
    column.note(
        240,
        """# Generate with a T-LoRA file

Choose the model the T-LoRA was trained on, and the file in *Load T-LoRA*. The node shows the file's picture, \
its trigger phrase, and the active ranks at each noise level. While a sampler runs, a dot marks its current step.

Use the trigger phrase in your prompts; **{}** stands for it.""",
    )
    loaded = column.add("CheckpointLoaderSimple", LOADER, models=[SDXL], ckpt_name=SDXL["name"])
    adapted = column.rest("TLoRALoad", model=loaded["MODEL"], file="")
    column.group("1  A model and a file", BLUE)
    _real_pictures(
        template,
        adapted["MODEL"],
        loaded["CLIP"],
        loaded["VAE"],
        adapted["T-LoRA"],
        column.beside,
        1024,
        steps=30,
        cfg=5.0,
    )


def use_a_file_from_elsewhere(template):
    column = Column(template, 0, 320)
    column.note(
        260,
        """# A file from elsewhere

*Load T-LoRA* reads the authors' files, LyCORIS and SimpleTuner files, and plain LoRAs; the report says what matched \
and what was assumed. If a file holds no schedule, set **min_rank**; it also gives a plain LoRA a T-LoRA's schedule.

The same T-LoRA is then saved as the pack's own file, for another program, and as one plain LoRA, its mean over all \
noise levels. Delete the nodes you do not need.""",
    )
    loaded = column.add("CheckpointLoaderSimple", LOADER, models=[SDXL], ckpt_name=SDXL["name"])
    adapted = column.rest("TLoRALoad", model=loaded["MODEL"], file="")
    column.group("1  A model and a file", BLUE)
    column = Column(template, column.beside, 320)
    column.add("PreviewAny", 200, "What matched", source=adapted["report"])
    info = column.add("TLoRAInfo", 80, tlora=adapted["T-LoRA"])
    column.rest("PreviewImage", "Ranks and blocks", images=info["IMAGE"])
    column.group("2  What it is", PURPLE)
    column = Column(template, column.beside, 300)
    column.add("TLoRASave", 145, tlora=adapted["T-LoRA"], file_name="tlora/from_elsewhere")
    column.add("TLoRAExport", 180, tlora=adapted["T-LoRA"], file_name="tlora/exported")
    column.add("TLoRABake", 290, tlora=adapted["T-LoRA"], file_name="tlora/baked")
    column.group("3  Saved in other ways", GREEN)
    _real_pictures(
        template,
        adapted["MODEL"],
        loaded["CLIP"],
        loaded["VAE"],
        adapted["T-LoRA"],
        column.beside,
        1024,
        steps=30,
        cfg=5.0,
    )


def which_step_to_keep(template):
    column = Column(template, 0, 290)
    column.note(
        335,
        """# Which saved step to keep?

For a training that saved files on the way (**checkpoint_every**, **checkpoint_files**). It runs the same prompts \
with three files, and *T-LoRA Evaluate* says which follows them best among those with about the highest likeness.

Choose the model the files were trained on, the training picture, a file in each *Load T-LoRA*, and a CLIP model \
in each *T-LoRA Evaluate* (see its help). Set **neutral_prompt** to the first prompt. For the paper's own prompts, \
set **prompt_set** to live or object.""",
    )
    loaded = column.add("CheckpointLoaderSimple", LOADER, models=[SDXL], ckpt_name=SDXL["name"])
    image = column.rest("LoadImage", "The training picture", image="example.png")
    column.group("1  A model and the picture", BLUE)
    column = Column(template, column.beside, 270)
    prompts = column.add(
        "TLoRAPrompts",
        220,
        subject="sks dog",
        prompts="a photo of {}\na photo of {} on the beach\na photo of {} in the snow\na painting of {} in a library",
    )
    positive = column.add("CLIPTextEncode", TEXT, "Prompts", clip=loaded["CLIP"], text=prompts["prompts"])
    negative = column.add("CLIPTextEncode", TEXT, "Negative prompt", clip=loaded["CLIP"])
    latent = column.add("EmptyLatentImage", LATENT, width=1024, height=1024, batch_size=2)
    column.group("2  Prompts", PURPLE)
    before, first, x = {}, None, column.beside
    for step in (400, 600, 800):
        column = Column(template, x, 260)
        adapted = column.add("TLoRALoad", 420, f"Step {step}", model=loaded["MODEL"], file="")
        sampled = column.add(
            "KSampler",
            SAMPLER,
            folded=True,
            model=adapted["MODEL"],
            positive=positive["CONDITIONING"],
            negative=negative["CONDITIONING"],
            latent_image=latent["LATENT"],
            seed=7,
            steps=30,
            cfg=5.0,
        )
        decoded = column.add("VAEDecode", 55, folded=True, samples=sampled["LATENT"], vae=loaded["VAE"])
        scored = column.rest(
            "TLoRAEvaluate",
            images=decoded["IMAGE"],
            prompts=prompts["prompts"],
            concept=image["IMAGE"],
            clip_model="none",
            label=f"step {step}",
            token="sks",
            neutral_prompt="a photo of sks dog",
            **before,
        )
        before, first, x = {"before": scored["scores"]}, first or column, column.x + column.width + 30
    first.group("3  Three saved steps", GREEN, column)
    column = Column(template, column.beside, WIDTH - column.beside)
    column.add("PreviewAny", 300, "Scores", source=scored["report"])
    column.add("PreviewAny", 140, "Keep this one", source=scored["best"])
    column.group("4  The best", RED)


# Keys: file names, which the template browser shows. It lists the templates in this order.
TEMPLATES = {
    "01 Quickstart": quickstart,
    "02 SDXL, train on one picture": train_sdxl_on_one_image,
    "03 FLUX, train on one picture": train_flux_on_one_image,
    "04 SDXL, train on several pictures with masks": train_sdxl_on_several_images,
    "05 Generate with a T-LoRA file": generate_with_a_file,
    "06 Use a LoRA or T-LoRA from elsewhere": use_a_file_from_elsewhere,
    "07 LoRA against T-LoRA": compare_lora_with_tlora,
    "08 How low should min_rank be": min_rank_sweep,
    "09 XY sheet of strength and min_rank": xy_sheet,
    "10 Which checkpoint to keep": which_step_to_keep,
    "11 Stop a training and go on": stop_and_go_on,
    "12 Several pictures with masks, no download": several_images_with_masks,
}
