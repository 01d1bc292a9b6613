"""The first half hour on a GPU: what may differ from a CPU, tried in order, on one page of figures.

    python -m support.gpu_check --model SmolVLM-256M --data chartqa
    python -m support.gpu_check --also LLaVA-OV-0.5B chartqa --also Qwen2.5-0.5B gsm8k:FOLDER
    python -m pytest -k cuda

A check that fails says so, and the next one runs. The weights do not matter, only shapes and precision do.
"""

import argparse
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
from dyme import Policy, Sequence
from reward import Example
from support import benchmark, data, graphs, parallel, runs

Check = Callable[[Policy, list[Example]], Iterator[str]]


def versions(policy: Policy, _: list[Example]) -> Iterator[str]:
    """Software and hardware."""
    yield f"torch {torch.__version__}, transformers {transformers.__version__}, {parallel.half_precision()}"
    yield f"{torch.cuda.get_device_name()}, {torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB, {os.cpu_count()} cores"


def attention_kernels(policy: Policy, examples: list[Example]) -> Iterator[str]:
    """Which kernels attend in prompt, decoding and update; none may be called cudnn."""
    inputs = dyme.encode_prompts(policy, examples[:2], room=32)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        sequences = sampled(policy, [inputs], 2, 32)
        loss_of(policy, inputs, sequences).backward()
    policy.model.zero_grad()
    names = {event.key for event in seen.key_averages() if any(x in event.key for x in ("fmha", "flash", "cudnn"))}
    yield from (name[:100] for name in sorted(names))


def padding(policy: Policy, examples: list[Example]) -> Iterator[str]:
    """A prompt padded on the left against the same prompt alone: log-probs and gradients."""
    sequence = [Sequence(0, [*range(20, 60)], 1.0, True)]
    results = []
    for batch in (examples[:1], examples[:2]):
        loss = -loss_of(policy, dyme.encode_prompts(policy, batch, room=64), sequence)
        loss.backward()
        results.append((loss.item(), gradient(policy)))
        policy.model.zero_grad()
    (alone, one), (padded, two) = results
    yield f"mean log-prob {alone:.4f} alone, {padded:.4f} padded; gradients differ by {distance(one, two):.2%}"


def grouped_attention(policy: Policy, examples: list[Example]) -> Iterator[str]:
    """Our attention against transformers' own in the update: log-probs and gradients."""
    model = copy.deepcopy(policy.model)
    config = model.config.get_text_config()
    inputs = dyme.encode_prompts(policy, examples[:2], room=64)
    results = []
    for implementation in ("grouped", "sdpa"):
        config._attn_implementation = implementation
        with policy.autocast():
            hidden = model.base_model(**inputs).last_hidden_state[:, -1]
        hidden.float().square().mean().backward()
        results.append((hidden.float(), gradient(replace(policy, model=model))))
        model.zero_grad()
    (ours, one), (theirs, two) = results
    yield f"states differ by {distance(ours, theirs):.2%}, gradients by {distance(one, two):.2%}"


def precision(policy: Policy, examples: list[Example]) -> Iterator[str]:
    """Log-probs of sampled responses in half precision, as trained, against float32."""
    inputs = dyme.encode_prompts(policy, examples[:2], room=64)
    sequences = sampled(policy, [inputs], 2, 64)
    with torch.no_grad():
        half, mask = logprobs_of(policy, inputs, sequences)
        prefix = dyme.encode_prefix(policy.model, inputs)
        exact, _ = dyme.completion_logprobs(policy.model, prefix, [s.prompt for s in sequences],
                                            [s.ids for s in sequences], torch.ones(len(sequences)))
    difference = (half - exact).abs()[mask == 1]
    yield f"differ by {difference.mean():.4f} on average, {difference.max():.4f} at most"


