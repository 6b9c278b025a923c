"""A plan -> text for a terminal: each configuration, each decision with its kind and reason, the forecast."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from autoseg.plan import Configuration, Decision, Forecast, Plan
from autoseg.units import format_bytes, format_seconds

WIDTH = 110  # characters of a line


def explain(plan: Plan) -> str:
    """The plan in words: what was decided, whether it is fixed, a rule or an experiment's outcome, and why."""
    own = {configuration.name: f"{configuration.name}." for configuration in plan.configurations}
    shared = [d for d in plan.decisions if not any(d.name.startswith(prefix) for prefix in own.values())]
    parts = [_heading(plan), _section("The dataset and the budget", shared, prefix="")]
    for configuration in plan.configurations:
        prefix = own[configuration.name]
        decisions = [d for d in plan.decisions if d.name.startswith(prefix)]
        parts.append(
            "\n".join(
                (
                    _title(configuration.name),
                    _table(_facts(configuration, plan.forecasts.get(configuration.name))),
                    "",
                    _decisions(decisions, prefix=prefix),
                )
            )
        )
    return "\n\n".join(parts) + "\n"


def _heading(plan: Plan) -> str:
    budget = plan.budget
    time = format_seconds(budget.fold_seconds) if budget.fold_seconds else "as many steps as planned"
    facts = [
        ("dataset", plan.dataset),
        ("channels", ", ".join(plan.channels)),
        ("labels", ", ".join(plan.labels.names) or "none"),
        ("budget", f"{format_bytes(budget.gpu_memory_bytes)}, {time} a fold, on {budget.device}"),
        ("plan", f"{plan.id}, from fingerprint {plan.fingerprint}"),
    ]
    return _table(facts)


def _facts(c: Configuration, forecast: Forecast | None) -> list[tuple[str, str]]:
    a = c.architecture
    facts = [
        ("spacing", " x ".join("as it is" if s is None else f"{s:g}" for s in c.preprocessing.spacing) + " mm"),
        ("median image", _sizes(c.median_shape)),
        ("patch, batch", f"{_sizes(c.patch_size)}, {c.batch_size}"),
        ("normalisation", ", ".join(n.scheme for n in c.preprocessing.normalization)),
        ("features", ", ".join(map(str, a.features))),
        ("strides", ", ".join(map(_sizes, a.strides))),
        ("kernels", ", ".join(map(_sizes, a.kernels))),
        ("training", f"{c.training.recipe}, {c.training.steps} steps"),
        ("mirrored axes", ", ".join("zyx"[axis] for axis in c.training.mirror_axes) or "none"),
    ]
    if c.previous_stage:
        facts.append(("previous stage", c.previous_stage))
    if c.view_axis:
        facts.append(("slices along", f"axis {c.view_axis} of the stored image; sizes begin with it"))
    if a.context != "none":
        facts.append(("context", f"{a.context_slices} slices, {a.context}"))
    if c.super_resolves:
        facts += _super_resolution(c)
    if forecast is not None:
        time = f"{forecast.seconds_per_step:.3g} s a step, " if forecast.seconds_per_step else "step not timed, "
        fold = format_seconds(forecast.fold_seconds) if forecast.fold_seconds else "not known"
        facts += [
            ("forecast", f"{time}a fold {fold}"),
            ("", f"{format_bytes(forecast.memory_bytes)} memory, {format_bytes(forecast.disk_bytes)} disk (estimated)"),
            ("", f"{forecast.parameters / 1e6:.2f} M parameters, {forecast.step_flops / 1e9:.3g} GFLOP a step"),
        ]
    return facts


def _super_resolution(c: Configuration) -> list[tuple[str, str]]:
    spacing = " x ".join("as it is" if s is None else f"{s:g}" for s in c.input_preprocessing.spacing)
    scale = " x ".join(f"{s:g}" for s in c.sr_scale)
    if c.sr_range is not None:
        scale += f", any from {c.sr_range[0]:g} to {c.sr_range[1]:g}"
    answers = [f"{c.architecture.output_channels} classes"] * bool(c.architecture.output_channels)
    answers += [f"{c.architecture.image_channels} image channels"] * bool(c.architecture.image_channels)
    model = c.acquisition
    profile = "" if model is None else f", {model.profile} of {model.thickness[0]:g} to {model.thickness[1]:g} slices"
    return [
        ("input grid", f"{spacing} mm"),
        ("scale", f"{scale}, {c.architecture.head} head: {' and '.join(answers)}"),
        ("fine truth", f"{c.sr_source}{profile}"),
    ]


def _section(title: str, decisions: Sequence[Decision], *, prefix: str) -> str:
    return f"{_title(title)}\n{_decisions(decisions, prefix=prefix)}"


def _title(text: str) -> str:
    return f"{text}\n{'-' * len(text)}"


def _table(facts: Iterable[tuple[str, str]]) -> str:
    facts = list(facts)
    column = max(len(name) for name, _ in facts)
    indent = " " * (column + 2)
    return "\n".join(_wrap(f"{name:{column}}  {value}", indent=indent) for name, value in facts)


def _decisions(decisions: Sequence[Decision], *, prefix: str) -> str:
    lines = []
    for decision in decisions:
        name = decision.name.removeprefix(prefix)
        lines.append(_wrap(f"{name} = {_value(decision.value)}  [{decision.kind}]", indent="    "))
        lines.append(_wrap(f"    {decision.because}", indent="    "))
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_value, value)) + ")"
    return f"{value:g}" if isinstance(value, float) else "as it is" if value is None else str(value)


def _wrap(text: str, *, indent: str) -> str:
    return "\n".join(textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, drop_whitespace=True))


def _sizes(values: Sequence[int]) -> str:
    return "x".join(map(str, values))
