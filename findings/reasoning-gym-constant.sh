#!/usr/bin/env bash
# Two data sets of reasoning-gym pay one and the same answer in full almost everywhere: "0", and any text at all.
#
# Version:    reasoning-gym 0.1.25.
# Guessed:    two experts, asked beforehand: "0" where the probability is 0.234375 gets 1 - |error|, about 0.77; "False"
#             where the answer is True gets 0.0 or 0.01.
# Behaviour:  coin_flip pays the length of the common beginning over the shorter of the two texts: "0" is the whole
#             beginning of every "0.234375". game_of_life_halting compares bool(text) with bool(text), and every text
#             that is not empty, "False" too, is True.
# Matters to: whoever mixes all data sets of the package into a reinforcement run: one teaches to write "0", the other
#             pays every response alike, so that its groups have no advantage.
# Seen:       coin_flip, 0: 459 of 500 in full
#             coin_flip, 0.5: 24 of 500 in full
#             game_of_life_halting, True: 100 of 100 in full
#             game_of_life_halting, False: 100 of 100 in full
#             game_of_life_halting, I do not know: 100 of 100 in full
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q reasoning-gym==0.1.25
cat > "$work/try.py" <<'PY'
import reasoning_gym

for name, size, answers in (("coin_flip", 500, ("0", "0.5")),
                            ("game_of_life_halting", 100, ("True", "False", "I do not know"))):
    rows = reasoning_gym.create_dataset(name, seed=42, size=size)
    for answer in answers:
        paid = [rows.score_answer(answer, row) for row in rows]
        print(f"{name}, {answer}: {paid.count(1.0)} of {size} in full")
PY
"$work/venv/bin/python" "$work/try.py" 2> "$work/log" | tee "$work/seen" || { cat "$work/log"; exit 1; }
diff - "$work/seen" <<'SEEN'
coin_flip, 0: 459 of 500 in full
coin_flip, 0.5: 24 of 500 in full
game_of_life_halting, True: 100 of 100 in full
game_of_life_halting, False: 100 of 100 in full
game_of_life_halting, I do not know: 100 of 100 in full
SEEN
echo "as seen before"
