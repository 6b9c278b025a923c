"""plan.json: what is written is read back, and what a hand broke is refused in a sentence that names it."""

import json
from dataclasses import replace
from typing import Any

import pytest
from small_models import small_plan

from autoseg.errors import PlanError
from autoseg.plan import Acquisition, Decision, Forecast, Plan
from autoseg.plan_values import BLOCKS, CONTEXTS, HEADS, PROFILES, RECIPES, SCHEMES
from autoseg.typed_json import to_json


@pytest.fixture
def content() -> dict[str, Any]:
    """The JSON of a sound plan with three configurations."""
    return json.loads(json.dumps(to_json(small_plan())))


def test_a_plan_is_read_back_as_it_was_written(tmp_path):
    plan = small_plan()
    plan = Plan(
        **{
            **plan.__dict__,
            "forecasts": {"3d_fullres": Forecast(10**9, 10**6, 10**10, 0.25, 60.0, 1000)},
            "decisions": (Decision("3d_fullres.patch_size", [8, 16, 16], "rule", "it fits."),),
        }
    )
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_forecasts_and_reasons_do_not_change_the_id_but_a_patch_does(content):
    plan = Plan.from_json(content, where="p")
    content["decisions"] = [{"name": "x", "value": 1, "kind": "rule", "because": "why not."}]
    assert Plan.from_json(content, where="p").id == plan.id
    content["configurations"][0]["patch_size"] = [8, 16, 32]
    assert Plan.from_json(content, where="p").id != plan.id


def test_a_plan_of_another_version_is_refused(content, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({**content, "version": 1}))
    with pytest.raises(PlanError, match=r"plan\.json: plan version 1 .* version 2; plan again"):
        Plan.load(tmp_path / "plan.json")


def test_a_missing_or_unreadable_plan_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match="there is no such plan"):
        Plan.load(path)
    path.write_text('{"version": 2,')
    with pytest.raises(PlanError, match="not valid JSON.*plan again"):
        Plan.load(path)


@pytest.mark.parametrize("place", [(), ("budget",), ("configurations", 0), ("configurations", 0, "architecture")])
def test_an_unknown_key_is_refused_with_its_nearest(content, place):
    inner: Any = content
    for step in place:
        inner = inner[step]
    inner["patchsize"] = 1
    with pytest.raises(PlanError, match="'patchsize'"):
        Plan.from_json(content, where="plan.json")


