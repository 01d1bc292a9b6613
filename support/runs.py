"""A run is a folder: beginning it, logging into it, showing progress, ending with the right exit code."""

import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import json
import os
import re
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from reward import Example
from support import DivergedError, UserError, data, files, parallel, settings

# ---- The folder ----------------------------------------------------------------------------------

FOLDERS = ("checkpoint", "best", "after-sft")


def default_folder(cfg: Any) -> str:
    """The run folder, if none is named."""
    name = f"{Path(cfg.model).name}-{data.name_of(cfg.data)}-{cfg.mode}-s{cfg.seed}"
    return f"runs/{name.replace(' ', '_')}"


@contextlib.contextmanager
def opened(cfg: Any) -> Iterator[tuple[list[Example], list[Example]]]:
    """Read a run's training and held-out rows, check or make its folder, and keep other processes out of it.

    Settles how long it is. Raises UserError. An existing run is never touched unless asked, and goes on only
    with the rows that it began with.
    """
    examples, held_out = (data.load_data(cfg.data, split, cfg.traces, cfg.augmented, cfg.hints)
                          for split in ("train", "val"))
    held_out = data.spread(held_out, cfg.eval_rows)
    settings.settle_length(cfg, len(examples))
    parallel.check_share(cfg.prompts)
    run = Path(cfg.out)
    with contextlib.ExitStack() as stack:
        with parallel.errors_shared():
            if parallel.is_main():
                try:
                    enter(cfg, run, stack)
                except OSError as error:
                    raise UserError(f"--out {run}: cannot be written ({error.strerror})") from None
                if cfg.resume:
                    check_rows(cfg, run, fingerprint(examples, held_out))
        yield examples, held_out


def enter(cfg: Any, run: Path, stack: contextlib.ExitStack) -> None:
    """Check or make the run folder, and lock it until the stack ends."""
    check_folder(cfg, run)
    check_inputs(cfg, run)
    new = not run.exists()
    run.mkdir(parents=True, exist_ok=True)
    stack.enter_context(files.locked(run))
    if new:
        stack.callback(remove_if_unused, run)
    for name in FOLDERS:
        files.restore_folder(run / name)
    (run / "config.json.tmp").touch()  # to know now whether it can be written
    (run / "config.json.tmp").unlink()


def check_folder(cfg: Any, run: Path) -> None:
    """Raise UserError if a folder cannot become this run's."""
    holds_run = (run / "config.json").exists() and bool(settings.read(run, type(cfg)))
    if holds_run and not (cfg.resume or cfg.overwrite):
        raise UserError(f"--out {run}: holds a run; --resume goes on with it, --overwrite replaces it")
    if not holds_run and run.exists():
        ours = {files.LOCK, "helper.jsonl"}  # what a start that failed may leave
        if not run.is_dir() or any(entry.name not in ours for entry in run.iterdir()):
            raise UserError(f"--out {run}: is not empty and not a run; name another folder")
    started = (run / "metrics.jsonl").exists()
    if cfg.resume and started and not any((run / f"checkpoint{end}").exists() for end in ("", ".old")):
        raise UserError(f"--out {run}: has no checkpoint to go on from; --overwrite starts it again")


def check_inputs(cfg: Any, run: Path) -> None:
    """Raise UserError if the run would write over what it starts from."""
    written = [run.resolve() / path.name for path in outputs(run)]
    for name in ("model", "data", "hints"):
        path = Path(getattr(cfg, name)).resolve()
        lost = any(path.is_relative_to(output) for output in written)
        if name == "model" and cfg.model != "tiny":
            lost = lost or path == run.resolve()
            # A resumed run reads its base only as the KL's reference, which must not be the policy itself.
            lost = lost and not (cfg.resume and not cfg.beta)
        if lost:
            raise UserError(f"--{name} {getattr(cfg, name)}: --out {run} would write over it; name another --out")


def remove_if_unused(run: Path) -> None:
    """Leave no folder where a run did not begin."""
    if not (run / "config.json").exists():
        with contextlib.suppress(OSError):
            (run / files.LOCK).unlink()
            run.rmdir()


