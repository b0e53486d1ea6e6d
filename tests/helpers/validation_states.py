"""States of scored runs, with their validation pictures, as the server gives them to the page."""

import io
import itertools
import re

from panel_page import RUN
from PIL import Image

_numbers = itertools.count()
MEASURES = ("likeness", "obedience", "copying")
# Each place in a validation has a red, and each validation a blue, so that a picture tells which one it is.
REDS, BLUES = range(30, 256, 22), range(40, 241, 4)


def colour(validation: int, place: int) -> tuple[int, int, int]:
    return REDS[place], 20, BLUES[validation]


def validation_png(validation: int, prompts: int, side: int) -> bytes:
    """The pictures of a validation side by side, each in its colour."""
    sheet, content = Image.new("RGB", (prompts * side, side)), io.BytesIO()
    for place in range(prompts):
        sheet.paste(colour(validation, place), (place * side, 0, (place + 1) * side, side))
    sheet.save(content, "PNG")
    return content.getvalue()


def serve_pictures(page) -> None:
    """Answers the page's requests for the pictures of all `scored_run`s."""

    def answer(route):
        count, side, validation = re.search(r"/scored\d+-(\d+)x(\d+)/validation/(\d+)", route.request.url).groups()
        route.fulfill(content_type="image/png", body=validation_png(int(validation), int(count), int(side)))

    page.route("**/validation/*", answer)


def scored_step(step: int, **means: float | None) -> dict:
    """Scores of a step, with an error of 0.01; None where not measured."""
    scores = dict.fromkeys(MEASURES, 0.5) | means
    errors = {f"{name}_error": None if mean is None else 0.01 for name, mean in scores.items()}
    return {"step": step, **scores, **errors}


def scored_run(steps: list[dict], prompts: list[str], best: int | None = None, side: int = 64, **more) -> dict:
    """The state of a new run of 400 steps with these scores, and for each a validation picture whose parts have `side`
    pixels."""
    sentence = f"step {best}: as like as it gets." if best else ""
    pictures = [
        {
            "index": i,
            "step": scores["step"],
            "captions": prompts,
            "scores": [of_prompt(scores, place) for place in range(len(prompts))],
        }
        for i, scores in enumerate(steps)
    ]
    scores = {"steps": steps, "best": best, "sentence": sentence, "past": 0}
    name = f"scored{next(_numbers)}-{len(prompts)}x{side}"
    run = {"id": name, "step": 400, "steps": 400, "scores": scores, "pictures": pictures}
    return RUN | run | more


def of_prompt(scores: dict, place: int) -> dict:
    """The first prompt has a likeness and the others have a copying, as the live scores do."""
    absent = "likeness" if place else "copying"
    return {name: None if name == absent else scores[name] for name in MEASURES}