# a hand's edits of the first configuration, and what the sentence must name
EDITS = [
    (("batch_size",), 0, "batch_size"),
    (("batch_size",), "two", "batch_size"),
    (("batch_size",), True, "batch_size"),
    (("patch_size",), [8, 16], "patch_size"),
    (("patch_size",), [8, 16, 17], r"patch_size .* divisible by \[2, 2, 2\]"),
    (("patch_size",), [0, 16, 16], "patch_size"),
    (("topology",), "4d", "2d, 3d"),
    (("topology",), "2d", "2d configuration needs patch_size"),
    (("preprocessing", "spacing"), [1.0, 0.0, 1.0], "spacing must be positive"),
    (("preprocessing", "spacing"), [1.0, -1.0, 1.0], "spacing must be positive"),
    (("preprocessing", "axis_order"), [0, 0, 1], "axis_order"),
    (("preprocessing", "normalization"), [], "normalization"),
    (("architecture", "features"), [4], "features, strides, kernels"),
    (("architecture", "features"), [4, 0], "at least 1"),
    (("architecture", "kernels"), [[3, 3, 3], [2, 3, 3]], "kernels must be odd"),
    (("architecture", "strides"), [[2, 2, 2], [2, 2, 2]], r"begin with \[1, 1, 1\]"),
    (("architecture", "decoder_convs"), [1, 1], "decoder_convs must have 1"),
    (("architecture", "output_channels"), 7, "output_channels must be 3"),
    (("architecture", "input_channels"), 2, "input_channels must be 1"),
    (("training", "mirror_axes"), [3], "mirror_axes"),
    (("training", "mirror_axes"), [1, 1], "mirror_axes .* each once"),
    (("training", "low_resolution_axes"), [3], "low_resolution_axes"),
    (("training", "recipe"), "adam", "recipe 'adam' .* 'adamw'"),
    (("training", "steps"), -1, "steps"),
    (("training", "seconds"), -1, "seconds"),
    (("patch_size",), [2, 2, 2], "leaves one voxel"),
    (("architecture", "block"), "residul", "block 'residul' .* 'residual'"),
    (("preprocessing", "image_order"), 6, "image_order must be from 0 to 5"),
    (("preprocessing", "normalization"), [{"scheme": "n4+zscor"}], "scheme 'n4\\+zscor'"),
    (("preprocessing", "normalization"), [{"scheme": "ct", "std": -1.0}], "std"),
    (("preprocessing", "normalization"), [{"scheme": "ct", "lower": 2.0, "upper": 1.0}], "lower"),
    (("sr_scale",), [2.0, 1.0, 1.0], r"sr_scale .* must not exceed head_scale \[1.0, 1.0, 1.0\]"),
    (("sr_source",), "degraded", "'degraded' does not go with head 'plain'"),
    (("sr_source",), "degrade", "sr_source 'degrade' .* 'degraded'"),
    (("architecture", "head"), "subpixel", "'none' does not go with head 'subpixel'"),
    (("architecture", "image_channels"), 1, "image_channels, .* need a sr_source"),
    (("architecture", "context_slices"), 3, "context_slices of a 3d configuration must be 1, got 3"),
    (("architecture", "context"), "stack", "a 3d configuration needs context 'none', got 'stack'"),
    (("topology",), "2.5d_stack", "2.5d_stack configuration needs patch_size and kernels of 1 along z"),
    (("view_axis",), 1, "view_axis must be 0, 1 or 2, and 0 for 3d, got 1"),
    (("preprocessing", "label_scale"), [2.0, 1.0, 1.0], r"label_scale .* must be \[1.0, 1.0, 1.0\] .* 'none'"),
    (("name",), "../3d_fullres", "folder"),
]


@pytest.mark.parametrize(("keys", "value", "sentence"), EDITS, ids=lambda entry: str(entry)[:40])
def test_a_hand_edited_value_that_cannot_be_is_refused_by_name(content, keys, value, sentence):
    inner = content["configurations"][0]
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    with pytest.raises(PlanError, match=sentence):
        Plan.from_json(content, where="plan.json")


@pytest.fixture
def fine_content() -> dict[str, Any]:
    """The JSON of a sound plan with one super-resolving configuration."""
    plan = small_plan()
    plain = plan.configuration("3d_fullres")
    configuration = replace(
        plain,
        name="3d_sr_any",
        architecture=replace(plain.architecture, head="subpixel", head_scale=(4.0, 1.0, 1.0), image_channels=1),
        sr_scale=(3.0, 1.0, 1.0),
        sr_range=(1.5, 4.0),
        sr_source="degraded",
        acquisition=Acquisition("gauss", (0.5, 1.1)),
    )
    return json.loads(json.dumps(to_json(replace(plan, configurations=(configuration,)))))


