"""A run on a Ray cluster of this machine against a run without: the ratio of their times, and whether both are equal.

    python benchmarks/ray_vs_local.py DATASET [--repeats 3] [--steps 60] [--configurations 3d_fullres]

Both plan by the same plan.json, preprocess, train every fold for so many steps, predict what was held out, choose,
export and report. The cluster has one node with as many cores as this process may use, so folds are trained one after
another in both; it is started before the clock, as a cluster is that stands. They take turns. Needs the extra `ray`.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from autoseg.checkpoint import load_tensors
from autoseg.executor import available_cores, executor_of
from autoseg.pipeline import run
from autoseg.stages import plan_and_preprocess, workspace_of
from autoseg.training.loop import RESUME_FORMAT
from autoseg.workspace import RESUME, Workspace


def main() -> None:
    """Print a line for each repeat, then the ratio of the medians."""
    arguments = parsed()
    ratios = []
    with tempfile.TemporaryDirectory() as folder, executor_of("ray") as cluster:
        planned = Path(folder) / "planned"
        plan_and_preprocess(
            arguments.dataset, workspace=planned, configurations=arguments.configurations, fill_store=False,
            gpu_memory_bytes=arguments.gpu_memory, fold_seconds=60.0, device="cpu",
        )  # fmt: skip
        for repeat in range(arguments.repeats):
            seconds, made = {}, {}
            for name in ("local", "ray") if repeat % 2 == 0 else ("ray", "local"):
                place = Path(folder) / f"{name}_{repeat}"
                shutil.copytree(planned, place)
                start = time.perf_counter()
                run(
                    arguments.dataset, workspace=place, steps=arguments.steps, device="cpu", workers=available_cores(),
                    configurations=arguments.configurations, executor=cluster if name == "ray" else None,
                )  # fmt: skip
                seconds[name] = time.perf_counter() - start
                made[name] = artefacts(workspace_of(arguments.dataset, place))
                shutil.rmtree(place)
            ratios.append(seconds["ray"] / seconds["local"])
            equal = "identical" if made["ray"] == made["local"] else "DIFFERENT"
            print(
                f"{repeat + 1}: local {seconds['local']:.1f} s, ray {seconds['ray']:.1f} s, ratio {ratios[-1]:.3f}, "
                f"{len(made['ray'])} files {equal}",
                flush=True,
            )
    print(f"ray / local: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def artefacts(place: Workspace) -> dict[str, object]:
    """Content of the stores, of the states of training and of the held-out predictions, by file."""
    found: dict[str, object] = {}
    for path in (*place.root.glob("preprocessed/*/*.b2nd"), *place.models.glob("*/*/validation/*.nii.gz")):
        found[f"{path.relative_to(place.root)}"] = path.read_bytes()
    for path in place.models.glob(f"*/*/{RESUME}"):
        tensors, _ = load_tensors(path, RESUME_FORMAT)
        found[f"{path.relative_to(place.root)}"] = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    return found


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--configurations", type=lambda text: text.split(","), default=["3d_fullres"])
    parser.add_argument("--gpu-memory", type=int, default=10**9)
    return parser.parse_args()


if __name__ == "__main__":
    main()
