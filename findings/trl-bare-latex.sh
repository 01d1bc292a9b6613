#!/usr/bin/env bash
# TRL's accuracy_reward pays 0 for the right answer and 1 for a wrong one where the solution is LaTeX without dollars.
#
# Versions:   trl 1.16.0 with math-verify 0.9.0 and latex2sympy2-extended 1.11.0; torch 2.13.0, transformers 5.24.0.
# Guessed:    an expert, asked beforehand: `2\sqrt{3}` without dollar signs cannot be read, so that the reward is None
#             and the sample is left out.
# Behaviour:  the number before the root is read as the solution: \boxed{2\sqrt{3}} gets 0.0, \boxed{2} gets 1.0, and no
#             warning. The docstring's own example, \frac{1}{3}, is bare as well and is read rightly. In dollars all are.
# Matters to: whoever trains on answers in LaTeX, such as MATH's: put them between dollar signs.
# Seen:       2\sqrt{3}: 0.0 for itself, 1.0 for 2
#             10\pi: 0.0 for itself, 1.0 for 10
#             \frac{1}{3}: 1.0 for itself, 0.0 for 1
#             $2\sqrt{3}$: 1.0 for itself, 0.0 for 2
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 trl==1.16.0 math-verify==0.9.0 latex2sympy2-extended==1.11.0
cat > "$work/try.py" <<'PY'
from trl.rewards import accuracy_reward


def reward(answer, solution):
    said = [{"role": "assistant", "content": rf"The answer is \boxed{{{answer}}}."}]
    return accuracy_reward([said], [solution])[0]


for solution, other in ((r"2\sqrt{3}", "2"), (r"10\pi", "10"), (r"\frac{1}{3}", "1"), (r"$2\sqrt{3}$", "2")):
    print(f"{solution}: {reward(solution.strip('$'), solution)} for itself, {reward(other, solution)} for {other}")
PY
"$work/venv/bin/python" "$work/try.py" 2> "$work/log" | tee "$work/seen" || { cat "$work/log"; exit 1; }
diff - "$work/seen" <<'SEEN'
2\sqrt{3}: 0.0 for itself, 1.0 for 2
10\pi: 0.0 for itself, 1.0 for 10
\frac{1}{3}: 1.0 for itself, 0.0 for 1
$2\sqrt{3}$: 1.0 for itself, 0.0 for 2
SEEN
echo "as seen before"
