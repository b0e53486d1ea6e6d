"""What the pack's templates hold; `make_workflows.py` writes them. Positions are in the graph's pixels."""

SCENES = "a photo of {} in a meadow\na photo of {} in the snow\na photo of {} on a plain yellow background"
# What teaches the tiny base an object.
TINY = {"token": "sks", "class_word": "circle", "rank": 32, "min_rank": 16, "steps": 350, "learning_rate": 0.0015, "resolution": 64,
        "batch_size": 2, "method": "tlora"}
# Of a node, in pixels, where the interface shows it higher: it grows to that by itself and would cover what is below.
HEIGHTS = {"TLoRATrainFromImage": 1310,  # with room for validation pictures and a message
           "TLoRAApply": 230, "TLoRALoad": 420, "TLoRAImages": 200, "TLoRAPrompts": 220, "TLoRASweep": 340, "TLoRACompare": 390,
           "TLoRAEvaluate": 370, "TLoRAInfo": 80, "TLoRASave": 145, "TLoRAExport": 180, "TLoRABake": 290, "TLoRATinyBaseModel": 100,
           "TLoRATinySampleConcept": 220, "CheckpointLoaderSimple": 128, "LoadImage": 352, "SolidMask": 120, "MaskComposite": 140,
           "CLIPTextEncode": 110, "ConditioningZeroOut": 55, "FluxGuidance": 80, "EmptyLatentImage": 120, "EmptySD3LatentImage": 120,
           "KSampler": 270, "VAEDecode": 55}
BLUE, GREEN, PURPLE, RED = "#3f789e", "#8A8", "#88A", "#A88"
HUB = "https://huggingface.co/"
SDXL = {"name": "sd_xl_base_1.0.safetensors", "directory": "checkpoints",
        "url": HUB + "stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors"}
FLUX = {"name": "flux1-dev-fp8.safetensors", "directory": "checkpoints",
        "url": HUB + "Comfy-Org/flux1-dev/resolve/main/flux1-dev-fp8.safetensors"}


def _tiny_subject(template, top=400):
    """The tiny base and one picture for it, in the first column from `top` on."""
    base = template.add("TLoRATinyBaseModel", (0, top), 320)
    concept = template.add("TLoRATinySampleConcept", 0, 320, concept="lime circle", background="beach")
    template.group("1  One picture and a model", (-20, top - 80), 360, BLUE)
    return base, concept


def _compared(template, base, settings, x, title, file_name, picture, scenes=SCENES, scheduler="simple"):
    """Prompts, then a sampler and a decoder for each (label, MODEL), and the sheet of all beside the training picture, from `x` on."""
    prompts = template.add("TLoRAPrompts", x, 280, "Scenes", prompts=scenes, subject="sks circle")
    positive = template.add("CLIPTextEncode", x, 280, "Prompts", clip=base["CLIP"], text=prompts["prompts"])
    negative = template.add("CLIPTextEncode", x, 280, "Negative prompt (empty)", clip=base["CLIP"])
    latent = template.add("EmptyLatentImage", x, 280, width=64, height=64)
    pictures = {}
    for number, (label, model) in enumerate(settings, 1):
        sampled = template.add("KSampler", x + 320, 260, label, model=model, positive=positive["CONDITIONING"],
                               negative=negative["CONDITIONING"], latent_image=latent["LATENT"], seed=7, steps=20, cfg=4.0, scheduler=scheduler)
        decoded = template.add("VAEDecode", x + 320, 260, samples=sampled["LATENT"], vae=base["VAE"])
        pictures[f"images_{number}"] = decoded["IMAGE"]
    template.group("Same prompts and seed for each", (x - 20, 0), 620, PURPLE)
    x += 640
    sheet = template.add("TLoRACompare", x, 320, labels="\n".join(label for label, _ in settings), prompts=prompts["prompts"],
                         title=title, cell=160, **pictures)
    template.add("PreviewImage", x, (320, 340), "The one training picture", images=picture)
    template.add("SaveImage", x + 350, (640, 790), "The sheet", images=sheet["sheet"], filename_prefix=file_name)
    template.group("Side by side", (x - 20, 0), 1030, RED)


