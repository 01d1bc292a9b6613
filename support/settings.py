"""The command line: a dataclass becomes flags, and what cannot work is refused."""

import argparse
import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import os
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from support import UserError


def one_line_parser(description: str) -> argparse.ArgumentParser:
    """A command-line parser that raises UserError instead of printing its usage."""

    def error(message: str) -> None:
        for word in re.findall(r"--[\w-]+", message):
            near = difflib.get_close_matches(word, parser._option_string_actions)
            if near and near[0] != word:
                message += f"; did you mean {near[0]}?"
        raise UserError(f"{message} (--help shows all flags)")

    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = error
    return parser


def build_parser(settings: type, description: str, choices: dict[str, Iterable[str]],
                 notes: dict[str, str]) -> argparse.ArgumentParser:
    """Turn a dataclass's fields into flags.

    The comment beside a field is its help, a comment line above one the title of a group; `notes` are added
    to the defaults.
    """
    parser = one_line_parser(description)
    group: Any = parser
    defaults = {f.name: f for f in dataclasses.fields(settings)}
    for line in textwrap.dedent(inspect.getsource(settings)).splitlines():
        title = re.fullmatch(r"    # (.*)", line)
        if title:
            group = parser.add_argument_group(title[1])
        declared = re.match(r"    (\w+): [^#]*(?:# (.*))?", line)
        if declared and declared[1] in defaults:
            add_flag(group, defaults[declared[1]], declared[2] or "", choices, notes)
    return parser


def add_flag(group: Any, field: dataclasses.Field, comment: str, choices: dict[str, Iterable[str]],
             notes: dict[str, str]) -> None:
    """Add the flag of one field; a flag that is not given leaves no trace, so that presets can be told."""
    shown = [str(field.default)] if field.default not in ("", False) else []
    if field.name in notes:
        shown.append(notes[field.name])
    text = " ".join(filter(None, [comment, f"[{'; '.join(shown)}]" if shown else ""]))
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if field.type is bool:
        options["action"] = "store_true"
    elif field.name in choices:
        options["choices"] = choices[field.name]
    else:
        options["type"] = field.type
        options["metavar"] = {str: "X", int: "N", float: "F"}[field.type]
    group.add_argument(flag(field.name), **options)


def implied(given: dict[str, Any]) -> dict[str, Any]:
    """Defaults that follow from other flags. Raises UserError for a model without data to train on."""
    if given.get("model", "tiny") != "tiny" and not given.keys() & {"data", "resume"}:
        raise UserError(f"--model {given['model']}: say with --data what to train it on")
    defaults: dict[str, Any] = {}
    if "steps" in given:
        if given.get("epochs"):
            raise UserError("--steps and --epochs both set the length of a run; give one of them")
        defaults["epochs"] = 0.0
    if given.get("mode") in ("grpo", "two-stage"):
        # r_t is DyME's: the paper rewards the baselines by r_a alone.
        defaults["thinking_weight"] = 0.0
    if "released_code" in given:
        defaults["format_weight"] = 1.0
    return defaults


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def read(run: Path, settings: type) -> dict[str, Any]:
    """Read a run's `config.json`. Raises UserError if there is none, or it is something else's, or damaged."""
    file = run / "config.json"
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        known = {f.name: f.default for f in dataclasses.fields(settings)}
        if not {"mode", "data", "steps", "prompts"} <= saved.keys():  # a model's, say
            raise ValueError("not a run's")
    except PermissionError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (OSError, ValueError, AttributeError, RecursionError):
        raise UserError(f"{run}: is not a run folder (it has no config.json of a run)") from None
    for f in dataclasses.fields(settings):
        wanted = (int, float) if f.type is float else f.type
        value = saved.get(f.name, f.default)
        if not isinstance(value, wanted) or (isinstance(value, bool) and f.type is not bool):
            raise UserError(f"{file}: `{f.name}` is {json.dumps(value)[:60]}, not of type {f.type.__name__}")
    # Settings that are retired are ignored; those that came later take their default.
    return known | {name: value for name, value in saved.items() if name in known}


# What changes no result. The rest of a run's settings stay as they are.
CHANGEABLE_ON_RESUME = {"out", "resume", "overwrite", "device", "micro_batch", "eval_every", "save_every", "tensorboard",
                        "helper_url", "helper_key_env", "helper_concurrency"}


