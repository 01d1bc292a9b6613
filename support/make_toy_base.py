"""Make the toy's base again, from its recipe: `python -m support.make_toy_base [FOLDER [SEED]]`.

The base lies in support/toy_base, so that everyone starts from the same weights.
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import dyme
from dyme import Policy, Sequence
from reward import Example
from support import fast, runs, toy

SEED, BATCH, WARMUP = 1, 64, 50
FLAGGED = 0.04  # share of lessons (but for descriptions) that end in the answer format
# Steps, peak learning rate, and share of calculations made to be of equal numbers. With these from
# the beginning, 900 steps did not teach which bar is the tallest.
ROUNDS = ((900, 3e-3, 0.0), (400, 1e-3, 0.2))


def new_policy(seed: int) -> Policy:
    """The tiny model with random weights, on the CPU."""
    words = toy.vocabulary(dyme.PROMPT)
    model, processor = toy.build_model(seed, words), toy.build_processor(words)
    return fast.speed_up(dyme.make_policy(model, processor, torch.device("cpu")))


def teach(policy: Policy, lessons: Iterator[tuple[Example, str]], steps: int, batch: int,
          lr: float) -> None:
    """Pre-train what is not frozen of a policy on `steps` batches of lessons."""
    torch.set_num_threads(1)  # the weights must not depend on the number of cores
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
    for step in tqdm(range(steps), "lessons", ncols=80):
        part = list(itertools.islice(lessons, batch))
        inputs = dyme.encode_prompts(policy, [e for e, _ in part], room=0, prompt="{question}")
        targets = []
        for i, (example, response) in enumerate(part):
            ids = dyme.target_ids(policy, example, response, prompt="{question}")
            targets.append(Sequence(i, ids, 1 / batch, explore=False))
        logprobs, mask = policy.logprobs(
            policy, policy.model, inputs, [*range(batch)], targets, temperature=1.0)
        weights, explore = torch.full((batch,), 1 / batch), torch.zeros(batch, dtype=torch.bool)
        dyme.policy_loss(logprobs, mask, weights, explore).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / WARMUP, 1 - 0.9 * step / steps)
        optimizer.step()
        optimizer.zero_grad()


def main(folder: Path, seed: int = SEED) -> None:
    """Make the base and write it into a folder."""
    policy = new_policy(seed)
    for i, (steps, lr, equal) in enumerate(ROUNDS):
        lessons = toy.lessons(seed + 10 * i, BATCH * steps, FLAGGED, dyme.PROMPT, equal)
        teach(policy, lessons, steps, BATCH, lr)
    policy.model.save_pretrained(folder)
    policy.processor.save_pretrained(folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    folder, seed = [*sys.argv[1:], *[str(toy.BASE), str(SEED)][len(sys.argv) - 1:]]
    sys.exit(runs.run_main(lambda: main(Path(folder), int(seed))))