def quickstart(template):
    template.note((0, 0), (320, 350), """# T-LoRA quickstart

Press **Run**. While it trains, the panel on *Train T-LoRA* shows the loss and what the model draws. Then the sheet on the right shows \
a thing the model had never seen, in four new scenes, learnt from the **one** picture beside it.

1. *Sample Concept* draws the training picture.
2. *Train T-LoRA* teaches it to the tiny base model that comes with the pack. The thing becomes `sks circle`.
3. *Apply T-LoRA* gives the sampler the ranks of each noise level.
4. The same prompts and seed run with and without it.

With a model and a picture of your own, open *02 SDXL, train on one picture* or *03 FLUX, train on one picture*.""")
    base, concept = _tiny_subject(template, 470)
    trained = template.add("TLoRATrainFromImage", 380, 340, model=base["MODEL"], clip=base["CLIP"], vae=base["VAE"],
                           image=concept["IMAGE"], **{**TINY, "batch_size": 4}, file_name="tlora/quickstart", validate_every=100,
                           validation_prompts="a photo of {token} {class_word} in the snow\na photo of {token} {class_word} in a meadow")
    template.add("PreviewImage", 0, (320, 250), "Loss", images=trained["loss"])
    template.group("2  Train", (360, 0), 380, GREEN)
    applied = template.add("TLoRAApply", 780, 280, model=base["MODEL"], tlora=trained["T-LoRA"])
    template.group("3  Apply", (760, 0), 320, GREEN)
    _compared(template, base, [("with the T-LoRA", applied["MODEL"]), ("without it", base["MODEL"])], 1120,
              "One training picture, same prompts, same seed", "tlora/quickstart", concept["IMAGE"],
              SCENES + "\na photo of {} on a plain grey background", scheduler="normal")


def compare_lora_with_tlora(template):
    template.note((0, 0), (320, 280), """# LoRA against T-LoRA

Press **Run**: two trainings on the **one** picture below, of some minutes in all, then the same prompts with each and with neither.

A plain LoRA has all its ranks on while the picture is still noise, and tends to bring the training picture's pose and background \
along. A T-LoRA has few of them on there.""")
    base, concept = _tiny_subject(template)
    common = {"model": base["MODEL"], "clip": base["CLIP"], "vae": base["VAE"], "image": concept["IMAGE"]}
    plain = template.add("TLoRATrainFromImage", (380, 80), 340, "LoRA", **common,
                         **{**TINY, "method": "lora", "file_name": "tlora/compared_lora"})
    masked = template.add("TLoRATrainFromImage", (760, 80), 340, "T-LoRA", **common, **TINY, file_name="tlora/compared_tlora")
    template.group("2  Two methods, else the same", (360, 0), 760, GREEN)
    _compared(template, base, [("LoRA", plain["MODEL"]), ("T-LoRA", masked["MODEL"]), ("without", base["MODEL"])], 1160,
              "One training picture, same prompts, same seed", "tlora/compare", concept["IMAGE"])


def min_rank_sweep(template):
    template.note((0, 0), (320, 280), """# How low should min_rank be?

Press **Run**: four trainings that differ in `min_rank` alone, a few minutes in all, then the same prompts with each.

`min_rank` ranks stay on at pure noise. Fewer follow the prompt more freely, too few lose the subject; at 32, the rank, the mask is off. \
With this small model, which settles most of a picture late, the four come out much alike.""")
    base, concept = _tiny_subject(template)
    common = {"model": base["MODEL"], "clip": base["CLIP"], "vae": base["VAE"], "image": concept["IMAGE"]}
    settings = []
    for i, least in enumerate((4, 8, 16, 32)):
        node = template.add("TLoRATrainFromImage", (380 + 380 * i, 80), 340, f"min_rank {least}", **common,
                            **{**TINY, "min_rank": least, "file_name": f"tlora/min_rank_{least}"})
        settings.append((f"min_rank {least}", node["MODEL"]))
    template.group("2  Four values of min_rank", (360, 0), 1520, GREEN)
    _compared(template, base, settings, 1920, "Rank 32, same prompts, same seed", "tlora/min_rank", concept["IMAGE"])


