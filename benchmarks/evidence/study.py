"""The cells of the study: which trainings answer which table or figure of the paper."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from tlora_core.method.adapters import METHODS
from tlora_core.method.starts import DEFAULT_START, STARTS
from tlora_core.tiny import world

from .prompts import Draws

RESULTS = Path(__file__).resolve().parents[1] / "results"
RATES = RESULTS / "rates.json"  # method -> learning rate, as chosen from the sweep
# The base is 96 and 192 wide, an eighth of SDXL. The paper's ranks 4 to 64 would be 0.5 to 8 here; 32 is a third of
# the width.
RANKS = (2, 4, 8, 16, 32)
RANK = 32
SMALL = (8, 4)  # the paper's largest rank at this width, and half of it
# An eighth of the paper's OFT-32 and GSOFT-64; the blocks are at least 24 and 12 wide.
BLOCKS = {"oft": 4, "gsoft": 8}
# Those of the paper's figure 2, then without the noisiest timesteps, then all.
INTERVALS = ((0.0, 0.5), (0.5, 0.8), (0.8, 1.0), (0.0, 0.8), (0.0, 0.2), (0.0, 1.0))
R_MIN = (0.0, 0.25, 0.5)  # and 1, which is Ortho-LoRA
FLOW_METHODS = ("lora", "vanilla_tlora", "tlora")
_PLAIN, _ORTHOGONAL = (7e-4, 1.5e-3, 3e-3), (1.5e-3, 3e-3, 6e-3)  # an orthogonal start moves less per step
SWEPT = {
    method: _ORTHOGONAL if kind.is_orthogonal else _PLAIN for method, kind in METHODS.items()
} | {  # wider if the best rate was at an end
    "oft": (3e-4, *_PLAIN),
    "gsoft": (3e-4, *_PLAIN),
    "svdiff": (*_PLAIN, 1e-2, 3e-2),
    "lora on flow": (3e-4, *_PLAIN),
    "vanilla_tlora on flow": (3e-4, *_PLAIN),
    "tlora on flow": (7e-4, *_ORTHOGONAL),
}
# SDXL's latents at 1024 pixels are 128 wide, the tiny base's 8. Coarse structure has the same signal at a 16th of the
# sigma.
FINER = 16
# For t = 0 to 999, in SDXL and in the tiny base.
SIGMAS = np.sqrt(1 / np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2) - 1)


def moved(level: float) -> float:
    """t / T at which SDXL's coarse structure is as noisy as the tiny base's at t / T = level; 1 if there is none."""
    return float(
        np.interp(FINER * np.interp(1000 * level, np.arange(1000), SIGMAS), SIGMAS, np.arange(1000) / 1000, right=1.0)
    )


_FINE = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35)
FREE = {  # shapes of r(t) that the paper leaves open, as shares of the rank: (t / T, share)
    "late drop": ((0.0, 1.0), (0.6, 1.0), (1.0, 0.5)),
    "early drop": ((0.0, 1.0), (0.4, 0.5), (1.0, 0.5)),
    "two steps": ((0.0, 1.0), (0.79, 1.0), (0.8, 0.5), (1.0, 0.5)),
    "rising": ((0.0, 0.5), (1.0, 1.0)),
    # The paper's schedule with r_min 50%, and with 0%, moved by `moved`.
    "equal signal": ((0.0, 1.0), *((level, 1 - 0.5 * moved(level)) for level in _FINE)),
    "equal signal, to 0": ((0.0, 1.0), *((level, 1 - moved(level)) for level in _FINE)),
}
ALPHAS = (0.5, 2.0)
PUBLISHED_START = "last_random_published"
PAPERS_STARTS = tuple(name for name, start in STARTS.items() if not start.completed)
FRESH = (3, 4, 5)  # seeds of the study `fresh`
WAYS = {"prior preservation": {"prior_weight": 1.0}, "output preservation": {"preservation_weight": 1.0}}
OWN_SCALES = {"rates": "sweep", "preservation": "preservation"}  # of studies that no other scale has


@dataclass(frozen=True)
class Cell:
    """One training and its drawn pictures: everything that the result depends on, and therefore its key.

    method: "none" is the bare base. min_share: r_min as a share of the rank. curve: name in FREE, or "". base: "noise",
        the tiny base, or "flow", the same model trained further to predict the velocity. pace: learning_rate as a share
        of the rate chosen for the method.
    """

    concept: str
    seed: int
    method: str
    rank: int = RANK
    learning_rate: float = 0.0
    steps: tuple[int, ...] = (0,)
    batch_size: int = 4
    min_share: float = 0.5
    alpha: float = 1.0
    curve: str = ""
    start: str = DEFAULT_START
    images: int = 1
    noise_from: float = 0.0
    noise_to: float = 1.0
    draws: Draws = Draws(1, 1, 0, 0, 0, 0)
    base: str = "noise"
    pace: float = 1.0
    prior_weight: float = 0.0
    preservation_weight: float = 0.0

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def min_rank(self) -> int:
        return round(self.min_share * self.rank)

    @property
    def curve_text(self) -> str:
        """The curve in the form of TrainRequest.curve."""
        return (
            ", ".join(f"{level:g}:{round(share * self.rank)}" for level, share in FREE[self.curve])
            if self.curve
            else ""
        )


def cell_of(record: dict) -> Cell:
    """The cell of a record. A record from before a field was added gets the field's default, which was the behaviour
    then."""
    known = {f.name for f in fields(Cell)}
    values = {name: value for name, value in record["cell"].items() if name in known}
    return Cell(**{**values, "steps": tuple(values["steps"]), "draws": Draws(**values["draws"])})


@dataclass(frozen=True)
class Scale:
    """The size of a study."""

    concepts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    draws: Draws
    batch_size: int = 4


_NAMES = tuple(c.name for c in world.CONCEPTS)
_COMPARED, _SWEPT = _NAMES[:10], _NAMES[10:]  # rates are chosen on concepts that no comparison uses
_STEPS, _DRAWS = (40, 80, 120, 180, 260), Draws(3, 4, 3, 3, 4, 4)
SCALES = {
    "full": Scale(_COMPARED, (0, 1, 2), _STEPS, _DRAWS),
    "sweep": Scale(_SWEPT, (0,), (60, 120, 200, 320), _DRAWS),
    "pilot": Scale(_COMPARED[:3], (0,), _STEPS, _DRAWS),
    "quick": Scale(_COMPARED[2:3], (0,), _STEPS, Draws(2, 4, 2, 2, 3, 3)),
    # With the quickstart's batches, as its steps cost more.
    "preservation": Scale(_COMPARED, (0, 1, 2), (70, 150, 260), Draws(3, 3, 2, 2, 2, 4, of_class=8), 2),
    "miniature": Scale(_COMPARED[2:3], (0,), (1, 2), Draws(1, 1, 0, 0, 0, 0), batch_size=1),
}


def rate_name(method: str, base: str = "noise") -> str:
    """The name of a cell's learning rate in RATES."""
    return method if base == "noise" else f"{method} on {base}"


