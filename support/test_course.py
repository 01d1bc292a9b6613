"""The course: these check what you write into exercises.py beside the code (see support/README.md)."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dyme
import reward
from dyme import Policy
from reward import Example, verify
from support import data, domains, toy
from support.test_support import answered, write_image
from test_dyme import Patch, make_trainer, take

EXERCISES = ("broken_target_ids", "group_gradient", "explore_if_mixed", "grounded_thinking",
             "right_for_wrong_reasons", "counting_row", "matched_steps")


def attempt(name: str) -> Any:
    """What exercises.py calls `name`; without it the exercise is skipped."""
    file = Path(dyme.__file__).with_name("exercises.py")
    if not file.exists():
        pytest.skip("there is no exercises.py yet")
    spec = importlib.util.spec_from_file_location("exercises", file)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    if not hasattr(module, name):
        pytest.skip(f"exercises.py has no {name} yet")
    return getattr(module, name)


def test_exercise_1_predict_the_mode() -> None:
    predicted = attempt("MODES")
    correct = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.float)
    thinking = torch.tensor([[.2, .2, .2, .2], [.5, .5, .5, .5], [.7, .7, .7, .7], [.1, .9, .9, .9]])
    explore = dyme.choose_mode(correct)
    learns = ~explore | ~dyme.no_variance(correct + thinking)
    right = [("explore" if e else "memorize", bool(x)) for e, x in zip(explore, learns, strict=True)]
    if predicted != right:  # no assert, which would show the solution
        pytest.fail("not yet: a right response makes a group explore, differing rewards give a gradient", pytrace=False)


def test_exercise_2_break_the_end_token(tiny: Policy, examples: list[Example], monkeypatch: Patch) -> None:
    whole, broken, finished = dyme.target_ids, attempt("broken_target_ids"), {}

    def with_the_original_at_hand(*args: Any) -> list[int]:
        dyme.target_ids = whole
        ids = broken(*args)
        dyme.target_ids = with_the_original_at_hand
        return ids

    for name, function in (("whole", whole), ("broken", with_the_original_at_hand)):
        monkeypatch.setattr(dyme, "target_ids", function)
        trainer = make_trainer(tiny, mode="sft", steps=40)
        for step in range(40):
            take(trainer, examples[:4], step, "sft", 3e-3)
        answers = list(dyme.respond(trainer.policy, examples[:4], 48, 4))
        finished[name] = sum(a["finished"] for a in answers) / len(answers)
    assert finished["whole"] > 0.8, "the lesson itself failed: nothing ends even with whole targets"
    assert finished["broken"] < 0.2, f"{finished['broken']:.0%} of responses still end"


def test_exercise_3_collapsed_groups_give_no_gradient() -> None:
    gradient = attempt("group_gradient")
    torch.manual_seed(0)
    for rewards in (torch.tensor([1.0, 0.0, 0.5, 1.7]).double(), torch.full((4,), 0.7).double()):
        scores = torch.randn(4, 3, dtype=torch.float64)  # d log p(y_k) / d theta, per token
        theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        weights = dyme.group_advantages(rewards[None])[0] / 4
        dyme.policy_loss((scores @ theta)[:, None], torch.ones(4, 1), weights, torch.ones(4, dtype=torch.bool)).backward()
        torch.testing.assert_close(torch.as_tensor(gradient(rewards, scores)).double(), theta.grad, rtol=1e-3, atol=1e-6)


def test_exercise_4_a_switch_of_your_own() -> None:
    switch = attempt("explore_if_mixed")
    correct = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.float)
    assert switch(correct).tolist() == [False, True, False, True]


def test_exercise_5_a_thinking_reward_that_looks_at_the_image() -> None:
    reward_of = attempt("grounded_thinking")
    for true, low in zip(toy.make_examples("train", "high")[:100], toy.make_examples("train", "low")[:100]):
        best = reward_of(true.hint, true.facts)
        assert best == 1 and (low.hint == true.hint or 0 <= reward_of(low.hint, true.facts) < 1), low.hint
    assert reward_of("It is so.", "red 4") == 0


def test_exercise_6_right_for_the_wrong_reasons(tmp_path: Path) -> None:
    share = attempt("right_for_wrong_reasons")
    rows = [{"strict": s, "grounded_numbers": g, "quoted_numbers": q} for s, g, q in
            ((True, 2, 2), (True, 1, 2), (True, 0, 0), (False, 0, 3), (True, 0, 1))]
    (tmp_path / "held-out-20.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held-out-3.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert share(tmp_path) == 0.5


def test_exercise_7_a_domain_of_your_own(tmp_path: Path, monkeypatch: Patch) -> None:
    row_to_example = attempt("counting_row")
    rows = [{"picture": "1.png", "ask": f"How many cats in {i}?", "count": 3, "why": "One, two, three cats."} for i in range(12)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    write_image(tmp_path / "pictures" / "1.png")
    domain = domains.Domain({"train": "train.json", "test": "test.json"}, row_to_example, "https://example.org")
    monkeypatch.setitem(domains.DOMAINS, "counting", domain)
    example = data.load_data(f"counting:{tmp_path}", "test")[0]
    assert example.question == "How many cats in 0?" and example.hint and example.image().size == (8, 8)
    assert verify(reward.reference_response(example), example).correct
    assert all(answered(example, a)[0] for a in ("3", "three", "Three.")) and not answered(example, "four")[0]


def test_exercise_8_a_fairer_baseline() -> None:
    matched = attempt("matched_steps")
    parts = ("seconds_feed", "seconds_sampling", "seconds_scoring", "seconds_update")
    ours = [dict.fromkeys(parts, 0.5) for _ in range(30)]
    sft = [dict(zip(parts, (0.1, 0.0, 0.0, 0.4), strict=True)) for _ in range(10)]
    assert matched(ours, sft) == pytest.approx(120, abs=1)
