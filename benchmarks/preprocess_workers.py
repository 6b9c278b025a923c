"""How much faster two worker processes preprocess than one.

python benchmarks/preprocess_workers.py ../shared/data/Dataset010_SunnybrookLV [--workers 1 2] [--copies 8]

The dataset, or one with so many copies of each case, is planned once. Then its store is filled anew, in turns with each
number of workers, by the command `autoseg plan-and-preprocess --keep-plan`; its start-up is timed too, and beside it
what is left when the start-up (the same command on a store that is full) is taken off.
"""

from __future__ import annotations

import argparse
import json
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
    parser.add_argument("--copies", type=int, default=1, help="of each case, under other names")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dataset = copied(options.dataset.resolve(), Path(folder), options.copies)
        command = [sys.executable, "-m", "autoseg", "plan-and-preprocess", dataset, "--workspace", folder]
        measure([*command, "--fold-time", "30m", "--quiet"])
        keep = [*command, "--keep-plan", "--quiet", "--workers"]
        store = Path(folder) / dataset.name / "preprocessed"
        filling: dict[int, list[float]] = {workers: [] for workers in options.workers}
        starting: dict[int, list[float]] = {workers: [] for workers in options.workers}
        for _ in range(options.repeats):
            for workers in options.workers:
                shutil.rmtree(store)
                filling[workers].append(measure([*keep, str(workers)]).seconds)
                starting[workers].append(measure([*keep, str(workers)]).seconds)
    print(machine())
    times = f", {options.copies} copies of each case" if options.copies > 1 else ""
    print(f"{dataset.name}{times}, median of {options.repeats} runs (fastest to slowest)\n")
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


def copied(dataset: Path, folder: Path, copies: int) -> Path:
    """A dataset with so many copies of each training case, links to its files; one copy is the dataset itself."""
    if copies == 1:
        return dataset
    target = folder / "raw" / dataset.name
    for name in ("imagesTr", "labelsTr"):
        (target / name).mkdir(parents=True)
        for path in sorted((dataset / name).iterdir()):
            for number in range(copies):
                (target / name / f"copy{number}{path.name}").symlink_to(path)
    description = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))
    description.pop("numTraining", None)
    (target / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    return target


if __name__ == "__main__":
    main()