def chosen_rates(path: Path = RATES) -> dict[str, float]:
    """The learning rate by `rate_name`. Raises SystemExit if the sweep was not run."""
    if not path.exists():
        raise SystemExit(f"{path} is missing; run the study `rates` first, then `choose-rates`.")
    return json.loads(path.read_text())


def usual_rates() -> dict[str, float]:
    """Rates that work on the tiny base (those of its gate and of the quickstart) but were not swept, for a quick look
    only."""
    return {
        rate_name(method, base): 1.5e-3 if kind.is_orthogonal else 3e-3
        for base in ("noise", "flow")
        for method, kind in METHODS.items()
    }


def _cells(scale: Scale, rates: dict[str, float], variants: Iterable[dict]) -> list[Cell]:
    """Raises SystemExit if a method's rate was not chosen."""
    named = [(rate_name(variant["method"], variant.get("base", "noise")), variant) for variant in variants]
    if missing := {name for name, _ in named} - rates.keys():
        raise SystemExit(
            f"No learning rate is chosen for {', '.join(sorted(missing))}; run the study `rates`, then `choose-rates`."
        )
    return [
        Cell(
            concept=concept,
            seed=seed,
            learning_rate=rates[name] * variant.get("pace", 1),
            steps=scale.steps,
            draws=scale.draws,
            batch_size=scale.batch_size,
            **variant,
        )
        for seed in scale.seeds
        for concept in scale.concepts
        for name, variant in named
    ]


def references(cells: Iterable[Cell], base: str) -> list[Cell]:
    """The bare base with the same prompts, for all units of the cells. IS and the gates are measured against it."""
    units = dict.fromkeys((cell.concept, cell.seed, cell.draws) for cell in cells if cell.base == base)
    return [Cell(concept=concept, seed=seed, method="none", draws=draws, base=base) for concept, seed, draws in units]


def rates(scale: Scale, chosen: dict[str, float]) -> list[Cell]:
    variants = [{"method": method} for method in METHODS] + [
        {"method": method, "base": "flow"} for method in FLOW_METHODS
    ]
    return [
        cell
        for variant in variants
        for rate in SWEPT[rate_name(**variant)]
        for cell in _cells(scale, {rate_name(**variant): rate}, [variant])
    ]


def table1(scale, chosen):
    return _cells(scale, chosen, [{"method": m, "rank": r} for m in ("lora", "vanilla_tlora", "tlora") for r in RANKS])


def table2(scale, chosen):
    return _cells(scale, chosen, [{"method": m} for m in METHODS])


def table4(scale, chosen):
    return _cells(scale, chosen, [{"method": m, "images": n} for m in ("lora", "tlora") for n in (1, 2, 3)])