def graph(policy: Policy, examples: list[Example]) -> Iterator[str]:
    """Decoding by graph against plain steps: tokens and seconds; and what makes the CPU wait."""
    inputs = dyme.encode_prompts(policy, examples[:4], room=160)
    capture, ids = graphs.capture, {}
    for name, chosen in (("graph", capture), ("plain", lambda _, step: step)):
        graphs.capture = chosen
        try:
            dyme.rollout(policy, [inputs], uniforms(4, 8, 160), 1.0)
            start = benchmark.seconds(policy.device)
            ids[name] = dyme.rollout(policy, [inputs], uniforms(4, 8, 160), 1.0).ids
            yield f"{name}: {benchmark.seconds(policy.device) - start:.2f} s for 4 x 8 x 160 tokens"
        finally:
            graphs.capture = capture
    yield f"{(ids['graph'] == ids['plain']).float().mean():.1%} of tokens alike"
    torch.cuda.set_sync_debug_mode("warn")
    try:
        dyme.rollout(policy, [inputs], uniforms(4, 8, 160), 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    yield "(warnings about synchronisation are above)"


def varied_shapes(policy: Policy, examples: list[Example]) -> Iterator[str]:
    """Twenty rollouts of other shapes: does memory grow, how long does recording take?"""
    spent, capture = [], graphs.capture

    def timed(*args: object) -> Callable[[], None]:
        start = benchmark.seconds(policy.device)
        recorded = capture(*args)
        spent.append(benchmark.seconds(policy.device) - start)
        return recorded

    graphs.capture = timed
    try:
        for i in range(20):
            inputs = dyme.encode_prompts(policy, examples[i:i + 1 + i % 4], room=40)
            dyme.rollout(policy, [inputs], uniforms(len(inputs["input_ids"]), 4, 24 + i % 8), 1.0)
            if i in (1, 19):
                yield f"after {i + 1}: {torch.cuda.memory_reserved() / 2**30:.2f} GiB reserved"
    finally:
        graphs.capture = capture
    yield f"a recording takes {1000 * sum(spent) / len(spent):.0f} ms"


def failing_capture(policy: Policy, examples: list[Example]) -> Iterator[str]:
    """A recording that fails: does sampling, and training after it, go on?"""
    broken = replace(policy, model=copy.deepcopy(policy.model))
    handle = broken.model.get_output_embeddings().register_forward_hook(lambda *_: torch.cuda.synchronize())
    inputs = dyme.encode_prompts(broken, examples[:2], room=16)
    rolled = dyme.rollout(broken, [inputs], uniforms(2, 4, 16), 1.0)
    handle.remove()
    loss_of(broken, inputs, [Sequence(0, rolled.ids[0].tolist(), 1.0, True)]).backward()
    yield f"uncapturable: {hasattr(broken.model, 'uncapturable')}, gradient finite: {gradient(broken).isfinite().all()}"


def half_with_scaler(policy: Policy, examples: list[Example]) -> Iterator[str]:
    """Ten steps in float16 with a gradient scaler, as on a GPU without bf16."""
    chosen, parallel.half_precision = parallel.half_precision, lambda: torch.float16
    try:
        own = replace(policy, model=copy.deepcopy(policy.model))
        trainer = dyme.make_trainer(dyme.Config(max_new_tokens=32, micro_batch=2), own)
        trainer.score = benchmark.coin_flips
        skipped = 0
        for step in range(10):
            done = dyme.take_step(trainer, examples[:2], step, "dyme", 1e-5)
            skipped += done.metrics["skipped_steps"]
        yield f"{skipped} of 10 steps skipped, gradient norm {done.metrics['grad_norm']:.3f}, " \
              f"scale {trainer.scaler.get_scale():.0f}"
    finally:
        parallel.half_precision = chosen


CHECKS: tuple[Check, ...] = (versions, attention_kernels, padding, grouped_attention, precision, graph, varied_shapes,
                             failing_capture, half_with_scaler)


def uniforms(prompts: int, generations: int, tokens: int) -> Tensor:
    """Random numbers for a rollout."""
    return dyme.keyed_uniforms(0, 0, range(prompts), generations, tokens)


def sampled(policy: Policy, inputs: list[dyme.Inputs], prompts: int, tokens: int) -> list[Sequence]:
    """Four sampled responses to each prompt, to be trained on."""
    rolled = dyme.rollout(policy, inputs, uniforms(prompts, 4, tokens), 1.0)
    return [Sequence(i // 4, ids, 1.0, True) for i, ids in enumerate(rolled.ids.tolist())]


def logprobs_of(policy: Policy, inputs: dyme.Inputs, sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
    """Log-probs and mask of sequences, as the update computes them."""
    prompts = [s.prompt for s in sequences]
    return dyme.sequence_logprobs(policy, policy.model, inputs, prompts, sequences, 1.0)[:2]


def loss_of(policy: Policy, inputs: dyme.Inputs, sequences: list[Sequence]) -> Tensor:
    """Minus the mean log-prob of sequences."""
    return -dyme.token_mean(*logprobs_of(policy, inputs, sequences)).mean()


def gradient(policy: Policy) -> Tensor:
    """The gradient as one vector."""
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


def distance(a: Tensor, b: Tensor) -> float:
    """How far `a` is from `b`, relative to its length."""
    return ((a - b).norm() / b.norm()).item()


def commands(model: str, source: str, others: list[list[str]], folder: str) -> list[list[str]]:
    """Whole programs to run: tests, a run with a resume, one process on nccl, benchmarks, other models' steps."""
    real = ["--model", model, "--data", source]
    toy = ["--steps", "20", "--eval-every", "0", "--out", f"{folder}/toy"]
    return [
        ["-m", "pytest", "-q", "-k", "cuda"],
        ["dyme.py", *toy], ["dyme.py", "--resume", "--out", f"{folder}/toy"],
        ["-m", "torch.distributed.run", "--nproc_per_node=1", "dyme.py", *toy[:-1], f"{folder}/nccl"],
        ["-m", "support.benchmark", "--steps", "3", *real, "--prompts", "4", "--max-new-tokens", "256"],
        ["-m", "support.benchmark", "--steps", "3", *real, "--prompts", "32", "--max-new-tokens", "256"],
        ["-m", "support.benchmark", "--steps", "3", *real, "--prompts", "32", "--max-new-tokens", "256",
         "--micro-batch", "2"],
        *(["-m", "support.benchmark", "--steps", "1", "--model", other, "--data", rows, "--prompts", "4"]
          for other, rows in others),
    ]


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
    yield from (done.stdout if done.returncode == 0 else done.stdout + done.stderr).splitlines()[-14:]


def main() -> None:
    """Run all checks on the GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SmolVLM-256M", help="as for dyme.py")
    parser.add_argument("--data", default="chartqa", help="as for dyme.py")
    parser.add_argument("--also", nargs=2, metavar=("MODEL", "DATA"), action="append", default=[],
                        help="another model, of which a step is timed; may be given several times")
    args = parser.parse_args()
    device = parallel.select_device("cuda")
    examples = data.load_data(args.data, "train")
    policy = replace(dyme.load_policy(args.model, device), end_ids=[])  # no response ever ends
    for check in CHECKS:
        report(check.__doc__.splitlines()[0], functools.partial(check, policy, examples))
    policy.model.to("cpu")  # the programs that follow need the memory
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        for words in commands(args.model, args.data, args.also, folder):
            report("python " + " ".join(words), functools.partial(run_command, words))


if __name__ == "__main__":
    sys.exit(runs.run_main(main))
