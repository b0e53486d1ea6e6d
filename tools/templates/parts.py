"""What the templates are made of: columns, and groups of nodes that several templates have.

Lengths are in the graph's pixels. The interface fits a template into the window when it opens it, and draws no text on
nodes that become too small. On a screen of 1366 x 768 a template can be 1772 x 988 at most, with the nodes' titles. It
consists of columns; a Train node has a column of its own, because it grows during training.
"""

WIDTH = 1772  # of all nodes
TOP, BOTTOM = 80, 1030  # of the nodes, without their titles
GAP, UNDER, FOLDED = 40, 45, 42  # between columns; below a node; below a folded node
TRAIN = (340, 624)
SAMPLER, TEXT, LATENT, CONCEPT, BASE, LOADER, PICTURE = 275, 105, 120, 220, 100, 126, 350  # heights
IMAGES = 310  # with its pictures when it has run
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
        right, bottom = (until or self).x + (until or self).width, max(BOTTOM, self.y - UNDER)
        self.template.group(title, (self.x - 15, self.top - 75, right - self.x + 30, bottom - self.top + 90), color)


def add_tiny_subject(template, text, height=265, shown=True):
    """The note, and below it the tiny base and one picture, which is `shown` too."""
    column = Column(template, 0, 300)
    column.note(height, text)
    base = column.add("TLoRATinyBaseModel", BASE)
    concept = column.add("TLoRATinySampleConcept", CONCEPT, concept="lime circle", background="beach")
    if shown:
        column.rest("PreviewImage", "The one training picture", images=concept["IMAGE"])
    column.group("1  One picture and a model", BLUE)
    return column, base, concept


def model_and_image(loaded, image):
    """Train's inputs from a node that outputs MODEL, CLIP and VAE, and a node that outputs IMAGE."""
    return {"model": loaded["MODEL"], "clip": loaded["CLIP"], "vae": loaded["VAE"], "image": image["IMAGE"]}


def add_sampler(column, title="", folded=False, *, model, positive, negative, latent, seed=7, **sampling):
    return column.add(
        "KSampler",
        SAMPLER,
        title,
        folded=folded,
        model=model["MODEL"],
        positive=positive["CONDITIONING"],
        negative=negative["CONDITIONING"],
        latent_image=latent["LATENT"],
        seed=seed,
        **sampling,
    )


def add_training(template, x, group="", heading="", height=TRAIN[1], **inputs):
    column = Column(template, x, TRAIN[0])
    node = column.add("TLoRATrainFromImage", height, heading, **inputs)
    if group:
        column.group(group, GREEN)
    return column, node


def add_samplers(column, base, settings, opened=1, scenes=SCENES, scheduler="simple"):
    """A column with the prompts and a sampler for each (label, node), all but the first `opened` folded. Returns
    (prompts, latents by label)."""
    prompts = column.add("TLoRAPrompts", 200, "Scenes", prompts=scenes, subject="sks circle")
    positive = column.add("CLIPTextEncode", TEXT, "Prompts", clip=base["CLIP"], text=prompts["prompts"])
    negative = column.add("CLIPTextEncode", TEXT, "Negative prompt (empty)", folded=True, clip=base["CLIP"])
    latent = column.add("EmptyLatentImage", LATENT, folded=True, width=64, height=64)
    latents = {}
    parts = {"positive": positive, "negative": negative, "latent": latent}
    for i, (label, model) in enumerate(settings):
        sampled = add_sampler(column, label, i >= opened, model=model, **parts, steps=20, cfg=4.0, scheduler=scheduler)
        latents[label] = sampled["LATENT"]
    column.group("Same prompts and seed", PURPLE)
    return prompts, latents


def add_sheet(column, base, prompts, latents, title):
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


def add_comparison(template, base, settings, x, title, file_name, sheet_width=370):
    """From `x` on: prompts, a sampler and a decoder for each (label, node), and the sheet of all pictures."""
    column = Column(template, x, 260)
    prompts, latents = add_samplers(column, base, settings)
    sheets = Column(template, column.beside, sheet_width)
    sheet = add_sheet(sheets, base, prompts, latents, title)
    sheets.rest("SaveImage", "The sheet", images=sheet["sheet"], filename_prefix=file_name)
    sheets.group("Side by side", RED)


def add_real_pictures(
    template,
    loaded,
    adapted,
    x,
    latent="EmptyLatentImage",
    negative=True,
    guidance=None,
    side=1024,
    steps=30,
    cfg=5.0,
    wide=290,
    **sampling,
):
    """Prompts for the subject of `adapted`, a node with MODEL and T-LoRA, its sampler, and saved pictures of `side`
    pixels, as wide as the remaining room. loaded: a node with CLIP and VAE. negative: whether there is a negative
    prompt. guidance: what to tell a model with guidance distilled into it. wide: the prompts' column."""
    column = Column(template, x, wide)
    prompts = column.add(
        "TLoRAPrompts",
        200,
        tlora=adapted["T-LoRA"],
        prompts="a photo of {} on the beach\na photo of {} in the snow\na painting of {} in a library",
    )
    positive = column.add("CLIPTextEncode", TEXT, "Prompts", clip=loaded["CLIP"], text=prompts["prompts"])
    if negative:
        empty = column.add("CLIPTextEncode", TEXT, "Negative prompt", folded=True, clip=loaded["CLIP"])
    else:
        conditioning = positive["CONDITIONING"]
        empty = column.add("ConditioningZeroOut", 50, folded=True, conditioning=conditioning)
    if guidance is not None:
        conditioning = positive["CONDITIONING"]
        positive = column.add("FluxGuidance", 80, folded=True, conditioning=conditioning, guidance=guidance)
    size = column.add(latent, LATENT, folded=not negative, width=side, height=side)
    parts = {"model": adapted, "positive": positive, "negative": empty, "latent": size}
    sampled = add_sampler(column, **parts, steps=steps, cfg=cfg, **sampling)
    decoded = column.add("VAEDecode", 55, folded=True, samples=sampled["LATENT"], vae=loaded["VAE"])
    last = Column(template, column.beside, min(WIDTH - column.beside, 640))
    last.rest("SaveImage", images=decoded["IMAGE"], filename_prefix="tlora/picture")
    column.group("Prompts and a sampler", PURPLE)
    last.group("New pictures", RED)


def add_model_and_file(template, note, height):
    """The note, and below it a model file and a T-LoRA file."""
    column = Column(template, 0, 320)
    column.note(height, note)
    loaded = column.add("CheckpointLoaderSimple", LOADER, models=[SDXL], ckpt_name=SDXL["name"])
    adapted = column.rest("TLoRALoad", model=loaded["MODEL"], file="")
    column.group("1  A model and a file", BLUE)
    return column, loaded, adapted


def add_training_on_one_image(template, model_file, note, subject, **settings):
    column = Column(template, 0, 320)
    column.note(335, note)
    loaded = column.add("CheckpointLoaderSimple", LOADER, models=[model_file], ckpt_name=model_file["name"])
    image = column.rest("LoadImage", "Your one picture", image="example.png")
    column.group("1  A model and one picture", BLUE)
    column, trained = add_training(
        template,
        column.beside,
        "2  Train",
        **model_and_image(loaded, image),
        token="sks",
        class_word=subject,
        file_name="tlora/my_subject",
        validation_prompts="a photo of {token} {class_word} on the beach",
        validate_every=100,
        **settings,
    )
    return loaded, trained, column.beside