def table5(scale, chosen):
    """The flow-matching base in place of FLUX, for which the paper uses Vanilla T-LoRA: small ranks, and a short
    version of figures 2 and 6."""
    return _cells(
        scale,
        chosen,
        [
            {**variant, "base": "flow"}
            for variant in (
                *({"method": m, "rank": r} for r in (RANK, *SMALL) for m in FLOW_METHODS),
                *({"method": "lora", "noise_to": end} for end in (0.8, 0.5)),
                *({"method": m, "min_share": share} for m in ("tlora", "vanilla_tlora") for share in (0.0, 0.25)),
            )
        ],
    )


def figure2(scale, chosen):
    return _cells(scale, chosen, [{"method": "lora", "noise_from": a, "noise_to": b} for a, b in INTERVALS])


def figure4(scale, chosen):
    """Effective rank, which every training's last record holds. Figure 9 shows it for all layers."""
    return _cells(scale, chosen, [{"method": m, "rank": r} for m in ("lora", "ortho_lora") for r in RANKS])


def figure5(scale, chosen):
    return _cells(
        scale, chosen, [{"method": "ortho_lora", "rank": r, "start": s} for s in PAPERS_STARTS for r in (4, 32)]
    )


def published(scale, chosen):
    """T-LoRA with the published code's start and with the paper's. They differ in keys and values of
    cross-attention."""
    return _cells(scale, chosen, [{"method": "tlora", "start": s} for s in (DEFAULT_START, PUBLISHED_START)])


def figure6(scale, chosen):
    return _cells(
        scale, chosen, [{"method": "tlora", "min_share": share} for share in R_MIN] + [{"method": "ortho_lora"}]
    )


def figures10_12(scale, chosen):
    return _cells(scale, chosen, [{"method": m, "rank": r} for m in ("lora", "tlora") for r in (4, 16, 32)])


def curves(scale, chosen):
    return _cells(
        scale,
        chosen,
        [{"method": "tlora", "curve": c} for c in FREE] + [{"method": "tlora", "alpha": a} for a in ALPHAS],
    )


def paces(scale, chosen):
    """Separates the method from slower learning: LoRA at half its rate, T-LoRA at twice its own."""
    return _cells(
        scale,
        chosen,
        [{"method": m, "pace": p} for m, p in (("lora", 1.0), ("lora", 0.5), ("tlora", 1.0), ("tlora", 2.0))],
    )


def main_methods(scale, chosen):
    """T-LoRA, LoRA and both controls, because T-LoRA combines mask and start."""
    return _cells(scale, chosen, [{"method": m} for m in ("lora", "tlora", "vanilla_tlora", "ortho_lora")])


def fresh(scale, chosen):
    """Further trainings, for questions that the first results raised."""
    of_fresh = replace(scale, seeds=FRESH[: len(scale.seeds)])
    return main_methods(of_fresh, chosen) + _cells(
        of_fresh, chosen, [{"method": m, "base": "flow"} for m in ("lora", "vanilla_tlora")]
    )


def preservation(scale, chosen):
    """Two ways to keep the class as it was, and neither; at a scale of its own, which draws pictures of the class."""
    return _cells(scale, chosen, [{"method": "tlora", **weight} for weight in ({}, *WAYS.values())])


STUDIES: dict[str, Callable[[Scale, dict[str, float]], list[Cell]]] = {
    "rates": rates,
    "methods": main_methods,
    "table1": table1,
    "table2": table2,
    "table4": table4,
    "table5": table5,
    "figure2": figure2,
    "figure4": figure4,
    "figure5": figure5,
    "published": published,
    "figure6": figure6,
    "figures10-12": figures10_12,
    "curves": curves,
    "paces": paces,
    "fresh": fresh,
    "preservation": preservation,
}


def cells_of(names: Iterable[str], scale: Scale, chosen: dict[str, float]) -> list[Cell]:
    """The references of each base, then the cells of all studies, each once."""
    cells = [cell for name in names for cell in STUDIES[name](scale, chosen)]
    of_base = {
        base: references(cells, base) + [c for c in cells if c.base == base]
        for base in dict.fromkeys(c.base for c in cells)
    }
    return list(dict.fromkeys(meaningful(cell) for cells in of_base.values() for cell in cells))


def drawn_earlier(cell: Cell) -> Cell:
    """The same training, measured at a quarter and half of its first step instead."""
    first = min(cell.steps)
    return replace(cell, steps=(first // 4, first // 2))


def drawn_later(cell: Cell) -> Cell:
    """The same training continued, measured at one and a half times and twice its last step instead."""
    last = max(cell.steps)
    return replace(cell, steps=(3 * last // 2, 2 * last))


def meaningful(cell: Cell) -> Cell:
    """The cell without the fields that its method ignores, so that two studies can share a training. The rank of
    rotations is their number of blocks."""
    if cell.method not in METHODS:
        return cell
    kind = METHODS[cell.method]
    if cell.method in BLOCKS:
        cell = replace(cell, rank=BLOCKS[cell.method])
    if not kind.is_masked:
        cell = replace(cell, min_share=1.0, alpha=1.0, curve="")
    if not kind.is_orthogonal:
        cell = replace(cell, start=DEFAULT_START)
    return cell
