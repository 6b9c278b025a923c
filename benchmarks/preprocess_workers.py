"""How much faster two worker processes preprocess than one.

python benchmarks/preprocess_workers.py ../shared/data/Dataset010_SunnybrookLV [--workers 1 2] [--repeats 5]

The dataset is planned once. Then its store is filled anew, in turns with each number of workers, by the command
`autoseg plan-and-preprocess --keep-plan`; its start-up is timed too, and beside it what is left when the start-up (the
same command on a store that is full) is taken off.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

from measure import machine, markdown_table, measure, seconds_text


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "autoseg", "plan-and-preprocess", options.dataset, "--workspace", folder]
        measure([*command, "--fold-time", "30m", "--quiet"])
        keep = [*command, "--keep-plan", "--quiet", "--workers"]
        store = Path(folder) / options.dataset.resolve().name / "preprocessed"
        filling: dict[int, list[float]] = {workers: [] for workers in options.workers}
        starting: dict[int, list[float]] = {workers: [] for workers in options.workers}
        for _ in range(options.repeats):
            for workers in options.workers:
                shutil.rmtree(store)
                filling[workers].append(measure([*keep, str(workers)]).seconds)
                starting[workers].append(measure([*keep, str(workers)]).seconds)
    print(machine())
    print(f"{options.dataset.name}, median of {options.repeats} runs (fastest to slowest)\n")
    first = options.workers[0]
    alone = {w: [whole - start for whole, start in zip(filling[w], starting[w], strict=True)] for w in options.workers}
    rows = []
    for workers in options.workers:
        row = [str(workers)]
        for seconds in (filling, alone):
            ratio = median(a / b for a, b in zip(seconds[first], seconds[workers], strict=True))
            spread = f"{seconds_text(min(seconds[workers]))} to {seconds_text(max(seconds[workers]))}"
            row += [f"{seconds_text(median(seconds[workers]))} ({spread})", f"{ratio:.2f}x"]
        rows.append(row)
    print(markdown_table(("workers", "the command", "faster by", "without start-up", "faster by"), rows))


if __name__ == "__main__":
    main()
