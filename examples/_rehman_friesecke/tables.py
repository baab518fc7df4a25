"""Rows of numbers: kept as JSON, averaged over seeds, printed as text."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openmm_bg.analysis import Distance

Row = dict[str, Any]


def distance_row(distance: Distance) -> Row:
    """What a table shows of a distance."""
    return {
        "n": distance.n,
        "value": distance.value,
        "value_error": distance.error,
        "floor": distance.floor,
        "floor_error": distance.floor_error,
        "debiased": distance.debiased,
        "within_floor": distance.within_floor,
        "unit": distance.unit,
    }


def over_seeds(rows: Iterable[Row], keys: Sequence[str], columns: Sequence[str]) -> list[Row]:
    """Mean and standard deviation of each column over the rows that share all keys, in order of appearance.

    ``column`` holds the mean, ``column_sd`` the standard deviation (None for a single row) and ``seeds`` the number of
    rows. A column of bools holds how many are true.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    means = []
    for values, group in groups.items():
        mean: Row = dict(zip(keys, values, strict=True)) | {"seeds": len(group)}
        for column in columns:
            series = [row[column] for row in group]
            if all(isinstance(value, bool | np.bool_) for value in series):
                mean[column] = f"{sum(series)} of {len(series)}"
                continue
            mean[column] = float(np.mean(series))
            mean[f"{column}_sd"] = float(np.std(series, ddof=1)) if len(series) > 1 else None
        means.append(mean)
    return means


def show(title: str, rows: Sequence[Row], columns: dict[str, tuple[str, str]]) -> None:
    """Print a table.

    Parameters
    ----------
    title : str
    rows : sequence of dict
    columns : dict
        Name in the rows to (heading, format). ``name_sd`` in a row is printed behind its value.
    """
    cells = [[heading for heading, _ in columns.values()]]
    for row in rows:
        line = []
        for name, (_, form) in columns.items():
            text = _text(row.get(name), form)
            if row.get(f"{name}_sd") is not None:
                text += f" ± {_text(row[f'{name}_sd'], form.lstrip('+'))}"
            line.append(text)
        cells.append(line)
    widths = [max(len(line[k]) for line in cells) for k in range(len(columns))]
    print(f"\n{title}")
    for line in cells:
        print("  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _text(value: Any, form: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, float) and math.isnan(value):
        return "not measured"
    return value if isinstance(value, str) else f"{value:{form}}"


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows; JSON knows neither NaN nor infinity, which become null."""
    path.write_text(json.dumps([{k: _plain(v) for k, v in row.items()} for row in rows], indent=1) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
