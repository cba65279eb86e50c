"""`make drills`: what must not be lost and who must not get in, tried for minutes to an hour; one table at the end.

    python experiments/drills.py [--soak-minutes 5] [--only NAME]

Each drill is a set of tests, the slow ones too, or the soak of both servers. docs/reliability.md has the table of the
last run.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "kills, one process": ["tests/train/test_interruptions.py", "-k", "twenty and one"],
    "kills, DDP": ["tests/train/test_interruptions.py", "-k", "twenty and ddp"],
    "kills, FSDP": ["tests/train/test_interruptions.py", "-k", "twenty and fsdp"],
    "signals, full disks, two commands": ["tests/train/test_interruptions.py", "-k", "not twenty"],
    "damaged samples": ["tests/train/test_faults.py"],
    "damaged and strange shards": ["tests/data/test_shards.py"],
    "hostile model directories": ["tests/inference/test_hostile.py"],
    "hostile uploads and requests": ["tests/deploy/test_app.py", "tests/deploy/test_serving.py"],
}


def run_tests(arguments: list[str]) -> str:
    """How many passed and failed, and what they counted."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.xml")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "0",
            "-m",
            "",
            "-o",
            "junit_family=xunit1",
            f"--junitxml={report}",
        ]
        subprocess.run([*command, *arguments], cwd=ROOT, stdout=sys.stderr, env=os.environ | {"OMP_NUM_THREADS": "1"})
        suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    wrong = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    passed = int(suite.get("tests", 0)) - wrong - int(suite.get("skipped", 0))
    found = [(item.get("name", ""), item.get("value")) for item in suite.iter("property")]
    counted = [f"{value} {name}" for name, value in found if not name.startswith("hypothesis-")]
    return "; ".join([f"{passed} passed" + f", **{wrong} failed**" * bool(wrong), *counted])


def run_soak(minutes: float) -> str:
    """Requests, errors and tracebacks of each server."""
    command = [sys.executable, "experiments/benchmarks/soak.py", "--minutes", str(minutes), "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=sys.stderr, text=True)
    if done.returncode:
        return f"**failed**, exit code {done.returncode}"
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    return "; ".join(
        f"{name}: {sum(row['requests'].values()):,} requests, {sum(row['errors'].values()):,} errors, "
        f"{row['tracebacks']} tracebacks"
        for name, row in rows.items()
    )


@click.command(help=__doc__)
@click.option("--soak-minutes", type=click.FloatRange(0.01, 60), default=5.0, show_default=True, help="Per server.")
@click.option("--only", type=click.Choice([*TESTS, "soak"]), multiple=True, help="These drills.")
def main(soak_minutes: float, only: tuple[str, ...]) -> None:
    drills = {name: lambda arguments=arguments: run_tests(arguments) for name, arguments in TESTS.items()}
    drills["soak"] = lambda: run_soak(soak_minutes)
    lines = ["| drill | result | minutes |", "| --- | --- | ---: |"]
    for name, drill in drills.items():
        if not only or name in only:
            print(f"{name} …", file=sys.stderr, flush=True)
            begin = time.monotonic()
            lines.append(f"| {name} | {drill()} | {(time.monotonic() - begin) / 60:.1f} |")
            print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))
    sys.exit(any("failed**" in line for line in lines))


if __name__ == "__main__":
    main()
