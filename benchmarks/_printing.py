"""How the benchmarks print their results."""

import json


def show(rows: list[dict], as_json: bool, **about) -> None:
    """Prints a line for each row. as_json: the last line is one JSON object of `about` and the rows."""
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if as_json:
        print(json.dumps({**about, "rows": rows}))
