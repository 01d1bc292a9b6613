"""A run is a folder: begin it, log into it, show progress, end with the right exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import shlex
import signal
import sys
import textwrap
import threading
import zlib
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.utils import logging as hub_logging
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from reward import Example
from support import DivergedError, UserError, data, files, parallel, settings, thinking

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dyme import Config, Step

# ---- The folder ----------------------------------------------------------------------------------

FOLDERS = ("checkpoint", "best", "after-sft")
ASIDE = ".overwritten"  # holds the run that a new one replaces, until that has a checkpoint


def default_folder(cfg: Config) -> str:
    """The run folder, if none is named."""
    name = f"{Path(cfg.model).name}-{data.name_of(cfg.data)}-{cfg.mode}-s{cfg.seed}"
    return f"runs/{name.replace(' ', '_')}"


def argument(run: Path) -> str:
    """A folder as a printed command names it: quoted, and never like a flag."""
    return shlex.quote(f"./{run}" if str(run).startswith("-") else str(run))


@contextlib.contextmanager
def opened(cfg: Config) -> Iterator[tuple[list[Example], list[Example]]]:
    """Read the rows, settle the run's length, enter and lock its folder. Raises UserError."""
    # If it ends before its first checkpoint, the run that it replaces is put back. A signal is
    # an exception, so that it does that too.
    with signals_handled(signal.default_int_handler), contextlib.ExitStack() as stack:
        with parallel.errors_shared():
            examples, val = (data.load_data(cfg.data, split, cfg.traces, cfg.augmented, cfg.hints)
                             for split in ("train", "val"))
            held_out = data.held_out(cfg.data, val, cfg.eval_rows)
            settings.settle_length(cfg, len(examples))
            parallel.check_share(cfg.prompts)
        rows = describe_rows(examples, held_out)
        if any(other != (cfg, rows) for other in parallel.gather((cfg, rows))):
            raise UserError("the processes of this run differ in their flags or rows")
        with parallel.errors_shared():
            if parallel.is_main():
                enter(cfg, stack)
                if cfg.resume:
                    check_unchanged(Path(cfg.out), cfg.data, rows)
        yield examples, held_out


def enter(cfg: Config, stack: contextlib.ExitStack) -> None:
    """Enter the run folder, or make it, and lock it until the stack ends. Raises UserError."""
    run = Path(cfg.out)
    if (run / "config.json").exists():
        settings.read(run, type(cfg))
        # One that was stopped before its first evaluation leaves empty files.
        begun = any(path.is_dir() or path.stat().st_size for path in outputs(run) if path.exists())
        if begun and not (cfg.resume or cfg.overwrite):
            raise UserError(f"--out {run}: holds a run; --resume goes on with it, --overwrite "
                            "replaces it, another --out lets it be")
    elif run.exists():
        ours = {files.LOCK, "helper.jsonl"}  # what a start that failed may leave
        if not run.is_dir() or any(entry.name not in ours for entry in run.iterdir()):
            raise UserError(f"--out {run}: is not empty and not a run; name another folder")
    for name in ("model", "data", "hints") if not cfg.resume else ():
        given = getattr(cfg, name)
        if given and Path(given).exists() and Path(given).resolve().is_relative_to(run.resolve()):
            raise UserError(f"--{name} {given}: lies in --out {run}; name another --out")
    run.mkdir(parents=True, exist_ok=True)
    stack.enter_context(files.locked(run))
    for name in FOLDERS:
        files.restore_folder(run / name)
    if (run / "checkpoint").exists() or read_config(run).get("saved"):
        restore(run)  # if a start that was to replace this run was killed
    stack.callback(restore, run)


def outputs(run: Path) -> list[Path]:
    """All that a new run in its place removes; what else is in the folder is the user's."""
    names = [folder + end for folder in FOLDERS for end in ("", ".tmp", ".old")]
    names += ["metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "tensorboard",
              "predictions.jsonl", "evaluation.json", "predictions-best.jsonl",
              "evaluation-best.json"]
    return [*map(run.joinpath, names), *run.glob("held-out-[0-9]*.jsonl")]


def read_config(run: Path) -> dict[str, Any]:
    """All that `config.json` holds: settings, and what else a run writes down about itself."""
    with contextlib.suppress(OSError, ValueError):  # it may be damaged while the run goes on
        saved = json.loads((run / "config.json").read_text(encoding="utf-8"))
        return saved if isinstance(saved, dict) else {}
    return {}