def xy_sheet(template):
    template.note((0, 0), (320, 280), """# An XY sheet

Press **Run**: one training of a minute or two, then a picture for each cell: `strength` from left to right, `min_rank` from top to \
bottom.

*Sweep* gives the model of each cell, the sampler runs once for each, and *Compare* takes labels and grid from `axes`. Choose *file* \
to compare checkpoints.""")
    base, concept = _tiny_subject(template)
    trained = template.add("TLoRATrainFromImage", (380, 80), 340, model=base["MODEL"], clip=base["CLIP"], vae=base["VAE"],
                           image=concept["IMAGE"], **TINY, file_name="tlora/xy_sheet")
    template.group("2  Train", (360, 0), 380, GREEN)
    sweep = template.add("TLoRASweep", (780, 80), 300, model=base["MODEL"], tlora=trained["T-LoRA"], x="strength",
                         x_values="0.5, 0.75, 1, 1.25", y="min_rank", y_values="4, 8, 16, 32")
    positive = template.add("CLIPTextEncode", 780, 300, "Prompt", clip=base["CLIP"],
                            text="a photo of sks circle in a meadow")
    negative = template.add("CLIPTextEncode", 780, 300, "Negative prompt (empty)", clip=base["CLIP"])
    latent = template.add("EmptyLatentImage", 780, 300, width=64, height=64)
    template.group("3  What to vary", (760, 0), 340, PURPLE)
    sampled = template.add("KSampler", (1140, 80), 280, "Once for each model", model=sweep["MODEL"], seed=2, steps=20, cfg=4.0,
                           positive=positive["CONDITIONING"], negative=negative["CONDITIONING"], latent_image=latent["LATENT"])
    decoded = template.add("VAEDecode", 1140, 280, samples=sampled["LATENT"], vae=base["VAE"])
    sheet = template.add("TLoRACompare", 1140, 280, images_1=decoded["IMAGE"], axes=sweep["axes"], labels="",
                         title="Rank 32, same prompt, same seed", cell=160)
    template.add("PreviewImage", 1140, (280, 300), "The one training picture", images=concept["IMAGE"])
    template.add("SaveImage", (1460, 80), (560, 600), "The sheet", images=sheet["sheet"], filename_prefix="tlora/xy_sheet")
    template.group("4  The sheet", (1120, 0), 920, RED)


def several_images_with_masks(template):
    template.note((0, 0), (320, 300), """# Several pictures, with masks

*T-LoRA Images* takes pictures with captions and a mask each; chain one for each size of picture. The loss counts inside the mask \
only, so nothing of the background is learnt.

Here both are drawn, so that **Run** needs nothing. With pictures of your own: *Load Image*, right click, **Open in Mask Editor**, \
paint over the subject, and connect its MASK output.""")
    base = template.add("TLoRATinyBaseModel", (0, 400), 320)
    empty = template.add("SolidMask", 0, 320, "Outside the subject", value=0.0, width=64, height=64)
    middle = template.add("SolidMask", 0, 320, "The subject's place", value=1.0, width=48, height=48)
    mask = template.add("MaskComposite", 0, 320, destination=empty["MASK"], source=middle["MASK"], x=8, y=8,
                        operation="add")
    template.group("1  A model and a mask", (-20, 320), 360, BLUE)
    images = None
    for background, words in (("beach", "on the beach"), ("brick", "before a brick wall")):
        concept = template.add("TLoRATinySampleConcept", 380, 320, concept="lime circle", background=background, count=2)
        more = {"before": images["images"]} if images else {}
        images = template.add("TLoRAImages", 380, 320, image=concept["IMAGE"], mask=mask["MASK"],
                              captions="a photo of {token} {class_word} " + words, **more)
    first = template.add("TLoRATinySampleConcept", 380, 320, concept="lime circle", background="meadow")
    template.group("2  Pictures with captions", (360, 0), 360, PURPLE)
    trained = template.add("TLoRATrainFromImage", (760, 80), 340, model=base["MODEL"], clip=base["CLIP"], vae=base["VAE"],
                           image=first["IMAGE"], mask=mask["MASK"], more_images=images["images"],
                           captions="a photo of {token} {class_word} in a meadow", **TINY, file_name="tlora/several_images")
    template.group("3  Train", (740, 0), 380, GREEN)
    _compared(template, base, [("T-LoRA", trained["MODEL"]), ("without", base["MODEL"])], 1160,
              "Five pictures with masks, same prompts, same seed", "tlora/several_images", first["IMAGE"])


