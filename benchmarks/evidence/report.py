"""docs/EVIDENCE.md and its plots, made from the records of the largest scale that was run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from tlora_core.method.adapters import METHODS
from tlora_core.method.starts import STARTS

from . import claims, plots
from .analysis import (
    CONTROL_LOSS,
    FEWEST,
    LEVELS,
    REPRODUCED,
    RESAMPLES,
    TRUSTED,
    Point,
    at_level,
    choose_rates,
    curves,
    difference,
    estimate,
    gate,
    left_out,
    load_sweep,
    mean_over_levels,
    points,
    sound,
)
from .prompts import prompts, settings
from .record_files import files_of, read
from .run import concept_named, sheet_path, whole
from .study import BLOCKS, FRESH, RANK, RATES, SCALES, Cell, meaningful, rate_name
from .tables import TABLES, ranks

HIGHER = (0.3, 0.4, 0.5, 0.6)  # levels of IS, up to where units become few
COMMAND = "python3 tools/host.py bench personalization"


def write(results: Path, docs: Path) -> None:
    """Overwrites docs/EVIDENCE.md and the pictures in docs/evidence."""
    pictures = docs / "evidence"
    pictures.mkdir(parents=True, exist_ok=True)
    scale, given = largest(results)
    parts = [
        _head(scale, given),
        *_claims(given, pictures),
        _by_likeness(given, pictures),
        _scorers(results),
        _sweep(results),
    ]
    for table in TABLES:
        if table.says_something(given):
            parts.append(_section(table, _in_order(curves(given, table.variant)), pictures))
    parts += [_samples(results, pictures), _effective_rank(given), _decided(results), _limits()]
    (docs / "EVIDENCE.md").write_text("\n\n".join(part for part in parts if part) + "\n")


def largest(results: Path) -> tuple[str, list[Point]]:
    """Name and points of the largest scale with records; ("", []) when there are none."""
    return next(((name, given) for name in ("full", "pilot", "quick") if (given := measured(results, name))), ("", []))


def measured(results: Path, scale: str) -> list[Point]:
    """Of the trainings of a scale that were not broken off."""
    records = read(*files_of(results, scale))
    return points(whole(records), left_out(results)) if records else []


def _head(scale, given):
    trained = [p for p in given if p.cell.method != "none"]
    text = (
        "# Evidence: does T-LoRA do what its paper says?\n\nMade by `"
        + COMMAND
        + " report` from `benchmarks/results/`; "
        "nothing here is written by hand.\n\n"
    )
    if not trained:
        return (
            text + f"**Not run yet.** The sweep first (`{COMMAND} rates`, then `choose-rates`), then `{COMMAND} all`."
        )
    units, cells = {(p.cell.concept, p.cell.seed) for p in trained}, {replace(p.cell, steps=()) for p in trained}
    commits = sorted({p.record["commit"] for p in trained})
    pictures = sum(len(p.record["rows"]) + len(p.record["control"]) for p in trained)
    concepts = len({c for c, _ in units})
    later = sorted({p.step for p in trained} - set(SCALES[scale].steps))
    further = f"; what learns too fast or too slowly for these also after {', '.join(map(str, later))}" if later else ""
    warning = (
        ""
        if scale == "full"
        else (
            f"**This is a run of scale `{scale}`, far below the {len(SCALES['full'].concepts)} concepts and "
            f"{len(SCALES['full'].seeds)} seeds "
            "that the study is meant for: it shows that the measurement works and which way things lean, no more.**\n\n"
        )
    )
    return (
        text
        + warning
        + f"Scale `{scale}`: {concepts} concepts, {len(units)} units (concept and seed), {len(cells)} trainings, "
        f"{len(trained)} checkpoints, {pictures} pictures; commit {', '.join(commits)}. Drawn after "
        f"{', '.join(map(str, SCALES[scale].steps))} steps{further}. One training picture a unit where nothing else "
        f"is said.\n\n"
        "IS: 0 is what the bare base draws for the class word, 1 the concept itself seen through the autoencoder, "
        "background masked, "
        "under the training prompt. TS: share of what the prompts ask for (background, place, colour) that a scorer "
        "finds. "
        f"Methods are compared where each training first reaches the same IS ({', '.join(f'{v:g}' for v in LEVELS)}), "
        f"within units; "
        f"intervals are 95%, from {RESAMPLES} draws of concepts and of seeds within them, and given from {FEWEST} "
        f"concepts on. "
        f"{_unresolved(given)}Copied: share of pictures that show the training "
        f"picture's place or background where the prompt leaves it open; by chance "
        f"{_bare(given, _MEANS['place copied'])} "
        f"and {_bare(given, _MEANS['background copied'])}, as the bare base does."
    )


def _unresolved(given):
    lines = [
        line
        for units in curves(given, lambda cell: replace(cell, concept="", seed=0, steps=()).key).values()
        for line in units.values()
    ]
    past = sum(line[1].is_ > LEVELS[0] for line in lines)
    return (
        f"{past} of {len(lines)} trainings are past the lowest level at their first checkpoint: theirs lies "
        f"between that and the bare base. "
    )


def _bare(given, value):
    return f"{np.mean([value(p) for p in given if p.cell.method == 'none']):.2f}"


def _scorers(results):
    file = results / "scorers.json"
    if not file.exists():
        return ""
    found = json.loads(file.read_text())
    rows = [
        [name, f"{min(by.values()):.1%}", f"{np.mean(list(by.values())):.1%}"]
        for name, by in found["attributes"].items()
    ]
    unsure = ", ".join(f"{name} of {concept}" for concept, name in sorted(left_out(results))) or "nothing"
    matcher = found["matcher"]
    return (
        "## The scorers\n\nOn rendered pictures of the twelve concepts, which no scorer was trained on, in their own "
        "and in named colours, "
        f"seen through the autoencoder ({found['pictures']} of each concept):\n\n"
        + _markdown(["attribute", "worst concept", "mean"], rows)
        + f"\n\nWhere a scorer is right in less than {TRUSTED:.0%} of a concept's pictures, no figure counts it: "
        f"{unsure}.\n\n"
        f"IS: {matcher['pictures']} rendered pictures lie {matcher['own']:.3f} from their concept and "
        f"{matcher['nearest_other']:.3f} from the nearest other concept on average; {matcher['right']:.0%} are "
        f"nearest to their own. "
        f"The same pictures under strong noise lie {matcher['noise']:.3f} from their concept, blurred "
        f"{matcher['blur']:.3f}, "
        f"without colour {matcher['grey']:.3f}, and those of the class in the world's own colours "
        f"{matcher['class']:.3f}."
    )


def _sweep(results):
    records = load_sweep(results)
    if not records:
        return ""
    given, rows, at_an_end = points(records), [], []
    for name, chosen in choose_rates(records).items():
        by_rate = curves(given, lambda c, n=name: f"{c.learning_rate:g}" if rate_name(c.method, c.base) == n else None)
        rows += [
            [name, f"**{rate}**" if float(rate) == chosen else rate, *_of_rate(lines)]
            for rate, lines in by_rate.items()
        ]
        at_an_end += [name] if chosen in (min(map(float, by_rate)), max(map(float, by_rate))) else []
    return (
        f"## Learning rates\n\nSwept per method at rank {RANK} (OFT, GSOFT: {BLOCKS['oft']} and {BLOCKS['gsoft']} "
        f"blocks). Reproduced: IS "
        f"{REPRODUCED} at any checkpoint. Undamaged: prompts without the concept lose at most {CONTROL_LOSS:.0%} of "
        f"their attributes "
        "at the first such checkpoint. Chosen, in bold: what reproduces most units undamaged, then obeys best. At the "
        "end of what was "
        f"swept lie the rates chosen for {', '.join(at_an_end) or 'none'}.\n\n"
        + _markdown(["method", "rate", "units", "reproduced", "undamaged", f"TS at IS {REPRODUCED}"], rows)
    )


def _of_rate(lines):
    passed = gate(lines)
    return (
        str(len(lines)),
        f"{passed['reproduced']:.0%}",
        _share_text(passed["undamaged"]),
        _text(estimate(at_level(lines, REPRODUCED, lambda p: p.ts))),
    )


def _in_order(lines):
    """Rows by method, rank and the rest, in whatever order they were trained."""

    def place(item):
        cell = next(iter(item[1].values()))[-1].cell
        return (
            list(METHODS).index(cell.method),
            cell.rank,
            cell.images,
            list(STARTS).index(cell.start),
            cell.curve,
            cell.alpha,
            cell.noise_from,
            cell.noise_to,
            cell.min_share,
            cell.pace,
        )

    return dict(sorted(lines.items(), key=place))


def _section(table, lines, pictures):
    plots.over_steps(lines, table.title, pictures / f"{table.name}.png")
    rows, compared = [], {name: sound(units) for name, units in lines.items()}
    for name, units in lines.items():
        steps = at_level(compared[name], LEVELS[1], lambda p: p.step).values()
        rows.append(
            [
                name,
                str(len(units)),
                f"{gate(units)['reproduced']:.0%}",
                str(len(compared[name])),
                f"{np.mean(list(steps)):.0f}" if steps else "-",
                *(_text(estimate(at_level(units, level, _ts))) for level in LEVELS),
            ]
        )
    head = [
        "",
        "units",
        "reproduced",
        "pass the gate",
        f"steps to IS {LEVELS[1]:g}",
        *(f"TS at IS {v:g}" for v in LEVELS),
    ]
    others = {name: table.other(units) for name, units in lines.items()}
    return (
        f"## {table.title}\n\n{_markdown(head, rows)}\n\nMeans over the three levels of IS of the units that pass the "
        f"gate, each followed "
        f"by its difference to {table.against_text} within units:\n\n{_means(compared, others)}\n\n"
        f"![IS and TS over the steps](evidence/{table.name}.png)"
    )


_MEANS = {
    "TS": lambda p: p.ts,
    "place obeyed": lambda p: p.by_attribute.get("place", np.nan),
    "place copied": lambda p: p.copied_place,
    "background copied": lambda p: p.copied_background,
    "spread of places": lambda p: p.spread,
}


def _means(lines, others):
    """others: the row that each row is compared with."""
    rows = []
    for name, units in lines.items():
        cells, other = [], lines.get(others[name], {}) if others[name] != name else {}
        for value in _MEANS.values():
            ours = mean_over_levels(units, value)
            cells.append(_text(estimate(ours)))
            cells.append(_text(estimate(difference(ours, mean_over_levels(other, value))) if other else None))
        rows.append([name, *cells])
    return _markdown(["", *(text for name in _MEANS for text in (name, "difference"))], rows)


def _samples(results, pictures):
    """Two trainings of each concept, their sheets one above the other."""
    if not RATES.exists():
        return ""
    methods, scale, rates = ("lora", "tlora"), SCALES["full"], json.loads(RATES.read_text())
    shown = {}
    for name in scale.concepts:
        cells = [
            meaningful(Cell(name, 0, m, learning_rate=rates[m], steps=scale.steps, draws=scale.draws)) for m in methods
        ]
        if file := _sheets(
            [sheet_path(results / "sheets", cell) for cell in cells], pictures / f"{name.replace(' ', '_')}.webp"
        ):
            shown[name] = file.name
    if not shown:
        return ""
    first = next(iter(shown))
    concept = concept_named(first)
    texts = "; ".join(f"*{p.text}*" for p in prompts(concept, 0, scale.draws, settings(concept, 0)[0]))
    others = ", ".join(f"[{name}](evidence/{file})" for name, file in shown.items() if name != first)
    return (
        f"## By eye\n\nThe {first}, learnt by {methods[0]} (above) and {methods[1]} (below): the training picture "
        f"first, a row for "
        f"each of the steps {', '.join(map(str, scale.steps))}; the prompts from left to right: {texts}; the last "
        f"{scale.draws.control} are "
        "of other things. Every training leaves such a sheet in `benchmarks/results/sheets`."
        + (f" The same of {others}." if others else "")
        + f"\n\n![Sheets of two trainings](evidence/{shown[first]})"
    )


def _sheets(files, whole):
    """The pictures `files` below one another, saved as `whole`; where they are not all there, the one of an earlier
    report, or None."""
    if all(file.exists() for file in files):
        parts = [Image.open(file).convert("RGB") for file in files]
        sheet = Image.new(
            "RGB", (max(p.width for p in parts), sum(p.height for p in parts) + 16 * (len(parts) - 1)), "white"
        )
        top = 0
        for part in parts:
            sheet.paste(part, (0, top))
            top += part.height + 16
        sheet.save(whole, quality=80)
    return whole if whole.exists() else None


def _effective_rank(given):
    rows = []
    for name, units in curves(given, ranks).items():
        last = {unit: line[-1].effective_rank for unit, line in units.items() if line[-1].effective_rank is not None}
        if last:
            rows.append([name, str(len(last)), _text(estimate(last))])
    head = ["", "units", "effective rank of B, mean over layers"]
    return "## Figures 4 and 9: effective rank at the last checkpoint\n\n" + _markdown(head, rows) if rows else ""


def _claims(given, pictures):
    """What came out in short, then each claim; nothing where nothing was run."""
    if not given:
        return []
    paper, at_the_end, copying = claims.of_paper(given), claims.of_the_end(given), claims.of_copying(given)
    plots.differences(paper, "TS above the other's at equal IS", pictures / "claims.png")
    plots.differences(copying, "Copied less often than by the other, at equal IS", pictures / "copying.png")
    short = (
        ("On obeying the prompt and on what training leaves", [*paper, *at_the_end]),
        ("On copying", copying),
        ("On obeying the prompt where the concept is learnt", claims.of_likeness(given)),
    )
    return [
        "## In short\n\n"
        + "\n\n".join(_counted(about, made) for about, made in short)
        + "\n\n![Differences in TS, with their intervals](evidence/claims.png)",
        "## The paper's claims\n\nDifferences at equal IS, within units. The verdict goes by the units that pass the "
        "gate: at none of the "
        f"levels of IS compared have prompts without the concept lost more than {CONTROL_LOSS:.0%} of their "
        f"attributes, as a damaged model "
        f"obeys nothing. It needs {FEWEST} concepts. Of the intervals on this page one in twenty, or a little more "
        f"where there are few "
        "concepts, misses by chance: no single one of them proves much.\n\n"
        + _judged(paper)
        + "\n\nAfter the last step that both have, whatever the likeness and without the gate:\n\n"
        + _judged(at_the_end),
        "## Copying\n\nOf the training picture's place and background where the prompt leaves them open, less than "
        "the other does. It "
        "was thought of after looking at the pictures of seed 0; the other seeds, trained after that, judge it "
        "apart.\n\n" + _judged(copying) + "\n\n![Differences in copying, with their intervals](evidence/copying.png)",
    ]


def _counted(about, made):
    """How many claims came out how, and which of them are settled."""
    kinds = {
        kind: [c.text for c in made if c.verdict.split(" (")[0] == kind]
        for kind in ("confirmed", "contradicted", "not separable", "no verdict", "not tested")
    }
    settled = "".join(f" {kind.capitalize()}: {'; '.join(texts)}." for kind, texts in list(kinds.items())[:2] if texts)
    return (
        f"{about}, {len(made)} claims: "
        f"{', '.join(f'{len(texts)} {kind}' for kind, texts in kinds.items() if texts)}.{settled}"
    )


def _by_likeness(given, pictures):
    made = [row for row in claims.by_likeness(given, HIGHER) if row.ts is not None]
    if not made:
        return ""
    plots.by_likeness(made, pictures / "likeness.png")
    rows = [
        [
            row.text,
            f"{row.level:g}",
            f"{row.ts.units} of {row.ts.concepts}",
            *map(_text, (row.ts, row.control, row.copied_background)),
        ]
        for row in made
    ]
    return (
        "## By likeness\n\nThe gate leaves out the trainings that break the model, and with them most of those that "
        "get as like the concept as "
        "the paper's do. So here is each level of IS by itself, with all units that reach it both ways: the "
        "differences in TS, in what "
        "prompts without the concept obey, and in how often the training picture's background is copied. This was "
        "looked at after all "
        f"else; seeds {FRESH[0]} to {FRESH[-1]}, trained after that and left out of it, judge it:\n\n"
        + _judged(claims.of_likeness(given))
        + "\n\n![Differences in TS at each level of IS](evidence/likeness.png)\n\n"
        + _markdown(["", "IS", "units of concepts", "TS", "prompts without the concept", "background copied"], rows)
    )


def _judged(made):
    return _markdown(
        ["claim", "here", "difference", "with the damaged ones"],
        [[c.text, c.verdict, c.figures, c.ungated] for c in made],
    )


def _decided(results):
    file = results / "decided.json"
    if not file.exists():
        return ""
    rows = json.loads(file.read_text())
    names = [name for name in rows[0] if name not in ("t", "sigma")]
    table = [[str(row["t"]), f"{row['sigma']:.2f}", *(f"{row[name]:.0%}" for name in names)] for row in rows]
    return (
        "## Where a picture is decided\n\nPictures noised to t and drawn on from there by the bare base, with a "
        "prompt that asks for another "
        "shape, colour, place and background: the share that shows what was asked. T-LoRA's mask guards the noisiest "
        "timesteps, so it "
        "can help only as far as something is decided there: what this table still shows open at small t, an update "
        "at full rank "
        "decides anew whatever was kept from it before. Coarse structure of an 8 x 8 latent is drowned by noise that "
        "leaves it clear in SDXL's "
        "128 x 128: the schedule *equal signal* is the paper's, moved to where this world has the same signal.\n\n"
        + _markdown(["t of 1000", "sigma", *names], table)
    )


def _limits():
    return (
        "## Limits\n\nA world of one object on one background at 64x64 pixels, a base of 5.5 M parameters that knows "
        "nothing else, "
        "and an adapter rank that is a far larger share of the layers' width than the paper's. What holds here may "
        "not for SDXL, "
        "and the other way round. Where a prompt leaves the background or the colour open, the base mixes several at "
        "some seeds "
        "(two of the four looked at), "
        "so neutral pictures of the bare base can be broken; the control prompts, which say everything, are not "
        "touched by that. "
        "All pictures of one kind start from the same few noises, whatever the concept, the seed and the method, and "
        "a seed is one seed "
        "of training in every concept: intervals do not cover other ones. Learning rates were swept at one rank and "
        "on two concepts. "
        "Of variants of which too few concepts could be compared, further seeds were trained after that was seen; and "
        "seeds "
        f"{FRESH[0]} to {FRESH[-1]} after all else, which count in every comparison of the methods that they are of. "
        "TS and IS are this world's own and cannot be compared with the paper's CLIP figures, only their order can. "
        "IS cannot tell a copied pose from a new one; the columns on copying and spread do. A level of IS that a "
        "training never "
        "reaches leaves its unit out of that column, so columns may stand on different units; differences always pair "
        "them."
    )


def _ts(point):
    return point.ts


def _text(found):
    return "-" if found is None else str(found)


def _share_text(value):
    return "-" if np.isnan(value) else f"{value:.0%}"


def _markdown(head, rows):
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])
