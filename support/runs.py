"""A run is a folder: beginning it, logging into it, showing progress, ending with the right exit code."""

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.utils import logging as hub_logging
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from support import files, parallel, settings
from support.errors import DivergedError, UserError

# ---- The folder ----------------------------------------------------------------------------------


def prepare(cfg: Any) -> None:
    """Check or make the run folder; an existing run is never touched unless asked. Raises UserError."""
    if not parallel.is_main():
        return
    run = Path(cfg.out)
    try:
        holds_run = (run / "config.json").exists() and bool(settings.read(run, type(cfg)))
        if holds_run and not (cfg.resume or cfg.overwrite):
            raise UserError(f"--out {run}: holds a run; --resume goes on with it, --overwrite replaces it")
        if not holds_run and run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise UserError(f"--out {run}: is not empty and not a run; name another folder")
        started = (run / "metrics.jsonl").exists()
        if cfg.resume and started and not any((run / f"checkpoint{end}").exists() for end in ("", ".old")):
            raise UserError(f"--out {run}: has no checkpoint to go on from; --overwrite starts it again")
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.json.tmp").touch()  # to know now whether it can be written
        (run / "config.json.tmp").unlink()
        for name in ("checkpoint", "best"):
            files.restore_folder(run / name)
    except OSError as error:
        raise UserError(f"--out {run}: cannot be written ({error.strerror})") from None


def begin(cfg: Any, step: int, resumed: bool) -> None:
    """Write down the settings; clear what an overwritten run left, or what came after the checkpoint."""
    if not parallel.is_main():
        return
    run = Path(cfg.out)
    if not resumed:
        for name in ("checkpoint", "checkpoint.tmp", "checkpoint.old", "best", "tensorboard"):
            shutil.rmtree(run / name, ignore_errors=True)
        # Only what the program writes: the folder may hold other files of yours.
        for name in ("metrics", "samples", "evaluations", "predictions", "held-out-*", "helper"):
            for file in run.glob(f"{name}.jsonl"):
                # Replies that were paid for outlive a crash before the first save.
                if not (cfg.resume and name == "helper"):
                    file.unlink()
        (run / "evaluation.json").unlink(missing_ok=True)
    saved = dataclasses.asdict(cfg) | {"resume": False}  # what --resume changed holds from now on
    files.write_atomically(run / "config.json", json.dumps(saved, indent=2) + "\n")
    # A resumed run repeats what came after its checkpoint.
    for name, last in (("metrics", step - 1), ("samples", step - 1), ("evaluations", step)):
        file = run / f"{name}.jsonl"
        files.write_jsonl(file, [row for row in files.read_jsonl(file) if row["step"] <= last])


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


def print_stopped(run: Path) -> None:
    """Say how to go on."""
    if parallel.is_main():
        print(f"stopped; go on with: python dyme.py --resume --out {shlex.quote(str(run))}")


def print_summary(run: Path, mode: str, steps: int) -> None:
    """Print three held-out answers before and after, and what was measured. Held-out rows are greedy."""
    if not parallel.is_main():
        return
    before, *_, after = files.read_jsonl(run / "evaluations.jsonl")
    old, new = (files.read_jsonl(run / f"held-out-{step}.jsonl") for step in (before["step"], steps))
    for p, q in zip(old, new, strict=True):
        if p["name"] in chosen_rows(old, before):
            print(f"\n{q['question']} (answer: {q['answer']}" + (f"; {p['facts']})" if p.get("facts") else ")"))
            for when, said in (("before", p), ("after", q)):
                print(f"  {when}: {verdict(said)}")
                print(textwrap.indent(said["response"] or "(nothing)", "    "))
    print(f"\n{after['rows']} held-out rows, greedy, before and after {steps} steps of {mode}:")
    for name, key in (("right and in the format", "strict"), ("and with valid thinking", "valid_thinking"),
                      ("in the format", "in_format"), ("last word right, in any format", "any_format")):
        if after.get(key) is not None:
            print(f"  {name:31} {before[key]:.3f} -> {after[key]:.3f}")
    quoted = shlex.quote(str(run))
    print(f"everything is in {run}; next: python eval.py {quoted}, python eval.py report {quoted}")


def chosen_rows(rows: list[dict[str, Any]], summary: dict[str, Any]) -> set[str]:
    """Names of three rows to show: of the source that the base is worst at, and of two others."""
    sources = list(dict.fromkeys(row["source"] for row in rows))
    sources.sort(key=lambda source: summary.get(f"any_format_{source}", 0.0))
    chosen: list[str] = []
    for source in sources[:1] + sources[:0:-1]:
        chosen += [row["name"] for row in rows if row["source"] == source][:1]
    return {*(chosen + [row["name"] for row in rows if row["name"] not in chosen])[:3]}


def verdict(judged: dict[str, Any]) -> str:
    """A held-out response's answer and thinking, judged in words."""
    answer = "answer right" if judged["strict"] else "answer wrong" if judged["in_format"] else "not in the format"
    if judged["thinking_fault"] is None:
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
    """Turn Ctrl-C (or SIGTERM) into an entry of the yielded list; a second one stops at once."""
    received: list[int] = []

    def handle(number: int, _: Any) -> None:
        if number in received:  # torchrun passes Ctrl-C on as a SIGTERM: that is no second one
            raise KeyboardInterrupt
        received.append(number)
        tqdm.write("stopping after this step (once more: at once)", file=sys.stderr)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_main(program: Callable[[], None]) -> int:
    """Run a program to its exit code: one line for what the user can mend (2), no word for Ctrl-C (130)."""
    keep_freed_memory()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        program()
    except UserError as error:
        return complain(str(error), 2)
    except DivergedError as error:
        return complain(f"{error}; the last checkpoint is kept", 1)
    except (MemoryError, RuntimeError) as error:
        text = str(error)  # PyTorch has no classes for these
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
    return 0


def complain(message: str, code: int) -> int:
    """Print an error in one line; the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return code


def keep_freed_memory() -> None:
    """Have glibc reuse large blocks, not return them: fresh pages took 40 % of an update on the CPU."""
    with contextlib.suppress(OSError, AttributeError):  # other systems manage memory in other ways
        libc, trim_threshold, mmap_max = ctypes.CDLL("libc.so.6"), -1, -4
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)
