"""Learning rate by progress."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoseg.training.schedule import DECAY_START, SCHEDULES, WARMUP, in_decay, learning_rate_factor, poly

progresses = st.floats(0, 1)


@given(st.sampled_from(sorted(SCHEDULES)), progresses)
def test_every_factor_lies_between_none_and_all(schedule: str, progress: float) -> None:
    assert 0 <= learning_rate_factor(schedule, progress) <= 1


@given(st.sampled_from(sorted(SCHEDULES)), progresses, progresses)
def test_after_the_warm_up_the_rate_never_rises(schedule: str, first: float, second: float) -> None:
    early, late = sorted((first, second))
    if early >= WARMUP:
        assert learning_rate_factor(schedule, late) <= learning_rate_factor(schedule, early)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_a_training_ends_without_a_rate_and_begins_with_one(schedule: str) -> None:
    assert learning_rate_factor(schedule, 1.0) == 0
    assert learning_rate_factor(schedule, 0.0) > 0


def test_warm_up_rises_to_the_constant_part_and_the_decay_begins_without_a_jump() -> None:
    def factor(progress: float) -> float:
        return learning_rate_factor("warmup_constant_decay", progress)

    assert factor(WARMUP / 2) == pytest.approx(0.5)
    assert factor(WARMUP) == factor((WARMUP + DECAY_START) / 2) == factor(DECAY_START) == 1
    assert factor(DECAY_START + 1e-9) == pytest.approx(1, abs=1e-3)
    assert factor((1 + DECAY_START) / 2) == pytest.approx(1 - 0.5**0.5)


def test_the_polynomial_is_nnunets() -> None:
    assert poly(0.0) == 1
    assert poly(0.5) == pytest.approx(0.5**0.9)


@given(progresses)
def test_only_the_schedule_with_a_constant_part_has_a_decay_to_go_back_before(progress: float) -> None:
    assert in_decay("warmup_constant_decay", progress) == (progress >= DECAY_START)
    assert not in_decay("poly", progress)
