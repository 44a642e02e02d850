"""One moment that all steps of an operation share, and which timeouts make one."""

from __future__ import annotations

import math
import select
import socket
import threading

import pytest
from clock import Clock

import echo_torch.support.deadline as deadline_module
from echo_torch.support.deadline import Deadline, Revocable, bounded_wait, check_timeout


@pytest.fixture
def clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(deadline_module, "time", clock)
    return clock


def test_time_left_shrinks_with_the_clock_and_ends_at_zero(clock) -> None:
    deadline = Deadline(2.0)
    seen = [(deadline.remaining(), deadline.expired)]
    for step in (0.5, 1.0, 0.5, 3.0):
        clock.advance(step)
        seen.append((deadline.remaining(), deadline.expired))
    assert seen == [(2.0, False), (1.5, False), (0.5, False), (0.0, True), (0.0, True)]


def test_all_who_share_a_deadline_share_the_moment(clock) -> None:
    deadline = Deadline(2.0)
    clock.advance(1.5)
    assert deadline.at == 1002.0
    assert deadline.timeout == 2.0
    assert Deadline(2.0).at == 1003.5


@pytest.mark.parametrize("timeout", [None, math.inf])
def test_never_comes(clock, timeout: float | None) -> None:
    deadline = Deadline(timeout)
    clock.advance(1e12)
    assert not deadline.expired
    assert deadline.remaining() == math.inf


@pytest.mark.parametrize("timeout", [0, 0.0])
def test_of_no_time_has_passed_at_once(timeout: float) -> None:
    deadline = Deadline(timeout)
    assert deadline.expired
    assert deadline.remaining() == 0.0


@pytest.mark.parametrize("timeout", [None, 0, 3, 0.25, 1e12, math.inf])
def test_a_timeout_is_given_back_as_it_is(timeout: float | None) -> None:
    assert check_timeout("timeout", timeout) is timeout


@pytest.mark.parametrize("timeout", [-1, -0.001, -math.inf, math.nan])
def test_negative_seconds_and_nan_are_refused_by_name(timeout: float) -> None:
    with pytest.raises(ValueError, match=r"stall_timeout.*>= 0"):
        check_timeout("stall_timeout", timeout)
    with pytest.raises(ValueError, match="timeout"):
        Deadline(timeout)


@pytest.mark.parametrize("timeout", [True, False, "3", b"3", [3], 3j])
def test_what_is_no_number_of_seconds_is_refused_by_name(timeout) -> None:
    with pytest.raises(TypeError, match=r"stall_timeout.*seconds"):
        check_timeout("stall_timeout", timeout)
    with pytest.raises(TypeError, match="timeout"):
        Deadline(timeout)


@pytest.mark.parametrize("seconds", [0.0, 0.25, 60.0])
def test_a_wait_of_everyday_length_is_not_cut(seconds: float) -> None:
    assert bounded_wait(seconds) == seconds


@pytest.mark.parametrize("seconds", [math.inf, 1e12, threading.TIMEOUT_MAX * 2])
def test_a_wait_of_any_length_is_cut_to_what_locks_polls_and_sockets_take(seconds: float) -> None:
    cut = bounded_wait(seconds)
    assert 60.0 < cut < seconds
    assert threading.Lock().acquire(timeout=cut)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(cut)
        theirs.send(b"x")
        poller = select.poll()
        poller.register(ours, select.POLLIN)
        assert poller.poll(cut * 1000) == [(ours.fileno(), select.POLLIN)]


@pytest.mark.parametrize(
    ("timeout", "within", "left"), [(2.0, 0.5, 0.5), (2.0, 3.0, 2.0), (None, 3.0, 3.0), (2.0, None, 2.0)]
)
def test_a_step_within_a_deadline_takes_no_longer_than_both(clock, timeout, within, left) -> None:
    for deadline in (Deadline(timeout), Revocable(timeout, lambda: False)):
        assert deadline.within(within).remaining() == left
    assert Deadline(None).within(None).remaining() == math.inf


def test_a_deadline_that_is_revoked_has_passed(clock) -> None:
    revoked = False
    deadline = Revocable(2.0, lambda: revoked)
    step = deadline.within(1.0)
    assert (deadline.remaining(), deadline.expired, step.remaining(), step.expired) == (2.0, False, 1.0, False)
    revoked = True
    assert (deadline.remaining(), deadline.expired, step.remaining(), step.expired) == (0.0, True, 0.0, True)


def test_a_revocable_deadline_passes_by_itself_too(clock) -> None:
    deadline = Revocable(2.0, lambda: False)
    clock.advance(2.0)
    assert deadline.expired


@pytest.mark.parametrize("seconds", [-1e-9, -1.0, -math.inf])
def test_a_wait_that_is_over_is_none_and_not_endless(seconds: float) -> None:
    """As the time that is left may be that is looked at twice."""
    assert bounded_wait(seconds) == 0.0
