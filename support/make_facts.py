"""Ask a vision model for the facts of every image of a data set: `--help` shows the flags."""

import base64
import contextlib
import hashlib
import io
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from reward import Example
from support import data, files, full_dyme, runs, settings


def main() -> None:
    """Write rows with facts into OUT.jsonl; pictures and replies go into OUT/. Raises UserError."""
    parser = settings.one_line_parser(
        "Write rows with the facts of their images, for --data of dyme.py.")
    for flag in ("--data", "--split", "--helper-url", "--helper-model", "--helper-key-env"):
        parser.add_argument(flag, required=flag != "--helper-key-env", default="")
    parser.add_argument("out", type=Path, metavar="OUT.jsonl")
    args = parser.parse_args()
    examples, folder = data.load_data(args.data, args.split), args.out.with_suffix("")
    if args.out.suffix != ".jsonl" or args.out.exists() or not all(e.image for e in examples):
        parser.error(f"{args.out}: must be a new .jsonl file, of data with an image in every row")
    key = full_dyme.read_key(args.helper_key_env)
    folder.mkdir(parents=True, exist_ok=True)
    helper = full_dyme.Helper(folder, args.helper_url, args.helper_model, key)

    async def row(example: Example) -> dict[str, Any]:
        picture, draw = io.BytesIO(), example.image
        assert draw  # checked above
        draw().save(picture, "PNG")
        png = picture.getvalue()
        name = f"{hashlib.sha256(png).hexdigest()[:16]}.png"
        (folder / name).write_bytes(png)
        url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        facts = await helper.ask([{"type": "text", "text": full_dyme.IMAGE_REQUEST},
                                  {"type": "image_url", "image_url": {"url": url}}], 5000)
        return {"question": example.question, "answer": example.answer, "trace": example.trace,
                "image": f"{folder.name}/{name}", "facts": facts or None}

    rows = []
    with contextlib.closing(helper), tqdm(total=len(examples), ncols=80) as bar:
        for first in range(0, len(examples), 64):  # not all pictures at once
            started = [helper.start(row(example)) for example in examples[first:first + 64]]
            rows += [future.result() for future in started]
            helper.check()
            bar.update(len(started))
    files.write_jsonl(args.out, rows)
    print(f"{args.out}: {len(rows)} rows, {sum(not row['facts'] for row in rows)} without facts")


if __name__ == "__main__":
    sys.exit(runs.run_main(main))
