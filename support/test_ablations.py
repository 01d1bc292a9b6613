"""Other switches and weights, by hand: Table 1b, the release, and what one hands over oneself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dyme
from dyme import Policy, Sequence, Step
from reward import Example
from support import ablations, parallel
from test_dyme import (
    CORRECT,
    assert_close,
    gradients,
    judged_as,
    make_trainer,
    plain_logprobs,
    plain_loss,
)


@pytest.mark.parametrize("rule, explore", [
    ("threshold:0.28", [0, 0, 0]), ("threshold:0.27", [1, 1, 1]), ("anneal", [1, 1, 1]),
    ("budget:8", [1, 1, 1]), ("explore", [1, 1, 1]), ("memorize", [0, 0, 0]),
    ("any-correct", [1, 0, 1])])
def test_switching_rules_by_hand(rule: str, explore: list[int], tiny: Policy) -> None:
    r_a = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    r_t = torch.tensor([[0.0, 0.1], [0.1, 0.2], [0.0, -0.1]])  # with r_a the mean is 0.55, of 2
    trainer = make_trainer(tiny, switch=rule)
    assert trainer.switch(r_a, r_t).tolist() == [bool(x) for x in explore]


def test_a_threshold_is_of_the_highest_reward(tiny: Policy) -> None:
    r_a, r_t = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])
    for weight, mean in ((0.0, 0.5), (1.0, 0.5), (3.0, 0.5)):  # (0.5 + w 0.5) / (1 + w)
        for rule, explores in ((mean - 0.01, True), (mean + 0.01, False)):
            trainer = make_trainer(tiny, switch=f"threshold:{rule}", thinking_weight=weight)
            assert trainer.switch(r_a, r_t).tolist() == [explores]
    assert make_trainer(tiny, switch="threshold:0.3", thinking_weight=0.0).switch(r_a, 0 * r_t)[0]


def test_a_threshold_is_reached_by_the_rewards_of_all_processes(
        monkeypatch: pytest.MonkeyPatch) -> None:
    half = torch.tensor([[1.0, 0.0]])
    assert ablations.threshold(0.5, 0.0, half, half).tolist() == [True]
    monkeypatch.setattr(parallel, "gather", lambda own: [own, {"reward": 0.0, "count": 6}])
    right = torch.ones(1, 2)  # of 8 rewards in two processes 2 are 1
    assert ablations.threshold(0.25, 0.0, right, right).tolist() == [True]
    assert ablations.threshold(0.3, 0.0, right, right).tolist() == [False]


def test_anneal_adds_every_target_to_exploration(
        tiny: Policy, examples: list[Example], no_update: None) -> None:
    trainer = make_trainer(tiny, CORRECT, switch="anneal", steps=3)
    done = dyme.train_step(trainer, examples[:4], 1, 1e-3)
    targets = [s for s in done.sequences if not s.explore]
    # A third of the way: (1 + cos 60 degrees) / 2 = 0.75, over P = 4
    assert [s.weight for s in targets] == pytest.approx([0.75 / 4] * 4)
    assert [s.ids for s in targets] == [dyme.target_ids(tiny, example) for example in examples[:4]]
    assert sum(s.explore for s in done.sequences) == 16
    assert done.metrics["memorized"] == 0.5  # as many prompts explore


def test_anneal_weighs_refined_targets_by_the_prompts_of_all_processes(
        tiny: Policy, examples: list[Example]) -> None:
    trainer = make_trainer(tiny, switch="anneal", steps=3)
    trainer.trace = lambda example: "refined"
    record = Step(0, examples[:2], (), torch.ones(2, dtype=torch.bool), [])  # 2 of 4 prompts
    added = ablations.anneal(trainer, record)
    assert [s.weight for s in added] == [1 / 4] * 2
    assert added[0].ids == dyme.target_ids(tiny, replace(examples[0], trace="refined"))


def test_budget_explores_and_memorizes_failures_when_there_are_enough(
        tiny: Policy, examples: list[Example], no_update: None) -> None:
    trainer = make_trainer(tiny, CORRECT, switch="budget:2", micro_batch=1)  # of four one fails
    trainer.rows = examples[:12]
    for step, memorized, waiting in ((0, 0, 1), (1, 1, 0), (2, 0, 1)):
        batch = examples[4 * step:4 * step + 4]
        done = dyme.train_step(trainer, batch, step, 1e-3)
        assert done.metrics["memorized"] == memorized
        assert len(trainer.kept["buffer"]) == waiting
        if memorized:
            failed = [examples[1], examples[5]]
            assert done.examples == failed
            loss = 0.0
            for example in failed:
                target = Sequence(0, dyme.target_ids(tiny, example), 1 / 2, False)
                prompt = dyme.encode_prompts(tiny, [example], 40)
                logprobs = plain_logprobs(trainer.policy.model, prompt, target, 1.0)
                loss -= 0.5 * logprobs.mean().item()
            assert done.metrics["loss"] == pytest.approx(loss, rel=1e-4)
        else:
            assert done.explore.all()  # failed groups explore as well
    assert trainer.kept["buffer"] == [examples[9].name]


def test_a_budget_holds_the_failures_of_all_processes(
        tiny: Policy, examples: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "gather", lambda names: [names, ["toy train row 9"]])
    trainer = make_trainer(tiny, switch="budget:9")
    record = Step(0, examples[:1], (), torch.ones(1, dtype=torch.bool), [], r_a=torch.zeros(1, 4))
    ablations.memorize_failures(trainer, record, 9)
    assert trainer.kept["buffer"] == ["toy train row 0", "toy train row 9"]


def test_what_extras_keep_is_in_a_checkpoint(tiny: Policy, tmp_path: Path) -> None:
    trainer, again = (make_trainer(tiny, switch="budget:2") for _ in range(2))
    trainer.kept["buffer"], trainer.failures, trainer.best = ["toy train row 9"], 1, 0.25
    dyme.save_checkpoint(tmp_path, trainer, 3)
    assert dyme.load_checkpoint(tmp_path, again) == 3
    assert again.kept == {"buffer": ["toy train row 9"]}
    assert (again.failures, again.best) == (1, 0.25)
    trainer.failures = 2  # while steps fail, the checkpoint before may be the last good one
    dyme.save_checkpoint(tmp_path, trainer, 4)
    assert dyme.load_checkpoint(tmp_path, again) == 3


def test_released_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3]])
    advantages = ablations.released_advantages(rewards, eps=0.0)
    assert advantages[0, 0] == pytest.approx(np.sqrt(3) / 2)  # divided by K - 1
    assert (advantages[1] == 0).all()


@pytest.mark.parametrize("released", [False, True])
def test_released_code_departs_as_documented(
        released: bool, tiny: Policy, examples: list[Example], no_update: None) -> None:
    trainer = make_trainer(tiny, released_code=released)
    # r_t varies, also where all are right.
    trainer.judge = judged_as(CORRECT, [[0.0, 0.1, 0.2, 0.3]] * 4)
    done = dyme.train_step(trainer, examples[:4], 0, 1e-3)
    weights: dict[Any, list[float]] = {}
    for s in done.sequences:
        weights.setdefault((s.prompt, s.explore), []).append(s.weight)
    # A target stands in the place of one of K = 4 responses.
    assert weights[1, False] == [1 / 4 / (4 if released else 1)]
    rewards = np.array([0.0, 1.1, 1.2, 0.3])
    advantage = (rewards[0] - rewards.mean()) / (rewards.std(ddof=int(released)) + 1e-4)
    assert weights[0, True][0] == pytest.approx(advantage / 16, rel=1e-5)
    assert any(weights[2, True]) != released  # a group that is all right is dropped
    assert done.metrics["no_variance"] == 0


# ---- Handed over ---------------------------------------------------------------------------------


def test_another_switch_is_handed_over(
        tiny: Policy, examples: list[Example], no_update: None) -> None:
    """HPT's, say: explore only where more than so many are right."""
    trainer = make_trainer(tiny, [[1, 1, 0, 0], [1, 1, 1, 0]])
    trainer.switch = lambda r_a, r_t: (r_a == 1).sum(1) > 2
    done = dyme.train_step(trainer, examples[:2], 0, 1e-3)
    assert done.explore.tolist() == [False, True]
    assert [(s.prompt, s.explore) for s in done.sequences] == [(0, False), *[(1, True)] * 4]


