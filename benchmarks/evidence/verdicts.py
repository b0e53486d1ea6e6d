"""The page's sections on the claims: in short, one by one, on copying, and level by level of likeness."""

from collections.abc import Sequence
from pathlib import Path

from . import claims, markdown, plots
from .analysis import CONTROL_LOSS, FEWEST, Point
from .claims import Claim
from .study import FRESH

HIGHER = (0.3, 0.4, 0.5, 0.6)  # levels of IS; few units reach higher ones


def verdicts(given: Sequence[Point], pictures: Path) -> list[str]:
    """The results in short, then each claim; empty if nothing was run."""
    if not given:
        return []
    paper, at_the_end, copying = claims.of_paper(given), claims.of_the_end(given), claims.of_copying(given)
    plots.differences(paper, "Difference in TS at equal IS", pictures / "claims.png")
    plots.differences(copying, "Copied less often, at equal IS", pictures / "copying.png")
    short = (
        ("Following the prompt, and what training leaves", [*paper, *at_the_end]),
        ("Copying", copying),
        ("Following the prompt where the concept is learnt", claims.of_likeness(given)),
    )
    return [
        "## In short\n\n"
        + "\n\n".join(_counted(about, made) for about, made in short)
        + "\n\n![Differences in TS, with their intervals](evidence/claims.png)",
        _paper_section(paper, at_the_end),
        _copying_section(copying),
    ]


def _counted(about, made):
    """The number of claims for each verdict, and the settled claims."""
    kinds = {
        kind: [c.text for c in made if c.verdict.split(" (")[0] == kind]
        for kind in ("confirmed", "contradicted", "not separable", "no verdict", "not tested")
    }
    numbers = ", ".join(f"{len(texts)} {kind}" for kind, texts in kinds.items() if texts)
    settled = "".join(f" {kind.capitalize()}: {'; '.join(texts)}." for kind, texts in list(kinds.items())[:2] if texts)
    return f"**{about}**, {len(made)} claims: {numbers}.{settled}"


def _paper_section(paper, at_the_end):
    return (
        "## The paper's claims\n\nDifferences at equal IS, within units. The verdict counts the units that pass the "
        "gate: at none of the compared levels of IS have prompts without the concept lost more than "
        f"{CONTROL_LOSS:.0%} of their attributes, because a damaged model follows no prompt. A verdict needs {FEWEST} "
        "concepts. About one in twenty of the intervals on this page misses the true value by chance, slightly more "
        "where there are few concepts, so no single interval proves much.\n\n"
        f"{_judged(paper)}\n\n"
        f"After the last step that both have, whatever the likeness and without the gate:\n\n{_judged(at_the_end)}"
    )


def _copying_section(copying):
    return (
        "## Copying\n\nWhich of two trainings copies the training picture's place and background less often where the "
        "prompt leaves them open. The pictures of seed 0 led to these claims; the other seeds, trained afterwards, "
        f"also judge them separately.\n\n{_judged(copying)}\n\n"
        "![Differences in copying, with their intervals](evidence/copying.png)"
    )


def by_likeness(given: Sequence[Point], pictures: Path) -> str:
    """The differences at each level of IS; empty if none can be compared."""
    made = [row for row in claims.by_likeness(given, HIGHER) if row.ts is not None]
    if not made:
        return ""
    plots.by_likeness(made, pictures / "likeness.png")
    rows = [
        [
            row.text,
            f"{row.level:g}",
            f"{row.ts.units} of {row.ts.concepts}",
            *map(markdown.text_of, (row.ts, row.control, row.copied_background)),
        ]
        for row in made
    ]
    head = ["", "IS", "units of concepts", "TS", "prompts without the concept", "background copied"]
    return (
        "## By likeness\n\nThe gate excludes trainings that damage the model, and with them most of those that come as "
        "close to the concept as the paper's trainings do. This section therefore shows each level of IS separately, "
        "with all units that reach it both ways: the differences in TS, in how well prompts without the concept are "
        "followed, and in how often the training picture's background is copied. It was added last. Seeds "
        f"{FRESH[0]} to {FRESH[-1]}, trained afterwards and not part of it, judge it:\n\n"
        + _judged(claims.of_likeness(given))
        + "\n\n![Differences in TS at each level of IS](evidence/likeness.png)\n\n"
        + markdown.table(head, rows)
    )


def _judged(made: Sequence[Claim]) -> str:
    return markdown.table(
        ["claim", "here", "difference", "without the gate"],
        [[c.text, c.verdict, c.figures, c.ungated] for c in made],
    )
