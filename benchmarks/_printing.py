"""How the benchmarks print what they found."""

import json


def show(rows: list[dict], as_json: bool, **about) -> None:
    """A line for each row; where asked for, one JSON object of `about` and the rows as the last line."""
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if as_json:
        print(json.dumps({**about, "rows": rows}))
