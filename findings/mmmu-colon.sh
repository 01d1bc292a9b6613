#!/usr/bin/env bash
# lmms-eval's MMMU takes "C: bird" for a letter drawn at random.
#
# Versions:   lmms_eval 0.7.3 without the packages that its import does not need; torch 2.13.0, transformers 5.24.0.
# Guessed:    two experts, asked beforehand: "C: bird" is C, by a rule for the colon. (That a random letter stands in for
#             an answer that cannot be read, both knew.)
# Behaviour:  a letter is read in (C), before a space or before a full stop. With a colon, a closing bracket alone or
#             bold type one of the options is drawn, though the option's own text stands beside it.
# Matters to: whoever compares models on MMMU: one that answers in such a form is right in a quarter, by chance, and other
#             rows' draws move with it.
# Seen:       C. bird: C
#             C bird: C
#             C: bird: A, B, C, D
#             C) bird: A, B, C, D
#             **C**: A, B, C, D
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0 evaluate==0.4.6 \
    loguru==0.7.3 numpy==2.4.6 pillow==13.0.0 pytz==2026.6 PyYAML==6.0.4 sacrebleu==2.6.0 tenacity==9.2.1
"$work/venv/bin/pip" install -q --no-deps lmms_eval==0.7.3
cat > "$work/try.py" <<'PY'
from lmms_eval.tasks.mmmu.utils import parse_multi_choice_response

options = {"A": "dog", "B": "cat", "C": "bird", "D": "fish"}
for response in ("C. bird", "C bird", "C: bird", "C) bird", "**C**"):
    read = {parse_multi_choice_response(response, [*options], options) for _ in range(200)}
    print(f"{response}: {', '.join(sorted(read))}")
PY
"$work/venv/bin/python" "$work/try.py" 2> "$work/log" | tee "$work/seen" || { cat "$work/log"; exit 1; }
diff - "$work/seen" <<'SEEN'
C. bird: C
C bird: C
C: bird: A, B, C, D
C) bird: A, B, C, D
**C**: A, B, C, D
SEEN
echo "as seen before"
