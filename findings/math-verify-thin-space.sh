#!/usr/bin/env bash
# math-verify adds the groups of a number that are set apart by thin spaces: 12\,345 is 357.
#
# Versions:   math-verify 0.9.0 with latex2sympy2-extended 1.11.0, sympy 1.14.0, antlr4-python3-runtime 4.13.2.
# Guessed:    an expert, asked beforehand: the groups are multiplied, 12\,345 is 4140 and 30^\circ 15' is 450.
# Behaviour:  a whole number before a positive fraction is read as a mixed number, and a whole number counts as a
#             fraction: the groups are added, and degrees and minutes too. Only after 0 it is a product: 10\,000 is 0, and
#             equal to 20\,000. With a comma, or {,}, the number is itself.
# Matters to: whoever rewards or scores by it (TRL's accuracy_reward does): where a solution sets 12\,345 so, the right
#             answer without the space is wrong, and every round number is worth the same.
# Seen:       12\,345 is read as 357; 12345: False, 357: True
#             299\,792\,458 is read as 1549; 299792458: False, 1549: True
#             10\,000 is read as 10*0; 10000: False, 20\,000: True
#             30^\circ 15' is read as 45; 30.25^\circ: False, 45^\circ: True
#             12{,}345 is read as 12345; 12345: True, 357: False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q math-verify==0.9.0 latex2sympy2-extended==1.11.0 sympy==1.14.0 \
    antlr4-python3-runtime==4.13.2
cat > "$work/try.py" <<'PY'
from math_verify import parse, verify

for truth, answers in ((r"12\,345", ("12345", "357")), (r"299\,792\,458", ("299792458", "1549")),
                       (r"10\,000", ("10000", r"20\,000")), (r"30^\circ 15'", (r"30.25^\circ", r"45^\circ")),
                       (r"12{,}345", ("12345", "357"))):
    read = parse(f"${truth}$")
    said = ", ".join(f"{answer}: {verify(read, parse(f'${answer}$'))}" for answer in answers)
    print(f"{truth} is read as {read[0]}; {said}")
PY
"$work/venv/bin/python" "$work/try.py" 2> "$work/log" | tee "$work/seen" || { cat "$work/log"; exit 1; }
diff - "$work/seen" <<'SEEN'
12\,345 is read as 357; 12345: False, 357: True
299\,792\,458 is read as 1549; 299792458: False, 1549: True
10\,000 is read as 10*0; 10000: False, 20\,000: True
30^\circ 15' is read as 45; 30.25^\circ: False, 45^\circ: True
12{,}345 is read as 12345; 12345: True, 357: False
SEEN
echo "as seen before"