def fingerprint(examples: list[Example], held_out: list[Example]) -> dict[str, Any]:
    """What tells other rows from those that a run began with: how many, and a hash of every column."""
    found: dict[str, Any] = {}
    for name, part in (("training rows", examples), ("held-out rows", held_out)):
        found[name] = len(part)
        for column in ("question", "answer", "trace", "facts", "image"):
            values = [getattr(example, column) for example in part]
            if column == "image":
                values = [bool(value) for value in values]  # which rows have one: to read them all takes long
            found[f"{column} of {name}"] = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
    return found


def check_rows(cfg: Any, run: Path, now: dict[str, Any]) -> None:
    """Raise UserError naming what has changed if a run began with other rows; older runs do not know."""
    before = json.loads((run / "config.json").read_text(encoding="utf-8")).get("rows")
    if not isinstance(before, dict):
        return
    changed = [key for key in now if key in before and before[key] != now[key]]
    counts = [f"{key}: {before[key]} then, {now[key]} now" for key in changed if " of " not in key]
    if changed:
        raise UserError(f"--data {cfg.data}: has changed since the run began ({'; '.join(counts or changed)}); "
                        "bring the old rows back, or start a new run with another --out")


def outputs(run: Path) -> list[Path]:
    """All that a run writes and a new one in its place removes; other files in the folder are the user's."""
    names = [folder + end for folder in FOLDERS for end in ("", ".tmp", ".old")]
    names += ["metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "predictions.jsonl", "evaluation.json",
              "helper.jsonl"]
    evaluated = [file for file in run.glob("held-out-*.jsonl") if re.fullmatch(r"held-out-\d+", file.stem)]
    return [run / name for name in [*names, "tensorboard"]] + evaluated


def begin(cfg: Any, step: int, examples: list[Example], held_out: list[Example]) -> None:
    """Write down the settings; clear what an overwritten run left, or what came after the checkpoint."""
    if not parallel.is_main():
        return
    run = Path(cfg.out)
    if not (cfg.resume and (run / "checkpoint").exists()):
        for path in outputs(run):
            if path.name != "helper.jsonl":  # whose replies were paid for
                files.remove(path)
    # What --resume changed holds from now on.
    saved = dataclasses.asdict(cfg) | {"resume": False, "rows": fingerprint(examples, held_out)}
    files.write_atomically(run / "config.json", json.dumps(saved, indent=2) + "\n")
    # A resumed run repeats what came after its checkpoint.
    for name, last in (("metrics", step - 1), ("samples", step - 1), ("evaluations", step)):
        file = run / f"{name}.jsonl"
        done = [row for row in files.read_jsonl(file) if isinstance(row.get("step"), int) and row["step"] <= last]
        files.write_jsonl(file, done)


def read_state(run: Path, optimizer: torch.optim.Optimizer, device: Any) -> dict[str, Any]:
    """The training state beside a checkpoint's weights; the optimiser takes its part.

    Raises UserError if it is missing, damaged or another model's.
    """
    file = run / "checkpoint" / "training_state.pt"
    try:
        state = torch.load(file, device, weights_only=True)
        missing = {"step", "optimizer", "scaler", "failures", "kept"} - state.keys()
        if missing:
            raise ValueError(f"it lacks {min(missing)}")
        optimizer.load_state_dict(state["optimizer"])
        return state
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - damaged files raise many kinds
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{file}: cannot be read ({reason}); a new run may start from the weights, "
                        f"--model {run} --out NEW") from None


def may_save(failures: int, ended: bool) -> bool:
    """The main process may, but not while steps in a row fail: the checkpoint before may be the last good one.

    Raises DivergedError if the run has ended so.
    """
    if failures > 1 and ended:
        raise DivergedError(f"the last {failures} steps had a loss or gradient that was not finite; "
                            "try a lower --lr")
    return failures < 2 and parallel.is_main()


def check_weights(model: Any) -> None:
    """Raise DivergedError rather than save weights that are not finite."""
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise DivergedError("the weights are no longer finite; try a lower --lr")


def pooling_key(run: Path, cfg: dict[str, Any], changeable: set[str]) -> str:
    """What runs have in common that differ in nothing but the seed."""
    setting = {key: value for key, value in cfg.items() if key not in changeable | {"seed"}}
    return json.dumps([len(files.read_jsonl(run / "metrics.jsonl")), setting])


def print_start(cfg: Any, device: Any, training: int, held_out: int, step: int) -> None:
    """Say what begins."""
    if parallel.is_main():
        begins = "going on" if cfg.resume and step else "starting"
        where = f"{begins} at step {step} of {cfg.steps}" if step < cfg.steps else "it is finished"
        print(f"{cfg.out}: {cfg.mode} on {device}, {training} training rows, {held_out} held out; {where}")
        if training < cfg.prompts:
            print(f"--prompts {cfg.prompts}: a step takes each of the {training} training rows more than once")


