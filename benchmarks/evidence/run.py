"""Runs cells one by one and appends their measurements to a file of JSON lines, from which an interrupted run
resumes."""

import functools
import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch.nn.functional import interpolate

from tlora_core.method.adapters import METHODS
from tlora_core.reports.report import B_KEY
from tlora_core.tiny import world
from tlora_core.tiny.autoencoder import LATENT_CHANNELS
from tlora_core.tiny.scorer import ConceptMatcher, at_size
from tlora_core.training.config import TrainConfig
from tlora_core.training.dataset import training_images
from tlora_core.training.images import to_picture
from tlora_core.training.trainer import TrainingDiverged

from .colour import ColourReader
from .metrics import measure, measure_class, seen
from .prompts import KINDS, TOKEN, TRAINING, Prompt, class_prompts, control_prompts, prompts, settings
from .record_files import mend, read
from .study import Cell, cell_of

MADE_UP = "circle star heart cross square triangle moon circle star square triangle cross heart moon".split()  # shapes
SAMPLING_STEPS, GUIDANCE = 20, 4.0  # as in the tiny base's gate


class Bench:
    """The tiny base in the host, its flow-matching sibling if needed, and the scorers."""

    def __init__(self, weights: Path):
        import tiny_gate

        from tlora_core.tiny import comfy as tiny_base

        self.model, self.clip, self.vae = tiny_base.load(str(weights / "tiny_base.safetensors"))
        self.flow = functools.cache(lambda: tiny_gate.load_flow(weights)[0])
        self.scorer = tiny_gate.load_scorer(weights)
        self.reader = functools.lru_cache(2)(lambda name: ColourReader(concept_named(name), self.through))
        self.matcher = functools.lru_cache(2)(lambda name: ConceptMatcher(concept_named(name)))

    def bare(self, base: str):
        """The MODEL named by Cell.base."""
        return self.flow() if base == "flow" else self.model

    def draw(self, asked: Sequence[Prompt], model=None) -> torch.Tensor:
        """One picture [N, 128, 128, 3] in 0..1 for each prompt, all in one batch. The noise depends only on the
        prompt's kind and seed."""
        import comfy.sample

        noise = torch.stack([torch.randn(LATENT_CHANNELS, 8, 8, generator=_noise_seed(p)) for p in asked])
        positive, negative = self._condition([p.text for p in asked]), self._condition([""] * len(asked))
        drawn = comfy.sample.sample(
            model or self.model,
            noise,
            SAMPLING_STEPS,
            GUIDANCE,
            "euler",
            "normal",
            positive,
            negative,
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=0,
        )
        return self.vae.decode(drawn).clamp(0, 1)

    def draw_from(self, asked: Sequence[Prompt], latent: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor):
        """Like `draw`, but from `latent` [N, C, 8, 8] with noise of the first of `sigmas`."""
        import comfy.sample
        import comfy.samplers

        positive, negative = self._condition([p.text for p in asked]), self._condition([""] * len(asked))
        drawn = comfy.sample.sample_custom(
            self.model,
            noise,
            GUIDANCE,
            comfy.samplers.sampler_object("euler"),
            sigmas,
            positive,
            negative,
            latent,
            disable_pbar=True,
            seed=0,
        )
        return self.vae.decode(drawn).clamp(0, 1)

    def through(self, pictures: torch.Tensor) -> torch.Tensor:
        """[B, 64, 64, 3] passed through the autoencoder, which draws them at twice the size, and averaged down."""
        return at_size(self.vae.decode(self.vae.encode(pictures)).clamp(0, 1).movedim(-1, 1)).movedim(1, -1)

    def _condition(self, texts):
        encoded = {text: self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))[0] for text in set(texts)}
        text = torch.cat([encoded[t][0] for t in texts])
        return [[text, {"pooled_output": torch.cat([encoded[t][1]["pooled_output"] for t in texts])}]]


