"""`Pace`: naps end before the window runs dry, and are not taken where they would cost more than they save."""

from __future__ import annotations

import pytest
from clock import Clock

from echo_torch.client import pace
from echo_torch.client.pace import LEAST_S, MOST_S, SHARE, Pace


@pytest.fixture
def clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(pace, "time", clock)
    return clock


@pytest.mark.parametrize("window", [1, 32, 1024])
@pytest.mark.parametrize("per_second", [1e3, 1e4, 1e5, 1e6, 1e7])
def test_no_more_than_a_share_of_the_window_is_acked_during_a_nap(clock: Clock, window: int, per_second: float) -> None:
    asked = Pace(window)
    acked = 0
    for took in (1e-5, 1e-3, 0.5):
        clock.now += took
        acked += max(1, round(took * per_second))
        nap = asked.nap(acked)
        rate = max(1, round(took * per_second)) / took
        assert nap == 0.0 or LEAST_S <= nap <= MOST_S
        assert nap * rate <= window / SHARE * (1 + 1e-9)
        if window / SHARE / rate >= LEAST_S:
            assert nap > 0.0


@pytest.mark.parametrize("took", [1e-6, 5.0])
def test_there_is_no_nap_where_nothing_was_acked(clock: Clock, took: float) -> None:
    asked = Pace(1024)
    clock.now += took
    assert asked.nap(0) == 0.0


def test_a_look_that_came_too_early_does_not_count(clock: Clock) -> None:
    """The rate is that since the last acks, however often was looked in between."""
    asked, undisturbed = Pace(1024), Pace(1024)
    for _ in range(10):
        clock.now += 1e-4
        asked.nap(0)
    assert asked.nap(300) == undisturbed.nap(300) > 0.0


def test_only_what_came_since_the_last_look_counts(clock: Clock) -> None:
    asked = Pace(1024)
    clock.now += 1.0
    assert asked.nap(10_000_000) == 0.0
    clock.now += 1.0
    assert asked.nap(10_000_100) == MOST_S