def describe_rows(examples: list[Example], held_out: list[Example]) -> dict[str, Any]:
    """What tells other rows from those that a run began with; of images, which rows have one."""
    columns = [(e.question, e.answer, e.trace, e.facts, bool(e.image))
               for e in [*examples, *held_out]]
    return {"training rows": len(examples), "held-out rows": len(held_out),
            "hash": hashlib.sha256(json.dumps(columns).encode()).hexdigest()[:16]}


def check_unchanged(run: Path, source: str, rows: dict[str, Any]) -> None:
    """Raise UserError if a run lost its checkpoint, or if the source's rows are not its own."""
    saved = read_config(run)
    if saved.get("saved") and not (run / "checkpoint").exists():
        raise UserError(f"--out {run}: has no checkpoint to go on from, though one was saved; "
                        "bring it back, or start again with --overwrite")
    before = saved.get("rows")
    for key, now in rows.items():
        then = before.get(key) if isinstance(before, dict) else None
        if then != now:
            raise UserError(f"--data {source}: has changed since the run began ({key}: {then} "
                            f"then, {now} now); bring the old rows back, or start a new run with "
                            "another --out")
    if saved.get("seal") != seal(saved):
        print(f"warning: {run / 'config.json'}: its settings were edited since the run began",
              file=sys.stderr)


def seal(saved: dict[str, Any]) -> str:
    """A hash of a run's settings, but for those that may change."""
    free = settings.CHANGEABLE_ON_RESUME | {"rows", "saved", "seal", "began"}
    fixed = {key: saved[key] for key in saved.keys() - free}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def begin(cfg: Config, step: int, examples: list[Example], held_out: list[Example]) -> None:
    """Write down the settings, and the rows as `opened` gave them; clear what is to be repeated."""
    if not parallel.is_main():
        return
    run = Path(cfg.out)
    resumed = cfg.resume and (run / "checkpoint").exists()
    if not resumed:
        put_aside(run)
    # What --resume changed holds from now on.
    saved = dataclasses.asdict(cfg) | {"resume": False, "overwrite": False, "saved": resumed,
                                       "rows": describe_rows(examples, held_out)}
    saved["seal"] = seal(saved)
    # As it began, whatever is changed later: by this its checkpoints are known.
    saved["began"] = resumed and read_config(run).get("began") or saved["seal"]
    files.write_atomically(run / "config.json", json.dumps(saved, indent=2) + "\n")
    # A resumed run repeats what came after its checkpoint.
    for name, last in (("metrics", step - 1), ("samples", step - 1), ("evaluations", step)):
        logged = files.read_jsonl(run / f"{name}.jsonl")
        done = [row for row in logged if isinstance(row.get("step"), int) and row["step"] <= last]
        files.write_jsonl(run / f"{name}.jsonl", done)


def put_aside(run: Path) -> None:
    """Move what a run has written into a folder of its own; one that was killed unsaved goes."""
    aside = run / ASIDE
    if (run / "config.json").exists() and not aside.exists():
        aside.mkdir()
        for path in filter(os.path.lexists, outputs(run)):  # the checkpoint first
            path.rename(aside / path.name)
        # Last, for it says that all is there.
        files.write_atomically(aside / "config.json", (run / "config.json").read_text())
    for path in outputs(run):
        files.remove(path)


def restore(run: Path) -> None:
    """Bring the run back that was put aside, unless the one in its place has a checkpoint."""
    aside = run / ASIDE
    if (run / "checkpoint").exists():
        settled(run)
    elif aside.exists():
        if (aside / "config.json").exists():  # else the rest of it is still in place
            for path in outputs(run):
                files.remove(path)
        order = {"config.json": 0, "checkpoint": 2}  # so that a crash in between can be told
        for path in sorted(aside.iterdir(), key=lambda path: order.get(path.name, 1)):
            path.rename(run / path.name)
        aside.rmdir()
        print(f"{run}: the run that was there before is back", file=sys.stderr)


