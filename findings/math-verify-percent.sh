#!/usr/bin/env bash
# math-verify takes \boxed{50\%} for 0.5 and for 50 in one environment, and for neither in another, without a word.
#
# Versions:   math-verify 0.9.0, latex2sympy2-extended 1.11.0 and sympy 1.14.0 throughout; antlr4-python3-runtime as pip
#             chooses it, as lm-eval's extra `math` pins it (4.11.0), and beside hydra-core 1.3.8, which verl needs (4.9.3).
# Guessed:    two experts, asked beforehand: all three are supported, and 50\% is 0.5 with each.
# Behaviour:  with 4.13.2 it is parsed to 50*(1/100); with the two others it stays a text, which equals no number (nor
#             the plain text 50%). No error, no warning.
# Matters to: whoever rewards or scores by it: the same responses are paid differently beside other packages. Pin the
#             runtime, and try a percentage.
# Seen:       antlr 4.13.2: of 99 percentages in a box 99 are i, 99 are i/100, 99 are i%
#             antlr 4.11.0: of 99 percentages in a box 0 are i, 0 are i/100, 0 are i%
#             antlr 4.9.3: of 99 percentages in a box 0 are i, 0 are i/100, 0 are i%
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/try.py" <<'PY'
from importlib.metadata import version

from math_verify import parse, verify

said = {i: parse(rf"The answer is \boxed{{{i}\%}}.") for i in range(1, 100)}
forms = {"i": lambda i: f"${i}$", "i/100": lambda i: f"$0.{i:02d}$", "i%": lambda i: f"{i}%"}
counts = (f"{sum(verify(parse(form(i)), said[i]) for i in said)} are {name}" for name, form in forms.items())
print(f"antlr {version('antlr4-python3-runtime')}: of {len(said)} percentages in a box", ", ".join(counts))
PY
for beside in "" antlr4-python3-runtime==4.11.0 hydra-core==1.3.8; do
    python3 -m venv --clear "$work/venv"
    "$work/venv/bin/pip" install -q math-verify==0.9.0 latex2sympy2-extended==1.11.0 sympy==1.14.0 $beside
    "$work/venv/bin/python" "$work/try.py" 2>> "$work/log" || { cat "$work/log"; exit 1; }
done | tee "$work/seen"
diff - "$work/seen" <<'SEEN'
antlr 4.13.2: of 99 percentages in a box 99 are i, 99 are i/100, 99 are i%
antlr 4.11.0: of 99 percentages in a box 0 are i, 0 are i/100, 0 are i%
antlr 4.9.3: of 99 percentages in a box 0 are i, 0 are i/100, 0 are i%
SEEN
echo "as seen before"