def concept_named(name: str) -> world.Concept:
    return next(c for c in (*world.CONCEPTS, *made_up_concepts()) if c.name == name)


@functools.cache
def made_up_concepts() -> tuple[world.Concept, ...]:
    """Concepts of any colours, on which the stopping rule's numbers were chosen."""
    rng = np.random.default_rng(99)
    colours = (map(tuple, rng.integers(0, 256, (3, 3)).tolist()) for _ in MADE_UP)
    return tuple(world.Concept(f"dev {i}", shape, *next(colours)) for i, shape in enumerate(MADE_UP))


def training_pictures(cell: Cell) -> torch.Tensor:
    """[images, 64, 64, 3] in 0..1."""
    concept, pictures = concept_named(cell.concept), []
    for i, setting in enumerate(settings(concept, cell.seed, cell.images)):
        rng = np.random.default_rng((cell.seed, i))
        pictures.append(world.render(world.concept_scenes(concept, 1, rng, setting.background, setting.place))[0])
    return torch.from_numpy(np.stack(pictures))


def ceiling(bench: Bench, concept: world.Concept, count: int = 2) -> float:
    """The distance of the concept itself, rendered in new scenes and passed through the autoencoder."""
    pictures = torch.from_numpy(world.render(world.concept_scenes(concept, count, np.random.default_rng(9))))
    return bench.matcher(concept.name).distance(bench.through(pictures)).mean().item()


def run_cell(bench: Bench, cell: Cell, done: set[int], on_step: Callable[[int], None] = lambda step: None):
    """Yields (record, pictures [N, 128, 128, 3]) at each of the cell's steps that is not in `done`."""
    concept = concept_named(cell.concept)
    setting = settings(concept, cell.seed)[0]
    asked = prompts(concept, cell.seed, cell.draws, setting)
    control = control_prompts(concept, cell.seed, cell.draws.control)
    of_class = class_prompts(concept, cell.seed, cell.draws.of_class)

    def drawn(model, **more):
        began = time.process_time()
        pictures = bench.draw([*asked, *control, *of_class], model)
        rows = measure(
            pictures[: len(asked)], asked, bench.matcher(cell.concept), bench.reader(cell.concept), bench.scorer
        )
        without, plain = pictures[len(asked) :].split([len(control), len(of_class)])
        others = [{"asked": p.asked, "seen": s} for p, s in zip(control, seen(without, bench.scorer))]
        classes = measure_class(plain, of_class, bench.matcher(cell.concept), bench.scorer)
        return {
            "cell": asdict(cell),
            "training": asdict(setting),
            "rows": rows,
            "control": others,
            **({"of_class": classes} if classes else {}),
            **more,
            "cpu_seconds_drawing": round(time.process_time() - began, 1),
        }, pictures

    if cell.method == "none":
        yield drawn(bench.bare(cell.base), step=0, ceiling=ceiling(bench, concept))
        return
    from tlora_core.hosts.comfy.sampling import apply_tlora

    trained = personalization(bench, cell)
    for step in cell.steps:
        began = time.process_time()
        try:
            trained.train(step, lambda at, loss: on_step(at))
        except TrainingDiverged as error:
            yield {"cell": asdict(cell), "training": asdict(setting), "step": step, "diverged": error.step}, None
            return
        seconds = round(time.process_time() - began, 1)
        if step in done:
            continue
        tlora = trained.tlora()
        yield drawn(
            apply_tlora(bench.bare(cell.base), tlora),
            step=step,
            loss=fmean(trained.trainer.losses[-20:]),
            effective_rank_B=list(tlora.training.get(B_KEY, {}).values()),
            cpu_seconds_training=seconds,
        )