def settled(run: Path) -> None:
    """Write down that a run has saved, after which the one that it replaces can go."""
    with tolerated(str(run / "config.json")):
        if saved := read_config(run):  # nothing, if the folder was moved meanwhile
            saved["saved"] = True
            files.write_atomically(run / "config.json", json.dumps(saved, indent=2) + "\n")
        else:
            warn_once(f"{run}: has no config.json that can be read any more; was it moved?")
        files.remove(run / ASIDE)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Save the training state beside the weights, with what says whose it is. Raises OSError."""
    state = state | {"files": hash_files(folder),
                     "began": read_config(folder.parent).get("began")}
    with (folder / "training_state.pt").open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # PyTorch hides what the disk said
            raise error.__context__ or error from None


def hash_files(folder: Path) -> list[str]:
    """A hash of each file of a transformers directory: weights, tokenizer, settings."""
    its_files = sorted(path for path in folder.glob("[!.]*")
                       if path.suffix in (".safetensors", ".json", ".jinja"))
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in its_files]


def read_state(run: Path, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Any]:
    """The training state; the optimiser takes its part. Raises UserError if it does not fit."""
    file = run / "checkpoint" / "training_state.pt"
    try:
        state = torch.load(file, device, weights_only=True)
        if state["files"] != hash_files(file.parent):
            raise ValueError("it was saved with other weights or files than those beside it")
        saved = read_config(run)
        if state["began"] not in (None, saved.get("began")):  # None: the folder was moved meanwhile
            raise ValueError("it was saved by a run with other settings")
        if state["step"] > (steps := saved.get("steps", state["step"])):
            raise ValueError(f"it is at step {state['step']} of a run of {steps}")
        if missing := {"scaler", "failures", "best", "kept"} - state.keys():
            raise ValueError(f"it has no {min(missing)}")
        optimizer.load_state_dict(state["optimizer"])
        return state
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - damaged files raise many kinds
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{file}: cannot be read ({reason}); a new run may start from the weights, "
                        f"--model {argument(run)} --out NEW") from None


def check_tokens(model: PreTrainedModel, tokenizer: Sized) -> None:
    """Raise ValueError if there are tokens that the model has no embedding of."""
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise ValueError(f"its tokenizer has {len(tokenizer)} tokens, its weights {known}")


def check_weights(model: torch.nn.Module) -> None:
    """Raise DivergedError rather than save weights that are not finite."""
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise DivergedError("the weights are not finite")


# ---- What is printed and logged ------------------------------------------------------------------


def print_start(cfg: Config, device: torch.device, training: int, held_out: list[Example],
                step: int) -> None:
    """Say what begins."""
    new = sum(example.source.startswith("new_") for example in held_out)
    told = f"{len(held_out) - new} held out" + f" and {new} of new combinations" * bool(new)
    begins = "going on" if step else "nothing was saved, starting" if cfg.resume else "starting"
    where = f"{begins} at step {step} of {cfg.steps}" if step < cfg.steps else "it is finished"
    if parallel.is_main():
        print(f"{cfg.out}: {cfg.mode} on {device}, {training} training rows, {told}; {where}")
        if 20 <= cfg.steps <= 2 * cfg.warmup:
            warn_once(f"--warmup {cfg.warmup}: half of the {cfg.steps} steps or more")


def print_stopped(run: Path) -> None:
    """Say how to go on."""
    if parallel.is_main():
        print(f"stopped; go on with: python dyme.py --resume --out {argument(run)}")


SUMMARY = {"accuracy": "right and in the format", "valid_thinking": "and with valid thinking",
           "in_format": "in the format", "any_format": "last word right, in any format",
           "accuracy_new": "on combinations it never met"}


@contextlib.contextmanager
def edited_records() -> Iterator[None]:
    """Leave out what is said of a run's records where someone has edited them, and say that."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        warn_once(f"the run's records are not as it wrote them ({type(error).__name__}: {error})")


@edited_records()
def print_summary(run: Path, mode: str, steps: int) -> None:
    """Print three held-out answers before and after, and what was measured."""
    evaluated = files.read_jsonl(run / "evaluations.jsonl")
    if not (parallel.is_main() and evaluated):
        return
    before, after = evaluated[0], evaluated[-1]
    both = [files.read_jsonl(run / f"held-out-{step}.jsonl") for step in (before["step"], steps)]
    keys = {"name", "source", "question", "answer", "response", "in_format", "accuracy"}
    old, new = ({row["name"]: row for row in rows if keys <= row.keys()} for rows in both)
    # Those first that are of a kind that the base is worst at.
    pairs = [(old[name], new[name]) for name in old
             if name in new and not thinking.is_new(old[name]["source"])]
    pairs.sort(key=lambda pair: before.get(f"any_format_{pair[0]['source']}", 0.0))
    for first, last in data.spread(pairs, 3):
        facts = f"; {first['facts']}" if first.get("facts") else ""
        print(f"\n{first['question']} (answer: {first['answer']}{facts})")
        for when, said in (("before", first), ("after", last)):
            print(f"  {when}: {verdict(said)}")
            print(textwrap.indent(said["response"] or "(nothing)", "    "))
    print(f"\n{after['rows']} held-out rows, greedy, at steps {before['step']} and {steps} of "
          f"{mode}:")
    for name, title in SUMMARY.items():
        if None not in (before.get(name), after.get(name)):
            print(f"  {title:31} {before[name]:.3f} -> {after[name]:.3f}")
    folder = argument(run)
    print(f"everything is in {run}; next: python eval.py {folder}; python eval.py report {folder}")