FLAT: dict[str, Any] = {"topology": "2d", "patch_size": [1, 16, 16], "architecture.kernels": [[1, 3, 3]] * 2}
PAIRED: dict[str, Any] = {"sr_source": "paired", "preprocessing.label_scale": [3.0, 1.0, 1.0], "acquisition": None}
# edits of a super-resolving configuration, and what the sentence must name; None: it is sound
FINE_EDITS: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"architecture.output_channels": 0}, None),
    ({"architecture.output_channels": 2}, "output_channels must be 3"),
    ({"architecture.head": "filter"}, "head 'filter' .* 'filters'"),
    ({"architecture.head_scale": [9.0, 1.0, 1.0]}, "scales must be from 1 to 8, got .*9.0"),
    ({"sr_scale": [0.5, 1.0, 1.0]}, r"scales must be from 1 to 8, got \[0.5"),
    ({"sr_scale": [1.0, 1.0, 1.0]}, "'degraded' needs a sr_scale above 1"),
    ({"sr_range": [1.5, 9.0]}, r"range \[1.5, 9.0\]"),
    ({"sr_range": [3.0, 2.0]}, "sr_range must rise"),
    ({"sr_range": [1.5, 5.0]}, "sr_range must .* end within head_scale 4"),
    ({"architecture.image_channels": 2}, "image_channels must be 0 or the image's 1, got 2"),
    ({"acquisition": None}, "'degraded' needs an acquisition"),
    ({"acquisition.profile": "gaus"}, "profile 'gaus' .* 'gauss'"),
    ({"acquisition.thickness": [0.0, 1.0]}, "thickness must rise from above 0"),
    ({"acquisition.thickness": [1.0, 0.5]}, "thickness must rise"),
    ({"acquisition.gap": 1.0, "acquisition.profile": "rect"}, "gap must be from 0 to below 1"),
    ({"acquisition.gap": 0.2, "acquisition.profile": "rect"}, None),
    ({"acquisition.gap": 0.2}, "a gap goes with profile rect alone, got 0.2 with gauss"),
    ({"acquisition.noise": -0.1}, "noise not negative"),
    ({"training.image_losses": ["l1", "l2"]}, "image loss 'l2'"),
    (PAIRED, None),
    ({**PAIRED, "preprocessing.label_scale": [2.0, 1.0, 1.0]}, r"must be \[3.0, 1.0, 1.0\] for sr_source 'paired'"),
    ({**PAIRED, "training.image_losses": ["consistency"]}, "'consistency' needs an acquisition"),
    ({"preprocessing.label_scale": [3.0, 1.0, 1.0]}, r"must be \[1.0, 1.0, 1.0\] for sr_source 'degraded'"),
    ({"preprocessing.label_scale": [0.5, 1.0, 1.0]}, "label_scale must be from 1 to 8"),
    ({"sr_source": "self"}, "head 'interpolating' is that of volumes with sr_source 'self', got 'subpixel'"),
    ({"architecture.head": "interpolating"}, "head 'interpolating' is that of volumes with sr_source 'self'"),
    ({"sr_source": "self", "architecture.head": "interpolating"}, "image_body must be 'slices' here, got 'shared'"),
    ({"architecture.image_body": "slices"}, "image_body must be 'shared' here, got 'slices'"),
    (
        {"sr_source": "self", "architecture.head": "interpolating", "architecture.image_body": "slices"},
        None,
    ),
    (
        {**FLAT, "architecture.strides": [[1, 1, 1], [1, 2, 2]], "sr_source": "self"},
        r"a sr_scale above 1 along .* axis 1 of slices .* got .*\[3.0, 1.0, 1.0\]",
    ),
    (
        {
            **FLAT,
            "architecture.strides": [[1, 1, 1], [1, 2, 2]],
            "architecture.head_scale": [1.0, 3.0, 1.0],
            "sr_scale": [1.0, 3.0, 1.0],
            "sr_range": None,
            "sr_source": "self",
        },
        None,
    ),
]


@pytest.mark.parametrize(("edits", "sentence"), FINE_EDITS, ids=lambda entry: str(entry)[:60])
def test_a_super_resolving_configuration_is_taken_or_refused_by_name(fine_content, edits, sentence):
    for path, value in edits.items():
        *keys, last = path.split(".")
        inner = fine_content["configurations"][0]
        for key in keys:
            inner = inner[key]
        inner[last] = value
    if sentence is None:
        assert Plan.from_json(fine_content, where="plan.json").configurations[0].super_resolves
        return
    with pytest.raises(PlanError, match=sentence):
        Plan.from_json(fine_content, where="plan.json")


def test_the_input_grid_of_a_degraded_source_is_coarser_than_its_store(fine_content):
    (configuration,) = Plan.from_json(fine_content, where="plan.json").configurations
    assert configuration.preprocessing.spacing == (1.5, 1.0, 1.0)
    assert configuration.input_preprocessing.spacing == (4.5, 1.0, 1.0)
    assert replace(configuration, sr_source="paired").input_preprocessing == configuration.preprocessing


