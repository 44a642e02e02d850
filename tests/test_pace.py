"""`Pace`: naps end before the window runs dry, and are not taken where they would cost more than they save."""

from __future__ import annotations

import pytest

from echo_torch import pace
from echo_torch.pace import LEAST_S, MOST_S, SHARE, Pace


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pace, "time", made)
    return made


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


def test_where_nothing_was_acked_the_nap_is_the_longest(clock: Clock) -> None:
    asked = Pace(1024)
    clock.now += 5.0
    assert asked.nap(0) == MOST_S


def test_only_what_came_since_the_last_look_counts(clock: Clock) -> None:
    asked = Pace(1024)
    clock.now += 1.0
    assert asked.nap(10_000_000) == 0.0
    clock.now += 1.0
    assert asked.nap(10_000_100) == MOST_S