def verdict(judged: dict[str, Any]) -> str:
    """A held-out response's answer and thinking, judged in words."""
    wrong = "answer wrong" if judged["in_format"] else "not in the format"
    answer = "answer right" if judged["accuracy"] else wrong
    fault = judged.get("thinking_fault")  # None without facts to judge by
    if fault is None or not (fault or judged["accuracy"]):  # true numbers alone are no thinking
        return answer
    known = fault if "not judged" in fault else f"false: {fault}"
    return f"{answer}; thinking {known if fault else 'valid'}"


def progress_bar(name: str, first: int, steps: int) -> tqdm:
    """The bar of a run. A log, where it cannot be redrawn, gets a line per step instead."""
    return tqdm(total=steps, initial=first, desc=name, ncols=80,
                disable=not (parallel.is_main() and sys.stderr.isatty()),
                bar_format="{desc} {percentage:3.0f}% {n}/{total} {elapsed}<{remaining}{postfix}")


def answering_bar(parts: list[range]) -> tqdm:
    """The bar of an evaluation in `parts`."""
    often = 0.5 if sys.stderr.isatty() else 30.0  # seconds; a log gets few lines, or none
    quiet = len(parts) < 2 or not parallel.is_main()
    return tqdm(parts, "answering", ncols=80, leave=False, disable=quiet, mininterval=often,
                delay=often)


def advance(bar: tqdm, name: str, metrics: dict[str, Any]) -> None:
    """Move the bar of a run on by a step; in a log write a line."""
    shown = {"reward": "reward", "accuracy": "acc", "memorized": "mem", "tokens_per_s": "tok/s"}
    values = {short: f"{metrics[key]:.2f}" if metrics[key] < 10 else f"{metrics[key]:.0f}"
              for key, short in shown.items() if key in metrics}
    bar.set_postfix(values, refresh=False)
    bar.update()
    if parallel.is_main() and not sys.stderr.isatty():
        seconds = sum(value for key, value in metrics.items() if key.startswith("seconds_"))
        line = " ".join(f"{key}={value}" for key, value in values.items())
        print(f"{name} {seconds:.2f} s {line}", file=sys.stderr)


TOLD: set[str] = set()  # warnings that were given


def warn_once(text: str) -> None:
    """Print a warning that was not given before."""
    if text not in TOLD:
        TOLD.add(text)  # first, or a terminal that cannot be written would warn of itself for ever
        tqdm.write(f"warning: {text}", file=sys.stderr)


@contextlib.contextmanager
def tolerated(what: str) -> Iterator[None]:
    """Let a run go on where it cannot write to a log, and say so once."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a closed file
        warn_once(f"{what}: cannot be written ({error}); going on")


def guard_streams() -> None:
    """Let a closed terminal, a full disk or a letter that a terminal lacks end no run."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and not hasattr(stream.write, "__wrapped__"):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
            stream.write = tolerated(name)(stream.write)  # type: ignore[method-assign]


def open_board(wanted: bool, run: Path, step: int) -> SummaryWriter | None:
    """A TensorBoard writer, if one is wanted."""
    if not (wanted and parallel.is_main()):
        return None
    from torch.utils.tensorboard import SummaryWriter
    # A resumed run repeats all later steps, but not the evaluation at this one.
    return SummaryWriter(run / "tensorboard", purge_step=step + 1)


def record(file: Path, row: dict[str, Any], board: SummaryWriter | None) -> None:
    """Append a row of a step to a file, and its numbers to TensorBoard."""
    with tolerated(str(file)):
        files.append_row(file, row)
        for key, value in row.items():
            if board and isinstance(value, int | float) and key != "step":
                board.add_scalar(f"{file.stem}/{key}", value, row["step"])
        if board:
            board.flush()


def log_step(run: Path, logged: dict[str, Any], shown: list[dict[str, Any]],
             board: SummaryWriter | None) -> None:
    """Write down a step's metrics and the groups that it shows in full."""
    if parallel.is_main():
        record(run / "metrics.jsonl", logged, board)
        for row in shown:
            record(run / "samples.jsonl", row, None)
        if logged["step"] % 20 == 19:
            warn(files.read_jsonl(run / "metrics.jsonl")[-20:])