def print_stopped(run: Path) -> None:
    """Say how to go on."""
    if parallel.is_main():
        print(f"stopped; go on with: python dyme.py --resume --out {shlex.quote(str(run))}")


def print_summary(run: Path, mode: str, steps: int) -> None:
    """Print three held-out answers before and after, and what was measured. Held-out rows are greedy."""
    if not parallel.is_main():
        return
    evaluated = files.read_jsonl(run / "evaluations.jsonl")
    before, after = evaluated[0], evaluated[-1]
    old, new = ({(row["name"], row["question"]): row for row in files.read_jsonl(run / f"held-out-{step}.jsonl")}
                for step in (before["step"], steps))
    shown = chosen_rows([*old.values()], before)
    for key, p in old.items():
        if p["name"] in shown and key in new:
            q = new[key]
            print(f"\n{q['question']} (answer: {q['answer']}" + (f"; {p['facts']})" if p.get("facts") else ")"))
            for when, said in (("before", p), ("after", q)):
                print(f"  {when}: {verdict(said)}")
                print(textwrap.indent(said["response"] or "(nothing)", "    "))
    print(f"\n{after['rows']} held-out rows, greedy, before and after {steps} steps of {mode}:")
    for name, key in (("right and in the format", "accuracy"), ("and with valid thinking", "valid_thinking"),
                      ("in the format", "in_format"), ("last word right, in any format", "any_format")):
        if None not in (before.get(key), after.get(key)):
            print(f"  {name:31} {before[key]:.3f} -> {after[key]:.3f}")
    quoted = shlex.quote(str(run))
    print(f"everything is in {run}; next: python eval.py {quoted}, python eval.py report {quoted}")


def chosen_rows(answers: list[dict[str, Any]], summary: dict[str, Any]) -> set[str]:
    """Names of three rows to show: of the source that the base is worst at, and of two others."""
    sources = list(dict.fromkeys(row.get("source") for row in answers))
    sources.sort(key=lambda source: summary.get(f"any_format_{source}", 0.0))
    chosen: list[str] = []
    for source in sources[:1] + sources[:0:-1]:
        chosen += [row["name"] for row in answers if row.get("source") == source][:1]
    return {*(chosen + [row["name"] for row in answers if row["name"] not in chosen])[:3]}


def verdict(judged: dict[str, Any]) -> str:
    """A held-out response's answer and thinking, judged in words."""
    answer = "answer right" if judged["accuracy"] else "answer wrong" if judged["in_format"] else "not in the format"
    if judged.get("thinking_fault") is None:  # without facts, or of an older run
        return answer
    thinking = f"thinking false: {judged['thinking_fault']}" if judged["thinking_fault"] else "thinking valid"
    return f"{answer}; {thinking}"


# ---- Logging -------------------------------------------------------------------------------------


def open_board(wanted: bool, run: Path, step: int) -> Any:
    """A TensorBoard writer, if one is wanted."""
    if not (wanted and parallel.is_main()):
        return None
    from torch.utils.tensorboard import SummaryWriter
    board = SummaryWriter(run / "tensorboard", purge_step=step)  # drops what a resumed run repeats
    for row in files.read_jsonl(run / "evaluations.jsonl"):
        if row["step"] == step:  # the one evaluation that it does not repeat
            add_scalars(board, "evaluations", row)
    return board


def record(file: Path, row: dict[str, Any], board: Any) -> None:
    """Append a row of a step to a file, and its numbers to TensorBoard."""
    files.append_row(file, row)
    if board:
        add_scalars(board, file.stem, row)


def log_step(run: Path, done, tokenizer, board: Any) -> None:
    """Write down a step's metrics and the groups that it shows in full."""
    from support import samples
    if parallel.is_main():
        record(run / "metrics.jsonl", done.metrics, board)
        shown = samples.describe(done, tokenizer)
        for row in shown:
            files.append_row(run / "samples.jsonl", row)


def add_scalars(board: Any, title: str, row: dict[str, Any]) -> None:
    """Write the numbers of a step to TensorBoard."""
    for key, value in row.items():
        if isinstance(value, int | float) and key != "step":
            board.add_scalar(f"{title}/{key}", value, row["step"])
    board.flush()


