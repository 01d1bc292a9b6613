#!/usr/bin/env bash
# TRL's accuracy_reward pays nothing for the right number where the box holds its full stop too: \boxed{5.}
#
# Versions:   trl 1.16.0 with math-verify 0.9.0, latex2sympy2-extended 1.11.0 and antlr4-python3-runtime 4.13.2; torch
#             2.13.0, transformers 5.24.0.
# Guessed:    two experts, asked beforehand: 1.0, for the trailing dot is tolerated, and "5." is 5.
# Behaviour:  the content of \boxed{5.} stays a text, which equals no number. \boxed{5.0} is 5, and behind the box the full
#             stop does no harm.
# Matters to: whoever rewards or scores by it: a model that ends its sentence inside the box is paid as if it were wrong.
# Seen:       $5$: 1.0 for \boxed{5}. 1.0 for \boxed{5.0} 0.0 for \boxed{5.}
#             $\frac{1}{2}$: 0.0 for \boxed{\frac{1}{2}.}
#             of the numbers 1 to 99 with a full stop in the box 0 are paid, behind the box 99
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 trl==1.16.0 math-verify==0.9.0 \
    latex2sympy2-extended==1.11.0 antlr4-python3-runtime==4.13.2
cat > "$work/try.py" <<'PY'
from trl.rewards import accuracy_reward


def reward(said, solution):
    return accuracy_reward([[{"role": "assistant", "content": said}]], [solution])[0]


five = (r"\boxed{5}.", r"\boxed{5.0}", r"\boxed{5.}")
print("$5$:", *(f"{reward(said, '$5$')} for {said}" for said in five))
half, solution = r"\boxed{\frac{1}{2}.}", r"$\frac{1}{2}$"
print(f"{solution}: {reward(half, solution)} for {half}")
inside, behind = (sum(reward(said % i, f"${i}$") for i in range(1, 100)) for said in (r"\boxed{%d.}", r"\boxed{%d}."))
print(f"of the numbers 1 to 99 with a full stop in the box {inside:.0f} are paid, behind the box {behind:.0f}")
PY
"$work/venv/bin/python" "$work/try.py" 2> "$work/log" | tee "$work/seen" || { cat "$work/log"; exit 1; }
diff - "$work/seen" <<'SEEN'
$5$: 1.0 for \boxed{5}. 1.0 for \boxed{5.0} 0.0 for \boxed{5.}
$\frac{1}{2}$: 0.0 for \boxed{\frac{1}{2}.}
of the numbers 1 to 99 with a full stop in the box 0 are paid, behind the box 99
SEEN
echo "as seen before"
