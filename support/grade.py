"""Score a student's file by the course's checks: python -m support.grade FILE --seed 7"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from support import UserError, runs, settings

CHECKS = Path(__file__).with_name("test_course.py")
VERDICTS = {"passed": "right", "failed": "wrong", "skipped": "missing"}


def grade(file: Path, seed: int, limit: float, only: list[int]) -> dict[str, tuple[str, str]]:
    """Verdict and message of each check, or of those of exercises `only`. Raises UserError."""
    if seed < 0 or not limit > 0:
        raise UserError("--seed must be at least 0, --limit more than 0")
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    found = re.findall(r"^def (test_exercise_(\d+)\w+)", CHECKS.read_text(), re.MULTILINE)
    if unknown := set(only) - {int(number) for _, number in found}:
        raise UserError(f"--only {min(unknown)}: no such exercise")
    names = [name for name, number in found if not only or int(number) in only]
    results: dict[str, tuple[str, str]] = {}
    while left := names[len(results):]:  # again, after one that ended the process
        code, lines = run_checks(file, seed, limit, [f"{CHECKS}::{name}" for name in left])
        stages = [json.loads(line) for line in lines if line.startswith("[")]
        late = any(line.startswith("Timeout (") for line in lines)
        why = f"it runs for more than {limit:g} s" if late else f"it ends the process ({code=})"
        for name, stage, outcome, said in stages:
            if said.startswith(f"{file.name} cannot be imported"):
                raise UserError(said)
            if stage == "call" or outcome != "passed":
                results[name] = VERDICTS[outcome], said
        if not stages:  # the file is imported before the first check
            raise UserError(f"{file.name} cannot be imported: {why}" if code in (0, 1) else
                            f"the checks do not run: {why}; python -m pytest -k exercise says more")
        if len(results) < len(names):
            results[names[len(results)]] = "wrong", why
    return results


def run_checks(file: Path, seed: int, limit: float, checks: list[str]) -> tuple[int, list[str]]:
    """Run checks in a process: its exit code, and what conftest.py reports."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        given = {"COURSE_FILE": str(file.resolve()), "COURSE_SEED": str(seed),
                 "COURSE_LIMIT": str(limit), "COURSE_REPORT": str(report)}
        done = subprocess.run(
            [sys.executable, "-B", "-m", "pytest", "-p", "no:cacheprovider", *checks],
            cwd=CHECKS.parents[1], env=os.environ | given,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return done.returncode, report.read_text().splitlines() if report.exists() else []


def main() -> None:
    """Read the flags, grade, print the table."""
    parser = settings.one_line_parser(__doc__ or "")
    parser.add_argument("file", type=Path, help="what a student wrote")
    parser.add_argument("--seed", type=int, default=0, help="draws the cases [0, as students do]")
    parser.add_argument("--limit", type=float, default=60, help="seconds for a check [60]")
    parser.add_argument("--only", type=int, nargs="+", default=[], help="exercises [all]")
    args = parser.parse_args()
    results = grade(args.file, args.seed, args.limit, args.only)
    for name, (verdict, said) in results.items():
        number, title = name.removeprefix("test_exercise_").split("_", 1)
        print(f"{int(number):2} {title.replace('_', ' '):40} {verdict:8}",
              said.strip().replace("\n", "\n      "))
    count = [verdict for verdict, _ in results.values()].count
    total = ", ".join(f"{count(verdict)} {verdict}" for verdict in VERDICTS.values())
    print(f"{len(results)} checks, seed {args.seed}: {total}")


if __name__ == "__main__":
    sys.exit(runs.run_main(main))
