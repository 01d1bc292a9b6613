#!/usr/bin/env bash
# inspect-ai's exact() and f1() mark the right option wrong where it is A, and "Vitamin" right where "Vitamin A" is.
#
# Version:    inspect-ai 0.3.285.
# Guessed:    two experts, asked beforehand: "A" for A is right, and its f1 is 1.0.
# Behaviour:  both texts lose their articles, as in SQuAD and DROP, so that the target A is left without a word, and a
#             target without words is passed over: no answer to it is right. B, C and D are scored as written.
# Matters to: whoever scores multiple choice by them: a quarter of the rows is lost, more where A is right more often.
# Seen:       A: exact I, f1 0.0
#             B: exact C, f1 1.0
#             "A." for A: I; "(A)" for A: I; "Vitamin" for Vitamin A: C
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q inspect-ai==0.3.285
cat > "$work/try.py" <<'PY'
import asyncio

from inspect_ai.model import ModelName, ModelOutput
from inspect_ai.scorer import Target, exact, f1
from inspect_ai.solver import TaskState


def score(scorer, answer, target):
    state = TaskState(model=ModelName("mockllm/model"), sample_id=1, epoch=1, input="Which?", messages=[],
                      output=ModelOutput.from_content("mockllm/model", answer))
    return asyncio.run(scorer(state, Target(target))).value


for letter in "AB":
    print(f"{letter}: exact {score(exact(), letter, letter)}, f1 {score(f1(), letter, letter)}")
others = [("A.", "A"), ("(A)", "A"), ("Vitamin", "Vitamin A")]
print("; ".join(f'"{answer}" for {target}: {score(exact(), answer, target)}' for answer, target in others))
PY
"$work/venv/bin/python" "$work/try.py" 2> "$work/log" | tee "$work/seen" || { cat "$work/log"; exit 1; }
diff - "$work/seen" <<'SEEN'
A: exact I, f1 0.0
B: exact C, f1 1.0
"A." for A: I; "(A)" for A: I; "Vitamin" for Vitamin A: C
SEEN
echo "as seen before"
