"""The templates for SDXL and FLUX."""

from .parts import (
    BLUE,
    FLUX,
    GREEN,
    IMAGES,
    LATENT,
    LOADER,
    PICTURE,
    PURPLE,
    RED,
    SDXL,
    TEXT,
    WIDTH,
    Column,
    add_model_and_file,
    add_real_pictures,
    add_sampler,
    add_training_on_one_image,
)


def train_sdxl_on_one_image(template):
    loaded, trained, x = add_training_on_one_image(
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
    add_real_pictures(template, loaded, trained, x)


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
    more = described.add("TLoRAImages", IMAGES, **picture[2])
    more = described.add("TLoRAImages", IMAGES, **picture[3], before=more["images"])
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
    add_real_pictures(template, loaded, trained, column.beside)


def train_flux_on_one_image(template):
    loaded, trained, x = add_training_on_one_image(
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
    add_real_pictures(
        template,
        loaded,
        trained,
        x,
        "EmptySD3LatentImage",
        negative=False,
        guidance=3.5,
        steps=20,
        cfg=1.0,
        scheduler="simple",
    )


def generate_with_a_file(template):
    column, loaded, adapted = add_model_and_file(
        template,
        """# Generate with a T-LoRA file

Choose the model the T-LoRA was trained on, and the file in *Load T-LoRA*. The node shows the file's picture, \
its trigger phrase, and the active ranks at each noise level. While a sampler runs, a dot marks its current step.

Use the trigger phrase in your prompts; **{}** stands for it.""",
        240,
    )
    add_real_pictures(template, loaded, adapted, column.beside)


def use_a_file_from_elsewhere(template):
    column, loaded, adapted = add_model_and_file(
        template,
        """# A file from elsewhere

*Load T-LoRA* reads the authors' files, LyCORIS and SimpleTuner files, and plain LoRAs; the report says what matched \
and what was assumed. If a file holds no schedule, set **min_rank**; it also gives a plain LoRA a T-LoRA's schedule.

The same T-LoRA is then saved as the pack's own file, for another program, and as one plain LoRA, its mean over all \
noise levels. Delete the nodes you do not need.""",
        260,
    )
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
    add_real_pictures(template, loaded, adapted, column.beside)


def which_checkpoint_to_keep(template):
    column = Column(template, 0, 290)
    column.note(
        335,
        """# Which saved step to keep?

For a training that saved files on the way (**checkpoint_every**, **checkpoint_files**). It runs the same prompts \
without a T-LoRA and with each file. *T-LoRA Evaluate* counts likeness, obedience and copying from the first, and says \
which file balances them best.

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
    parts = {"positive": positive, "negative": negative, "latent": latent}
    before, first, x = {}, None, column.beside
    for label in ("no T-LoRA", "step 400", "step 800"):
        column, model = Column(template, x, 260), loaded
        if label.startswith("step"):
            model = column.add("TLoRALoad", 420, label.capitalize(), model=loaded["MODEL"], file="")
        sampled = add_sampler(column, folded=True, model=model, **parts, steps=30, cfg=5.0)
        decoded = column.add("VAEDecode", 55, folded=True, samples=sampled["LATENT"], vae=loaded["VAE"])
        scored = column.rest(
            "TLoRAEvaluate",
            images=decoded["IMAGE"],
            prompts=prompts["prompts"],
            concept=image["IMAGE"],
            clip_model="none",
            label=label,
            token="sks",
            neutral_prompt="a photo of sks dog",
            **before,
        )
        before, first, x = {"before": scored["scores"]}, first or column, column.x + column.width + 30
    first.group("3  Without, and two saved steps", GREEN, column)
    column = Column(template, column.beside, WIDTH - column.beside)
    column.add("PreviewAny", 300, "Scores", source=scored["report"])
    column.add("PreviewAny", 140, "Keep this one", source=scored["best"])
    column.group("4  The best", RED)