def personalization(bench: Bench, cell: Cell):
    from tlora_core.hosts.comfy.training.personalize import Personalization, TrainRequest

    config = TrainConfig(
        steps=max(cell.steps),
        learning_rate=cell.learning_rate,
        batch_size=cell.batch_size,
        seed=cell.seed,
        noise_from=cell.noise_from,
        noise_to=cell.noise_to,
        prior_weight=cell.prior_weight,
        preservation_weight=cell.preservation_weight,
    )
    request = TrainRequest(
        TOKEN,
        concept_named(cell.concept).shape,
        method=cell.method,
        rank=cell.rank,
        start=cell.start,
        alpha=cell.alpha,
        min_rank=cell.min_rank if METHODS[cell.method].is_masked else cell.rank,
        curve=cell.curve_text,
        resolution=64,
        config=config,
    )
    return Personalization(
        bench.bare(cell.base), bench.clip, bench.vae, training_images(training_pictures(cell), TRAINING), request
    )


def steps_done(records: list[dict]) -> dict[str, set[int]]:
    """The measured steps by cell key. A training that diverged counts as measured at all its steps."""
    done: dict[str, set[int]] = {}
    for record in records:
        cell = cell_of(record)
        done.setdefault(cell.key, set()).update(cell.steps if "diverged" in record else [record["step"]])
    return done


def whole(records: list[dict]) -> list[dict]:
    """The records without those of incomplete trainings."""
    done = steps_done(records)
    return [
        record for record in records if (cell := cell_of(record)).method == "none" or set(cell.steps) <= done[cell.key]
    ]


def run(
    bench: Bench, cells: Sequence[Cell], file: Path, say: Callable[[str], None], others: Sequence[Path] = ()
) -> None:
    """Appends to `file` the records that neither it nor `others` hold. Saves a sheet of each cell's pictures in the
    folder `sheets` beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    mend(file)
    done, began, finished = steps_done(read(file, *others)), time.monotonic(), 0
    missing = [cell for cell in cells if not set(cell.steps) <= done.get(cell.key, set())]
    total = sum(max(cell.steps) for cell in missing)
    at = commit()
    say(f"{len(cells) - len(missing)} of {len(cells)} cells are done; {len(missing)} to go, {total} steps.")
    for number, cell in enumerate(missing, 1):

        def progress(step, number=number, cell=cell, before=finished):
            if step % 10 == 0 or step == max(cell.steps):
                share = (before + step) / max(1, total)
                left = (time.monotonic() - began) * (1 - share) / share
                say(
                    f"cell {number} of {len(missing)}: {cell.method} {cell.concept}, step {step}; {share:.0%}, about "
                    f"{left / 60:.0f} min left"
                )

        sheets = []
        for record, pictures in run_cell(bench, cell, done.get(cell.key, set()), progress):
            with file.open("a") as out:
                out.write(json.dumps({**record, "commit": at}) + "\n")
            if pictures is not None:
                sheets.append((record["step"], pictures))
        if sheets:
            _sheet(cell, sheets, file.parent / "sheets")
        finished += max(cell.steps)


def sheet_path(folder: Path, cell: Cell) -> Path:
    return (
        folder
        / f"{cell.concept.replace(' ', '_')}-{cell.method}-{hashlib.sha256(cell.key.encode()).hexdigest()[:10]}.png"
    )


def _sheet(cell, drawn, folder):
    """A row for each measured step: the training picture, then the prompts in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    side = drawn[0][1].shape[1]  # the autoencoder draws larger than it encodes
    first = interpolate(training_pictures(cell)[:1].movedim(-1, 1), (side, side)).movedim(1, -1)
    rows = [torch.cat([first, pictures]) for _, pictures in drawn]
    to_picture(torch.cat([torch.cat(list(row), dim=1) for row in rows])).save(sheet_path(folder, cell))


def _noise_seed(prompt):
    kind = (*KINDS, "control", "class").index(prompt.kind)
    return torch.Generator().manual_seed(1000 * kind + prompt.seed)


def commit() -> str:
    """The short hash of the repository's commit."""
    here = Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
