"""Draws the ways in which a T-LoRA is put on a model, from the measurements of benchmarks/sampling.py.

python3 tools/host.py bench sampling --model sdxl-fifth --json > sdxl.txt
python3 tools/host.py bench sampling --model flux-small --json > flux.txt
python3 tools/host.py bench figure sdxl.txt flux.txt docs/sampling_ways.png
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TEXT, FAINT, GRID = (40, 42, 48), (120, 124, 132), (214, 217, 223)
WAYS = {  # colour, name, what it is, what it takes
    "weight": ((58, 124, 190), "folded", "a copy of the weight holds the update and follows r(t)", "the weight's size"),
    "output": (
        (232, 150, 52),
        "cached",
        "the text is the same at every step, and so is a layer's output for it",
        "its outputs",
    ),
    "beside": ((150, 154, 162), "beside", "two thin products beside the layer, at every step", "nothing"),
}
RUNS = {
    "bare": "no LoRA",
    "static_lora": "the host's LoRA, static",
    "tlora": "T-LoRA",
    "tlora_short": "T-LoRA, nothing kept",
    "tlora_product": "T-LoRA, all beside",
}
WIDTH, ROW, LEFT, RIGHT, BAR = 900, 34, 190, 210, 18


def share(row: dict) -> dict[str, float]:
    """The part of the layers that each way serves; none of a run without T-LoRA."""
    if not row["what"].startswith("tlora"):
        return {}
    folded = {way: row["layers"][way] for way in ("weight", "output")}
    return {
        way: n / row["targets"] for way, n in {**folded, "beside": row["targets"] - sum(folded.values())}.items() if n
    }


def panel(draw: ImageDraw.ImageDraw, result: dict, top: int, fonts, longest: float) -> None:
    plain, small = fonts
    rank = next(row["rank"] for row in result["rows"] if "rank" in row)
    draw.text(
        (20, top), f"{result['model']}, rank {rank}: time of a whole sampling, to that without a LoRA", TEXT, font=plain
    )
    per_unit = (WIDTH - LEFT - RIGHT) / longest
    for i, row in enumerate(result["rows"]):
        y, length = top + 30 + i * ROW, row["ratio"] * per_unit
        draw.text((LEFT - 10, y + BAR / 2), RUNS[row["what"]], TEXT, font=small, anchor="rm")
        x = LEFT
        for way, part in share(row).items() or {None: 1}.items():
            draw.rectangle([x, y, x + part * length, y + BAR], WAYS[way][0] if way else GRID)
            x += part * length
        memory = f", {sum(row['kept_mb'].values()):.0f} MB more" if row["what"].startswith("tlora") else ""
        draw.text((LEFT + length + 8, y + BAR / 2), f"{row['ratio']:.2f}{memory}", TEXT, font=small, anchor="lm")
    x = LEFT + per_unit
    draw.line([(x, top + 24), (x, top + 24 + len(result["rows"]) * ROW)], FAINT)


def figure(results: list[dict]) -> Image.Image:
    fonts = ImageFont.load_default(15), ImageFont.load_default(13)
    height = sum(50 + ROW * len(result["rows"]) for result in results)
    image = Image.new("RGB", (WIDTH, height + 110), "white")
    draw, top = ImageDraw.Draw(image), 14
    longest = max(row["ratio"] for result in results for row in result["rows"])
    for result in results:
        panel(draw, result, top, fonts, longest)
        top += 50 + ROW * len(result["rows"])
    draw.text((20, top), "A bar's colours are the parts of the layers put on each way:", TEXT, font=fonts[0])
    for i, (colour, name, what, memory) in enumerate(WAYS.values()):
        y = top + 28 + 22 * i
        draw.rectangle([20, y, 34, y + 14], colour)
        draw.text((44, y + 7), name, TEXT, font=fonts[1], anchor="lm")
        draw.text((110, y + 7), f"{what}; takes {memory}", FAINT, font=fonts[1], anchor="lm")
    return image


def main(sources: list[Path], target: Path) -> None:
    figure([json.loads(source.read_text().splitlines()[-1]) for source in sources]).save(target, optimize=True)
    print(target)


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:-1]], Path(sys.argv[-1]))