@pytest.mark.parametrize(
    ("topology", "view", "source", "training", "prediction"),
    [
        ("2d", 0, "none", [(0, 1, 2)], [(0, 1, 2)]),
        ("2d", 1, "none", [(1, 0, 2)], [(1, 0, 2)]),
        ("2d", 2, "degraded", [(2, 0, 1)], [(2, 0, 1)]),
        ("2d", 0, "self", [(0, 1, 2), (0, 2, 1)], [(1, 0, 2), (2, 0, 1)]),
        ("3d", 0, "self", [(1, 0, 2), (2, 0, 1)], [(0, 1, 2)]),
    ],
)
def test_a_patch_has_its_view_first_and_self_supervision_turns_an_axis_of_the_plane_into_the_place_of_the_thick_one(
    topology, view, source, training, prediction
):
    plain = small_plan(flat=True).configurations[0]
    configuration = replace(plain, topology=topology, view_axis=view, sr_source=source)
    assert configuration.frames(training=True) == tuple(training)
    assert configuration.frames(training=False) == tuple(prediction)


def test_a_cascade_on_a_stage_that_is_not_planned_is_refused(content):
    content["configurations"][2]["previous_stage"] = "3d_lowest"
    with pytest.raises(PlanError, match="previous_stage '3d_lowest'"):
        Plan.from_json(content, where="plan.json")


def test_a_cascade_that_super_resolves_is_refused(content, fine_content):
    stage = content["configurations"][0]
    both = [stage, {**fine_content["configurations"][0], "previous_stage": stage["name"]}]
    with pytest.raises(PlanError, match="super-resolves cannot have a previous stage, got '3d_fullres'"):
        Plan.from_json({**content, "configurations": both}, where="plan.json")


def test_a_cascade_on_a_cascade_two_configurations_of_one_name_and_none_at_all_are_refused(content):
    for change, sentence in (
        ({"previous_stage": "3d_cascade"}, "has a previous stage itself"),
        ({"name": "3d_fullres"}, "two configurations are named '3d_fullres'"),
    ):
        edited = [*content["configurations"][:2], {**content["configurations"][2], **change}]
        with pytest.raises(PlanError, match=sentence):
            Plan.from_json({**content, "configurations": edited}, where="plan.json")
    with pytest.raises(PlanError, match="no configuration"):
        Plan.from_json({**content, "configurations": []}, where="plan.json")


def test_the_names_that_a_plan_may_hold_are_those_that_the_stages_know():
    from autoseg import acquisition
    from autoseg.networks import blocks, context, upsampling
    from autoseg.preprocessing import normalize
    from autoseg.training import settings

    assert sorted(BLOCKS) == sorted(blocks.BLOCKS)
    assert sorted(CONTEXTS) == sorted(context.CONTEXTS)
    assert sorted(HEADS) == sorted([*upsampling.WITHOUT_RESIDUAL, *upsampling.HEADS])
    assert sorted(PROFILES) == sorted(acquisition.PROFILES)
    assert sorted(RECIPES) == sorted(settings.RECIPES)
    assert sorted(SCHEMES) == sorted(normalize.NORMALIZERS)


def test_a_missing_key_is_named(content):
    del content["configurations"][0]["patch_size"]
    with pytest.raises(PlanError, match="'patch_size' is missing"):
        Plan.from_json(content, where="plan.json")


def test_a_sensible_edit_is_taken(content):
    content["configurations"][0]["patch_size"] = [8, 32, 32]
    content["configurations"][0]["batch_size"] = 5
    edited = Plan.from_json(content, where="plan.json").configuration("3d_fullres")
    assert (edited.patch_size, edited.batch_size) == ((8, 32, 32), 5)


def test_an_unknown_configuration_is_refused_with_those_that_are_planned():
    with pytest.raises(PlanError, match="3d_cascade, 3d_fullres, 3d_lowres.*3d_fullres"):
        small_plan().configuration("3d_fulres")


def test_equal_preprocessing_shares_a_store():
    plan = small_plan()
    fine, coarse, cascade = (plan.configuration(name) for name in ("3d_fullres", "3d_lowres", "3d_cascade"))
    assert fine.preprocessing.store_id == cascade.preprocessing.store_id != coarse.preprocessing.store_id
