"""How long `--help` takes, here and in nnU-Net: median of several runs, each in a new process, files warm.

python benchmarks/help.py [--nnunet-python /path/to/python] [--repeats 5]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from measure import bytes_text, machine, markdown_table, measure, measure_repeated, peer_line, seconds_text

OURS = ("--help", "plan-and-preprocess --help", "train-fold --help", "predict --help")
PEERS = ("nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnunet-python", type=Path, help="python of an environment that has nnunetv2")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    rows = []
    for words in OURS:
        rows.append(_row(f"autoseg {words}", [sys.executable, "-m", "autoseg", *words.split()], options.repeats))
    if options.nnunet_python:
        for name in PEERS:
            script = options.nnunet_python.parent / name
            rows.append(_row(f"{name} -h", [script, "-h"], options.repeats))

    print(machine())
    if options.nnunet_python:
        print(f"peer: {peer_line(options.nnunet_python)}")
    print(f"median of {options.repeats} runs\n")
    print(markdown_table(("command", "time", "peak memory"), rows))


def _row(name: str, command: list[str | Path], repeats: int) -> tuple[str, str, str]:
    measure(command)  # the first run reads the files from disk
    result = measure_repeated(command, repeats=repeats)
    return f"`{name}`", seconds_text(result.seconds), bytes_text(result.peak_bytes)


if __name__ == "__main__":
    main()
