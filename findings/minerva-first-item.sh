#!/usr/bin/env bash
# lm-eval's minerva_math compares the first item of a list alone: where 1,-2 is right, "1,7" is right, and "-2,1" is not.
#
# Versions:   lm-eval 0.4.13 without the packages that this task's file does not need; sympy 1.14.0, math-verify 0.9.0 and
#             antlr4-python3-runtime 4.11.0, as its extra `math` asks.
# Guessed:    two experts, asked beforehand: "1,7" is read as 17, and wrong.
# Behaviour:  sympy's parse_latex reads up to the comma, and nobody looks at what is left. A mixed number is a product: a
#             half is right where 1\frac{1}{2} is.
# Matters to: whoever compares models on MATH by exact_match: a wrong second solution counts as right, in every pair that
#             was tried. The task's second figure, math_verify, sees it.
# Seen:       1,-2: exact_match 1 for 1,-2, math_verify 1
#             1,-2: exact_match 1 for 1,7, math_verify 0
#             1,-2: exact_match 0 for -2,1, math_verify 1
#             1\frac{1}{2}: exact_match 0 for \frac{3}{2}, math_verify 1
#             1\frac{1}{2}: exact_match 1 for \frac{1}{2}, math_verify 0
#             a,b for a,c, with c unequal b: exact_match 1 in 448 of 448
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q sympy==1.14.0 antlr4-python3-runtime==4.11.0 math-verify==0.9.0 \
    latex2sympy2-extended==1.11.0
"$work/venv/bin/pip" install -q --no-deps lm-eval==0.4.13
cat > "$work/try.py" <<'PY'
import itertools
import runpy
from importlib.util import find_spec
from pathlib import Path

folder = Path(find_spec("lm_eval").submodule_search_locations[0])
process_results = runpy.run_path(str(folder / "tasks/minerva_math/utils.py"))["process_results"]


def score(right, said):
    row = {"solution": rf"It is $\boxed{{{right}}}$.", "answer": right}
    return process_results(row, [f"Final Answer: The final answer is ${said}$. I hope it is correct."])


for right, said in (("1,-2", "1,-2"), ("1,-2", "1,7"), ("1,-2", "-2,1"), (r"1\frac{1}{2}", r"\frac{3}{2}"),
                    (r"1\frac{1}{2}", r"\frac{1}{2}")):
    scores = score(right, said)
    print(f"{right}: exact_match {scores['exact_match']} for {said}, math_verify {scores['math_verify']}")
triples = [(a, b, c) for a, b, c in itertools.product(range(-4, 4), repeat=3) if b != c]
paid = sum(score(f"{a},{c}", f"{a},{b}")["exact_match"] for a, b, c in triples)
print(f"a,b for a,c, with c unequal b: exact_match 1 in {paid} of {len(triples)}")
PY
"$work/venv/bin/python" "$work/try.py" 2> "$work/log" | tee "$work/seen" || { cat "$work/log"; exit 1; }
diff - "$work/seen" <<'SEEN'
1,-2: exact_match 1 for 1,-2, math_verify 1
1,-2: exact_match 1 for 1,7, math_verify 0
1,-2: exact_match 0 for -2,1, math_verify 1
1\frac{1}{2}: exact_match 0 for \frac{3}{2}, math_verify 1
1\frac{1}{2}: exact_match 1 for \frac{1}{2}, math_verify 0
a,b for a,c, with c unequal b: exact_match 1 in 448 of 448
SEEN
echo "as seen before"
