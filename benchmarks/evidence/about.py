"""What the page says about the study itself: what was run and measured, how far to trust it, and its limits."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from . import markdown
from .analysis import FEWEST, LEVELS, RESAMPLES, TRUSTED, Point, curves, left_out
from .study import FRESH, SCALES

COMMAND = "python3 tools/host.py bench personalization"


def head(scale: str, given: Sequence[Point]) -> str:
    trained = [p for p in given if p.cell.method != "none"]
    if not trained:
        return f"**Not run yet.** Run the sweep (`{COMMAND} rates`, then `choose-rates`), then `{COMMAND} all`."
    return f"{_warning(scale)}{_extent(scale, trained)}\n\n{_measures(given)}"


def _warning(scale):
    full = SCALES["full"]
    if scale == "full":
        return ""
    return (
        f"**This is a run of scale `{scale}`, far below the {len(full.concepts)} concepts and {len(full.seeds)} seeds "
        "that the study is meant for. It shows that the measurement works, and the direction of the results, but no "
        "more.**\n\n"
    )


def _extent(scale, trained):
    """What was run."""
    units = {(p.cell.concept, p.cell.seed) for p in trained}
    cells = {replace(p.cell, steps=()) for p in trained}
    pictures = sum(len(p.record["rows"]) + len(p.record["control"]) for p in trained)
    usual = SCALES[scale].steps
    further = sorted({p.step for p in trained} - set(usual))
    also = f", and trainings that learn too fast or too slowly for these also after {_list(further)}" if further else ""
    return (
        f"Scale `{scale}`: {len({concept for concept, _ in units})} concepts, {len(units)} units (a unit is one "
        f"concept with one seed), {len(cells)} trainings with {len(trained)} measured steps, {pictures} pictures; "
        f"commit {', '.join(sorted({p.record['commit'] for p in trained}))}. Trainings were measured after "
        f"{_list(usual)} steps{also}. Each unit has one training picture unless a table says otherwise."
    )


def _list(numbers):
    return ", ".join(map(str, numbers))


def _measures(given):
    """What the figures mean."""
    return (
        "**IS** (image similarity) is 0 for what the bare base draws for the class word, and 1 for the concept itself, "
        "passed through the autoencoder. It is measured under the training prompt with the background masked. **TS** "
        "(text similarity) is the share of what the prompts ask for (background, place, colour) that a scorer finds "
        f"in the pictures. Methods are compared where each training first reaches the same IS ({_levels()}), within "
        f"units. Intervals are 95% intervals from {RESAMPLES} resamples of concepts, and of seeds within concepts. "
        f"They need at least {FEWEST} concepts. {_interpolated(given)} **Copied** is the share of pictures that show "
        "the training picture's place or background where the prompt leaves it open. The bare base does so by chance: "
        f"{_bare(given, lambda p: p.copied_place)} for the place, {_bare(given, lambda p: p.copied_background)} for "
        "the background."
    )


def _levels():
    return ", ".join(f"{level:g}" for level in LEVELS)


def _interpolated(given):
    lines = [
        line
        for units in curves(given, lambda cell: replace(cell, concept="", seed=0, steps=()).key).values()
        for line in units.values()
    ]
    past = sum(line[1].is_ > LEVELS[0] for line in lines)
    return (
        f"{past} of {len(lines)} trainings are past the lowest of these levels at their first measured step. Their "
        "values there are interpolated between that step and the bare base."
    )


def _bare(given, value):
    return f"{np.mean([value(p) for p in given if p.cell.method == 'none']):.2f}"


def scorers(results: Path) -> str:
    """How accurate the scorers are; empty if this was not measured."""
    file = results / "scorers.json"
    if not file.exists():
        return ""
    found = json.loads(file.read_text())
    rows = [
        [name, f"{min(by.values()):.1%}", f"{np.mean(list(by.values())):.1%}"]
        for name, by in found["attributes"].items()
    ]
    unsure = ", ".join(f"{name} of {concept}" for concept, name in sorted(left_out(results))) or "none"
    matcher = found["matcher"]
    return (
        "## The scorers\n\nTheir accuracy on rendered pictures of the twelve concepts, in the concepts' own and in "
        f"named colours, passed through the autoencoder ({found['pictures']} of each concept). No scorer was trained "
        "on these concepts.\n\n"
        + markdown.table(["attribute", "worst concept", "mean"], rows)
        + f"\n\nWhere a scorer is right in less than {TRUSTED:.0%} of a concept's pictures, this attribute of this "
        f"concept counts in no figure: {unsure}.\n\n"
        f"IS: {matcher['pictures']} rendered pictures have a mean distance of {matcher['own']:.3f} to their own "
        f"concept and of {matcher['nearest_other']:.3f} to the nearest other concept; {matcher['right']:.0%} are "
        f"nearest to their own. With strong noise, the same pictures are {matcher['noise']:.3f} from their concept, "
        f"blurred {matcher['blur']:.3f}, without colour {matcher['grey']:.3f}. Pictures of the same class in the "
        f"world's own colours are {matcher['class']:.3f} from the concept."
    )


def decided(results: Path) -> str:
    """Down to which noise level prompts are followed; empty if this was not measured."""
    file = results / "decided.json"
    if not file.exists():
        return ""
    rows = json.loads(file.read_text())
    names = [name for name in rows[0] if name not in ("t", "sigma")]
    shares = [[str(row["t"]), f"{row['sigma']:.2f}", *(f"{row[name]:.0%}" for name in names)] for row in rows]
    return (
        "## Where a picture is decided\n\nPictures were noised to t, and the bare base continued from there with a "
        "prompt that asks for another shape, colour, place and background. The table shows the share of pictures that "
        "follow this prompt. T-LoRA's mask protects the noisiest timesteps, so it can help only with what is decided "
        "there. Whatever is still open at small t, the update at full rank decides anew. Noise that leaves coarse "
        "structure visible in SDXL's latents of 128 x 128 hides it in a latent of 8 x 8. The schedule *equal signal* "
        "is the paper's, moved to where this world has the same signal.\n\n"
        + markdown.table(["t of 1000", "sigma", *names], shares)
    )


def limits() -> str:
    return f"""## Limits

- **The world.** One object on one background at 64x64 pixels, a base of 5.5 M parameters that knows nothing else, and \
an adapter rank that is a far larger share of the layers' width than the paper's. What holds here may not hold for \
SDXL, and the other way round.
- **The base.** Where a prompt leaves the background or the colour open, the base mixes several of them at some seeds \
(two of the four examined), so its neutral pictures can be broken. The control prompts, which state everything, are \
not affected.
- **Noise and seeds.** All pictures of one kind start from the same few noises, whatever the concept, seed and method. \
A seed is one seed of training in every concept. The intervals do not cover other noises or seeds.
- **Learning rates.** They were swept at one rank and on two concepts.
- **Later trainings.** Where too few concepts could be compared, further seeds of these variants were trained after \
that was known. Seeds {FRESH[0]} to {FRESH[-1]} were trained last of all. All of them count in every comparison of \
their methods.
- **The measures.** TS and IS belong to this world. Only their order can be compared with the paper's CLIP figures. IS \
cannot tell a copied pose from a new one; the columns on copying and spread can. A unit whose training never reaches a \
level of IS is missing in that column, so columns may cover different units; differences always pair the same units."""
