"""How the benchmarks print a figure: one JSON line of name, value, unit, and what it is held against."""

import json


def report(name: str, value: float, unit: str, against: str) -> None:
    print(json.dumps({"name": name, "value": round(value, 3), "unit": unit, "against": against}), flush=True)