def resumed_settings(cfg: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run to go on with, and flags `given` anew. Raises UserError if one may not change."""
    if cfg.overwrite:
        raise UserError("--resume goes on with a run; leave out --overwrite")
    saved = read(Path(cfg.out), type(cfg))
    for key in given.keys() - CHANGEABLE_ON_RESUME:
        if given[key] != saved.get(key):
            raise UserError(f"{flag(key)} {given[key]}: the run has {saved.get(key)} and a resumed run keeps "
                            "its settings; start a new one with another --out")
    anew = {key: given[key] for key in given.keys() & CHANGEABLE_ON_RESUME}
    # Whether it was begun with --overwrite is of an earlier command, not of the run.
    return saved | {"overwrite": False} | anew | {"out": cfg.out}


def check_model_name(name: str, known: Iterable[str], flag: str = "") -> None:
    """Raise UserError, before anything is downloaded, if a model is neither known nor a folder nor a hub id."""
    path = Path(name)
    if not path.exists() and name not in known and (len(path.parts) == 1 or path.parent.is_dir()):
        raise UserError(f"{flag}{name}: no such folder; give one, a hub id (NAME/MODEL) or one of "
                        f"{', '.join(sorted(known))}")


LOWEST = {"generations": 2, "temperature": 1e-6, "lr": 1e-12, "prompts": 1,
          "max_new_tokens": 1, "steps": 1, "eval_rows": 1, "helper_concurrency": 1}
HIGHEST = 1e6  # of settings that are not whole numbers: float32 ends at 3e38
MOST_TOKENS = 10**8  # sampled in a step: more is a slip of the keys, and would take all memory before it is told
SWITCHES = r"any-correct|anneal|explore|memorize|threshold:\d*\.?\d+|budget:[1-9]\d*"


def check(cfg: Any, models: Iterable[str], choices: dict[str, Iterable[str]] = {}) -> None:
    """Refuse values that cannot work, naming the flag; `models` are the names that need no folder."""
    if not cfg.resume:
        check_model_name(cfg.model, models, "--model ")
    if cfg.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard: needs `pip install tensorboard`")
    for f in dataclasses.fields(cfg):
        value, low = getattr(cfg, f.name), LOWEST.get(f.name, 0)
        high = HIGHEST if f.type is float else math.inf
        if f.type in (int, float) and not low <= value <= high:
            why = " (a group needs two responses for an advantage, Eq. 2)" if f.name == "generations" else ""
            limit = "" if high == math.inf else f" and at most {high:g}"
            raise UserError(f"{flag(f.name)} {value}: must be at least {low}{limit}{why}")
        if f.name in choices and value not in choices[f.name]:  # in a config.json, say
            raise UserError(f"{flag(f.name)} {value}: must be one of {', '.join(choices[f.name])}")
    if cfg.prompts * cfg.generations * cfg.max_new_tokens > MOST_TOKENS:
        raise UserError(f"--prompts {cfg.prompts} x --generations {cfg.generations} x --max-new-tokens "
                        f"{cfg.max_new_tokens}: more than {MOST_TOKENS:,} tokens a step")
    check_switch(cfg)
    check_helper(cfg)
    if cfg.beta and cfg.mode not in ("grpo", "two-stage"):
        raise UserError(f"--beta belongs to --mode grpo and two-stage; {cfg.mode} has no KL term (Eq. 7)")
    published = not cfg.data.endswith((".json", ".jsonl", "toy"))
    if cfg.hints and not published:
        raise UserError("--hints belongs to published data sets; your own rows have a field `trace`")
    if cfg.augmented and (not published or ":" in cfg.data):
        raise UserError("--augmented belongs to ChartQA data")
    if cfg.model == "tiny" and cfg.data != "toy":
        raise UserError(f"--data {cfg.data}: the tiny model reads only the toy; add --model SmolVLM-256M")


def check_switch(cfg: Any) -> None:
    """Refuse a switching rule that does not exist, or does not belong to the mode."""
    if not re.fullmatch(SWITCHES, cfg.switch):
        raise UserError(f"--switch {cfg.switch}: give any-correct, threshold:0.8, anneal, budget:192, "
                        "explore or memorize")
    if cfg.switch.startswith("budget:") and int(cfg.switch.partition(":")[2]) < cfg.prompts:
        raise UserError(f"--switch {cfg.switch}: give at least --prompts {cfg.prompts}, or the buffer may "
                        "grow for ever")
    if cfg.mode != "dyme" and (cfg.switch != type(cfg).switch or cfg.helper_url):
        raise UserError(f"--switch and --helper-url belong to --mode dyme, not {cfg.mode}")


def settle_length(cfg: Any, rows: int) -> None:
    """Turn passes over so many training rows into steps; a resumed run keeps what it has. Raises UserError."""
    # A step takes `prompts` rows, one of SFT `generations` times as many.
    targets, sft = cfg.prompts * cfg.generations, 0
    if cfg.mode == "two-stage":  # the paper sees SFT saturate after one pass
        sft = cfg.sft_steps = cfg.sft_steps or math.ceil(rows / targets)
    if cfg.epochs and not cfg.resume:
        size = targets if cfg.mode == "sft" else cfg.prompts
        cfg.steps = sft + math.ceil((cfg.epochs * rows - sft * targets) / size)
    if cfg.mode == "two-stage" and not 0 < sft < cfg.steps:
        raise UserError(f"--sft-steps {sft}: SFT takes all of the run's {max(0, cfg.steps)} steps; lower it, or "
                        "raise --steps or --epochs (a step of SFT takes --prompts x --generations rows)")


def check_helper(cfg: Any) -> None:
    """Refuse flags of the helper that do not go together."""
    if bool(cfg.helper_url) != bool(cfg.helper_model):
        raise UserError("--helper-url and --helper-model belong together")
    if cfg.helper_url and not cfg.helper_url.startswith(("http://", "https://")):
        raise UserError(f"--helper-url {cfg.helper_url}: must begin with http:// or https://")
    if (cfg.no_checker or cfg.no_refiner) and (not cfg.helper_url or cfg.no_checker and cfg.no_refiner):
        raise UserError("--no-checker and --no-refiner leave out one half of what --helper-url brings")
    if cfg.helper_key_env and cfg.helper_key_env not in os.environ:
        raise UserError(f"--helper-key-env {cfg.helper_key_env}: no such environment variable")


def read_flags(config, description, argv):
    from transformers.hf_argparser import HfArgumentParser
    parser = HfArgumentParser(config, description=description, allow_abbrev=False,
                              formatter_class=argparse.RawDescriptionHelpFormatter)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    def error(message: str) -> None:
        raise UserError(message)
    parser.error = error
    return vars(parser.parse_args(argv))