# ---- Progress ------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Note the seconds since the last lap."""
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now


def bar_interval() -> float:
    """Seconds between updates of a progress bar: often on a terminal, rarely in a log."""
    return 0.5 if sys.stderr.isatty() else 30.0


def progress_bar(name: str, first: int, steps: int) -> tqdm:
    """The bar of a run. A log, where it cannot be redrawn, gets a line per step instead."""
    return tqdm(total=steps, initial=first, desc=name, ncols=80,
                disable=not (parallel.is_main() and sys.stderr.isatty()),
                bar_format="{desc} {percentage:3.0f}% {n}/{total} {elapsed}<{remaining}{postfix}")


def advance(bar: tqdm, name: str, metrics: dict[str, Any]) -> None:
    """Move the bar of a run on by a step; in a log write a line."""
    values = {}
    shown = {"reward": "reward", "accuracy": "acc", "memorized": "mem", "tokens_per_s": "tok/s"}
    for key, short in shown.items():
        if key in metrics:
            values[short] = f"{metrics[key]:.2f}" if metrics[key] < 10 else f"{metrics[key]:.0f}"
    bar.set_postfix(values, refresh=False)
    bar.update()
    if parallel.is_main() and not sys.stderr.isatty():
        seconds = sum(value for key, value in metrics.items() if key.startswith("seconds_"))
        line = " ".join(f"{key}={value}" for key, value in values.items())
        print(f"{name} {seconds:.2f} s {line}", file=sys.stderr)


# ---- Signals and the end -------------------------------------------------------------------------


@contextlib.contextmanager
def finish_step_on_interrupt() -> Iterator[list[int]]:
    """Turn Ctrl-C (or SIGTERM) into an entry of the yielded list; a second one ends the process at once."""
    received: list[int] = []

    def handle(number: int, _: Any) -> None:
        if number in received:  # torchrun passes Ctrl-C on as a SIGTERM: that is no second one
            print("interrupted", file=sys.stderr, flush=True)
            # Not by an exception, which would wait for threads, and they perhaps for a helper. Files are
            # whole at any time.
            os._exit(130)
        received.append(number)
        tqdm.write("stopping after this step (once more: at once)", file=sys.stderr)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


FULL_DISK = "no space left on the disk; make room, then --resume goes on from the last checkpoint"


def run_main(program: Callable[[], None]) -> int:
    """Run a program to its exit code: one line for what the user can mend (2), no word for Ctrl-C (130)."""
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a stand-in may not have it
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack a question's letters
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        program()
    except UserError as error:
        return complain(str(error), 2)
    except DivergedError as error:
        return complain(f"{error}; the last checkpoint, if there is one, is kept", 1)
    except (MemoryError, RuntimeError, SafetensorError) as error:
        text = str(error)  # PyTorch has no classes for these
        if re.search("No space left|PytorchStreamWriter failed|inline_container.*unexpected pos", text):
            return complain(FULL_DISK, 2)
        if re.search("gloo|NCCL|Connection (closed|reset)", text):
            return complain("another process of this run has ended, see its message; --resume goes on from "
                            "the last checkpoint", 1)
        if isinstance(error, MemoryError) or re.search("out of memory|t allocate memory", text):
            return complain("out of memory; lower the batch (--micro-batch; --batch in eval.py), "
                            "--image-edge, --max-new-tokens or --generations", 2)
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the output went into `head` or the like, which has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return complain(FULL_DISK, 2)
        if error.filename is None:
            raise
        return complain(f"{error.filename}: {error.strerror}", 2)
    return 0


def complain(message: str, code: int) -> int:
    """Print an error in one line; the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return code


def keep_freed_memory() -> None:
    if os.environ.get("NOMALLOPT"): return
    """Have glibc reuse large blocks, not return them: fresh pages took 40 % of an update on the CPU."""
    with contextlib.suppress(OSError, AttributeError):  # other systems manage memory in other ways
        libc, trim_threshold, mmap_max = ctypes.CDLL("libc.so.6"), -1, -4
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


from support.files import read_jsonl, replaced_folder, write_jsonl  # noqa


def say(text):
    if parallel.is_main():
        tqdm.write(text)


def write_state(folder, state):
    torch.save(state, folder / "training_state.pt")


def settled(run):
    pass
