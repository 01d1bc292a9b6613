"""Make sight.safetensors again, from its recipe: `python -m support.make_sight LANGUAGE [FILE]`.

LANGUAGE is the folder of SmolLM2 (support/smollm2.py). First each of the 36 visual tokens learns to
be the *input embedding of a word* of the chart's description: no pass of the language model. Then,
with the eyes frozen, a low-rank change of its attention learns to read bars aloud. Nothing is
taught of sums, differences, comparing, or the answer format.
"""

import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize
from tqdm import tqdm

import dyme
from reward import Example
from support import UserError, charts, fast, make_toy_base, runs, settings, sight

SEED, BATCH, STEPS, LR = 0, 32, 4000, 1e-3  # of learning words
LESSONS, LESSON_LR, RANK = 120, 3e-3, 4  # batches of 8 through the language model
QUESTIONS = ("What is the value of {bar}?", "How high is the {bar} bar?", "Which value has {bar}?")
ANSWERS = ("The value of {bar} is {n}.", "{bar} reads {n}.", "I see {bar} {n}.",
           "The {bar} bar is {n} high.")


def training_charts(seed: int) -> Iterator[charts.Chart]:
    """Charts without end, none of them in the rows of `--data charts`."""
    reserved = {e.facts for split in charts.SPLITS
                for e in charts.make_examples("charts", split, "high")}
    rng = np.random.default_rng([11, seed])
    while True:
        if (chart := charts.random_chart(rng)).facts() not in reserved:
            yield chart


def description(chart: charts.Chart) -> list[str]:
    """The tokens that the visual tokens shall stand for: a row of six for a bar, or none."""
    tokens = []
    for name, value in chart.values.items():
        row = [f"Ġ{name}", "Ġ", *str(value), ","]
        tokens += row + ["Ċ"] * (sight.GRID - len(row))
    return tokens + ["Ċ"] * (sight.GRID ** 2 - len(tokens))


def learn_words(model: sight.Model, processor: Any, seed: int) -> None:
    """Train the eyes: each visual token is classified among the embeddings of 21 words."""
    words = [*(f"Ġ{name}" for name in charts.COLORS), *"0123456789", "Ġ", ",", "Ċ"]
    ids = processor.tokenizer.convert_tokens_to_ids(words)
    table = model.get_input_embeddings().weight[ids].detach()  # (W, D)
    scale = 20 / squared_distances(table, table).mean()  # so that logits are of a usual size
    parameters = [*sight.eyes(model).parameters()]
    optimizer = torch.optim.AdamW(parameters, LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / 100, (1 + math.cos(math.pi * step / STEPS)) / 2 + 0.02))
    found = training_charts(seed)
    for step in (bar := tqdm(range(STEPS), "learning words", ncols=80)):
        batch = [*itertools.islice(found, BATCH)]
        pixels = torch.stack([picture(chart) for chart in batch])  # (B, 3, 192, 192)
        target = torch.tensor([[words.index(w) for w in description(c)] for c in batch])  # (B, 36)
        seen = model.model.vision_model(pixel_values=pixels).last_hidden_state  # (B, 36, H)
        distance = scale * squared_distances(model.model.connector(seen), table)  # (B, 36, W)
        near = distance.gather(-1, target[..., None]).mean() / 20
        loss = F.cross_entropy(-distance.flatten(0, 1), target.flatten()) + near
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            right = (distance.argmin(-1) == target).view(BATCH, sight.GRID, -1).all(-1)
            bar.set_postfix_str(f"rows {right.float().mean():.3f}")


def squared_distances(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """From each vector of x (.., D) to each row of a table (W, D): (.., W)."""
    return x.square().sum(-1, keepdim=True) - 2 * x @ table.T + table.square().sum(-1)


def picture(chart: charts.Chart) -> torch.Tensor:
    """A chart's pixels (3, 192, 192) between -1 and 1, as the processor gives them."""
    return torch.from_numpy(np.array(chart.draw())).permute(2, 0, 1) / 127.5 - 1


def lessons(seed: int) -> Iterator[tuple[Example, str]]:
    """Yield rows (prompt, response) in which bars are read: one, some, or all of them."""
    rng = np.random.default_rng([12, seed])
    for chart in training_charts(seed + 1):
        bars = rng.permutation(list(chart.values)).tolist()
        task, listed = rng.random(), bars[:rng.integers(1, 4)]
        if task < 0.25:
            question, response = "Describe the chart.", f"It shows {chart.facts()}."
        elif task < 0.45:
            question = f"Describe {', '.join(listed)}."
            response = ", ".join(f"{bar} {chart.values[bar]}" for bar in listed) + "."
        else:
            bar, n = bars[0], chart.values[bars[0]]
            question = QUESTIONS[rng.integers(len(QUESTIONS))].format(bar=bar)
            response = ANSWERS[rng.integers(len(ANSWERS))].format(bar=bar, n=n)
            if rng.random() < 0.6:
                question = dyme.PROMPT.format(question=question)
        yield Example(question, "", chart.draw), response


class LowRank(torch.nn.Module):
    """A weight (out, in) with a change of low rank: W + up down."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        inward = 4 / weight.shape[1] ** 0.5
        self.down = torch.nn.Parameter(inward * torch.randn(RANK, weight.shape[1]))
        self.up = torch.nn.Parameter(torch.zeros(weight.shape[0], RANK))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The changed weight."""
        return weight + self.up @ self.down  # (out, in)


def make(language: Path, file: Path) -> None:
    """Make the weights and write them into a file, in 16 bits."""
    if not (language / "config.json").is_file():
        raise UserError(f"{language}: no model; python -m support.smollm2 FOLDER makes one")
    torch.manual_seed(SEED)
    processor = sight.build_processor(language)
    model = sight.build_model(language, processor.tokenizer).requires_grad_(False)
    sight.eyes(model).requires_grad_(True)
    learn_words(model, processor, SEED)
    model.requires_grad_(False)  # what the eyes write is good: now it is learned to be read
    adapted = sight.adapted(model)
    for linear in adapted.values():
        parametrize.register_parametrization(linear, "weight", LowRank(linear.weight))
    policy = fast.speed_up(dyme.make_policy(model, processor, torch.device("cpu")))
    make_toy_base.teach(policy, lessons(SEED), LESSONS, 8, LESSON_LR)
    weights = sight.eyes(model).state_dict()
    for name, linear in adapted.items():
        change = linear.parametrizations.weight[0]
        weights |= {f"{name}.up": change.up, f"{name}.down": change.down}
    safetensors.torch.save_file({k: x.half().contiguous() for k, x in weights.items()}, file)
    print(f"wrote {file}")


if __name__ == "__main__":
    parser = settings.one_line_parser(__doc__ or "")
    parser.add_argument("language", metavar="LANGUAGE", type=Path, help="the folder of SmolLM2")
    parser.add_argument("file", metavar="FILE", type=Path, nargs="?", default=sight.WEIGHTS)
    sys.exit(runs.run_main(lambda: make(**vars(parser.parse_args()))))
