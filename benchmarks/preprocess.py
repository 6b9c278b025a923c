"""How long plan + preprocess takes on a dataset, and the memory of all its processes, here and in nnU-Net.

python benchmarks/preprocess.py ../shared/data/Dataset004_Hippocampus --nnunet-python /path/to/python [--repeats 3]

Both plan and preprocess `2d` and `3d_fullres`, each run into an empty folder, on the command line as users type it.
nnU-Net runs with its own number of processes unless `--nnunet-workers` is given.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from measure import (
    MEMORY_KIND,
    Measurement,
    bytes_text,
    cores,
    machine,
    markdown_table,
    measure,
    median,
    peer_line,
    seconds_text,
)

CONFIGURATIONS = ("2d", "3d_fullres")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="raw dataset folder, named DatasetNNN_Name for nnU-Net")
    parser.add_argument("--nnunet-python", type=Path, help="python of an environment that has nnunetv2")
    parser.add_argument("--nnunet-workers", type=int, help="its processes for each step (default: its own choice)")
    parser.add_argument("--workers", type=int, default=cores(), help="our processes (default: one for each core)")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    dataset = options.dataset.resolve()
    cases = len(list((dataset / "labelsTr").iterdir()))

    # the peer and we in turns, so that a slower minute of the machine meets both
    ours, peers = [], []
    for _ in range(options.repeats):
        ours.append(_ours(dataset, options.workers))
        if options.nnunet_python:
            peers.append(_peer(dataset, options.nnunet_python, options.nnunet_workers))

    print(machine())
    if peers:
        print(f"peer: {peer_line(options.nnunet_python)}")
    print(
        f"{dataset.name}, {cases} cases, {' and '.join(CONFIGURATIONS)}; median of {options.repeats} runs into empty "
        f"folders; memory: peak {MEMORY_KIND} summed over all processes\n"
    )
    rows = [_row(f"`autoseg plan-and-preprocess`, {options.workers} workers", ours, peers)]
    if peers:
        rows.append(_row("`nnUNetv2_plan_and_preprocess`", peers, peers))
    print(markdown_table(("command", "time", "fastest to slowest", "peak memory", "faster by", "memory"), rows))


def _ours(dataset: Path, workers: int) -> Measurement:
    with tempfile.TemporaryDirectory() as folder:
        names = ",".join(CONFIGURATIONS)
        command = [sys.executable, "-m", "autoseg", "plan-and-preprocess", str(dataset), "--configurations", names]
        return measure([*command, "--workers", str(workers), "--workspace", folder])


def _peer(dataset: Path, python: Path, workers: int | None) -> Measurement:
    identifier = dataset.name.removeprefix("Dataset").split("_")[0]
    with tempfile.TemporaryDirectory() as folder:
        places = {name: Path(folder) / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        for place in places.values():
            place.mkdir()
        (places["nnUNet_raw"] / dataset.name).symlink_to(dataset)
        command = [str(python.parent / "nnUNetv2_plan_and_preprocess"), "-d", identifier, "-c", *CONFIGURATIONS]
        if workers:
            command += ["-npfp", str(workers), "-np", *[str(workers)] * len(CONFIGURATIONS)]
        return measure(command, environment={name: str(place) for name, place in places.items()})


def _row(name: str, runs: list[Measurement], peers: list[Measurement]) -> tuple[str, ...]:
    middle = median(runs)
    spread = f"{seconds_text(min(r.seconds for r in runs))} to {seconds_text(max(r.seconds for r in runs))}"
    row = (name, seconds_text(middle.seconds), spread, bytes_text(middle.peak_bytes))
    if not peers:
        return (*row, "", "")
    peer = median(peers)
    return (*row, f"{peer.seconds / middle.seconds:.1f}x", f"{middle.peak_bytes / peer.peak_bytes:.2f}x")


if __name__ == "__main__":
    main()
