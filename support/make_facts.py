"""Ask a vision model for the facts of every image of a data set: `--help` shows the flags."""

import hashlib
import io
import sys
from pathlib import Path

from tqdm import tqdm

from reward import Example
from support import data, files, full_dyme, runs, settings


def main() -> None:
    """Write rows with facts into OUT.jsonl; pictures and replies go into OUT/. Raises UserError."""
    parser = settings.one_line_parser("Write rows with the facts of their images, for --data of dyme.py.")
    for flag in ("--data", "--split", "--helper-url", "--helper-model", "--helper-key-env"):
        parser.add_argument(flag, required=flag != "--helper-key-env", default="")
    parser.add_argument("out", type=Path, metavar="OUT.jsonl")
    args = parser.parse_args()
    examples, folder = data.load_data(args.data, args.split), args.out.with_suffix("")
    if args.out.suffix != ".jsonl" or args.out.exists() or not all(example.image for example in examples):
        parser.error(f"{args.out}: must be a new .jsonl file, of data in which every row has an image")
    key = full_dyme.read_key(args.helper_key_env)
    folder.mkdir(parents=True, exist_ok=True)
    def row(example: Example) -> dict[str, str | None]:
        example.image().save(picture := io.BytesIO(), "PNG")
        name = f"{hashlib.sha256(picture.getvalue()).hexdigest()[:16]}.png"
        (folder / name).write_bytes(picture.getvalue())
        return {"question": example.question, "answer": example.answer, "trace": example.trace,
                "image": f"{folder.name}/{name}", "facts": helper.see(picture.getvalue())}
    with full_dyme.Helper(args.helper_url, args.helper_model, key, folder=folder) as helper:
        helper.check_server()
        rows = list(tqdm(helper.pool.map(row, examples), total=len(examples), ncols=80))
    files.write_jsonl(args.out, rows)
    print(f"{args.out}: {len(rows)} rows, {sum(not row['facts'] for row in rows)} without facts")


if __name__ == "__main__":
    sys.exit(runs.run_main(main))
