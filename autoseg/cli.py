"""The command line: one thin function for each command. Only here is printed, only here environment and clock are read.

Only typer is imported up here, so that `--help` answers at once; every command imports what it needs.
"""

from __future__ import annotations

import atexit
import functools
import os
import signal
import sys
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from autoseg import __version__
from autoseg.options import (
    DatasetArgument,
    DeviceOption,
    DropCasesOption,
    ExecutorOption,
    FoldsOption,
    GroupByOption,
    InputSpacingOption,
    LogOption,
    MlflowOption,
    OutputSpacingOption,
    QuietOption,
    ScaleOption,
    SeedOption,
    TaskOption,
    VerboseOption,
    WorkersOption,
    WorkspaceOption,
)
from autoseg.status import DONE, REFUSED, SOME_FAILED, complain, status_of

if TYPE_CHECKING:
    from autoseg.experiment_planning.superresolution import Asked
    from autoseg.screen import Screen
    from autoseg.training.loop import Progress

SCREEN: ContextVar[Screen] = ContextVar("screen")  # of the command that runs, made from its -v and --quiet

app = typer.Typer(
    help="Segmentation of medical images: a folder of labelled images in, a trained model and its predictions out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help needs no rich and takes half the time
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def command(name: str, short: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Make a function a command: what it returns is the exit status, what it raises becomes one sentence."""

    def register(function: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> None:
            from autoseg.screen import Screen
            from autoseg.units import parse_device

            screen = Screen(verbose=kwargs["verbose"], quiet=kwargs["quiet"])
            SCREEN.set(screen)

            def run() -> int:
                parse_device(kwargs["device"])  # refused even where the command computes nothing
                return function(*args, **kwargs)

            raise typer.Exit(status_of(run, screen))

        app.command(name, short_help=short)(guarded)
        return function

    return register


def _cores(workers: int | None) -> int:
    """The number of worker processes: what was asked for, else the cores that this process may use."""
    if workers is not None:
        return workers
    from autoseg.executor import available_cores

    return available_cores()


def _names(listed: str) -> list[str]:
    """The names in `A,B`."""
    return [name.strip() for name in listed.split(",") if name.strip()]


def _asked(input_spacing: str | None, output_spacing: str | None, scale: str | None, task: str) -> Asked | None:
    """What the options say of super-resolution."""
    from autoseg.stages import asked_super_resolution
    from autoseg.units import parse_numbers

    return asked_super_resolution(
        input_spacing=None if input_spacing is None else parse_numbers(input_spacing, option="--input-spacing"),
        output_spacing=None if output_spacing is None else parse_numbers(output_spacing, option="--output-spacing"),
        scale=None if scale is None else parse_numbers(scale, option="--sr-scale", counts=(1, 3)),
        task=task,
    )


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"autoseg {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@command("verify", "Check a raw dataset, case by case.")
def verify(
    dataset: DatasetArgument,
    fix: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--fix", metavar="OUT", help="Write a repaired copy of the dataset to this new folder."),
    ] = None,
    json_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", metavar="FILE", help="Write the findings as JSON too."),
    ] = None,
    workers: WorkersOption = None,
    workspace: WorkspaceOption = None,
    device: DeviceOption = "auto",
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> int:
    """Check a raw dataset, case by case; --fix writes a repaired copy where that is safe.

    \b
    Example:
      autoseg verify data/Dataset004_Hippocampus
    """
    from autoseg.experiment_planning.verify import fix_dataset, verify_dataset
    from autoseg.files import write_json

    screen = SCREEN.get()
    if fix is not None:
        fixed = fix_dataset(dataset, fix, workers=_cores(workers))
        for problem in fixed.repairs:
            screen.say(f"repaired  {problem.case or '(dataset)'}  {problem.sentence}")
        for problem in fixed.remaining:
            screen.say(f"{problem.severity}  {problem.case or '(dataset)'}  {problem.sentence}")
        copy = f"the repaired copy is {fix}" if fixed.repairs else "there was nothing to repair, no copy was written"
        screen.say(f"{len(fixed.repairs)} problems repaired; {copy}.")
        return DONE
    report = verify_dataset(dataset, workers=_cores(workers))
    screen.say(report.table())
    if json_file is not None:
        write_json(json_file, report.to_json())
    if report.sound:
        return DONE
    return SOME_FAILED if report.broken_cases else REFUSED


@command("plan-and-preprocess", "Plan the experiment, preprocess the cases.")
def plan_and_preprocess(
    dataset: DatasetArgument,
    gpu_memory: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--gpu-memory",
            metavar="SIZE",
            help="Memory that a training step may take, such as 8GB. [default: what the GPU has free; 8GB without one]",
        ),
    ] = None,
    fold_time: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--fold-time", metavar="TIME", help="Training time of one fold, such as 30m or 2h. [default: a rule]"
        ),
    ] = None,
    configurations: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--configurations", metavar="A,B", help="Plan these, such as 2d,3d_fullres. [default: what the rules plan]"
        ),
    ] = None,
    input_spacing: InputSpacingOption = None,
    output_spacing: OutputSpacingOption = None,
    sr_scale: ScaleOption = None,
    task: TaskOption = "joint",
    drop_cases: DropCasesOption = False,
    replan: Annotated[
        bool, typer.Option("--replan", help="Plan anew over trained models; these are put aside, not deleted.")
    ] = False,
    keep_plan: Annotated[
        bool, typer.Option("--keep-plan", help="Preprocess for the plan.json that is there, edited by hand or not.")
    ] = False,
    group_by: GroupByOption = None,
    folds: FoldsOption = None,
    workers: WorkersOption = None,
    workspace: WorkspaceOption = None,
    device: DeviceOption = "auto",
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> int:
    """Measure the dataset, plan the experiment, and preprocess every training case.

    Spacings and scales are in the order of the raw files' arrays: (z, y, x), the reverse of NIfTI's header.

    \b
    Example:
      autoseg plan-and-preprocess data/Dataset004_Hippocampus --gpu-memory 8GB --fold-time 30m
      autoseg plan-and-preprocess data/Dataset004_Hippocampus --input-spacing 4,1,1
    """
    from autoseg.locks import alone
    from autoseg.stages import plan_and_preprocess as run
    from autoseg.stages import workspace_of
    from autoseg.units import parse_bytes, parse_seconds

    screen = SCREEN.get()
    names = _names(configurations) if configurations is not None else None
    asked = _asked(input_spacing, output_spacing, sr_scale, task)
    place = workspace_of(dataset, workspace)
    working_alone = alone(place.lock, what=f"{place.root}: another run works here")
    with working_alone, screen.cases("preprocessing") as progress:
        planned = run(
            dataset,
            workspace=workspace,
            gpu_memory_bytes=parse_bytes(gpu_memory, option="--gpu-memory") if gpu_memory is not None else None,
            fold_seconds=parse_seconds(fold_time, option="--fold-time") if fold_time is not None else None,
            configurations=names,
            asked=asked,
            drop_broken=drop_cases,
            replan=replan,
            keep_plan=keep_plan,
            group_by=group_by,
            folds=folds,
            device=device,
            workers=_cores(workers),
            progress=progress,
        )
    for sentence in planned.dropped.values():
        screen.note(f"left out: {sentence}")
    screen.say(planned.summary())
    return DONE


@command("explain", "Show the plan and the reasons for it.")
def explain(
    dataset: DatasetArgument,
    workspace: WorkspaceOption = None,
    device: DeviceOption = "auto",
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> int:
    """Show the plan: every decision with its reason, and the forecast.

    \b
    Example:
      autoseg explain data/Dataset004_Hippocampus
    """
    from autoseg.stages import load_plan

    plan, _ = load_plan(dataset, workspace)

    from autoseg.experiment_planning.explain import explain as explained

    SCREEN.get().say(explained(plan))
    return DONE


@command("train-fold", "Train one fold and score it.")
def train_fold(
    dataset: DatasetArgument,
    configuration: Annotated[
        str, typer.Argument(help="A configuration of the plan, such as 3d_fullres.", metavar="CONFIGURATION")
    ],
    fold: Annotated[str, typer.Argument(help="0 to 4, or all: every case trains.", metavar="FOLD")],
    time: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--time",
            metavar="TIME",
            help="Train this long, such as 30m or 2h. [default: the plan's; with --continue, as before]",
        ),
    ] = None,
    steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--steps", metavar="N", min=1, help="Train this many steps."),
    ] = None,
    go_on: Annotated[bool, typer.Option("--continue", help="Go on where an earlier training stopped.")] = False,
    seed: SeedOption = 0,
    workers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--workers", metavar="N", min=0, help="Processes that prepare patches. [default: by the number of cores]"
        ),
    ] = None,
    log: LogOption = None,
    mlflow_uri: MlflowOption = None,
    workspace: WorkspaceOption = None,
    device: DeviceOption = "auto",
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> int:
    """Train one fold, then predict and score its held-out cases.

    Ctrl-C or SIGTERM ends the training after the current step with a valid model; --continue goes on from there.

    \b
    Example:
      autoseg train-fold data/Dataset004_Hippocampus 3d_fullres 0 --time 30m
      torchrun --nproc-per-node 4 -m autoseg train-fold data/Dataset004_Hippocampus 3d_fullres 0
    """
    from autoseg.stages import load_plan, require_current_store, require_folds, train, validate
    from autoseg.training.loggers import asked_logs
    from autoseg.units import format_seconds, parse_seconds

    screen = SCREEN.get()
    seconds = parse_seconds(time, option="--time") if time is not None else None
    logs = asked_logs(log or (), mlflow_uri)
    plan, place = load_plan(dataset, workspace)
    require_current_store(dataset, plan, configuration, workspace=place)
    require_folds(dataset, workspace=place)

    from autoseg.screen import Screen
    from autoseg.training.distributed import joined

    with joined(os.environ, device) as world:
        screen = screen if world.first else Screen(quiet=True)
        with screen.training(f"{configuration} fold {fold}") as bar, screen.stop_signals() as stop:
            trained = train(
                plan,
                configuration,
                fold,
                workspace=place,
                device=device,
                seconds=seconds,
                steps=steps,
                resume=go_on,
                seed=seed,
                workers=workers,
                on_step=bar,
                stop=stop,
                world=world,
                logs=logs,
            )
    if not world.first:
        return DONE
    if not trained.steps:
        return screen.refuse("Stopped before the first step: there is no model yet; --continue begins.", stop.status)
    screen.say(f"{trained.checkpoint}: {trained.steps} steps in {format_seconds(trained.seconds)}.")
    if not trained.finished:
        return screen.refuse(
            "Stopped before the budget was spent: the model is valid; --continue goes on, then scores it.",
            stop.status,
        )
    with screen.named_cases("predicting held-out cases") as progress:
        evaluation = validate(
            dataset,
            plan,
            configuration,
            fold,
            workspace=place,
            device=device,
            workers=_cores(workers),
            progress=progress,
        )
    if evaluation is None:
        screen.say("No case is held out, so none is scored.")
        return DONE
    screen.say(evaluation.table())
    return complain(screen, evaluation.problems())


@command("predict", "Segment images with a trained model.")
def predict(
    input: Annotated[Path, typer.Argument(help="An image file, a folder of them, or a DICOM series.", metavar="INPUT")],
    output: Annotated[
        Path, typer.Argument(help="Folder for the label maps; a file for a single image.", metavar="OUTPUT")
    ],
    model: Annotated[
        Path,
        typer.Option("--model", metavar="MODEL", help="An exported folder or zip, models/CONFIGURATION, or one fold."),
    ],
    folds: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--folds", metavar="K,L", help="Use only these folds. [default: all that are finished]"),
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Write the probability of each class too, in image geometry.")
    ] = False,
    skip_existing: Annotated[bool, typer.Option("--skip-existing", help="Leave finished cases alone.")] = False,
    image: Annotated[
        bool, typer.Option("--image", help="Write the super-resolved image too, CASE_image beside the labels.")
    ] = False,
    native: Annotated[
        bool, typer.Option("--native", help="Bring the labels of a super-resolving model to the image's own grid.")
    ] = False,
    output_spacing: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--output-spacing",
            metavar="Z,Y,X",
            help="Spacing of the answer in mm, for any-scale models. [default: as planned]",
        ),
    ] = None,
    no_mirroring: Annotated[
        bool, typer.Option("--no-mirroring", help="Do not average over mirrored copies: faster.")
    ] = False,
    step_size: Annotated[
        float, typer.Option("--step-size", metavar="SHARE", help="Step between tiles as a fraction of the tile.")
    ] = 0.5,
    part: Annotated[
        str, typer.Option("--part", metavar="K/N", help="Only the K-th of N shares of the cases, for N machines.")
    ] = "1/1",
    max_ram: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--max-ram", metavar="SIZE", help="Memory for one case's logits, such as 4GB; beyond it they go to disk."
        ),
    ] = None,
    workers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--workers", metavar="N", min=0, help="0: one case after the other; else read and write beside it."
        ),
    ] = None,
    executor: ExecutorOption = "local",
    workspace: WorkspaceOption = None,
    device: DeviceOption = "auto",
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> int:
    """Segment a file, a folder or a DICOM series; labels lie on each image's own grid.

    Those of a super-resolving model lie on a finer grid over the same extent. Spacings are in the order of the files'
    arrays: (z, y, x), the reverse of NIfTI's header.

    \b
    Example:
      autoseg predict scans/ labels/ --model autoseg_workspace/Dataset004_Hippocampus/models/3d_fullres
      autoseg predict scans/ labels/ --model autoseg_workspace/Dataset004_Hippocampus/models/3d_sr_any \\
        --image --output-spacing 1,1,1
    """
    from autoseg.units import parse_bytes, parse_numbers, parse_part

    screen = SCREEN.get()
    share = parse_part(part, option="--part")
    ram = {"max_ram_bytes": parse_bytes(max_ram, option="--max-ram")} if max_ram is not None else {}
    asked = parse_numbers(output_spacing, option="--output-spacing") if output_spacing is not None else None

    from autoseg.executor import executor_of
    from autoseg.inference.predictor import load_model
    from autoseg.inference.run import ModelSource, PredictOptions, predict_files

    options = PredictOptions(
        probabilities=probabilities,
        skip_existing=skip_existing,
        image=image,
        native=native,
        output_spacing=None if asked is None else (asked[0], asked[1], asked[2]),
        mirroring=not no_mirroring,
        step_size=step_size,
        part=share,
        **ram,
        **({"workers": workers} if workers is not None else {}),
    )
    chosen = _names(folds) if folds else ()
    source = ModelSource(model, device, tuple(chosen))
    with executor_of(executor) as elsewhere:
        loaded = load_model(model, device, folds=chosen)
        with screen.named_cases("predicting") as progress:
            outcome = predict_files(
                loaded, input, output, options=options, executor=elsewhere, source=source, progress=progress
            )
    skipped = f", {len(outcome.skipped)} were there already" if outcome.skipped else ""
    cases = "1 case" if len(outcome.done) == 1 else f"{len(outcome.done)} cases"
    screen.say(f"{cases} predicted to {output}{skipped}.")
    return complain(screen, tuple(outcome.failed.values()), nothing=not (outcome.done or outcome.skipped))


@command("evaluate", "Score label maps against true ones.")
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of label maps, or one file.", metavar="PREDICTIONS")],
    references: Annotated[Path, typer.Argument(help="Folder of the true label maps, or one file.")],
    images: Annotated[
        bool, typer.Option("--images", help="Compare images (CASE_image with CASE or CASE_0000): PSNR and SSIM.")
    ] = False,
    json_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", metavar="FILE", help="Write all scores, case by case, as JSON."),
    ] = None,
    dataset: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--dataset",
            metavar="DATASET",
            help="Take classes and regions from its dataset.json. [default: look nearby]",
        ),
    ] = None,
    workers: WorkersOption = None,
    workspace: WorkspaceOption = None,
    device: DeviceOption = "auto",
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> int:
    """Score label maps: Dice, IoU, NSD, HD95, ASSD, volume error, per class, with 95 % bootstrap intervals.

    With --images, super-resolved images against the true fine ones.

    \b
    Example:
      autoseg evaluate labels/ data/Dataset004_Hippocampus/labelsTs --json scores.json
    """
    from autoseg.dataset import RawDataset
    from autoseg.inference.evaluation import evaluate_folders, evaluate_image_folders

    screen = SCREEN.get()
    if images:
        evaluation = evaluate_image_folders(predictions, references, workers=_cores(workers))
    else:
        labels = RawDataset.load(dataset).labels if dataset is not None else None
        evaluation = evaluate_folders(predictions, references, labels=labels, workers=_cores(workers))
    screen.say(evaluation.table())
    if json_file is not None:
        evaluation.save(json_file)
    return complain(screen, evaluation.problems(), nothing=not (evaluation.cases or evaluation.images))


@command("run", "Everything: plan, train, choose, export, report.")
def run(
    dataset: DatasetArgument,
    time: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--time", metavar="TIME", help="For everything, such as 45m. [default: the plan's, for each fold]"
        ),
    ] = None,
    steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--steps", metavar="N", min=1, help="Train each fold for this many steps instead."),
    ] = None,
    gpu_memory: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--gpu-memory", metavar="SIZE", help="Memory that a training step may take, such as 8GB."),
    ] = None,
    configurations: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--configurations", metavar="A,B", help="Candidates. [default: what the rules plan]"),
    ] = None,
    input_spacing: InputSpacingOption = None,
    output_spacing: OutputSpacingOption = None,
    sr_scale: ScaleOption = None,
    task: TaskOption = "joint",
    drop_cases: DropCasesOption = False,
    group_by: GroupByOption = None,
    folds: FoldsOption = None,
    licence: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--licence", metavar="TEXT", help="The terms under which the model may be used."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Plan, if need be; show every task, what it waits for and its time; end.")
    ] = False,
    print_commands: Annotated[
        bool, typer.Option("--print-commands", help="Plan, if need be; print plain commands for any scheduler; end.")
    ] = False,
    seed: SeedOption = 0,
    log: LogOption = None,
    mlflow_uri: MlflowOption = None,
    workers: WorkersOption = None,
    executor: ExecutorOption = "local",
    workspace: WorkspaceOption = None,
    device: DeviceOption = "auto",
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> int:
    """Do everything: plan, preprocess, train the folds, choose by cross-validation, export the model, write the report.

    Of several candidates those that are beaten beyond noise are stopped early. Ctrl-C, SIGTERM or a power failure end
    it anywhere; the same command goes on where it was.

    \b
    Example:
      autoseg run data/Dataset004_Hippocampus --time 45m
      autoseg run data/Dataset004_Hippocampus --time 45m --dry-run
      autoseg run data/Dataset004_Hippocampus --executor ray://10.0.0.1:6379
    """
    from autoseg.executor import executor_of, known_executor
    from autoseg.pipeline import outlook
    from autoseg.pipeline import run as everything
    from autoseg.training.loggers import asked_logs
    from autoseg.units import parse_bytes, parse_seconds

    screen = SCREEN.get()
    logs = asked_logs(log or (), mlflow_uri)
    names = _names(configurations) if configurations is not None else None
    asked: dict[str, Any] = {
        "workspace": workspace,
        "seconds": parse_seconds(time, option="--time") if time is not None else None,
        "steps": steps,
        "gpu_memory_bytes": parse_bytes(gpu_memory, option="--gpu-memory") if gpu_memory is not None else None,
        "configurations": names,
        "asked": _asked(input_spacing, output_spacing, sr_scale, task),
        "drop_broken": drop_cases,
        "group_by": group_by,
        "folds": folds,
        "device": device,
        "workers": _cores(workers),
    }
    if dry_run or print_commands:
        known_executor(executor)
        contest, agenda = outlook(dataset, **asked, seed=seed, keep=print_commands)
        if dry_run:
            screen.say(agenda.table())
        if print_commands:
            from autoseg.agenda import commands

            same: dict[str, Any] = {"device": device, "seed": seed, "logs": logs}
            lines = commands(contest, dataset, workspace, **same, drop_cases=drop_cases, licence=licence)
            screen.say("\n".join(lines))
        return DONE
    with executor_of(executor) as elsewhere, screen.experiment() as shown, screen.stop_signals() as stop:
        stop.steps = False

        def part(name: str) -> None:
            stop.steps = False
            shown.part(name)

        def step(progress: Progress) -> None:
            stop.steps = True
            shown.step(progress)

        outcome = everything(
            dataset,
            **asked,
            executor=elsewhere,
            licence=licence,
            seed=seed,
            logs=logs,
            on_part=part,
            on_step=step,
            on_rows=shown.rows,
            stop=stop,
        )
    if outcome.selection is None:
        return screen.refuse("Stopped before the end; the same command goes on from there.", stop.status)
    screen.say(f"{outcome.model}")
    screen.say(f"{outcome.workspace.report}")
    if not outcome.selection.scores:  # images alone
        (why,) = outcome.selection.decisions
        screen.say(f"{why.value}: {why.because}")
        return DONE
    best = outcome.selection.score
    screen.say(f"mean Dice {best.dice:.4f} ({best.low:.4f} to {best.high:.4f}): {best.candidate.name}")
    return DONE


@command("export", "Pack trained folds into one portable model.")
def export(
    dataset: DatasetArgument,
    output: Annotated[Path, typer.Argument(help="A new file MODEL.zip, or a new folder.", metavar="OUTPUT")],
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write the networks alone, as ONNX files in a folder, for other programs.")
    ] = False,
    configuration: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--configuration", metavar="NAME", help="Which one. [default: the one that is trained]"),
    ] = None,
    folds: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--folds", metavar="K,L", help="Only these folds. [default: all that are finished]"),
    ] = None,
    licence: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--licence", metavar="TEXT", help="The terms under which the weights may be used."),
    ] = None,
    workspace: WorkspaceOption = None,
    device: DeviceOption = "auto",
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> int:
    """Pack the finished folds of a configuration into one portable model, for `autoseg predict --model` anywhere.

    \b
    Example:
      autoseg export data/Dataset004_Hippocampus hippocampus.zip --licence "CC-BY-SA 4.0"
      autoseg export data/Dataset004_Hippocampus hippocampus_onnx --onnx
    """
    from autoseg.inference.package import NO_LICENCE
    from autoseg.stages import load_plan, trained_configuration

    plan, place = load_plan(dataset, workspace)
    name = configuration or trained_configuration(plan, place)
    plan.configuration(name)
    chosen = _names(folds) if folds else ()
    if onnx:
        from autoseg.inference.onnx import export_onnx as write
    else:
        from autoseg.inference.package import export_model as write
    SCREEN.get().say(f"{write(place, name, output, folds=chosen, licence=licence or NO_LICENCE)}")
    return DONE


@command("report", "Write a report of what is there as one HTML file.")
def report(
    dataset: DatasetArgument,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="The file to write. [default: report.html in the workspace]", metavar="[OUTPUT]"),
    ] = None,
    workspace: WorkspaceOption = None,
    device: DeviceOption = "auto",
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> int:
    """Write a report: dataset, every decision with its reason, training curves, scores, worst and median cases.

    \b
    Example:
      autoseg report data/Dataset004_Hippocampus
    """
    from autoseg.report import write_report
    from autoseg.stages import load_plan

    _, place = load_plan(dataset, workspace)
    SCREEN.get().say(f"{write_report(place, output)}")
    return DONE


@command("demo", "The whole story on a synthetic dataset.")
def demo(
    folder: Annotated[Path, typer.Argument(help="Where to write everything.", metavar="[FOLDER]")] = Path(
        "autoseg_demo"
    ),
    time: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--time", metavar="TIME", help="Train this long. [default: 250 steps, about a minute]"),
    ] = None,
    workspace: WorkspaceOption = None,
    device: DeviceOption = "auto",
    verbose: VerboseOption = 0,
    quiet: QuietOption = False,
) -> int:
    """The whole story on an embedded synthetic dataset: from raw files to a scored prediction with a picture.

    \b
    Example:
      autoseg demo
    """
    from autoseg.demo import run_demo
    from autoseg.units import parse_seconds

    screen = SCREEN.get()
    seconds = parse_seconds(time, option="--time") if time is not None else None
    with screen.training("training") as bar:
        outcome = run_demo(
            folder,
            workspace=workspace,
            seconds=seconds,
            device=device,
            workers=_cores(None),
            on_part=lambda part: screen.note(f"{part} ..."),
            on_step=bar,
        )
    screen.say(outcome.summary())
    return complain(screen, outcome.test.problems())


def main() -> None:
    """The console script."""
    try:
        app(prog_name="autoseg")
    except SystemExit as end:
        _leave(end.code if isinstance(end.code, int) else DONE)


def _leave(status: int) -> None:
    """End the process without taking torch apart, which lasts most of a second; files are closed and whole by now."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done: Ctrl-C would only break the tidying up
    atexit._run_exitfuncs()  # the workers' end among them
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