def stop_and_go_on(template):
    template.note((0, 0), (320, 280), """# Stop, keep, go on

1. Press **Run**, and **Stop and keep** in the training panel when you have seen enough: the sheet is made with what was learnt.
2. Press **Run** again: with `rerun` on *continue* the training goes on from there to its last step. A cancel, a crash or a power \
cut costs at most the 50 steps since the last checkpoint.

`checkpoint_files` keeps a file of each checkpoint, for *Load T-LoRA*.""")
    base, concept = _tiny_subject(template)
    trained = template.add("TLoRATrainFromImage", (380, 80), 340, model=base["MODEL"], clip=base["CLIP"], vae=base["VAE"],
                           image=concept["IMAGE"], **TINY, file_name="tlora/stop_and_go_on", checkpoint_every=50, checkpoint_files=True,
                           save_on_cancel=True, rerun="continue", validate_every=50,
                           validation_prompts="a photo of {token} {class_word} in the snow")
    template.group("2  Train, in as many goes as you like", (360, 0), 380, GREEN)
    _compared(template, base, [("T-LoRA", trained["MODEL"]), ("without", base["MODEL"])], 780,
              "So far learnt, same prompts, same seed", "tlora/stop_and_go_on", concept["IMAGE"])


def _real_pictures(template, model, clip, vae, prompts, x, side, latent="EmptyLatentImage", negative=True, **sampling):
    """Text, sampler and saved pictures on a model of full size."""
    positive = template.add("CLIPTextEncode", (x, 80), 300, "Prompts", clip=clip, text=prompts)
    conditioning = positive["CONDITIONING"]
    if negative:
        empty = template.add("CLIPTextEncode", x, 300, "Negative prompt", clip=clip)["CONDITIONING"]
    else:
        empty = template.add("ConditioningZeroOut", x, 300, conditioning=conditioning)["CONDITIONING"]
        conditioning = template.add("FluxGuidance", x, 300, conditioning=conditioning, guidance=3.5)["CONDITIONING"]
    size = template.add(latent, x, 300, width=side, height=side)
    sampled = template.add("KSampler", x, 300, model=model, positive=conditioning, negative=empty,
                           latent_image=size["LATENT"], seed=7, **sampling)
    decoded = template.add("VAEDecode", x, 300, samples=sampled["LATENT"], vae=vae)
    template.add("SaveImage", (x + 360, 80), (560, 600), images=decoded["IMAGE"], filename_prefix="tlora/picture")
    template.group("New pictures", (x - 20, 0), 960, RED)


def _train_on_one_image(template, checkpoint, note, subject, **settings):
    template.note((0, 0), (320, 330), note)
    loaded = template.add("CheckpointLoaderSimple", (0, 440), 320, models=[checkpoint], ckpt_name=checkpoint["name"])
    image = template.add("LoadImage", 0, 320, "Your one picture", image="example.png")
    template.group("1  A model and one picture", (-20, 360), 360, BLUE)
    trained = template.add("TLoRATrainFromImage", (380, 80), 340, model=loaded["MODEL"], clip=loaded["CLIP"], vae=loaded["VAE"],
                           image=image["IMAGE"], token="sks", class_word=subject, file_name="tlora/my_subject",
                           validation_prompts="a photo of {token} {class_word} on the beach", validate_every=100, **settings)
    template.group("2  Train", (360, 0), 380, GREEN)
    prompts = template.add("TLoRAPrompts", (780, 80), 300, tlora=trained["T-LoRA"],
                           prompts="a photo of {} on the beach\na photo of {} in the snow\na painting of {} in a library")
    template.group("3  Prompts", (760, 0), 340, PURPLE)
    return loaded, trained, prompts


def train_sdxl_on_one_image(template):
    loaded, trained, prompts = _train_on_one_image(template, SDXL, """# SDXL, one picture

1. Choose an SDXL checkpoint, and your picture in *Load Image*. The centre square is used; a plain background helps.
2. Set `class_word` to what it is: dog, mug, person.
3. Press **Run**. The panel on *Train T-LoRA* shows the loss and validation pictures; **Stop and keep** ends early.

Steps, learning rate and resolution are 0: what suits the model. `rank` 64 and `min_rank` 32 are the paper's. If memory runs out, set \
`rank` to 32 and `min_rank` to 16; then start ComfyUI with `--fp8_e4m3fn-unet`. It works \
for SD1.5 and SD2 as well: then set *Empty Latent Image* to 512 or 768.""", "dog")
    _real_pictures(template, trained["MODEL"], loaded["CLIP"], loaded["VAE"], prompts["prompts"], 1140, 1024, steps=30, cfg=5.0)


