"""The report's tables: the trainings in each row, and the row that each is compared with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from tlora_core.method.adapters import METHODS
from tlora_core.method.starts import DEFAULT_START

from .analysis import Lines, Point
from .study import RANK, Cell, meaningful

SHARED = {"concept", "seed", "method", "learning_rate", "steps", "draws", "batch_size"}


@dataclass(frozen=True)
class Table:
    """name: of the study. variant: the row of a cell. against: the changes to a Cell that give the cell it is compared
    with; against_text: the same in words. varies: fields of Cell; unless the rows have more than one value of them, the
    table says nothing."""

    name: str
    title: str
    variant: Callable[[Cell], str | None]
    against: dict[str, object]
    against_text: str
    varies: tuple[str, ...]

    def says_something(self, given: Sequence[Point]) -> bool:
        cells = [p.cell for p in given if p.cell.method != "none" and self.variant(p.cell) is not None]
        return len({tuple(getattr(cell, name) for name in self.varies) for cell in cells}) > 1

    def other(self, lines: Lines) -> str | None:
        """The row with which the row of these lines is compared."""
        cell = next(iter(lines.values()))[-1].cell
        return self.variant(meaningful(replace(cell, **self.against)))


def free(cell: Cell, *names: str) -> bool:
    """Whether all fields except `names` have their defaults."""
    usual = meaningful(Cell(cell.concept, cell.seed, cell.method))
    return all(
        getattr(cell, f.name) == getattr(usual, f.name)
        for f in fields(Cell)
        if f.name not in SHARED and f.name not in names
    )


def _method(cell):
    return cell.method if free(cell) else None


def ranks(cell):
    return (
        f"{cell.method}, rank {cell.rank}"
        if cell.method in METHODS and not METHODS[cell.method].of_weight and free(cell, "rank")
        else None
    )


def _images(cell):
    return f"{cell.method}, images {cell.images}" if free(cell, "images") and cell.method in ("lora", "tlora") else None


def _flow(cell):
    if cell.base != "flow" or not free(cell, "base", "rank", "min_share", "noise_to"):
        return None
    part = f", t up to {cell.noise_to:g}" if cell.noise_to < 1 else ""
    return f"{cell.method}, rank {cell.rank}{part}" + (
        f", r_min {cell.min_share:.0%}" if METHODS[cell.method].is_masked else ""
    )


def _interval(cell):
    return (
        f"t/T {cell.noise_from:g} to {cell.noise_to:g}"
        if cell.method == "lora" and free(cell, "noise_from", "noise_to")
        else None
    )


def _start(cell):
    return f"{cell.start}, rank {cell.rank}" if cell.method == "ortho_lora" and free(cell, "start", "rank") else None


def _published(cell):
    return cell.start if cell.method == "tlora" and free(cell, "start") else None


def _r_min(cell):
    if cell.method == "ortho_lora" and free(cell):
        return "r_min 100%"  # the same adapter, never masked
    return f"r_min {cell.min_share:.0%}" if cell.method == "tlora" and free(cell, "min_share") else None


def _curve(cell):
    if cell.method != "tlora" or not free(cell, "curve", "alpha"):
        return None
    return cell.curve or f"alpha {cell.alpha:g}"


def _pace(cell):
    if METHODS[cell.method].of_weight or not free(cell, "pace"):
        return None
    return cell.method if cell.pace == 1 else f"{cell.method}, {cell.pace:g} times its rate"


_LORA = {"method": "lora"}
TABLES = (
    Table(
        "methods",
        f"LoRA, T-LoRA and both controls, rank {RANK} (Table 2's shape with the baselines there are)",
        _method,
        {**_LORA, "rank": RANK},
        "lora",
        ("method",),
    ),
    Table(
        "paces",
        "Is it the method, or how fast it learns?",
        _pace,
        {**_LORA, "pace": 0.5},
        "lora, 0.5 times its rate",
        ("pace",),
    ),
    Table("table1", "Table 1: ranks", ranks, _LORA, "lora of the same rank", ("rank",)),
    Table(
        "table4",
        "Table 4: one, two and three training pictures",
        _images,
        {**_LORA, "images": 1},
        "lora, images 1",
        ("images",),
    ),
    Table(
        "table5",
        "Table 5: a flow-matching base, in the place of FLUX",
        _flow,
        {**_LORA, "noise_to": 1.0},
        "lora of the same rank",
        ("method", "rank", "min_share", "noise_to"),
    ),
    Table(
        "figure2",
        "Figure 2: LoRA trained on a part of the noise axis",
        _interval,
        {"noise_from": 0.0, "noise_to": 1.0},
        "t/T 0 to 1",
        ("noise_from", "noise_to"),
    ),
    Table(
        "figure5",
        "Figure 5: six starts of Ortho-LoRA",
        _start,
        {"start": DEFAULT_START},
        f"{DEFAULT_START} of the same rank",
        ("start",),
    ),
    Table(
        "published",
        "Beyond the paper: the start that its published code draws",
        _published,
        {"start": DEFAULT_START},
        DEFAULT_START,
        ("start",),
    ),
    Table(
        "figure6",
        "Figure 6: r_min as a share of the rank",
        _r_min,
        {"method": "tlora", "min_share": 0.5},
        "r_min 50%",
        ("min_share",),
    ),
    Table(
        "curves",
        "Beyond the paper: other shapes of r(t)",
        _curve,
        {"curve": "", "alpha": 1.0},
        "alpha 1",
        ("curve", "alpha"),
    ),
)
