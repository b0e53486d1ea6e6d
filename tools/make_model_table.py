"""Writes the table of models in README.md: what the tests do with each family, and its default settings.

python3 tools/host.py python tools/make_model_table.py
"""

import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
README = REPO / "README.md"
START, END = "<!-- models: tools/make_model_table.py -->", "<!-- end of models -->"
HEAD = (
    "model, ComfyUI's class",
    "tests, random weights",
    "real weights",
    "resolution",
    "steps",
    "method, optimizer",
    "guidance",
)


def table() -> str:
    """The table as Markdown: a row for each family of the small random models. Needs the host importable."""
    from random_models import SMALL

    rows = [HEAD, ("---",) * len(HEAD), *(_row(name, family) for name, family in SMALL.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(name: str, family) -> tuple[str, ...]:
    from random_models import config_of

    from tlora_core.hosts.comfy.model.defaults import defaults_of

    config = config_of(family)
    config.unet_config.update(type(config).unet_config)  # the width of the real models' text, among others
    usual = defaults_of(config)
    steps = usual.steps_of.get(usual.method, usual.steps)
    kind = f"{name}, {family.host_class}"
    settings = str(usual.resolution), str(steps), f"{usual.method}, {usual.optimizer}", str(usual.guidance)
    return kind, _tested(name), "not yet", *settings


def _tested(name: str) -> str:
    """What test_every_family.py does with the family."""
    from family_table import TABLE

    refused = TABLE[name].refused
    return f"sampled; training refused: {refused}" if refused else "trained and sampled"


def written(readme: str) -> str:
    """The README's text with the table of today."""
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{table()}\n\n{END}{after}"


def main() -> None:
    from comfy.cli_args import args

    args.cpu = True  # read when the host's other modules are imported
    sys.path.append(str(REPO / "tests" / "helpers"))
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