def train_sdxl_on_several_images(template):
    template.note((0, 0), (320, 330), """# SDXL, several pictures with masks

1. Choose an SDXL checkpoint, and your pictures in *Load Image*, of any sizes; two to five are plenty.
2. In each: right click, **Open in Mask Editor**, paint over the subject, save. The loss then counts inside the mask only. Where you \
want no mask, unconnect it.
3. Write what each picture shows besides the subject into its `captions`: what is named there is not taken for the subject.
4. Set `class_word`, and press **Run**.""")
    loaded = template.add("CheckpointLoaderSimple", (0, 440), 320, models=[SDXL], ckpt_name=SDXL["name"])
    template.group("1  A model", (-20, 360), 360, BLUE)
    picture = {}
    for number, place in enumerate(("on a sofa", "in a garden", "on a street"), 1):
        image = template.add("LoadImage", 380, 320, f"Picture {number}", image="example.png")
        picture[number] = {"image": image["IMAGE"], "mask": image["MASK"], "captions": "a photo of {token} {class_word} " + place}
    more = template.add("TLoRAImages", (740, 80), 320, **picture[2])
    more = template.add("TLoRAImages", 740, 320, **picture[3], before=more["images"])
    template.group("2  Pictures with masks and captions", (360, 0), 720, PURPLE)
    trained = template.add("TLoRATrainFromImage", (1120, 80), 340, model=loaded["MODEL"], clip=loaded["CLIP"], vae=loaded["VAE"],
                           **picture[1], more_images=more["images"], framing="keep aspect ratio", token="sks", class_word="dog",
                           file_name="tlora/my_subject", validation_prompts="a photo of {token} {class_word} on the beach", validate_every=100)
    template.group("3  Train", (1100, 0), 380, GREEN)
    prompts = template.add("TLoRAPrompts", (1520, 80), 300, tlora=trained["T-LoRA"],
                           prompts="a photo of {} on the beach\na photo of {} in the snow\na painting of {} in a library")
    template.group("4  Prompts", (1500, 0), 340, PURPLE)
    _real_pictures(template, trained["MODEL"], loaded["CLIP"], loaded["VAE"], prompts["prompts"], 1880, 1024, steps=30, cfg=5.0)


def train_flux_on_one_image(template):
    loaded, trained, prompts = _train_on_one_image(template, FLUX, """# FLUX, one picture

1. Choose a FLUX.1 dev checkpoint, and your picture in *Load Image*.
2. Set `class_word` to what it is: dog, mug, person.
3. Press **Run**. The panel on *Train T-LoRA* shows the loss and validation pictures; **Stop and keep** ends early.

`method` auto is *vanilla_tlora* here, and steps, learning rate and resolution are 0: what suits the model. If memory runs out, \
set `rank` to 32 and `min_rank` to 16, then `resolution` to 512.""", "dog")
    _real_pictures(template, trained["MODEL"], loaded["CLIP"], loaded["VAE"], prompts["prompts"], 1140, 1024, "EmptySD3LatentImage",
                   negative=False, steps=20, cfg=1.0, scheduler="simple")


def generate_with_a_file(template):
    template.note((0, 0), (320, 300), """# Generate with a T-LoRA file

Choose the checkpoint that it was trained on, and the file in *Load T-LoRA*: it shows the file's picture, its trigger phrase, and \
how many of its ranks are on at each noise level. While a sampler runs, a dot shows where it is.

Use the trigger phrase in your prompts; `{}` stands for it.""")
    loaded = template.add("CheckpointLoaderSimple", (0, 400), 320, models=[SDXL], ckpt_name=SDXL["name"])
    adapted = template.add("TLoRALoad", 0, 320, model=loaded["MODEL"], file="")
    template.group("1  A model and a file", (-20, 320), 360, BLUE)
    prompts = template.add("TLoRAPrompts", (380, 80), 300, tlora=adapted["T-LoRA"],
                           prompts="a photo of {} on the beach\na photo of {} in the snow\na painting of {} in a library")
    template.group("2  Prompts", (360, 0), 340, PURPLE)
    _real_pictures(template, adapted["MODEL"], loaded["CLIP"], loaded["VAE"], prompts["prompts"], 740, 1024, steps=30, cfg=5.0)


