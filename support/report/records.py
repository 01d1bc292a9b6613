"""A run as the page knows it: what does not fit is left out of its records, and counted."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyme import Config
from support import UserError, settings

Row = dict[str, Any]  # an object of JSON
MODE_NAMES = {"dyme": "DyME", "grpo": "GRPO", "sft": "SFT", "two-stage": "SFT, then GRPO"}
# What a record must hold: a type, one of several, or one of these words; None may be missing.
CONFIG = {"mode": tuple(MODE_NAMES), "data": str, "steps": int, "prompts": int, "switch": str,
          "thinking_weight": float, "format_weight": float}
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
    if shape in (int, float):
        return type(value) in (int, shape) and (0 if shape is int else -1e9) <= value <= 1e9
    if shape is str:
        return isinstance(value, str) and len(value) <= 20_000  # longer ones crowd out the rest
    return isinstance(value, bool) if shape is bool else value == shape


def fitted(value: Any, shape: Any) -> Any:
    """What a shape, or an object or list of shapes, names of a value. Raises ValueError."""
    if isinstance(shape, dict) and isinstance(value, dict):
        return {key: fitted(value.get(key), part) for key, part in shape.items()}
    if isinstance(shape, list) and isinstance(value, list):
        return [fitted(item, shape[0]) for item in value]
    if isinstance(shape, dict | list) or not fits(value, shape):
        raise ValueError("does not fit")
    return value


def read(file: Path, shape: Row, numbers: bool = False) -> tuple[list[Row], int]:
    """What a shape names of the rows of a .jsonl file, by step, and how much does not fit.

    With `numbers` a row's other numbers are kept as well.
    """
    rows, lost = [], 0
    try:
        lines = file.read_bytes().split(b"\n") if file.exists() else []
    except OSError:
        lines = [b"?"]  # such as a folder
    for line in filter(bytes.strip, lines):
        try:
            row = json.loads(line.decode())
            rows.append(fitted(row, shape))
        except (ValueError, RecursionError):  # such as a line that a crash cut short
            lost += 1
            continue
        more = {k: v for k, v in row.items() if numbers and k not in shape and v is not None}
        known = {key: value for key, value in more.items() if fits(value, float)}
        rows[-1] |= known
        lost += len(more) - len(known)
    return sorted(rows, key=lambda row: row.get("step", 0)), lost


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
    if wrong := [key for key, shape in CONFIG.items() if not fits(cfg[key], shape)]:
        raise UserError(f"{folder / 'config.json'}: `{wrong[0]}` is {str(cfg[wrong[0]])[:60]}")
    cfg["prompts"] = max(1, cfg["prompts"])
    cfg["by_eq_6"] = cfg["mode"] == "dyme" and cfg["switch"] == "any-correct"
    cfg["helper_rates"] = bool(cfg["helper_url"]) and not cfg["no_checker"]  # r_t is the helper's

    def rows(file: str, shape: Row, numbers: bool = False) -> list[Row]:
        found, lost[f"{file}.jsonl"] = read(folder / f"{file}.jsonl", shape, numbers)
        return found

    groups, metrics = rows("samples", GROUP), rows("metrics", STEP, numbers=True)
    for group in groups:
        group["right"] = sum(response["r_a"] > 0 for response in group["responses"])
        group["explores"] = group["mode"] in ("exploration", "both")
    for row in metrics:
        row["seconds"] = sum(value for key, value in row.items() if key.startswith("seconds_"))
    evaluations = rows("evaluations", STEP, numbers=True)
    last = evaluations[-1]["step"] if evaluations else 0
    return Run(name, folder, cfg, metrics, evaluations, groups,
               rows("held-out-0", ANSWER), rows(f"held-out-{last}", ANSWER) if last else [], lost)
