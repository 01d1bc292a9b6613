"""The first minutes on a GPU: what may differ from a CPU, tried in order, on one page of figures.

    python -m support.gpu_check --model SmolVLM-256M --data chartqa

A check that fails says so, and the next one runs. The weights do not matter, only shapes and
precision do.
"""

import argparse
import contextlib
import copy
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import dyme
from dyme import Policy, Response, Sequence
from reward import Example
from support import benchmark, data, fast, parallel, runs

Check = Callable[[Policy, list[Example]], Iterator[str]]


def versions(policy: Policy, _: list[Example]) -> Iterator[str]:
    """Software and hardware."""
    yield f"torch {torch.__version__}, transformers {transformers.__version__}"
    yield f"{torch.cuda.get_device_name()}, {torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB, " \
          f"{parallel.half_precision()}, {os.cpu_count()} cores"


def kernels(policy: Policy, examples: list[Example]) -> Iterator[str]:
    """Which kernels attend in prompt, decoding and update; none may be called cudnn."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        measure(policy, examples[:2])
    names = {event.key for event in seen.key_averages()}
    yield from sorted(x[:100] for x in names if any(y in x for y in ("fmha", "flash", "cudnn")))


def fast_and_plain(policy: Policy, examples: list[Example]) -> Iterator[str]:
    """Log-probs and gradients: fast against plain, and both in float32."""
    plain = replace(policy, rollout=dyme.rollout, logprobs=dyme.sequence_logprobs)
    exact = replace(plain, autocast=contextlib.nullcontext)
    logprobs, gradient = measure(exact, examples[:2])
    for name, other in (("fast", policy), ("plain", plain)):
        x, g = measure(other, examples[:2])
        yield f"{name}, half precision: log-probs differ by {(x - logprobs).abs().mean():.4f}, " \
              f"at most {(x - logprobs).abs().max():.4f}; gradients by " \
              f"{(g - gradient).norm() / gradient.norm():.2%}"


def graphs(policy: Policy, examples: list[Example]) -> Iterator[str]:
    """Decoding by graph against plain steps: tokens and seconds; memory over twenty shapes."""
    capture, ids = fast.capture, {}
    for name, chosen in (("graph", capture), ("steps", lambda _, step: step)):
        fast.capture = chosen
        try:
            sampled(policy, examples[:4], 160)
            start = benchmark.now(policy.device)
            ids[name] = [y.ids for y in sampled(policy, examples[:4], 160)]
            yield f"{name}: {benchmark.now(policy.device) - start:.2f} s for 4 x 4 x 160 tokens"
        finally:
            fast.capture = capture
    alike = sum(a == b for a, b in zip(*ids.values(), strict=True))
    yield f"{alike} of {len(ids['graph'])} responses alike"
    for i in range(20):
        sampled(policy, examples[i:i + 1 + i % 4], 24 + i % 8)
        if i in (1, 19):
            yield f"after {i + 1} shapes: {torch.cuda.memory_reserved() / 2**30:.2f} GiB reserved"


def half_with_scaler(policy: Policy, examples: list[Example]) -> Iterator[str]:
    """Ten steps in float16 with a gradient scaler, as on a GPU without bf16."""
    own = replace(policy, model=copy.deepcopy(policy.model),
                  autocast=functools.partial(torch.autocast, "cuda", dtype=torch.float16))
    trainer = dyme.make_trainer(dyme.Config(max_new_tokens=32, micro_batch=2, plain=True), own)
    trainer.judge = benchmark.coin_flips
    trainer.scaler = torch.amp.GradScaler("cuda")
    done = [dyme.train_step(trainer, examples[:2], step, 1e-5).metrics for step in range(10)]
    yield f"{sum(x['skipped_steps'] for x in done)} of 10 steps skipped, gradient norm " \
          f"{done[-1]['grad_norm']:.3f}, scale {trainer.scaler.get_scale():.0f}"


def sampled(policy: Policy, examples: list[Example], tokens: int) -> list[Response]:
    """Four sampled responses of so many tokens to each prompt."""
    inputs = dyme.encode_prompts(policy, examples, room=tokens)
    uniforms = dyme.keyed_uniforms(0, 0, range(len(examples)), 4, tokens)
    return policy.rollout(policy, [inputs], uniforms, 4, 1.0)


def measure(policy: Policy, examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Log-probs of fixed sequences, and the gradient of their sum as one vector."""
    sampled(policy, examples, 32)
    inputs, prompts = dyme.encode_prompts(policy, examples, room=64), [0, 0, 1]
    sequences = [Sequence(p, [*range(20 + p, 60 + p)], 1.0, True) for p in prompts]
    logprobs, _ = policy.logprobs(policy, policy.model, inputs, prompts, sequences, 1.0)
    logprobs.sum().backward()
    gradient = [p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]
    policy.model.zero_grad()
    return logprobs.detach(), torch.cat(gradient)


CHECKS: tuple[Check, ...] = (versions, kernels, fast_and_plain, graphs, half_with_scaler)


def commands(model: str, source: str, folder: str) -> list[list[str]]:
    """Whole programs to run: tests, a run with a resume, one process on nccl, benchmarks."""
    toy = ["--steps", "20", "--eval-every", "0", "--out", f"{folder}/toy"]
    real = ["-m", "support.benchmark", "--steps", "3", "--model", model, "--data", source,
            "--max-new-tokens", "256", "--prompts"]
    return [["-m", "pytest", "-q", "-k", "cuda"],
            ["dyme.py", *toy], ["dyme.py", "--resume", "--out", f"{folder}/toy"],
            ["-m", "torch.distributed.run", "--nproc_per_node=1", "dyme.py", *toy[:-1],
             f"{folder}/nccl"],
            [*real, "4"], [*real, "32"], [*real, "32", "--micro-batch", "2"]]


def report(title: str, lines: Callable[[], Iterator[str]]) -> None:
    """Print what a check yields, or how it failed."""
    print(f"\n{title}", flush=True)
    start = time.perf_counter()
    try:
        for line in lines():
            print(f"  {line}", flush=True)
    except Exception as error:  # noqa: BLE001 - the page goes on, whatever fails
        print(f"  FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    print(f"  ({time.perf_counter() - start:.1f} s)", flush=True)


def run_command(words: list[str]) -> Iterator[str]:
    """Run a program; its last lines."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    yield f"exit code {done.returncode}"
    yield from (done.stdout + done.stderr * bool(done.returncode)).splitlines()[-14:]


def main() -> None:
    """Run all checks on the GPU."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SmolVLM-256M", help="as for dyme.py")
    parser.add_argument("--data", default="chartqa", help="as for dyme.py")
    args = parser.parse_args()
    examples = data.load_data(args.data, "train")
    policy = dyme.load_policy(args.model, parallel.select_device("cuda"))
    policy = fast.speed_up(replace(policy, end_ids=[]))  # no response ever ends
    for check in CHECKS:
        report(str(check.__doc__), functools.partial(check, policy, examples))
    policy.model.to("cpu")  # the programs that follow need the memory
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        for words in commands(args.model, args.data, folder):
            report("python " + " ".join(words), functools.partial(run_command, words))


if __name__ == "__main__":
    sys.exit(runs.run_main(main))
