"""Writes locales/en/nodeDefs.json from the nodes' own texts, and lists what the other languages lack.

python3 tools/host.py python tools/make_locales.py
"""

import json
from pathlib import Path

from hostlib.server import PACK_NAME, own_server

LOCALES = Path(__file__).resolve().parents[1] / "locales"


def entry(info: dict) -> dict:
    """A node's entry in the host's nodeDefs.json."""
    declared = {
        name: spec[1] for group in ("required", "optional") for name, spec in (info["input"].get(group) or {}).items()
    }
    inputs = {
        name: {"name": options.get("display_name") or name, "tooltip": options["tooltip"]}
        for name, options in declared.items()
    }
    tips = info.get("output_tooltips") or []
    outputs = {
        str(i): {"name": name, **({"tooltip": tip} if tip else {})}
        for i, (name, tip) in enumerate(zip(info["output_name"], [*tips, *[None] * len(info["output_name"])]))
    }
    return {
        "display_name": info["display_name"],
        **plain(description=info["description"]),
        **({"inputs": {name: plain(**one) for name, one in inputs.items()}} if inputs else {}),
        "outputs": outputs,
    }


def plain(**texts: str) -> dict:
    """Removes texts that vue-i18n does not treat as plain text and that stop older interfaces. These then show the
    node's own text."""
    return {key: text for key, text in texts.items() if not set(text) & set("{}|@")}


def main() -> None:
    with own_server() as server:
        ours = {
            name: info for name, info in server.object_info().items() if info["python_module"].endswith("." + PACK_NAME)
        }
    english = {name: entry(info) for name, info in ours.items()}
    path = LOCALES / "en" / "nodeDefs.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(english, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, one in english.items():
        changed = [
            key
            for key, value in one.get("inputs", {}).items()
            if before.get(name, {}).get("inputs", {}).get(key) != value
        ]
        gone = before.get(name, {}).get("inputs", {}).keys() - one.get("inputs", {}).keys()
        if changed or gone:
            print(f"{name}: translate {', '.join(changed) or 'nothing'}; drop {', '.join(gone) or 'nothing'}")


if __name__ == "__main__":
    main()
