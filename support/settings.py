"""The command line: a dataclass becomes flags, and what cannot work is refused."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import torch
from transformers.hf_argparser import HfArgumentParser

from support import UserError

if TYPE_CHECKING:
    from dyme import Config


class OneLineParser(HfArgumentParser):
    """A command-line parser that raises UserError instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and which flag was perhaps meant."""
        known = {name.replace("_", "-") for name in self._option_string_actions}
        for word in re.findall(r"--[\w-]+", message):
            near = difflib.get_close_matches(word, known - {word})
            if near and word not in known:
                message += f"; did you mean {near[0]}?"
        message = re.sub(r"//[^/\s]*@", "//...@", message)  # a password
        raise UserError(f"{message} (--help shows all flags)")


def one_line_parser(description: str, config: Any = None) -> OneLineParser:
    """A parser without flags, or with those of a dataclass, whose errors are one line."""
    return OneLineParser(config, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)


def read_flags(config: type, description: str, argv: list[str] | None) -> dict[str, Any]:
    """The flags that were given, by the field of a dataclass that they set. Raises UserError."""
    parser = one_line_parser(description, config)
    parser.usage = "%(prog)s [flags]"
    parser.epilog = "In brackets: the toy's values; those of other data are in PRESETS of dyme.py."
    metavars: dict[Any, str] = {int: "N", float: "F", str: "X"}
    for action in parser._actions[1:]:  # all but --help
        shown = "" if action.default in ("", False) else f" [{action.default}]"
        action.help = f"{action.help or ''}{shown}".replace("%", "%%")
        action.default = argparse.SUPPRESS  # a flag that is not given leaves no trace
        action.option_strings = action.option_strings[-1:]  # --help leaves out --a_b for --a-b
        if not action.choices:
            action.metavar = metavars.get(action.type, "yes|no")
    return vars(parser.parse_args(argv))


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def implied(given: dict[str, Any]) -> dict[str, Any]:
    """Defaults that follow from other flags. Raises UserError for a model without data."""
    if given.get("model", "tiny") != "tiny" and not given.keys() & {"data", "resume"}:
        raise UserError(f"--model {given['model']}: say with --data what to train it on")
    defaults: dict[str, Any] = {}
    if "steps" in given:
        defaults["epochs"] = 0.0
        if given.get("epochs"):
            raise UserError("--steps and --epochs both set the length of a run; give one of them")
    if given.get("mode") in ("grpo", "two-stage"):
        defaults["thinking_weight"] = 0.0  # the paper rewards the baselines by r_a alone
    if given.get("released_code"):
        defaults["format_weight"] = 1.0
    if "resume" not in given:
        tell_idle(given)
    return defaults


SAMPLING_MODES = {"dyme", "grpo", "two-stage"}
# Flags that do something only beside some values of another, which has this default.
ONLY_WITH = {"traces": ("data", "toy", {"toy", "sums", "charts"}),
             "sft_steps": ("mode", "dyme", {"two-stage"}),
             "temperature": ("mode", "dyme", SAMPLING_MODES),
             "thinking_weight": ("mode", "dyme", SAMPLING_MODES)}


def tell_idle(given: dict[str, Any]) -> None:
    """Warn of flags that have no effect in this run."""
    # No error: whoever compares modes in a loop gives all of them the same flags.
    for name in sorted(given.keys() & ONLY_WITH.keys()):
        other, default, values = ONLY_WITH[name]
        value = given.get(other, default)
        if value.partition(":")[0] not in values:
            print(f"warning: {flag(name)} has no effect with {flag(other)} {value}",
                  file=sys.stderr)


def read(run: Path, config: type) -> dict[str, Any]:
    """Read a run's settings from its `config.json`. Raises UserError if it has none that fit."""
    file = run / "config.json"
    if not file.exists():
        raise UserError(f"{run}: is not a run folder (it has no config.json)")
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        if not {"mode", "data", "steps", "prompts"} <= saved.keys():
            raise ValueError("perhaps a model's")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{run}: is not a run folder (its config.json: {error})") from None
    # Settings that are retired are left out, newer ones take their default.
    found = {f.name: saved.get(f.name, f.default) for f in dataclasses.fields(config)}
    try:
        check_values(config, found)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return found


