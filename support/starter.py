"""What to begin the course with: copy it to exercises.py beside dyme.py, and fill in (COURSE.md).

    cp support/starter.py exercises.py

A stub that still raises NotImplementedError counts as not written: its check is skipped. Times are
our guess. P prompts, K responses to each; N sequences of at most T tokens.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

import dyme
from dyme import Sequence, Step
from reward import Example

# ---- Read ----------------------------------------------------------------------------------------

# 1. An hour. Five pairs such as ("explore", True): the mode, and whether there is a gradient.
MODES: list[tuple[str, bool]] = []


# 2. One to two hours, with a minute's run.
def explore_curve(correct: Tensor, sizes: list[int]) -> list[tuple[float, float]]:
    """From r_a of N samples to each of P prompts, (P, N): (predicted, measured) for each size."""
    raise NotImplementedError


# 3. Two hours, most of them on paper.
def group_gradient(rewards: Tensor, scores: Tensor) -> Tensor:
    """From `rewards: (K,)` and `scores: (K, D)` the gradient of a group's loss, (D,)."""
    raise NotImplementedError


# ---- Measure -------------------------------------------------------------------------------------


# 4. One to two hours, with runs of all modes at hand.
def right_for_wrong_reasons(run: Path) -> dict[str, float | None]:
    """From a run's folder: kind of question to the share of right answers that have a fault."""
    raise NotImplementedError


# 5. Two hours.
def counting_row(row: dict[str, Any], root: Path, name: str) -> Example:
    """From a row of the data, its folder, and a name for messages: an example."""
    raise NotImplementedError


# ---- Change the algorithm ------------------------------------------------------------------------


# 6. An afternoon, with two runs.
def sum_loss(logprobs: Tensor, mask: Tensor, weights: Tensor, explore: Tensor,
             per_token: Tensor | float = 1.0) -> Tensor:
    """From `logprobs, mask: (N, T)` and `weights, explore: (N,)`: the loss, one number."""
    raise NotImplementedError


# 7. An afternoon, with two runs.
def twins(rows: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    """From rows of samples.jsonl: triples (step, i, j), i the valid response and j the other."""
    raise NotImplementedError


# 8. An afternoon, with four runs.
def clipped_loss(logprobs: Tensor, old: Tensor, mask: Tensor, weights: Tensor, explore: Tensor,
                 clip: float) -> Tensor:
    """From `logprobs, old, mask: (N, T)` and `weights, explore: (N,)`: the loss, one number."""
    raise NotImplementedError


# ---- Research ------------------------------------------------------------------------------------


# 9. A day or two, with runs.
def hack(question: str) -> str:
    """A text of thinking, made from the question alone."""
    raise NotImplementedError


def mended(trace: str, example: Example) -> float:
    """The reward, from 0 to 1, of a text of thinking; `example.facts` has what the chart shows."""
    raise NotImplementedError


# 10. A day, most of it thinking.
def will_learn(base: dict[str, dict[str, float]]) -> list[str]:
    """From {kind: {any_format, in_format, right}}: the kinds of question that GRPO learns."""
    raise NotImplementedError


# ---- Rules that others found ---------------------------------------------------------------------


# 11. An hour, and an afternoon of runs.
def switch_above(G: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A switch: from `r_a, r_t: (P, K)` to (P,) bool, the prompts with more than G right."""
    raise NotImplementedError


# 12. Two hours, and an afternoon of runs.
def join_reference(record: Step, targets: list[list[int]], reward: float) -> list[Sequence]:
    """From a step of P groups and P references (token ids): P (K + 1) sequences."""
    raise NotImplementedError


# 13. An hour, and an afternoon of runs.
def weigh_by_doubt(record: Step) -> list[Sequence]:
    """A step's sequences; the targets' `per_token` maps log-probs (T,) to factors (T,)."""
    raise NotImplementedError


if __name__ == "__main__":
    # Here a function of your own takes the place of dyme's: dyme.policy_loss = sum_loss
    sys.exit(dyme.main())
