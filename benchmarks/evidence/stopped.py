"""Trainings with live scores, and the truth at each of their validations: the records by which the stopping rule is
judged.

A unit is one concept with one seed. Its validations draw four prompts (neutral, another background, another place,
another colour) from four seeds each, and the tiny world's scorer scores them, as in *Train T-LoRA from Image*. The
truth is measured on other prompts from other seeds, as in the rest of the study.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from tlora_core.reports.live_scores import LiveScorer, StepScores
from tlora_core.tiny import WEIGHTS, world
from tlora_core.tiny.encoder import TinyEncoder
from tlora_core.training.dataset import training_images

from . import run
from .metrics import measure
from .prompts import TOKEN, TRAINING, Draws, Prompt, prompts, settings
from .record_files import mend, read
from .study import Cell, chosen_rates

FILE, MADE_UP_FILE = "stopping.jsonl", "stopping_made_up.jsonl"
LAST, EVERY = 350, 35  # fixed trainings end at LAST; a validation comes every so many steps
STEPS = tuple(range(EVERY, LAST + 1, EVERY))
SEEDS_PER_PROMPT = 4  # of the pictures that are scored; the rule is judged on the first ones, and on all
_TRUTH, _LIVE = Draws(3, 2, 1, 2, 2, 0), Draws(1, 1, 1, 1, 0, 0)
_OTHER = 100  # added to the seeds of the live pictures, and to that of their prompts


@dataclass(frozen=True)
class Unit:
    """One training. steps: of its validations. weights: digest of the tiny base, since its pictures decide."""

    concept: str
    seed: int
    steps: tuple[int, ...] = STEPS
    method: str = "tlora"
    weights: str = ""

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Checkpoint:
    """step 0 is the bare base. live: what the rule sees. record: the truth, in the form of the study's records."""

    live: StepScores
    record: dict


def units(concepts: Iterable[str], seeds: Iterable[int], steps: tuple[int, ...] = STEPS) -> list[Unit]:
    """Each concept with the first seed, then with the next, so that a run that ends early has all concepts."""
    found = weights_digest()
    return [Unit(concept, seed, steps, weights=found) for seed in seeds for concept in concepts]


def weights_digest() -> str:
    return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()[:12]


def trained(bench: run.Bench, unit: Unit, rate: float) -> list[Checkpoint]:
    """Trains the unit and measures it at step 0 and at its steps."""
    from tlora_core.hosts.comfy.sampling import apply_tlora

    cell = Cell(unit.concept, unit.seed, unit.method, learning_rate=rate, steps=unit.steps, draws=_TRUTH)
    setting, concept = settings(run.concept_named(unit.concept), unit.seed)[0], run.concept_named(unit.concept)
    asked, live = prompts(concept, unit.seed, _TRUTH, setting), live_prompts(concept, unit.seed, setting)
    shown = training_images(run.training_pictures(cell), TRAINING)
    scorer = LiveScorer(TinyEncoder(), shown, [p[0].text for p in live], live[0][0].text, TOKEN)
    drawn = [*asked, *(prompt for of_prompt in live for prompt in of_prompt)]

    def checkpoint(step, of, model=None, **more):
        pictures = bench.draw(drawn, model)
        truth, seen = pictures[: len(asked)], pictures[len(asked) :].split(SEEDS_PER_PROMPT)
        rows = measure(truth, asked, bench.matcher(unit.concept), bench.reader(unit.concept), bench.scorer)
        record = {"cell": asdict(of), "training": asdict(setting), "rows": rows, "control": [], "step": step, **more}
        return Checkpoint(scorer.measure(step, seen), record)

    bare = replace(cell, method="none", learning_rate=0.0, steps=(0,))
    found = [checkpoint(0, bare, ceiling=run.ceiling(bench, concept))]
    training = run.personalization(bench, cell)
    for step in unit.steps:
        training.train(step)
        found.append(checkpoint(step, cell, apply_tlora(bench.model, training.tlora())))
    return found


def live_prompts(concept: world.Concept, seed: int, setting) -> list[list[Prompt]]:
    """The prompts of the validations, the neutral one first, each once for every seed of its noise."""
    return [
        [replace(prompt, seed=_OTHER + i) for i in range(SEEDS_PER_PROMPT)]
        for prompt in prompts(concept, seed + _OTHER, _LIVE, setting)
    ]


def run_units(
    bench: run.Bench, wanted: Sequence[Unit], file: Path, say: Callable[[str], None], rate: float | None = None
) -> None:
    """Appends a line for each unit that the file lacks. rate: of learning; None for the study's."""
    mend(file)
    done = {unit.key for unit, _ in load(file)}
    missing = [unit for unit in wanted if unit.key not in done]
    say(f"{len(wanted) - len(missing)} of {len(wanted)} trainings are done.")
    rate = chosen_rates()["tlora"] if rate is None else rate
    for number, unit in enumerate(missing, 1):
        began = time.monotonic()
        found = trained(bench, unit, rate)
        line = {
            "unit": asdict(unit),
            "checkpoints": [{"live": one.live.to_json(), "record": one.record} for one in found],
            "commit": run.commit(),
        }
        with file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        say(f"{number} of {len(missing)}: {unit.concept}, seed {unit.seed}, {time.monotonic() - began:.0f} s")


def load(file: Path) -> list[tuple[Unit, list[Checkpoint]]]:
    """The units of a file, plain or packed, in its order."""
    found = []
    for line in read(file):
        unit = Unit(**{**line["unit"], "steps": tuple(line["unit"]["steps"])})
        kept = [Checkpoint(StepScores.from_json(one["live"]), one["record"]) for one in line["checkpoints"]]
        found.append((unit, kept))
    return found


def prepared() -> run.Bench:
    """The tiny base in the host. Parses no arguments of the host's own."""
    import tiny_gate

    tiny_gate.parse_host_arguments()
    with torch.inference_mode():
        return run.Bench(tiny_gate.WEIGHTS)
