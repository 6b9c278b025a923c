"""When super-resolution is planned, from what truth and at what scale; and what labels lose on a coarser grid."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import memory_by_formula
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from autoseg.cli import app
from autoseg.dataset import RawDataset
from autoseg.errors import PlanError
from autoseg.experiment_planning.explain import explain
from autoseg.experiment_planning.fingerprint import Fingerprint, extract_fingerprint, uniform_fingerprint
from autoseg.experiment_planning.grid import plan_grid
from autoseg.experiment_planning.label_ceiling import coarse_label, down_and_up, label_ceiling, structure_dice
from autoseg.experiment_planning.notes import Notes
from autoseg.experiment_planning.planner import first_stores, plan_experiment
from autoseg.experiment_planning.sizing import Sizer
from autoseg.experiment_planning.superresolution import (
    Asked,
    Ceiling,
    SuperResolution,
    choose_acquisition,
    choose_super_resolution,
    expected_spacing,
    snap,
    to_canonical,
)
from autoseg.image import Grid, Image, write_image
from autoseg.labels import Labels
from autoseg.plan import Acquisition, Budget, Plan
from autoseg.plan_values import check_plan
from autoseg.stages import _answers, asked_super_resolution

TWO = Labels.from_json({"background": 0, "a": 1, "b": 2})
GB = 10**9
GAUSS = Acquisition("gauss")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny steps are slower with several threads, by far on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch):
    """Memory by a formula and not by a step on fake tensors, which takes a second: for rules that do not hang on it."""
    monkeypatch.setattr(Sizer, "measure", memory_by_formula)


def dataset(shape=(36, 50, 35), spacing=(1.0, 1.0, 1.0), *, cases=50, channels=("MRI",)) -> Fingerprint:
    return uniform_fingerprint(
        "Dataset001_Any", shape=shape, spacing=spacing, cases=cases, labels=TWO, channels=channels
    )


def mixed(thin: int, thick: int, *, thin_mm=1.0, thick_mm=(4.0,), shape=(36, 50, 35)) -> Fingerprint:
    """`thin` cases of thin slices and `thick` of thick ones, of the same extent."""
    (case,) = dataset(shape, cases=1).cases
    spacings = [thin_mm] * thin + [thick_mm[i % len(thick_mm)] for i in range(thick)]
    cases = tuple(
        replace(case, identifier=f"case_{i}", spacing=(mm, 1.0, 1.0), shape=(round(shape[0] / mm), *shape[1:]))
        for i, mm in enumerate(spacings)
    )
    median = float(np.median(spacings))
    found = dataset(shape, cases=1)
    return replace(found, cases=cases, median_spacing=(median, 1.0, 1.0), median_shape=cases[-1].shape)


def choose(
    fingerprint: Fingerprint, asked: Asked | None = None, *, named: bool = False, ceiling: Ceiling | None = None
) -> tuple[SuperResolution | None, str]:
    """What the rules choose and the reason."""
    asked, notes = asked or Asked(), Notes()
    grid = plan_grid(fingerprint, notes, expected=expected_spacing(fingerprint, asked))
    found = choose_super_resolution(fingerprint, grid, asked, named=named, ceiling=ceiling, notes=notes)
    (because,) = [d.because for d in notes.without(()) if d.name == "super_resolution"]
    return found, because


def plan_by_memory(fingerprint: Fingerprint, gigabytes: float = 1.0, **options) -> Plan:
    return plan_experiment(fingerprint, Budget(int(gigabytes * GB), 0.0, "auto"), probe=False, **options)


# --- the rules


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(1.0, 1.0), (0.97, 1.0), (1.04, 1.0), (1.3, 1.3), (1.92, 2.0), (2.08, 2.0), (2.5, 2.5), (4.19, 4.0), (4.3, 4.3)],
)
def test_a_scale_within_five_percent_of_a_whole_number_takes_it(scale, expected):
    assert snap(scale) == expected


def test_nothing_is_planned_without_a_reason_and_the_plan_says_so():
    found, because = choose(dataset())
    assert found is None
    assert "labels lie on the images' grid" in because
    assert "0 of 50 cases" in because and "1.0 times as thick" in because


@pytest.mark.parametrize(
    ("asked", "scale", "output"),
    [
        (Asked(input_spacing=(4.0, 1.0, 1.0)), (4.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
        (Asked(input_spacing=(4.1, 1.0, 1.0)), (4.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
        (Asked(input_spacing=(2.5, 1.0, 1.0)), (2.5, 1.0, 1.0), (1.0, 1.0, 1.0)),
        (Asked(input_spacing=(4.0, 2.0, 2.0)), (4.0, 2.0, 2.0), (1.0, 1.0, 1.0)),
        (Asked(input_spacing=(5.0, 1.5, 1.0)), (5.0, 1.5, 1.0), (1.0, 1.0, 1.0)),
        (Asked(input_spacing=(4.0, 1.0, 1.0), output_spacing=(2.0, 1.0, 1.0)), (2.0, 1.0, 1.0), (2.0, 1.0, 1.0)),
        (Asked(input_spacing=(4.0, 1.0, 1.0), scale=(2.0,)), (2.0, 1.0, 1.0), (2.0, 1.0, 1.0)),
        (Asked(output_spacing=(2.0, 1.0, 1.0), scale=(3.0,)), (3.0, 1.0, 1.0), (2.0, 1.0, 1.0)),
        (Asked(scale=(4.0,)), (4.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
        (Asked(scale=(2.0, 1.0, 1.0)), (2.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
        (Asked(scale=(8.0,)), (8.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
    ],
)
def test_the_user_says_two_of_three_and_the_dataset_the_rest(asked, scale, output):
    found, because = choose(dataset(), asked)
    assert found is not None
    assert found.source == "degraded" and found.scale == scale and found.output_spacing == output
    assert found.store_spacing == output
    assert "asked for" in because


@settings(max_examples=100, deadline=None)
@given(
    scale=st.floats(1.3, 8.0),
    fine=st.floats(0.3, 3.0),
    spacing=st.tuples(st.floats(0.5, 2.0), st.floats(0.5, 2.0)),
)
@example(scale=1.3, fine=0.7991954946638563, spacing=(0.8, 0.8))  # input / output is 1.2999999999999998
def test_input_and_output_spacing_always_differ_by_the_scale(scale, fine, spacing):
    found, _ = choose(
        dataset(spacing=(fine, *spacing)), Asked(scale=(scale, 1.0, 1.0), output_spacing=(fine, *spacing))
    )
    assert found is not None
    for i, o, s in zip(found.input_spacing, found.output_spacing, found.scale, strict=True):
        assert i == pytest.approx(s * o, rel=1e-4)
    assert scale == pytest.approx(max(found.scale), rel=0.0501)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (Asked(scale=(0.5,)), "--sr-scale 0.5: a scale.*from 1 to 8, got 0.5"),
        (Asked(scale=(9.0, 1.0, 1.0)), "--sr-scale 9,1,1.*from 1 to 8, got 9"),
        (Asked(input_spacing=(4.0, 1.0, 1.0), output_spacing=(5.0, 1.0, 1.0)), "5 mm is coarser than the input's 4 mm"),
        (Asked(output_spacing=(3.0, 1.0, 1.0)), "3 mm is coarser than the input's 1 mm"),
        (Asked(input_spacing=(12.0, 1.0, 1.0)), "From 12 mm to 1 mm is a scale of 12, the limit is 8"),
        (Asked(input_spacing=(0.0, 1.0, 1.0)), "--input-spacing 0,1,1: a spacing is above 0"),
        (Asked(output_spacing=(0.5, 0.5, 0.5)), "cannot be learned from Dataset001_Any.*coarser --output-spacing"),
        (
            Asked(input_spacing=(4.0, 1.0, 1.0), output_spacing=(1.0, 1.0, 1.0), scale=(2.0,)),
            "--sr-scale says 2,1,1.*make it 4,1,1.*two of the three",
        ),
        (Asked(scale=(2.0,), task="jiont"), "--task 'jiont' is not known.*'joint'"),
    ],
)
def test_what_cannot_be_is_refused_with_its_values(asked, sentence):
    with pytest.raises(PlanError, match=sentence) as caught:
        choose(dataset(), asked)
    assert "\n" not in str(caught.value)


def test_a_scale_below_1_3_is_left_to_interpolation():
    found, because = choose(dataset(), Asked(scale=(1.25,)))
    assert found is None and "below 1.3" in because


def test_above_six_the_plan_says_that_nobody_has_shown_it():
    assert "outside what has been shown" in choose(dataset(), Asked(scale=(7.0,)))[1]
    assert "outside" not in choose(dataset(), Asked(scale=(6.0,)))[1]


def test_spacing_is_in_the_order_of_the_files_arrays():
    turned = dataset((36, 50, 35))
    cases = tuple(replace(case, orientation="RAS") for case in turned.cases)  # the file's first axis is left-right
    turned = replace(turned, cases=cases)
    assert to_canonical((4.0, 2.0, 1.0), turned) == (1.0, 2.0, 4.0)
    found, _ = choose(turned, Asked(input_spacing=(4.0, 1.0, 1.0)))
    grid = plan_grid(turned, Notes(), expected=expected_spacing(turned, Asked(input_spacing=(4.0, 1.0, 1.0))))
    assert grid.axis_order == (2, 0, 1), "the axis that is coarse in use comes first"
    assert found is not None and found.scale == (4.0, 1.0, 1.0)


def test_labels_on_a_finer_grid_are_the_truth():
    fingerprint = dataset((12, 50, 35), (4.0, 1.0, 1.0))
    cases = tuple(replace(case, label_scale=(4.0, 1.0, 1.0)) for case in fingerprint.cases)
    found, because = choose(replace(fingerprint, cases=cases))
    assert found is not None and found.source == "paired" and found.scale == (4.0, 1.0, 1.0)
    assert found.store_spacing == (4.0, 1.0, 1.0) and found.acquisition is None
    assert "4x1x1 times as fine" in because
    assert found.segments and not found.restores_images, "there is no fine image"


@pytest.mark.parametrize(
    ("thin", "thick", "planned"),
    [(10, 20, True), (10, 40, True), (9, 20, False), (10, 41, False), (30, 31, True)],
)
def test_a_fifth_of_the_cases_and_ten_must_be_twice_as_fine(thin, thick, planned):
    found, because = choose(mixed(thin, thick))
    assert (found is not None) == planned
    assert f"{thin} of {thin + thick} cases" in because
    if found is not None:
        assert found.source == "degraded" and found.scale == (4.0, 1.0, 1.0) and found.output_spacing[0] == 1.0


def test_cases_are_fine_enough_from_a_factor_two_on():
    assert choose(mixed(20, 30, thin_mm=2.0))[0] is not None
    assert choose(mixed(20, 30, thin_mm=2.2))[0] is None


def test_spacings_that_differ_ask_for_any_scale():
    even, _ = choose(mixed(15, 30, thick_mm=(4.0, 4.2)))
    assert even is not None and even.spread is None and even.names(3) == ("3d_sr",)
    uneven, because = choose(mixed(15, 30, thick_mm=(3.0, 4.0)))
    assert uneven is not None and uneven.spread == (3.0, 4.0) and uneven.names(3) == ("3d_sr_any",)
    assert "any scale" in because


@pytest.mark.parametrize(
    ("thin", "thick", "thick_mm", "scale", "spread"),
    [(12, 40, (2.0, 3.9, 3.9, 3.9, 3.9), 4.0, (2.0, 4.0)), (20, 20, (3.0, 5.0), 2.0, (2.0, 5.0))],
)
def test_the_scale_that_is_planned_for_is_one_of_those_that_are_trained(thin, thick, thick_mm, scale, spread):
    found, _ = choose(mixed(thin, thick, thick_mm=thick_mm))
    assert found is not None and found.scale == (scale, 1.0, 1.0)
    assert found.any_range == spread


@pytest.mark.parametrize(
    ("ratio", "c", "planned", "said"),
    [
        (4.0, 0.85, True, "0.850"),
        (4.0, 0.95, False, "0.950"),
        (2.9, 0.5, False, "2.9 times as thick"),
        (3.0, 0.94, True, "0.940"),
        (5.0, 0.5, False, "automatic up to 4"),
    ],
)
def test_thick_slices_alone_learn_in_the_plane_where_labels_lose_by_it(ratio, c, planned, said):
    spacings = []

    def ceiling(spacing):
        spacings.append(spacing)
        return c

    found, because = choose(dataset((12, 60, 60), (ratio, 1.0, 1.0)), ceiling=ceiling)
    assert (found is not None) == planned
    assert said in because
    if found is not None:
        assert found.source == "self" and found.names(3) == ("3d_sr",)
        assert found.output_spacing == (1.0, 1.0, 1.0) and found.input_spacing == (ratio, 1.0, 1.0)
        assert sorted(set(spacings)) == [(0.0, 0.0, ratio), (0.0, ratio, 0.0)], "measured in the plane"


def test_what_is_asked_by_name_may_be_larger_and_need_not_pay():
    found, _ = choose(dataset((12, 60, 60), (6.0, 1.0, 1.0)), named=True, ceiling=lambda scale: 0.99)
    assert found is not None and found.source == "self" and found.scale == (6.0, 1.0, 1.0)
    assert choose(dataset((12, 60, 60), (9.0, 1.0, 1.0)), named=True)[0] is None


def test_a_finer_output_of_thick_slices_is_learned_in_the_plane():
    for asked in (Asked(output_spacing=(1.0, 1.0, 1.0)), Asked(scale=(5.0,))):
        found, _ = choose(dataset((12, 60, 60), (5.0, 1.0, 1.0)), asked)
        assert found is not None and found.source == "self" and found.scale == (5.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("channels", "scale", "profile", "thickness"),
    [
        (("MRI",), (4.0, 1.0, 1.0), "gauss", (1.0, 1.0)),
        (("cineMRI",), (4.0, 1.0, 1.0), "gauss", (1.0, 1.0)),
        (("T1w", "T2-FLAIR"), (4.0, 1.0, 1.0), "gauss", (1.0, 1.0)),
        (("MRI",), (2.0, 2.0, 2.0), "sinc", (1.0, 1.0)),
        (("3D T1",), (2.0, 1.0, 1.0), "sinc", (1.0, 1.0)),
        (("CT",), (4.0, 1.0, 1.0), "rect", (1.0, 1.0)),
        (("CT", "MRI"), (4.0, 1.0, 1.0), "gauss", (0.5, 1.1)),
        (("ultrasound",), (4.0, 1.0, 1.0), "gauss", (0.5, 1.1)),
        (("pet",), (4.0, 1.0, 1.0), "gauss", (0.5, 1.1)),
        (("contrast12",), (4.0, 1.0, 1.0), "gauss", (0.5, 1.1)),
    ],
)
def test_the_slice_profile_follows_the_channels_names(channels, scale, profile, thickness):
    assert choose_acquisition(channels, scale) == Acquisition(profile, thickness)


# --- the plans


def test_the_network_is_planned_on_the_input_grid_and_the_store_is_that_of_3d_fullres():
    asked = Asked(input_spacing=(4.0, 1.0, 1.0))
    plan = plan_by_memory(dataset(), configurations=["3d_fullres", "3d_sr"], asked=asked)
    full, sr = plan.configurations
    assert sr.preprocessing == full.preprocessing
    assert sr.input_preprocessing.spacing == (4.0, 1.0, 1.0)
    assert sr.median_shape == (9, 50, 35)
    assert sr.patch_size[0] < full.patch_size[0]
    assert sr.architecture.kernels[0] == (1, 3, 3), "flat until spacing is even, on the input grid"
    assert full.architecture.kernels[0] == (3, 3, 3)
    assert (sr.architecture.head, sr.architecture.head_scale) == ("subpixel", (4.0, 1.0, 1.0))
    assert (sr.sr_source, sr.sr_scale, sr.acquisition) == ("degraded", (4.0, 1.0, 1.0), GAUSS)
    assert sr.architecture.image_channels == 1 and sr.architecture.output_channels == 3
    assert sr.training.low_resolution_axes == (1, 2)
    assert sr.training.rotate_out_of_plane, "the fine patch is even"


def test_ct_that_is_made_thick_is_stored_unclipped_and_read_clipped(counted):
    asked = Asked(input_spacing=(4.0, 1.0, 1.0))
    plan = plan_by_memory(dataset(channels=("CT", "MRI")), configurations=["3d_fullres", "3d_sr"], asked=asked)
    full, sr = plan.configurations
    schemes = [
        [n.scheme for n in s.normalization] for s in (full.preprocessing, sr.preprocessing, sr.input_preprocessing)
    ]
    assert schemes == [["ct", "zscore"], ["ct_unclipped", "zscore"], ["ct", "zscore"]]
    check_plan(plan, where="plan.json")


def test_a_finer_answer_that_is_asked_for_leaves_only_networks_that_give_it(counted):
    thick = dataset((12, 60, 60), (4.0, 1.0, 1.0))
    plan = plan_by_memory(thick, asked=Asked(output_spacing=(1.0, 1.0, 1.0)), ceiling=lambda spacing: 0.9)
    assert [c.name for c in plan.configurations] == ["3d_sr"] and plan.configurations[0].sr_source == "self"
    text = " ".join(explain(plan).split())
    assert "no other network gives them" in text and "in the plane keep a Dice of 0.900" in text


def test_what_is_asked_for_and_comes_to_nothing_is_told(tiny_dataset, tmp_path, caplog, counted):
    root = tiny_dataset(cases=5)
    words = ["plan-and-preprocess", str(root), "--workspace", str(tmp_path), "--workers", "1", "--fold-time", "60s"]
    told = CliRunner().invoke(app, [*words, "--sr-scale", "1.2"])
    assert told.exit_code == 0, told.output
    assert "no super-resolution is planned: input voxels of 2.4x1x1 mm are 1.2 times as coarse" in told.stderr
    for option, value in (("--sr-scale", "2"), ("--gpu-memory", "4GB"), ("--fold-time", "1m")):
        refused = CliRunner().invoke(app, [*words[:6], "--keep-plan", option, value])
        assert refused.exit_code == 2 and option in refused.stderr and "takes the plan as it is" in refused.stderr


def test_a_plane_that_no_case_shows_so_finely_is_refused_however_many_cases_there_are(counted):
    many = dataset(spacing=(1.0, 1.0, 1.0), cases=12)
    with pytest.raises(PlanError, match="cannot be learned from .* no axis shows so much"):
        plan_by_memory(many, asked=Asked(output_spacing=(1.0, 0.5, 1.0)))


def test_thick_images_in_use_leave_only_networks_that_read_them(counted):
    plan = plan_by_memory(dataset(), asked=Asked(input_spacing=(4.0, 1.0, 1.0)))
    assert [c.name for c in plan.configurations] == ["3d_sr"]
    text = " ".join(explain(plan).split())
    assert "subpixel head: 3 classes and 1 image channels" in text
    assert "4 x 1 x 1 mm" in text


@pytest.mark.parametrize(
    ("task", "classes", "images"), [("joint", 3, 1), ("segmentation", 3, 0), ("super_resolution", 0, 1)]
)
def test_the_task_says_which_heads_there_are(task, classes, images, counted):
    (c,) = plan_by_memory(dataset(), asked=Asked(scale=(2.0,), task=task)).configurations
    assert (c.architecture.output_channels, c.architecture.image_channels) == (classes, images)


def test_a_task_without_super_resolution_is_refused(counted):
    with pytest.raises(PlanError, match="--task super_resolution: nothing asks for super-resolution"):
        plan_by_memory(dataset(), asked=Asked(task="super_resolution"))


def test_any_scale_is_trained_up_to_the_one_asked_for(counted):
    (c,) = plan_by_memory(dataset(), asked=Asked(scale=(4.0,)), configurations=["3d_sr_any"]).configurations
    assert c.sr_range == (1.5, 4.0) and c.architecture.head_scale == (4.0, 1.0, 1.0)


def test_bodies_of_one_scale_share_a_store():
    names = ["3d_sr", "3d_sr_any", "2d_sr", "2.5d_stack_sr"]
    plan = plan_by_memory(dataset(), asked=Asked(input_spacing=(4.0, 1.0, 1.0)), configurations=names)
    assert {c.name for c in plan.configurations} == set(names)
    assert len(plan.stores()) == 1
    flat = plan.configuration("2d_sr")
    assert flat.view_axis == 1 and flat.sr_scale == (1.0, 4.0, 1.0), "its slices hold the axis that is coarse"
    assert flat.median_shape == (50, 9, 35)
    stack = plan.configuration("2.5d_stack_sr")
    assert stack.sr_scale == (4.0, 1.0, 1.0)
    assert stack.architecture.context_slices == 3, "of the 9 thick slices, not of the 36 fine ones"
    with pytest.raises(PlanError, match="has 2 slices of 16 mm, 2.5d_stack_sr sees a stack of 3"):
        plan_by_memory(dataset(), asked=Asked(scale=(8.0,), output_spacing=(2.0, 1.0, 1.0)), configurations=names)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=st.tuples(*(st.integers(8, 120) for _ in range(3))),
    spacing=st.tuples(*(st.floats(0.5, 2.0) for _ in range(3))),
    scale=st.floats(1.3, 8.0),
    axis=st.integers(0, 2),
    task=st.sampled_from(["joint", "segmentation", "super_resolution"]),
)
def test_any_scale_of_any_dataset_gets_plans_that_load(tmp_path_factory, shape, spacing, scale, axis, task):
    asked = Asked(scale=tuple(scale if a == axis else 1.0 for a in range(3)), output_spacing=spacing, task=task)
    names = ["3d_sr", "3d_sr_any", "2d_sr", *(["2.5d_stack_sr"] if min(shape) >= 3 * scale else [])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sizer, "measure", memory_by_formula)
        plan = plan_by_memory(dataset(shape, spacing), asked=asked, configurations=names)
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan  # which checks every value
    for c in plan.configurations:
        store, wanted = c.preprocessing.spacing, c.input_preprocessing.spacing
        frame = c.frames(training=False)[0]
        factors = [1.0 if s is None else w / s for w, s in zip(wanted, store, strict=True)]
        assert factors == pytest.approx([c.sr_scale[frame.index(a)] for a in range(3)])
    assert explain(plan)


def test_planes_are_super_resolved_in_the_plane(counted):
    asked = Asked(scale=(1.0, 1.5, 5.0))
    (c,) = plan_by_memory(dataset((1, 64, 300), channels=("ultrasound",)), asked=asked).configurations
    assert c.name == "2d_sr" and c.sr_scale == (1.0, 1.5, 5.0) and c.patch_size[0] == 1
    assert c.preprocessing.spacing == (None, 1.0, 1.0)


def test_self_supervision_plans_thick_volumes_with_an_image_of_their_slices(counted):
    fingerprint = dataset((12, 60, 60), (4.0, 1.0, 1.0))
    plan = plan_by_memory(fingerprint, ceiling=lambda scale: 0.8)
    c = plan.configuration("3d_sr")
    assert (c.sr_source, c.sr_scale, c.topology) == ("self", (4.0, 1.0, 1.0), "3d")
    assert (c.architecture.head, c.architecture.image_body) == ("interpolating", "slices")
    assert c.preprocessing.spacing == (4.0, 1.0, 1.0) and c.median_shape == (12, 60, 60)
    assert "0.800" in " ".join(d.because for d in plan.decisions if d.name == "super_resolution")
    labels = plan_by_memory(fingerprint, ceiling=lambda scale: 0.8, asked=Asked(task="segmentation", scale=(4.0,)))
    assert labels.configuration("3d_sr").architecture.image_body == "shared"


def test_self_supervised_slices_are_coarse_along_one_axis(counted):
    fingerprint = dataset((12, 60, 60), (4.0, 1.0, 1.0))
    plan = plan_by_memory(fingerprint, ceiling=lambda scale: 0.8, configurations=["2d_sr"])
    c = plan.configuration("2d_sr")
    assert (c.sr_source, c.sr_scale, c.topology) == ("self", (1.0, 4.0, 1.0), "2d")
    assert c.preprocessing.spacing == (4.0, 1.0, 1.0)
    assert c.median_shape == (12, 15, 60)
    assert c.training.low_resolution_axes == (2,)
    assert "0.800" in " ".join(d.because for d in plan.decisions if d.name == "super_resolution")


def test_paired_labels_keep_their_own_grid_in_the_store(counted):
    fingerprint = dataset((12, 50, 35), (4.0, 1.0, 1.0))
    cases = tuple(replace(case, label_scale=(4.0, 1.0, 1.0)) for case in fingerprint.cases)
    plan = plan_by_memory(replace(fingerprint, cases=cases))
    c = plan.configuration("3d_sr")
    assert c.preprocessing.label_scale == (4.0, 1.0, 1.0) and c.preprocessing.spacing == (4.0, 1.0, 1.0)
    assert c.architecture.image_channels == 0 and not c.training.rotate_out_of_plane
    assert plan.configuration("3d_fullres").preprocessing.label_scale == (1.0, 1.0, 1.0)
    with pytest.raises(PlanError, match="--task super_resolution needs fine images"):
        plan_by_memory(replace(fingerprint, cases=cases), asked=Asked(task="super_resolution"))


@pytest.mark.slow
def test_a_big_volume_and_a_small_memory_plan_super_resolution_for_its_context():
    plan = plan_by_memory(dataset((300, 400, 400), cases=100, channels=("CT",)), 4)
    c = plan.configuration("3d_sr")
    seen = math.prod(min(p, m) for p, m in zip(c.patch_size, c.median_shape, strict=True)) / math.prod(c.median_shape)
    assert seen >= 0.25
    assert c.preprocessing == plan.configuration("3d_fullres").preprocessing
    assert c.sr_source == "degraded" and all(s == int(s) <= 4 for s in c.sr_scale) and max(c.sr_scale) >= 2
    assert plan.forecasts["3d_sr"].memory_bytes <= 4 * GB
    (why,) = [d.because for d in plan.decisions if d.name == "super_resolution.for_context"]
    assert "%" in why and "one network" in why


def test_a_name_alone_needs_grids_from_somewhere(counted):
    with pytest.raises(PlanError, match="3d_sr must know its grids.*--input-spacing"):
        plan_by_memory(dataset(), configurations=["3d_sr"])


def test_a_case_that_is_thinner_than_one_input_slice_is_named():
    thin = replace(dataset(cases=1).cases[0], identifier="scout", shape=(3, 50, 35))
    found = replace(dataset(), cases=(*dataset().cases, thin))
    for asked, named in ((Asked(scale=(4.0,)), False), (Asked(input_spacing=(4.0, 1.0, 1.0)), True)):
        with pytest.raises(PlanError, match="Case scout of .* has 3 voxels of 1 mm along z, fewer than the 4 of one"):
            choose(found, asked, named=named)
    assert choose(found, Asked(scale=(3.0,)))[0] is not None
    mix = mixed(15, 30)
    resolution, because = choose(replace(mix, cases=(*mix.cases, replace(thin, spacing=(1.0, 1.0, 1.0)))))
    assert resolution is None and "Case scout" in because, "what nobody asked for is left out"


@pytest.mark.parametrize("name", ["3d_sr_any", "2.5d_stack_sr"])
def test_neither_stacks_nor_any_scale_learn_from_thick_slices_alone(name, counted):
    with pytest.raises(PlanError, match=f"{name} needs images or labels as fine as its answer.*plan 3d_sr"):
        plan_by_memory(dataset((12, 60, 60), (4.0, 1.0, 1.0)), configurations=[name], ceiling=lambda scale: 0.8)


def test_stores_can_be_filled_before_the_networks_are_sized(counted):
    asked = Asked(input_spacing=(4.0, 1.0, 1.0))
    for fingerprint, options in (
        (dataset(), {"asked": asked, "configurations": ["3d_fullres", "3d_sr", "2d_sr"]}),
        (dataset((12, 60, 60), (4.0, 1.0, 1.0)), {"ceiling": lambda scale: 0.8}),
    ):
        assert set(first_stores(fingerprint, **options)) == set(plan_by_memory(fingerprint, **options).stores())


# --- the command line


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--sr-scale", "0.5"), "--sr-scale 0.5"),
        (("--sr-scale", "2,2"), "--sr-scale 2,2: expected one number or 3 numbers"),
        (("--input-spacing", "4"), "--input-spacing 4: expected 3 numbers"),
        (("--input-spacing", ""), "--input-spacing : expected 3 numbers"),
        (("--input-spacing", "nan,1,1"), "--input-spacing nan,1,1: expected 3 numbers"),
        (("--output-spacing", "-1,1,1"), "--output-spacing -1,1,1: a spacing is above 0 mm"),
        (("--configurations", ""), "No configuration was asked for"),
        (("--output-spacing", "9,9,9"), "9 mm is coarser than the input's 2 mm"),
        (("--input-spacing", "99,1,1"), "the limit is 8"),
        (("--task", "restore"), "--task 'restore' is not known"),
        (("--configurations", "3d_sr"), "3d_sr must know its grids"),
    ],
)
def test_the_command_refuses_with_a_sentence_and_writes_nothing(
    tiny_dataset: Callable[..., Path], options: tuple[str, ...], sentence: str
):
    root = tiny_dataset(cases=2)
    workspace = root.parent / "workspace"
    words = ["plan-and-preprocess", root, *options, "--workspace", workspace, "--workers", "0", "--gpu-memory", "1GB"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr and "should not happen" not in result.stderr
    assert not [path for path in workspace.rglob("*") if path.is_file() and path.name != "run.lock"]


def test_a_plan_of_trained_models_answers_only_the_grids_that_it_was_made_for(counted):
    asked = asked_super_resolution(input_spacing=(4, 1, 1), output_spacing=None, scale=None, task="joint")
    plan = plan_by_memory(dataset(), asked=asked)
    anything = Budget(0, 0.0)
    assert _answers(plan, anything, None, asked) and _answers(plan, anything, None, None)
    assert not _answers(plan, anything, None, Asked(scale=(2.0,)))
    assert asked_super_resolution(input_spacing=None, output_spacing=None, scale=None, task="joint") is None


# --- C(s)


def boxes(shape: tuple[int, int, int], *corners: tuple[slice, slice, slice]) -> np.ndarray:
    label = np.zeros(shape, np.int16)
    for value, corner in enumerate(corners, start=1):
        label[corner] = value
    return label


def test_a_label_of_whole_slices_loses_nothing():
    label = boxes((12, 8, 8), (slice(4, 8), slice(2, 6), slice(2, 6)))
    fine, restored = down_and_up(label, (4.0, 1.0, 1.0), Acquisition("rect"))
    np.testing.assert_array_equal(fine, label)
    np.testing.assert_array_equal(restored, label)


def test_what_fills_less_than_half_of_a_slice_is_lost():
    label = boxes((12, 8, 8), (slice(4, 5), slice(2, 6), slice(2, 6)), (slice(9, 12), slice(0, 4), slice(0, 4)))
    coarse = coarse_label(label, (4.0, 1.0, 1.0), Acquisition("rect"))
    assert coarse.shape == (3, 8, 8)
    assert set(np.unique(coarse)) == {0, 2}
    assert (coarse[2, :4, :4] == 2).all()


def test_half_a_slice_is_background():
    label = boxes((8, 4, 4), (slice(0, 2), slice(0, 4), slice(0, 4)))
    assert not coarse_label(label, (4.0, 1.0, 1.0), Acquisition("rect")).any()


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(9, 24), st.integers(9, 24), st.integers(9, 24)),
    scale=st.floats(1.3, 8.0),
    axis=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_down_and_up_compares_what_the_thick_slices_cover(shape, scale, axis, seed):
    label = (np.random.default_rng(seed).random(shape) < 0.3).astype(np.int16)
    factors = tuple(scale if a == axis else 1.0 for a in range(3))
    fine, restored = down_and_up(label, factors, GAUSS)
    assert fine.shape == restored.shape
    covered = math.floor(shape[axis] / scale + 1e-6) * scale
    assert covered - 2 < fine.shape[axis] <= covered + 1e-6
    others = [a for a in range(3) if a != axis]
    assert all(fine.shape[a] == shape[a] for a in others)
    # turning the label turns the answer
    order = (axis, *others)
    turned = down_and_up(label.transpose(order), tuple(factors[a] for a in order), GAUSS)[1]
    np.testing.assert_array_equal(turned, restored.transpose(order))


def test_thin_structures_lose_more_than_bulky_ones():
    thin = boxes((32, 32, 32), (slice(10, 14), slice(4, 28), slice(4, 28)))
    bulky = boxes((32, 32, 32), (slice(5, 27), slice(4, 28), slice(4, 28)))
    one = Labels.from_json({"background": 0, "a": 1})
    scores = []
    for label in (thin, bulky):
        fine, restored = down_and_up(label, (4.0, 1.0, 1.0), GAUSS)
        (score,) = structure_dice(restored, fine, one)
        scores.append(score)
    assert scores[0] < 0.95 <= scores[1] < 1


def test_the_ceiling_is_measured_along_canonical_axes(tiny_dataset: Callable[..., Path]):
    root = tiny_dataset(cases=4, shape=(24, 16, 14), spacing=(1.0, 1.0, 1.0))
    found = RawDataset.load(root)
    along = {axis: label_ceiling(found, _along(axis, 4.0), workers=1) for axis in range(3)}
    assert all(0.3 < c < 0.97 for c in along.values())
    assert label_ceiling(found, (2.0, 1.0, 1.0), workers=1) > along[0]
    turned = tiny_dataset(name="Dataset002_Turned", cases=4, shape=(24, 16, 14), spacing=(1.0, 1.0, 1.0))
    direction = ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0))  # file axis 0 runs along world x, axis 2 along z
    for path in [*(turned / "imagesTr").iterdir(), *(turned / "labelsTr").iterdir()]:
        _turn(path, direction)
    assert label_ceiling(RawDataset.load(turned), _along(2, 4.0), workers=1) == pytest.approx(along[0])


def test_at_most_twenty_cases_are_read(tiny_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    found = RawDataset.load(tiny_dataset(cases=3))
    many = replace(found, cases=found.cases * 20)
    read = []

    def count(function, cases, *, workers, names):
        read.extend(names)
        return iter([(0, [0.5])])

    monkeypatch.setattr("autoseg.experiment_planning.label_ceiling.map_cases", count)
    assert label_ceiling(many, (2.0, 1.0, 1.0), workers=1) == 0.5
    assert len(read) == 20


def test_the_fingerprint_tells_how_much_finer_labels_are(tiny_dataset: Callable[..., Path]):
    root = tiny_dataset(cases=2, shape=(6, 16, 14), spacing=(4.0, 1.0, 1.0))
    before = extract_fingerprint(RawDataset.load(root), workers=1)
    assert {case.label_scale for case in before.cases} == {(1.0, 1.0, 1.0)}
    content = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps({**content, "label_grid": "own"}))
    from autoseg.image import read_image

    for path in (root / "labelsTr").iterdir():
        label = read_image(path)
        grid = Grid((24, 16, 14), (1.0, 1.0, 1.0), (-1.5, 0.0, 0.0))
        write_image(Image(np.repeat(label.array, 4, axis=1), grid), path)
    after = extract_fingerprint(RawDataset.load(root), workers=1)
    assert {case.label_scale for case in after.cases} == {(4.0, 1.0, 1.0)}
    assert [c.class_voxels for c in after.cases] == [c.class_voxels for c in before.cases]


def _along(axis: int, scale: float) -> tuple[float, float, float]:
    z, y, x = (scale if a == axis else 1.0 for a in range(3))
    return z, y, x


def _turn(path: Path, direction) -> None:
    from autoseg.image import read_image

    image = read_image(path)
    write_image(Image(image.array, replace(image.grid, direction=direction)), path)
