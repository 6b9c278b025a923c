"""The memory of a training step, counted on fake tensors, against what the profiler records of real steps."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_training import sr_configuration, stack_configuration

from autoseg.experiment_planning.memory import PRECISIONS, StepMeter, training_memory
from autoseg.experiment_planning.timing import probe_speed
from autoseg.plan import TrainingSettings
from autoseg.training.settings import RECIPES
from autoseg.training.shapes import blank_batch
from autoseg.training.step import build_training, training_step

spec = importlib.util.spec_from_file_location(
    "memory_benchmark", Path(__file__).parents[1] / "benchmarks" / "memory.py"
)
assert spec is not None and spec.loader is not None
benchmark = importlib.util.module_from_spec(spec)
sys.modules["memory_benchmark"] = benchmark  # dataclasses look their module up
spec.loader.exec_module(benchmark)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny steps are slower with several threads, by far on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TOLERANCE = 0.1  # what the planner promises; the benchmark's table shows about 0.01
TINY = (8, 16, 32)
FLAT = (8, 16, 32, 64)
STEPS = [
    benchmark.Step("3D", TINY, (16, 24, 16), 2),
    benchmark.Step("3D, fp32", TINY, (16, 24, 16), 2, precision="fp32"),
    benchmark.Step("3D, SGD", TINY, (16, 24, 16), 2, recipe="sgd"),
    benchmark.Step("3D, no deep supervision", TINY, (16, 16, 16), 3, deep_supervision=False),
    benchmark.Step("3D, anisotropic kernels", FLAT, (8, 32, 32), 2, flat_stages=2),
    benchmark.Step("3D, regions", TINY, (16, 16, 16), 2, labels=benchmark.REGIONS, channels=4),
    benchmark.Step("3D, ignore label", TINY, (16, 16, 16), 2, labels=benchmark.IGNORED),
    benchmark.Step("3D, 14 organs", TINY, (16, 16, 16), 2, labels=benchmark.ORGANS),
    benchmark.Step("2D", FLAT, (1, 32, 48), 8, flat_stages=4),
    benchmark.Step("2D, fp32", FLAT, (1, 32, 48), 8, flat_stages=4, precision="fp32"),
    benchmark.Step("2D, RGB", FLAT, (1, 64, 64), 4, channels=3, flat_stages=4),
    benchmark.Step("3D, batch 1", (16, 32), (24, 24, 24), 1),
]


def meter_of(step):
    return StepMeter(step.architecture, step.labels, recipe=step.recipe, precision=step.precision)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_the_estimate_is_within_ten_percent_of_the_recorded_peak(step):
    estimate = meter_of(step).measure(step.batch, step.patch).peak_bytes
    assert estimate == pytest.approx(benchmark.measured_peak(step), rel=TOLERANCE)


def test_a_meter_gives_the_same_answer_whatever_it_measured_before():
    step = STEPS[0]
    used, fresh = meter_of(step), meter_of(step)
    used.measure(500, (16, 16, 16))
    assert used.measure(2, (16, 24, 16)) == fresh.measure(2, (16, 24, 16))


def test_memory_grows_with_the_batch_and_the_persistent_part_does_not():
    meter = meter_of(STEPS[0])
    two, four = meter.measure(2, (16, 16, 16)), meter.measure(4, (16, 16, 16))
    assert four.peak_bytes > 1.5 * two.peak_bytes
    assert four.persistent_bytes == two.persistent_bytes
    assert four.step_flops == 2 * two.step_flops


def test_the_persistent_part_is_weights_gradients_two_moments_and_the_average():
    estimate = meter_of(STEPS[0]).measure(1, (16, 16, 16))
    copies = estimate.persistent_bytes / (4 * estimate.parameters)
    assert copies == pytest.approx(5, rel=0.01)


def test_a_huge_step_is_measured_without_being_allocated():
    step = benchmark.Step("3D", (32, 64, 128, 256, 320, 320), (256, 256, 256), 2)
    assert meter_of(step).measure(2, step.patch).peak_bytes > 30 * 10**9


def widened(configuration, patch, batch):
    """The tiny configuration with features enough that activations, not weights, fill the memory."""
    network = replace(configuration.architecture, features=(8, 16, 16))
    return replace(configuration, architecture=network, patch_size=patch, batch_size=batch)


ALL_TERMS = TrainingSettings(image_losses=("l1", "high_frequency", "perceptual", "consistency"))
CONFIGURATIONS = {
    "2.5d_stack": widened(stack_configuration(slices=5), (1, 64, 64), 4),
    "2.5d_reduce": widened(stack_configuration(context="reduce"), (1, 64, 64), 4),
    "3d_sr": widened(sr_configuration(scale=(4.0, 1.0, 1.0)), (6, 32, 32), 2),
    "3d_sr, all terms": widened(sr_configuration(scale=(4.0, 1.0, 1.0), training=ALL_TERMS), (6, 32, 32), 2),
    "3d_sr_any": widened(sr_configuration(scale=(2.0, 1.0, 1.0), sr_range=(1.5, 3.5)), (6, 32, 32), 2),
    "2.5d_stack_sr": widened(sr_configuration(patch_size=(1, 12, 12), slices=3), (1, 64, 64), 4),
    "image only": widened(sr_configuration(segments=False), (6, 32, 32), 2),
    "self, volumes": widened(sr_configuration(source="self", scale=(4.0, 1.0, 1.0)), (6, 32, 32), 2),
    "paired": widened(sr_configuration(source="paired", image=False), (6, 32, 32), 2),
}


def recorded_peak(configuration):
    """What the profiler records of two steps on batches of the loop's shapes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        settings = configuration.architecture, benchmark.CLASSES, RECIPES["adamw"]
        state = build_training(*settings, configuration=configuration)
        size = configuration.batch_size, configuration.patch_size
        batch = blank_batch(configuration.architecture, *size, configuration=configuration)
        batch.image.normal_()
        for _ in range(2):
            precision = PRECISIONS["bf16"]
            training_step(state, batch, precision=precision)
    now = highest = 0
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_topologies_and_super_resolution_are_estimated_as_well(name):
    configuration = CONFIGURATIONS[name]
    estimate = training_memory(configuration, benchmark.CLASSES).peak_bytes
    assert estimate == pytest.approx(recorded_peak(configuration), rel=TOLERANCE)


def test_a_finer_answer_takes_more_memory_and_without_a_configuration_the_heads_scale_counts():
    any_scale, fixed = CONFIGURATIONS["3d_sr_any"], widened(sr_configuration(), (6, 32, 32), 2)
    finer, coarser = (training_memory(c, benchmark.CLASSES).peak_bytes for c in (any_scale, fixed))
    assert finer > 1.1 * coarser
    bare = StepMeter(any_scale.architecture, benchmark.CLASSES, recipe="adamw").measure(2, (6, 32, 32))
    assert bare.peak_bytes == pytest.approx(finer, rel=0.02)


def test_a_super_resolving_network_is_timed_on_its_own_grids():
    configuration = CONFIGURATIONS["3d_sr"]
    speed = probe_speed(
        configuration.architecture,
        benchmark.CLASSES,
        recipe="adamw",
        patch_size=(4, 16, 16),
        device=torch.device("cpu"),
        configuration=configuration,
    )
    assert speed.seconds > 0 and speed.voxels % (4 * 16 * 16) == 0
