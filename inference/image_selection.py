"""Held-out scores of configurations that answer with an image alone -> which one to use, as a `Selection`.

There is nothing to threshold, to clean or to calibrate: the mean PSNR over the held-out cases decides. Where no fine
image is known (self-supervision) there is nothing to compare, and one configuration must be all there is.
"""

from __future__ import annotations

from collections.abc import Sequence

from autoseg.errors import PlanError
from autoseg.files import read_json
from autoseg.inference.cascade import held_out_cases
from autoseg.inference.chosen import Chosen, Member
from autoseg.inference.selection import Selection
from autoseg.plan import Decision, Plan
from autoseg.workspace import SUMMARY, VALIDATION, Workspace


def select_by_image(plan: Plan, configurations: Sequence[str], *, workspace: Workspace) -> Selection:
    """The configuration with the highest mean PSNR over the cases that all of them were scored on; or the only one.

    It mirrors where its plan does, as it was scored. Raises PlanError where several are there and none is scored.
    """
    scores = {name: held_out_psnr(name, workspace) for name in configurations}
    common = set.intersection(*(set(found) for found in scores.values()))
    if len(scores) > 1 and not common:
        raise PlanError(
            f"{workspace.root}: no held-out image is scored for all of {', '.join(configurations)}, so there is "
            "nothing to choose by; export one of them with `autoseg export --configuration`."
        )
    mean = {name: sum(found[case] for case in common) / len(common) for name, found in scores.items() if common}
    best = max(mean, key=lambda name: mean[name], default=configurations[0])
    shown = ", ".join(f"{name} {value:.2f} dB" for name, value in mean.items())
    because = (
        f"of the mean PSNR over {len(common)} held-out cases ({shown}) it has the highest."
        if common
        else "it is the only one, and no fine image is known to score it by."
    )
    mirroring = bool(plan.configuration(best).training.mirror_axes)
    return Selection(
        plan.id,
        Chosen((Member(best, mirroring),), (1.0,)),
        calibration_error=None,
        scores=(),
        decisions=(Decision("configuration", best, "empirical", because),),
        cases=len(common),
    )


def held_out_psnr(configuration: str, workspace: Workspace) -> dict[str, float]:
    """Case -> PSNR in dB of each held-out image whose fine truth is known and that is not equal to it."""
    found: dict[str, float] = {}
    for fold in range(len(held_out_cases(workspace.folds))):
        path = workspace.fold(configuration, str(fold)) / VALIDATION / SUMMARY
        if path.is_file():
            images = read_json(path, error=PlanError, what="summary of scores").get("images", {})
            for case, row in images.get("cases", {}).items():
                if row["psnr"] is not None:
                    found[case] = float(row["psnr"])
    return found
