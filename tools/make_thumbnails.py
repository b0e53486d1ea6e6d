"""Write the templates' thumbnails, workflows/*.jpg: what a template has made, or, where it needs a model that does not come with
the pack, a card with its title over the paper's rank schedule.

    python3 tools/host.py run workflows/NAME.json --out FOLDER       for each template that needs no model
    python3 tools/host.py python tools/make_thumbnails.py NAME=FOLDER/compare_00001_.png ...
"""
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tlora_core.plot import schedule_curve
from tlora_core.schedule import RankSchedule

WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"
WIDTH, HEIGHT = 856, 640  # at most
TITLES = {
    "train_sdxl_on_one_image": "SDXL: train on one picture", "train_sdxl_on_several_images": "SDXL: pictures with masks",
    "train_flux_on_one_image": "FLUX: train on one picture",
    "generate_with_a_file": "Generate with a T-LoRA file", "use_a_file_from_elsewhere": "A LoRA or T-LoRA from elsewhere",
    "which_checkpoint_to_keep": "Which checkpoint to keep?"}


def card(title: str) -> Image.Image:
    curve = schedule_curve(RankSchedule(64, 32), size=(640, 300))
    whole = Image.new("RGB", (640, 360), curve.getpixel((0, 0)))
    whole.paste(curve, (0, 60))
    ImageDraw.Draw(whole).text((64, 22), title, "white", font=ImageFont.load_default(28))
    return whole


def save(name: str, picture: Image.Image) -> None:
    picture = picture.convert("RGB")
    picture.thumbnail((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    picture.save(WORKFLOWS / f"{name}.jpg", quality=88)
    print(f"workflows/{name}.jpg {picture.width}x{picture.height}")


def main(made: list[str]) -> None:
    for name, title in TITLES.items():
        save(name, card(title))
    for one in made:
        name, path = one.split("=", 1)
        with Image.open(path) as picture:
            save(name, picture)


if __name__ == "__main__":
    main(sys.argv[1:])
