"""Fingerprint and budget -> plan: tables for the rules, invariants for any dataset, and the reasons it gives."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import memory_by_formula
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoseg.errors import PlanError
from autoseg.experiment_planning.explain import explain
from autoseg.experiment_planning.fingerprint import IntensityStatistics, MirroredPair, uniform_fingerprint
from autoseg.experiment_planning.grid import target_spacing
from autoseg.experiment_planning.machine import CPU_FOLD_SECONDS, GPU_FOLD_STEPS, MEMORY_SHARE
from autoseg.experiment_planning.notes import Notes
from autoseg.experiment_planning.planner import plan_experiment
from autoseg.experiment_planning.sizing import TARGET_STEPS, Sizer
from autoseg.experiment_planning.timing import Speed, probe_speed
from autoseg.labels import Labels
from autoseg.plan import Architecture, Budget, Plan, TrainingSettings
from autoseg.plan_values import check_plan


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny steps are slower with several threads, by far on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TWO = Labels.from_json({"background": 0, "a": 1, "b": 2})
GB = 10**9


def dataset(shape=(36, 50, 35), spacing=(1.0, 1.0, 1.0), *, cases=260, channels=("MRI",), labels=TWO, ending=".nii.gz"):
    return uniform_fingerprint(
        "Dataset001_Any",
        shape=shape,
        spacing=spacing,
        cases=cases,
        labels=labels,
        channels=channels,
        file_ending=ending,
    )


def plan_by_memory(fingerprint, gigabytes=8.0, **options):
    return plan_experiment(fingerprint, Budget(int(gigabytes * GB), 0.0, "auto"), probe=False, **options)


@pytest.fixture
def counted(monkeypatch):
    """Memory by a formula and not by a step on fake tensors, which takes a second: for rules that do not hang on it."""
    monkeypatch.setattr(Sizer, "measure", memory_by_formula)


def named(plan: Plan, *names: str):
    return [plan.configuration(name) for name in names]


def reason(plan: Plan, name: str) -> str:
    (found,) = [d.because for d in plan.decisions if d.name == name]
    return found


# the eight kinds of dataset of docs/planner-vs-nnunet.md that are quick to plan: configurations, patch, batch
@pytest.mark.parametrize(
    ("fingerprint", "gigabytes", "expected"),
    [
        (dataset(), 8, {"3d_fullres": ((40, 56, 40), 9)}),
        (
            dataset((9, 256, 216), (10.0, 1.56, 1.56), cases=200),
            24,
            {"2d": ((1, 256, 224), 87), "3d_fullres": ((10, 256, 224), 9), "2.5d_stack": ((1, 256, 224), 87)},
        ),
        (dataset((1, 584, 565), (999.0, 1.0, 1.0), cases=20, channels=("R", "G", "B")), 8, {"2d": ((1, 640, 640), 2)}),
        (dataset((138, 170, 138), cases=484, channels=("T1",)), 24, {"3d_fullres": ((160, 192, 160), 3)}),
    ],
    ids=["hippocampus", "cardiac", "retina", "brain"],
)
def test_well_known_datasets_get_what_nnunet_plans(fingerprint, gigabytes, expected):
    plan = plan_by_memory(fingerprint, gigabytes)
    assert {c.name: (c.patch_size, c.batch_size) for c in plan.configurations if c.name in expected} == expected


def test_the_batch_grows_until_the_memory_is_used():
    plan = plan_by_memory(dataset((60, 90, 70), cases=484), 2, configurations=["2d"])
    (c,) = plan.configurations
    (forecast,) = plan.forecasts.values()
    one_more = forecast.memory_bytes * (c.batch_size + 2) / c.batch_size
    assert forecast.memory_bytes <= MEMORY_SHARE * 2 * GB < one_more


@pytest.mark.slow
def test_a_big_ct_gets_a_low_resolution_and_a_cascade_on_it():
    fingerprint = dataset((200, 300, 300), (1.0, 0.8, 0.8), cases=100, channels=("CT",))
    plan = plan_by_memory(fingerprint, 2)
    assert [c.name for c in plan.configurations][:3] == ["3d_fullres", "3d_lowres", "3d_cascade"]
    full, low, cascade = plan.configurations[:3]
    assert math.prod(full.patch_size) < 0.25 * math.prod(full.median_shape)
    assert math.prod(low.patch_size) >= 0.25 * math.prod(low.median_shape)
    assert math.prod(full.median_shape) >= 2 * math.prod(low.median_shape)
    assert cascade.previous_stage == "3d_lowres"
    assert cascade.architecture.input_channels == 1 + 2
    assert cascade.preprocessing == full.preprocessing
    assert full.preprocessing.normalization[0].scheme == "ct"
    assert full.preprocessing.normalization[0].upper == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("gigabytes", [4, 80])
def test_a_step_of_every_plan_fits_the_memory(gigabytes):
    plan = plan_by_memory(dataset((120, 320, 320), (2.0, 1.0, 1.0), cases=300), gigabytes)
    for configuration in plan.configurations:
        assert plan.forecasts[configuration.name].memory_bytes <= MEMORY_SHARE * gigabytes * GB


def test_more_memory_never_gives_a_smaller_step():
    sizes = []
    for gigabytes in (1, 2, 8):
        (c,) = plan_by_memory(dataset((90, 120, 90), cases=100), gigabytes).configurations
        sizes.append(math.prod(c.patch_size) * c.batch_size)
    assert sizes == sorted(sizes)


def test_where_nothing_fits_one_sentence_says_what_is_needed():
    with pytest.raises(PlanError, match="No network fits in 1 MB.*--gpu-memory"):
        plan_by_memory(dataset(), 0.001)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=st.tuples(*(st.integers(1, 120) for _ in range(3))),
    spacing=st.tuples(*(st.floats(0.3, 6.0) for _ in range(3))),
    cases=st.integers(1, 50),
)
def test_any_dataset_gets_a_plan_that_loads_and_fits(tmp_path_factory, shape, spacing, cases):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sizer, "measure", memory_by_formula)
        plan = plan_by_memory(dataset(shape, spacing, cases=cases), 1)
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan  # which checks that every patch divides
    assert all(forecast.memory_bytes <= GB for forecast in plan.forecasts.values())
    assert all(c.batch_size >= 2 for c in plan.configurations)
    assert explain(plan)


def test_a_batch_holds_at_most_a_twentieth_of_the_dataset():
    (c,) = plan_by_memory(dataset(cases=100), 8).configurations
    assert c.batch_size == round(0.05 * 100 * 36 * 50 * 35 / math.prod(c.patch_size))
    (few,) = plan_by_memory(dataset(cases=3), 8).configurations
    assert few.batch_size == 2


# --- which configurations


@pytest.mark.parametrize(
    ("shape", "spacing", "names"),
    [
        ((40, 40, 40), (1.0, 1.0, 1.0), ["3d_fullres"]),
        ((20, 60, 60), (2.9, 1.0, 1.0), ["3d_fullres"]),
        ((20, 60, 60), (3.1, 1.0, 1.0), ["2d", "2.5d_stack", "2.5d_reduce", "3d_fullres"]),
        ((60, 20, 60), (1.0, 5.0, 1.0), ["2d", "2.5d_stack", "2.5d_reduce", "3d_fullres"]),
        ((2, 60, 60), (5.0, 1.0, 1.0), ["2d", "3d_fullres"]),
        ((1, 60, 60), (1.0, 1.0, 1.0), ["2d"]),
    ],
)
def test_2d_and_stacks_are_planned_for_planes_and_thick_slices(shape, spacing, names, counted):
    assert [c.name for c in plan_by_memory(dataset(shape, spacing), 1).configurations] == names


def test_configurations_are_planned_on_request(counted):
    plan = plan_by_memory(dataset(), 1, configurations=["2d", "3d_fullres"])
    assert [c.name for c in plan.configurations] == ["2d", "3d_fullres"]
    plan = plan_by_memory(dataset((64, 64, 64)), 1, configurations=["3d_cascade"])
    assert [c.name for c in plan.configurations] == ["3d_lowres", "3d_cascade"]
    low, cascade = plan.configurations
    assert 2 * math.prod(low.median_shape) <= math.prod(cascade.median_shape)


def test_an_unknown_or_unsuitable_configuration_is_refused():
    with pytest.raises(PlanError, match="'3d_fulres' is not known.*Did you mean '3d_fullres'"):
        plan_by_memory(dataset(), configurations=["3d_fulres"])
    with pytest.raises(PlanError, match="3d_fullres needs volumes"):
        plan_by_memory(dataset((1, 60, 60)), configurations=["3d_fullres"])
    with pytest.raises(PlanError, match="No configuration"):
        plan_by_memory(dataset(), configurations=[])


# --- 2.5D


@pytest.mark.parametrize(("slices", "seen"), [(3, 3), (7, 3), (19, 3), (20, 5), (40, 5)], ids=lambda value: str(value))
def test_a_stack_sees_five_slices_where_the_median_volume_has_twenty(slices, seen, counted):
    plan = plan_by_memory(dataset((slices, 60, 60), (6.0, 1.0, 1.0)), 1)
    for c in named(plan, "2.5d_stack", "2.5d_reduce"):
        assert c.architecture.context_slices == seen
        assert c.architecture.halo == seen // 2
        assert c.patch_size[0] == 1
    assert "slices" in reason(plan, "2.5d_stack.context_slices")


def test_2d_and_stacks_share_a_store_and_differ_in_one_value(counted):
    two, stack, reduce = named(
        plan_by_memory(dataset((12, 60, 60), (8.0, 1.0, 1.0)), 1), "2d", "2.5d_stack", "2.5d_reduce"
    )
    assert two.preprocessing == stack.preprocessing == reduce.preprocessing
    assert [c.topology for c in (two, stack, reduce)] == ["2d", "2.5d_stack", "2.5d_reduce"]
    assert [c.architecture.context for c in (two, stack, reduce)] == ["none", "stack", "reduce"]
    assert two.architecture.input_channels == stack.architecture.input_channels == 1
    assert two.training.mirror_axes == stack.training.mirror_axes == (1, 2)


def test_one_slice_and_volumes_thinner_than_a_stack_are_refused_by_name(counted):
    for depth, said in ((2, "2 slices"), (1, "1 slice")):
        thin = dataset((12, 60, 60), (5.0, 1.0, 1.0), cases=5)
        cases = (*thin.cases[:3], replace(thin.cases[3], shape=(depth, 60, 60)), thin.cases[4])
        with pytest.raises(PlanError, match=f"case_0003 of Dataset001_Any has {said}.*stack of 3"):
            plan_by_memory(replace(thin, cases=cases), 1, configurations=["2.5d_stack"])
        assert "2.5d_stack" not in [c.name for c in plan_by_memory(replace(thin, cases=cases), 1).configurations]
    with pytest.raises(PlanError, match="2.5d_reduce needs volumes"):
        plan_by_memory(dataset((1, 60, 60)), 1, configurations=["2.5d_reduce"])


@pytest.mark.parametrize(
    ("spacing", "axis_order", "views"),
    [
        ((1.0, 1.0, 1.0), (0, 1, 2), (0, 1, 2)),
        ((1.0, 1.2, 1.0), (1, 0, 2), (1, 0, 2)),
        ((1.0, 1.0, 1.3), (2, 0, 1), (1, 2, 0)),
    ],
)
def test_views_are_canonical_whatever_axis_comes_first(spacing, axis_order, views, counted):
    names = ["2.5d_axial", "2.5d_coronal", "2.5d_sagittal"]
    shape = (40, 56, 72)
    plan = plan_by_memory(dataset(shape, spacing), 1, configurations=names)
    planned = named(plan, *names)
    assert tuple(c.view_axis for c in planned) == views
    for canonical, c in enumerate(planned):
        assert c.preprocessing.axis_order == axis_order
        assert c.median_shape[0] == shape[canonical], "slices along the view come first"
        assert sorted(c.median_shape) == sorted(shape)
        assert c.patch_size[0] == 1
    check_plan(plan, where="here")


def test_a_left_right_pair_is_not_mirrored_in_any_view(counted):
    pair = MirroredPair("left_kidney", "right_kidney", 2)
    names = ["2.5d_axial", "2.5d_coronal", "2.5d_sagittal"]
    plan = plan_by_memory(replace(dataset((40, 40, 40)), mirrored_pairs=(pair,)), 1, configurations=names)
    # canonical x is the last axis of axial and coronal slices, and the one along which sagittal ones lie
    assert [c.training.mirror_axes for c in named(plan, *names)] == [(1,), (1,), (1, 2)]


@pytest.mark.parametrize(
    ("shape", "spacing", "planned"),
    [
        ((200, 200, 200), (1.0, 1.0, 1.0), True),
        ((200, 200, 200), (1.6, 1.0, 1.0), False),
        ((60, 60, 60), (1.0, 1.0, 1.0), False),
    ],
)
def test_three_views_are_planned_for_even_spacing_where_3d_sees_too_little(shape, spacing, planned, counted):
    plan = plan_by_memory(dataset(shape, spacing, cases=50), 1)
    names = [c.name for c in plan.configurations]
    assert all((name in names) == planned for name in ("2.5d_axial", "2.5d_coronal", "2.5d_sagittal"))
    assert "%" in reason(plan, "triplanar")


def test_the_plan_says_what_to_train_first_and_what_is_there_on_request(counted):
    plan = plan_by_memory(dataset((12, 60, 60), (8.0, 1.0, 1.0)), 1)
    (first,) = [d for d in plan.decisions if d.name == "first_choice"]
    assert first.value == "3d_fullres" and "Wang" in first.because
    (rest,) = [d for d in plan.decisions if d.name == "configurations.on_request"]
    assert "2.5d_axial" in rest.value and "3d_sr" in rest.value and "2d" not in rest.value


# --- grid, normalisation, mirroring


def test_the_coarsest_axis_comes_first_and_slices_keep_their_spacing_in_2d(counted):
    two, three = named(plan_by_memory(dataset((60, 20, 50), (1.0, 5.0, 0.8)), 1), "2d", "3d_fullres")
    assert two.preprocessing.axis_order == three.preprocessing.axis_order == (1, 0, 2)
    assert two.preprocessing.spacing == (None, 1.0, 0.8)
    assert three.preprocessing.spacing == (5.0, 1.0, 0.8)
    assert two.median_shape == three.median_shape == (20, 60, 50)
    assert two.patch_size[0] == 1


def test_the_target_spacing_is_the_median_and_finer_along_thick_slices():
    thick = [(float(z), 1.0, 1.0) for z in range(5, 16)]
    shapes = [(20, 200, 200)] * len(thick)
    assert target_spacing(thick, shapes, dimensions=3, notes=Notes()) == (6.0, 1.0, 1.0)
    deep = [(200, 200, 200)] * len(thick)
    assert target_spacing(thick, deep, dimensions=3, notes=Notes()) == (10.0, 1.0, 1.0)
    thin = [(1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (2.5, 1.0, 1.0)]
    assert target_spacing(thin, shapes[:3], dimensions=3, notes=Notes()) == (2.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("channels", "shape", "change", "schemes"),
    [
        (("CT",), (20, 20, 20), {}, ["ct"]),
        (("ct", "PET"), (20, 20, 20), {}, ["ct", "zscore"]),
        (("noNorm",), (20, 20, 20), {}, ["none"]),
        (("rescale_0_1", "None"), (20, 20, 20), {}, ["rescale", "none"]),
        (("rgb_to_0_1",) * 3, (1, 40, 40), {}, ["rgb"] * 3),
        (("R", "G", "B"), (1, 40, 40), {}, ["rgb"] * 3),
        (("R", "G", "B"), (20, 20, 20), {}, ["zscore"] * 3),
        (
            ("R", "G", "B"),
            (1, 40, 40),
            {"intensities": (IntensityStatistics(1e3, 1.0, 0.0, 1e3, 4e3),) * 3},
            ["zscore"] * 3,
        ),
        (("T1",), (20, 20, 20), {"cropped_share": 0.25}, ["masked_zscore"]),
        (("T1",), (20, 20, 20), {"cropped_share": 0.24}, ["zscore"]),
        (("CT",), (20, 20, 20), {"cropped_share": 0.9}, ["ct"]),
    ],
)
def test_normalisation_follows_the_channels_name(channels, shape, change, schemes, counted):
    fingerprint = replace(dataset(shape, channels=channels), **change)
    normalization = plan_by_memory(fingerprint, 1).configurations[0].preprocessing.normalization
    assert [entry.scheme for entry in normalization] == schemes


def test_mirroring_is_off_along_the_axis_of_a_left_right_pair(counted):
    pair = MirroredPair("left_kidney", "right_kidney", 2)
    fingerprint = replace(dataset((40, 40, 40)), mirrored_pairs=(pair,))
    plan = plan_by_memory(fingerprint, 1)
    assert plan.configurations[0].training.mirror_axes == (0, 1)
    assert "left_kidney" in reason(plan, "mirror_axes")
    sagittal = replace(dataset((40, 40, 12), (1.0, 1.0, 5.0)), mirrored_pairs=(pair,))  # x is the slice axis
    two, three = named(plan_by_memory(sagittal, 1), "2d", "3d_fullres")
    assert two.preprocessing.axis_order == (2, 0, 1)
    assert two.training.mirror_axes == (1, 2)
    assert three.training.mirror_axes == (1, 2)


def test_thick_slices_are_not_turned_through_the_plane(counted):
    two, three = named(plan_by_memory(dataset((20, 60, 60), (5.0, 1.0, 1.0)), 1), "2d", "3d_fullres")
    assert three.training.low_resolution_axes == two.training.low_resolution_axes == (1, 2)
    assert not three.training.rotate_out_of_plane
    (even,) = plan_by_memory(dataset(), 1).configurations
    assert even.training.low_resolution_axes == (0, 1, 2)
    assert even.training.rotate_out_of_plane


def test_regions_have_one_output_each():
    labels = Labels.from_json({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
    assert plan_by_memory(dataset(labels=labels), 1).configurations[0].architecture.output_channels == 2


# --- time


def timed(monkeypatch, seconds, fingerprint, fold_seconds, configurations=None):
    """A plan on a machine where a step at width 16 on 100,000 voxels takes `seconds`."""
    monkeypatch.setattr(
        "autoseg.experiment_planning.timing.probe_speed", lambda *_, **__: Speed(seconds, 16, 100_000, "cpu")
    )
    return plan_experiment(fingerprint, Budget(4 * GB, fold_seconds, "cpu"), configurations=configurations)


def test_the_folds_time_chooses_the_width(monkeypatch):
    widths = []
    for fold_seconds in (20, 300, 3000, 36_000):
        plan = timed(monkeypatch, 0.1, dataset(), fold_seconds)
        (c,) = plan.configurations
        widths.append(c.architecture.features[0])
        assert c.training.seconds == fold_seconds
        assert c.training.steps == int(fold_seconds / plan.forecasts[c.name].seconds_per_step)
        assert plan.forecasts[c.name].fold_seconds == fold_seconds
    assert widths == [8, 16, 16, 32], "24 feature maps cost as much as 32"


def test_a_slow_machine_shrinks_the_patch_of_big_images(monkeypatch):
    fingerprint = dataset((150, 150, 150), cases=50)
    (slow,) = timed(monkeypatch, 0.3, fingerprint, 1800, ["3d_fullres"]).configurations
    (fast,) = timed(monkeypatch, 0.001, fingerprint, 1800, ["3d_fullres"]).configurations
    assert math.prod(slow.patch_size) < math.prod(fast.patch_size)
    assert slow.architecture.features[0] < fast.architecture.features[0] == 32


def test_the_fold_gives_enough_steps_wherever_a_network_of_the_table_can(monkeypatch):
    plan = timed(monkeypatch, 0.1, dataset(), 1800)
    assert plan.configurations[0].training.steps >= TARGET_STEPS


def test_a_long_fold_grows_the_batch_to_what_memory_allows(monkeypatch):
    (short,) = timed(monkeypatch, 0.1, dataset(), 1800).configurations
    (long,) = timed(monkeypatch, 0.1, dataset(), 10**6).configurations
    assert short.batch_size == 2 < long.batch_size


def test_without_a_gpu_a_fold_takes_half_an_hour_by_default(monkeypatch):
    plan = timed(monkeypatch, 0.01, dataset(), 0.0)
    assert plan.budget.fold_seconds == CPU_FOLD_SECONDS
    assert "no GPU" in reason(plan, "budget.fold_seconds")


def test_memory_that_is_given_without_a_gpu_plans_for_one_elsewhere():
    plan = plan_experiment(dataset(), Budget(8 * GB, 0.0, "auto"))
    (c,) = plan.configurations
    assert plan.budget.device == "gpu"
    assert plan.forecasts[c.name].seconds_per_step == 0, "nothing was measured"
    assert "not measured" in reason(plan, f"{c.name}.forecast")
    assert c.training.steps == GPU_FOLD_STEPS


def test_the_probe_times_real_steps_on_a_bounded_batch():
    (c,) = plan_by_memory(dataset((24, 24, 24), cases=5), 1).configurations
    small = replace(c.architecture, features=(4, 8, 16)[: len(c.architecture.features)])
    speed = probe_speed(
        small, TWO, recipe=TrainingSettings().recipe, patch_size=(96, 96, 96), device=torch.device("cpu")
    )
    assert speed.seconds > 0
    assert speed.voxels <= 100_000
    assert 0 <= speed.overhead <= speed.seconds / 2
    growing = speed.seconds - speed.overhead
    assert speed.seconds_per_step(speed.width, 2 * speed.voxels) == pytest.approx(speed.overhead + 2 * growing)
    assert speed.seconds_per_step(2 * 16 * speed.width, speed.voxels) > speed.overhead + 2 * growing


def test_the_probe_keeps_more_than_one_voxel_in_the_bottleneck():
    architecture = Architecture(1, 3, (2, 2), ((1, 1, 1), (32, 64, 64)), ((3, 3, 3),) * 2, (1, 1), (1,))
    speed = probe_speed(
        architecture, TWO, recipe=TrainingSettings().recipe, patch_size=(64, 64, 64), device=torch.device("cpu")
    )
    assert speed.voxels == 64**3


# --- reasons


def test_every_value_of_a_configuration_has_a_reason_with_numbers():
    plan = plan_by_memory(dataset(), 1)
    names = {d.name for d in plan.decisions}
    for value in (
        "spacing",
        "patch_size",
        "batch_size",
        "features",
        "architecture",
        "augmentation",
        "steps",
        "forecast",
    ):
        assert f"3d_fullres.{value}" in names
    assert {"axis_order", "spacing", "normalization.MRI", "mirror_axes", "configurations"} <= names
    assert all(d.because.endswith(".") and d.kind in ("fixed", "rule", "empirical") for d in plan.decisions)
    assert "40x56x40" in reason(plan, "3d_fullres.patch_size")


def test_explain_shows_every_decision_with_its_reason():
    plan = plan_by_memory(dataset((20, 60, 60), (5.0, 1.0, 1.0)), 1)
    text = " ".join(explain(plan).split())
    for decision in plan.decisions:
        assert " ".join(decision.because.split()) in text
    assert "patch, batch" in text and "forecast" in text
    assert max(map(len, explain(plan).splitlines())) <= 110


def test_equal_fingerprints_and_budgets_give_equal_plans():
    assert plan_by_memory(dataset(), 1) == plan_by_memory(dataset(), 1)
