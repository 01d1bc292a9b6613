"""A run as the page knows it: what does not fit is left out of its records, and counted."""

import contextlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyme import Config
from support import settings

Row = dict[str, Any]  # an object of JSON
MODE_NAMES = {"dyme": "DyME", "grpo": "GRPO", "sft": "SFT", "two-stage": "SFT, then GRPO"}
# What a record must hold: a type, one of several, or one of these words; None may be missing.
STEP = {"step": int, "mode": (str, None)}  # metrics and evaluations, with numbers beside it
RESPONSE = {"text": str, "finished": bool, "r_a": float, "r_t": float, "r_f": float,
            "reward": float, "advantage": float}
GROUP = {"step": int, "name": str, "source": str, "question": str, "answer": str,
         "facts": (str, None), "trace": (str, None), "target": (str, None), "responses": [RESPONSE],
         "mode": ("exploration", "memorization", "both", "buffered")}
ANSWER = {"name": str, "source": str, "question": str, "answer": str, "response": str,
          "accuracy": bool, "in_format": bool, "finished": bool, "thinking_fault": (str, None)}


def fits(value: Any, shape: Any) -> bool:
    """Is a value as the shape wants it? A number that cannot be drawn, such as NaN, never is."""
    if isinstance(shape, tuple):
        return any(fits(value, one) for one in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(
            fits(value.get(key), part) for key, part in shape.items())
    if shape in (int, float):
        return type(value) in (int, shape) and (0 if shape is int else -1e9) <= value <= 1e9
    if shape is str:
        return isinstance(value, str) and len(value) <= 20_000  # longer ones crowd out the rest
    return isinstance(value, bool) if shape is bool else value == shape


def cut(value: Any, shape: Any) -> Any:
    """A value that fits, less what the shape does not name."""
    if isinstance(shape, dict):
        return {key: cut(value.get(key), part) for key, part in shape.items()}
    return [cut(item, shape[0]) for item in value] if isinstance(shape, list) else value


def read(file: Path, shape: Row, lost: Counter[str], numbers: bool = False) -> list[Row]:
    """What a shape names of a file's rows, perhaps with other `numbers`; counts what is lost."""
    rows = []
    try:
        lines = file.read_bytes().split(b"\n") if file.exists() else []
    except OSError:
        lines = [b"?"]  # such as a folder
    for line in filter(bytes.strip, lines):
        row: Any = None
        with contextlib.suppress(ValueError, RecursionError):  # as a crash may cut a line short
            row = json.loads(line.decode())
        if not fits(row, shape):
            lost[file.name] += 1
            continue
        rows.append(cut(row, shape))
        for key, value in row.items() if numbers else ():
            if fits(value, float):
                rows[-1][key] = value
            elif value is not None and key not in shape:
                lost[file.name] += 1
    return sorted(rows, key=lambda row: row.get("step", 0))


@dataclass
class Run:
    """What a run's folder holds, as far as it fits."""

    name: str
    folder: Path
    cfg: Row
    metrics: list[Row]
    evaluations: list[Row]
    groups: list[Row]
    before: list[Row]  # held-out responses at step 0
    after: list[Row]  # and at the last evaluation
    lost: Counter[str]  # what did not fit, by file


def read_run(folder: Path, name: str) -> Run:
    """Read a run folder. Raises UserError if it is none, or its settings cannot be."""
    cfg, lost = settings.read(folder, Config), Counter[str]()
    cfg["helper_rates"] = bool(cfg["helper_url"]) and not cfg["no_checker"]  # r_t is the helper's

    def rows(name: str, shape: Row, numbers: bool = False) -> list[Row]:
        return read(folder / f"{name}.jsonl", shape, lost, numbers)

    groups, metrics = rows("samples", GROUP), rows("metrics", STEP, numbers=True)
    for group in groups:
        group["right"] = sum(response["r_a"] > 0 for response in group["responses"])
        group["explores"] = group["mode"] in ("exploration", "both")
    # A switch that was replaced in Python is in no setting, but its groups show it.
    cfg["by_eq_6"] = cfg["mode"] == "dyme" and cfg["switch"] == "any-correct" and all(
        group["explores"] == (group["right"] > 0) for group in groups)
    for row in metrics:
        row["seconds"] = sum(value for key, value in row.items() if key.startswith("seconds_"))
    evaluations = rows("evaluations", STEP, numbers=True)
    last = evaluations[-1]["step"] if evaluations else 0
    return Run(name, folder, cfg, metrics, evaluations, groups,
               rows("held-out-0", ANSWER), rows(f"held-out-{last}", ANSWER) if last else [], lost)