# What changes no result. The rest of a run's settings stay as they are.
CHANGEABLE_ON_RESUME = {"out", "resume", "overwrite", "device", "plain", "micro_batch",
                        "eval_every", "save_every", "tensorboard",
                        "helper_url", "helper_key_env", "helper_concurrency"}


def resumed_settings(cfg: Config, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run to go on with, and flags `given` anew. Raises UserError."""
    if cfg.overwrite:
        raise UserError("--resume goes on with a run; leave out --overwrite")
    saved = read(Path(cfg.out), type(cfg))
    free = CHANGEABLE_ON_RESUME
    if Path(saved["data"]).suffix in (".json", ".jsonl"):
        free = free | {"data"}  # a file may have moved: its rows are known by their hash
    for key in given.keys() - free:
        if given[key] != saved[key]:
            raise UserError(f"{flag(key)} {given[key]}: the run has {saved[key]} and a resumed run "
                            "keeps its settings; start a new one with another --out")
    return saved | given | {"out": cfg.out}


def check_model_name(name: str, known: Iterable[str], flag: str = "") -> None:
    """Raise UserError, before any download, if a model is neither known, a folder nor a hub id."""
    path = Path(name)
    if path.suffix == ".gguf":
        raise UserError(f"{flag}{name}: is a GGUF file; make a model folder of it with "
                        f"python -m support.smollm2 FOLDER {name}")
    if not path.exists() and name not in known and (len(path.parts) == 1 or path.parent.is_dir()):
        raise UserError(f"{flag}{name}: no such folder; give one, a hub id (NAME/MODEL) or one of "
                        f"{', '.join(sorted(known))}")


@contextlib.contextmanager
def loading(name: str, known: Iterable[str]) -> Iterator[None]:
    """Turn whatever loading a model raises into a UserError: why in one line, and what to do."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - loaders raise many kinds, alike to the user
        reason = " ".join(str(error).split())
        advice = "one of its files is damaged or missing, or the run has no checkpoint yet"
        if "connect to" in reason:
            advice = ("download it elsewhere and give its folder; or python -m support.smollm2 "
                      "FOLDER makes a small text model without the hub")
        elif Path(name).is_dir() and not (Path(name) / "config.json").exists():
            advice = "it has no config.json: it is neither a run nor a model"
        elif not Path(name).is_dir():
            advice = f"give a hub id, a directory or one of {', '.join(known)}"
        if "not known here" in reason or isinstance(error, AttributeError):  # as Llama 4 raises
            advice = "support/README.md has the families of models that are known"
        reason = textwrap.shorten(reason, 200, placeholder=" ...")  # at a word's end
        for package in ("torchvision", "num2words"):
            if package in reason.lower():  # asked for alone, pip would replace torch
                advice = f"pip install -r requirements.txt {package}"
        if "trust_remote_code" in str(error):
            advice = "a model that brings its own code is not run here"
        raise UserError(f"--model {name}: cannot be loaded ({reason}); {advice}") from None


LOWEST = {"generations": 2, "temperature": 1e-6, "lr": 1e-12, "prompts": 1,
          "max_new_tokens": 1, "steps": 1, "eval_rows": 1, "helper_concurrency": 1}
HIGHEST = 1e9  # of all but a seed
SWITCHES = (r"any-correct|anneal|explore|memorize|threshold:(0?\.\d+|[01](\.0+)?)"
            r"|budget:[1-9]\d*")


def check(cfg: Config, models: Iterable[str]) -> None:
    """Refuse values that cannot work, naming the flag; `models` are names that need no folder."""
    if not cfg.resume:
        check_model_name(cfg.model, models, "--model ")
    check_values(type(cfg), vars(cfg))
    budget, url = re.fullmatch(r"budget:(\d+)", cfg.switch), cfg.helper_url
    fitting = {"sums": "FOLDER, one that python -m support.smollm2 FOLDER makes",
               "charts": "FOLDER, one that python -m support.smollm2 FOLDER --sight makes"}.get(
        cfg.data, "SmolVLM-256M")
    refused = {
        f"--out {ascii(cfg.out)}: its name is not UTF-8":
            any("\ud800" <= c <= "\udfff" for c in cfg.out),
        "--tensorboard: needs `pip install tensorboard`":
            cfg.tensorboard and importlib.util.find_spec("tensorboard") is None,
        f"--switch {cfg.switch}: give any-correct, threshold:0.8, anneal, budget:192, explore or "
        "memorize": not re.fullmatch(SWITCHES, cfg.switch),
        f"--switch {cfg.switch}: give at least --prompts {cfg.prompts}, or the buffer may grow for "
        "ever": budget and int(budget[1]) < cfg.prompts,
        f"--switch and --helper-url belong to --mode dyme, not {cfg.mode}":
            cfg.mode != "dyme" and (cfg.switch != type(cfg).switch or url),
        "--helper-url and --helper-model belong together": bool(url) != bool(cfg.helper_model),
        "--helper-url: must begin with http:// or https://":
            url and not url.startswith(("http://", "https://")),  # it may hold a password
        "--no-checker and --no-refiner leave out one half of what --helper-url brings":
            cfg.no_checker and cfg.no_refiner or not url and (cfg.no_checker or cfg.no_refiner),
        f"--helper-key-env {cfg.helper_key_env}: no such environment variable":
            cfg.helper_key_env and cfg.helper_key_env not in os.environ,
        f"--beta belongs to --mode grpo and two-stage; {cfg.mode} has no KL term (Eq. 7)":
            cfg.beta and cfg.mode not in ("grpo", "two-stage"),
        f"--data {cfg.data}: not the toy, which is all that the tiny model reads; add --model "
        f"{fitting}":
            cfg.model == "tiny" and cfg.data.partition(":")[0] != "toy",
    }
    for message, wrong in refused.items():
        if wrong:
            raise UserError(message)


def check_values(config: type, values: dict[str, Any]) -> None:
    """Refuse a value that has another type than its setting, or is outside choices or range."""
    for field in dataclasses.fields(config):
        name, value, kind = field.name, values[field.name], type(field.default)
        if type(value) is not kind and (kind, type(value)) != (float, int):
            raise UserError(f"`{name}` is {json.dumps(value)[:60]}, not of type {kind.__name__}")
        choices, high = get_args(field.type), math.inf if name == "seed" else HIGHEST
        if choices and value not in choices:
            raise UserError(f"{flag(name)} {value}: must be one of {', '.join(choices)}")
        low = LOWEST.get(name, 0)
        if kind is not str and not low <= value <= high:
            raise UserError(f"{flag(name)} {value}: must be at least {low} and at most {high:g}")


def settle_length(cfg: Config, rows: int) -> None:
    """Turn passes over so many training rows into steps, unless resumed. Raises UserError."""
    # A step takes `prompts` rows, one of SFT `generations` times as many.
    targets, sft = cfg.prompts * cfg.generations, 0
    if cfg.mode == "two-stage":  # the paper sees SFT saturate after one pass
        sft = cfg.sft_steps = cfg.sft_steps or math.ceil(rows / targets)
    if cfg.epochs and not cfg.resume:
        size = targets if cfg.mode == "sft" else cfg.prompts
        cfg.steps = sft + math.ceil((cfg.epochs * rows - sft * targets) / size)
    if cfg.mode == "two-stage" and not 0 < sft < cfg.steps:
        raise UserError(f"--sft-steps {sft}: SFT takes all of the run's {max(0, cfg.steps)} steps; "
                        "lower it, or raise --steps or --epochs (a step of SFT takes --prompts x "
                        "--generations rows)")