@edited_records()
def warn(last: list[dict[str, Any]]) -> None:
    """Say once what the metrics of the last 20 steps, if they sampled, show to go wrong."""
    sampled = [row for row in last if row.get("accuracy") is not None]
    if len(sampled) < 20:
        return
    if not any(row["accuracy"] for row in sampled):
        warn_once("no response of the last 20 steps was right: exploration has nothing to learn "
                  "from")
    if sum(row.get("truncated", 0.0) for row in sampled) > len(sampled) / 2:
        warn_once("most responses of the last 20 steps were cut off, which counts as wrong: try a "
                  "higher --max-new-tokens")


MODES = {(True, False): "exploration", (False, True): "memorization", (True, True): "both",
         (False, False): "buffered"}  # the last waits in the buffer of `--switch budget`


def describe_groups(done: Step, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Rows for `samples.jsonl`: the groups of the prompts that are followed, or of one, in full."""
    # Chosen by a hash of the name, so that every run keeps the same.
    hashes = [zlib.crc32(example.name.encode(errors="replace")) for example in done.examples]
    chosen = [p for p, value in enumerate(hashes) if value < 2**32 // 32]  # one prompt in 32
    numbers = {"r_a": done.r_a, "r_t": done.r_t, "reward": done.rewards,
               "advantage": done.advantages} if done.responses else {}  # SFT has none
    found = []
    for p in chosen or [hashes.index(min(hashes))]:
        example = done.examples[p]
        responses = [
            {"text": response.text, "finished": response.finished, "r_f": float(response.in_format)}
            | {name: round(value[p, k].item(), 4) for name, value in numbers.items()}
            for k, response in enumerate(done.responses[p] if done.responses else ())]
        targets = [s.ids for s in done.sequences if s.prompt == p and not s.explore]
        decoded = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in targets[:1]]
        found.append({"step": done.step, "mode": MODES[bool(done.explore[p]), bool(targets)],
                      "target": decoded[0] if decoded else None, "responses": responses}
                     | {key: getattr(example, key) for key in
                        ("name", "source", "question", "answer", "facts", "trace")})
    return found


# ---- Signals and the end -------------------------------------------------------------------------

# Ctrl-C; an end by the system, a closed ssh window; what batch systems send before they kill.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)


@contextlib.contextmanager
def signals_handled(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Give the signals that ask a run to stop to a handler, within a block."""
    previous = {number: signal.signal(number, handler) for number in STOP_SIGNALS
                if signal.getsignal(number) != signal.SIG_IGN}  # as `nohup` sets SIGHUP
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Let a signal to stop wait for the end of a block."""
    received: list[int] = []
    here = threading.current_thread() is threading.main_thread()  # no other thread gets signals
    hold = signals_handled(lambda number, _: received.append(number))
    with hold if here else contextlib.nullcontext():
        yield
    for number in received[:1]:
        signal.raise_signal(number)


@contextlib.contextmanager
def finish_step_on_interrupt() -> Iterator[list[int]]:
    """Turn a signal to stop into an entry of the yielded list; a second Ctrl-C ends at once."""
    received: list[int] = []

    def handle(number: int, _: Any) -> None:
        # torchrun passes Ctrl-C on as a SIGTERM, which is no second one; SIGXCPU comes each second.
        if number in received and number in (signal.SIGINT, signal.SIGTERM):
            # Not by an exception, which would wait for threads. Files are whole at any time.
            os._exit(130)
        received.append(number)
        with contextlib.suppress(RuntimeError):  # if it came in the middle of another line
            tqdm.write("stopping after this step (once more: at once)", file=sys.stderr)

    with signals_handled(handle):
        yield received


def run_main(program: Callable[[], None]) -> int:
    """Run a program to its exit code: 2 and one line for what the user can mend, 130 for Ctrl-C."""
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    guard_streams()
    try:
        program()
        return 0
    except UserError as error:
        message, code = f"error: {error}", 2
    except DivergedError as error:
        message, code = (f"error: {error}; try a lower --lr; the last checkpoint, if there is "
                         "one, is kept"), 1
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            message, code = f"error: {error.filename}: {error.strerror}", 2
        elif (isinstance(error, MemoryError | torch.OutOfMemoryError)
              or "t allocate memory" in str(error)):  # as PyTorch says on the CPU
            message, code = ("error: out of memory; lower the batch (--micro-batch; --batch in "
                             "eval.py), --image-edge, --max-new-tokens or --generations"), 2
        elif re.search(r"(?is)(gloo|nccl).*(closed|reset|remote process)", str(error)):
            message, code = "error: another process of this run has ended; --resume goes on", 1
        else:
            raise
    print(message, file=sys.stderr)
    return code
