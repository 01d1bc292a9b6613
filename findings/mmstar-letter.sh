#!/usr/bin/env bash
# lmms-eval's MMStar reads "The answer is B. Canada" as option C.
#
# Versions:   lmms_eval 0.7.3 without the packages that its import does not need; torch 2.13.0, transformers 5.24.0.
# Guessed:    an expert, asked beforehand: a prefix is matched, so that "The answer is B. Canada" is right where B is.
# Behaviour:  behind an answer phrase the last capital from A to D counts, also within a word: the C of Canada, the D of
#             Dark. A response that opens with the article A chooses A.
# Matters to: whoever compares models on MMStar: one that repeats the option or gives a reason is marked wrong.
# Seen:       B: as B
#             The answer is B.: as B
#             The answer is B. Canada: as C
#             The answer is B, as shown by the Dark line.: as D
#             A closer look shows that it is (B).: as A
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0 evaluate==0.4.6 \
    loguru==0.7.3 numpy==2.4.6 pillow==13.0.0 pytz==2026.6 PyYAML==6.0.4 sacrebleu==2.6.0 tenacity==9.2.1
"$work/venv/bin/pip" install -q --no-deps lmms_eval==0.7.3
cat > "$work/try.py" <<'PY'
from lmms_eval.tasks.mmstar.utils import mmstar_process_results

for response in ("B", "The answer is B.", "The answer is B. Canada", "The answer is B, as shown by the Dark line.",
                 "A closer look shows that it is (B)."):
    for letter in "ABCD":  # the option that counts as right is the one that was read
        row = {"answer": letter, "index": 0, "category": "math", "l2_category": "geometry"}
        if mmstar_process_results(row, [response])["average"]["score"] == 1.0:
            print(f"{response}: as {letter}")
PY
"$work/venv/bin/python" "$work/try.py" 2> "$work/log" | tee "$work/seen" || { cat "$work/log"; exit 1; }
diff - "$work/seen" <<'SEEN'
B: as B
The answer is B.: as B
The answer is B. Canada: as C
The answer is B, as shown by the Dark line.: as D
A closer look shows that it is (B).: as A
SEEN
echo "as seen before"
