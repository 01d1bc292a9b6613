#!/usr/bin/env bash
# The scorer of reasoning-gym's gsm_symbolic takes a wrong sign for right, and a right negative answer for wrong.
#
# Version:    reasoning-gym 0.1.25.
# Guessed:    an expert, asked beforehand: the wrong sign gets a part, 0.75 ("288" is 3 of the 4 characters of
#             "-288"), and the answer itself 1.0.
# Behaviour:  the scorer looks for \b-?\d+: before a minus sign there is no word boundary, so the sign is never read.
#             "-288" for 288 is paid in full. Where the answer is -1, both "-1" and "1" get 0.01. Thousands with a
#             comma are read up to the comma: "1,585" for 1585 gets 0.01.
# Matters to: whoever trains with it as a reward: compare numbers by a parser of your own.
# Seen:       288: 1.0 for 288, 1.0 for -288, 1.0 for The result is -288
#             -1: 0.01 for -1
#             1585: 0.01 for 1,585
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q reasoning-gym==0.1.25
cat > "$work/try.py" <<'PY'
import reasoning_gym

data = reasoning_gym.create_dataset("gsm_symbolic", seed=1, size=3000)
for wanted, answers in (("288", ("288", "-288", "The result is -288")), ("-1", ("-1",)), ("1585", ("1,585",))):
    entry = next(data[i] for i in range(3000) if data[i]["answer"] == wanted)
    print(f"{wanted}:", ", ".join(f"{data.score_answer(answer, entry)} for {answer}" for answer in answers))
PY
"$work/venv/bin/python" "$work/try.py" | tee "$work/seen"
diff - "$work/seen" <<'SEEN'
288: 1.0 for 288, 1.0 for -288, 1.0 for The result is -288
-1: 0.01 for -1
1585: 0.01 for 1,585
SEEN
echo "as seen before"