def use_a_file_from_elsewhere(template):
    template.note((0, 0), (320, 330), """# A file from elsewhere

*Load T-LoRA* reads the authors' checkpoints, LyCORIS and SimpleTuner files, and plain LoRAs; the report tells what matched and \
what was assumed. Where a file says no schedule, set `min_rank`: on a plain LoRA it puts a T-LoRA's schedule.

Below, the same T-LoRA is saved as our own file, for another program, and as one plain LoRA, its mean over all noise levels. Delete what \
you do not need.""")
    loaded = template.add("CheckpointLoaderSimple", (0, 420), 320, models=[SDXL], ckpt_name=SDXL["name"])
    adapted = template.add("TLoRALoad", 0, 320, model=loaded["MODEL"], file="")
    template.group("1  A model and a file", (-20, 350), 360, BLUE)
    template.add("PreviewAny", (380, 80), (360, 200), "What was matched", source=adapted["report"])
    info = template.add("TLoRAInfo", 380, 360, tlora=adapted["T-LoRA"])
    template.add("PreviewImage", 380, (360, 530), "Ranks and blocks", images=info["IMAGE"])
    template.group("2  What it is", (360, 0), 400, PURPLE)
    template.add("TLoRASave", (800, 80), 320, tlora=adapted["T-LoRA"], file_name="tlora/from_elsewhere")
    template.add("TLoRAExport", 800, 320, tlora=adapted["T-LoRA"], file_name="tlora/exported")
    template.add("TLoRABake", 800, 320, tlora=adapted["T-LoRA"], file_name="tlora/baked")
    template.group("3  Saved in other ways", (780, 0), 360, GREEN)
    prompts = template.add("TLoRAPrompts", (1180, 80), 300, tlora=adapted["T-LoRA"], prompts="a photo of {} on the beach")
    template.group("4  Prompts", (1160, 0), 340, PURPLE)
    _real_pictures(template, adapted["MODEL"], loaded["CLIP"], loaded["VAE"], prompts["prompts"], 1540, 1024, steps=30, cfg=5.0)


def which_checkpoint_to_keep(template):
    template.note((0, 0), (320, 380), """# Which checkpoint to keep?

For a training that kept its checkpoints (`checkpoint_every`, `checkpoint_files`): the same prompts with three of them, and *T-LoRA \
Evaluate* says which obeys best among those that are about as alike as the most alike one.

Choose the checkpoint that they were trained on, the training picture, a file in each *Load T-LoRA*, and a CLIP model in each \
*T-LoRA Evaluate* (its help says which, and where to put it). Set `neutral_prompt` to the first prompt. For the paper's own prompts \
set `prompt_set` to live or object.""")
    loaded = template.add("CheckpointLoaderSimple", (0, 490), 320, models=[SDXL], ckpt_name=SDXL["name"])
    image = template.add("LoadImage", 0, 320, "The training picture", image="example.png")
    template.group("1  A model and the picture", (-20, 410), 360, BLUE)
    prompts = template.add("TLoRAPrompts", (380, 80), 320, subject="sks dog", prompts="a photo of {}\na photo of {} on the beach\n"
                           "a photo of {} in the snow\na painting of {} in a library")
    positive = template.add("CLIPTextEncode", 380, 320, "Prompts", clip=loaded["CLIP"], text=prompts["prompts"])
    negative = template.add("CLIPTextEncode", 380, 320, "Negative prompt", clip=loaded["CLIP"])
    latent = template.add("EmptyLatentImage", 380, 320, width=1024, height=1024, batch_size=2)
    template.group("2  Prompts", (360, 0), 360, PURPLE)
    before = {}
    for i, step in enumerate((400, 600, 800)):
        x = 760 + 380 * i
        adapted = template.add("TLoRALoad", (x, 80), 320, f"Step {step}", model=loaded["MODEL"], file="")
        sampled = template.add("KSampler", x, 320, model=adapted["MODEL"], positive=positive["CONDITIONING"],
                               negative=negative["CONDITIONING"], latent_image=latent["LATENT"], seed=7, steps=30, cfg=5.0)
        decoded = template.add("VAEDecode", x, 320, samples=sampled["LATENT"], vae=loaded["VAE"])
        scored = template.add("TLoRAEvaluate", x, 320, images=decoded["IMAGE"], prompts=prompts["prompts"],
                              concept=image["IMAGE"], clip_model="none", label=f"step {step}", token="sks",
                              neutral_prompt="a photo of sks dog", **before)
        before = {"before": scored["scores"]}
    template.group("3  Three checkpoints", (740, 0), 1120, GREEN)
    template.add("PreviewAny", (1900, 80), (420, 300), "Scores", source=scored["report"])
    template.add("PreviewAny", 1900, (420, 140), "Keep this one", source=scored["best"])
    template.group("4  The best", (1880, 0), 460, RED)


# By the name that the template browser shows: it takes the file's, and lists them in the order of these.
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
    "10 Which checkpoint to keep": which_checkpoint_to_keep,
    "11 Stop a training and go on": stop_and_go_on,
    "12 Several pictures with masks, no download": several_images_with_masks}