def test_a_reference_joins_the_group(
        tiny: Policy, examples: list[Example], no_update: None, readable: None) -> None:
    """As in LUFFY: the target is response K + 1 of its group, with reward 1."""
    trainer = make_trainer(tiny, [[0, 1, 1, 0], [1, 0, 0, 0]])

    def weigh(done: Step) -> list[Sequence]:
        sequences = []
        advantages = dyme.group_advantages(F.pad(done.rewards, (0, 1), value=1.0))
        for i, example in enumerate(done.examples):
            ids = [y.ids for y in done.responses[i]] + [dyme.target_ids(tiny, example)]
            for row, a in zip(ids, advantages[i].tolist(), strict=True):
                sequences.append(Sequence(i, row, a / (5 * 2), True))
        return sequences

    trainer.weigh = weigh
    done = dyme.train_step(trainer, examples[:2], 0, 1e-3)
    # Rewards 0 1 1 0 1: mean 0.6, deviation 0.4899; and 1 0 0 0 1: mean 0.4, the same deviation.
    low, high = -0.6 / 0.4899, 0.4 / 0.4899
    expected = [low, high, high, low, high, -low, -high, -high, -high, -low]
    assert [10 * s.weight for s in done.sequences] == pytest.approx(expected, rel=1e-3)
    ours = gradients(trainer.policy.model)
    prompts = [dyme.encode_prompts(tiny, [example], 40) for example in examples[:2]]
    plain_loss(trainer.policy.model, prompts, done.sequences, 1.0).backward()
    theirs = {name: g for name, g in gradients(trainer.policy.model).items() if name in ours}
    assert_close(ours, theirs, 1e-5)


def test_targets_may_be_weighted_by_what_the_policy_thinks_of_them(
        tiny: Policy, examples: list[Example], no_update: None) -> None:
    """As in CHORD: each token of a target by p (1 - p)."""
    trainer = make_trainer(tiny, [[0] * 4] * 2, micro_batch=1)

    def weigh(done: Step) -> list[Sequence]:
        doubt = lambda logp: logp.exp() * (1 - logp.exp())  # noqa: E731
        return [replace(s, per_token=doubt) for s in done.sequences]

    trainer.weigh = weigh
    done, expected = dyme.train_step(trainer, examples[:2], 0, 1e-3), 0.0
    for s in done.sequences:
        prompt = dyme.encode_prompts(tiny, [examples[s.prompt]], 40)
        logprobs = plain_logprobs(trainer.policy.model, prompt, s, 1.0)
        expected -= 0.5 * (logprobs * logprobs.exp() * (1 - logprobs.exp())).mean().item()
    assert done.metrics["loss"] == pytest.approx(expected, rel=1e-4)
