"""One moment that all steps of an operation share, and which timeouts make one."""

from __future__ import annotations

import math
import select
import socket
import threading

import pytest
from clock import Clock

import echo_torch.support.deadline as deadline_module
from echo_torch.support.deadline import Deadline, RevocableDeadline, check_timeout, clamp_timeout


@pytest.fixture
def clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(deadline_module, "time", clock)
    return clock


def test_remaining_shrinks_to_zero(clock) -> None:
    deadline = Deadline(2.0)
    seen = [(deadline.remaining(), deadline.expired)]
    for step in (0.5, 1.0, 0.5, 3.0):
        clock.advance(step)
        seen.append((deadline.remaining(), deadline.expired))
    assert seen == [(2.0, False), (1.5, False), (0.5, False), (0.0, True), (0.0, True)]


def test_expiry_is_fixed_when_a_deadline_is_made(clock) -> None:
    deadline = Deadline(2.0)
    clock.advance(1.5)
    assert deadline.at == 1002.0
    assert deadline.timeout == 2.0
    assert Deadline(2.0).at == 1003.5


@pytest.mark.parametrize("timeout", [None, math.inf])
def test_a_deadline_without_timeout_never_expires(clock, timeout: float | None) -> None:
    deadline = Deadline(timeout)
    clock.advance(1e12)
    assert not deadline.expired
    assert deadline.remaining() == math.inf


@pytest.mark.parametrize("timeout", [0, 0.0])
def test_a_zero_timeout_expires_at_once(timeout: float) -> None:
    deadline = Deadline(timeout)
    assert deadline.expired
    assert deadline.remaining() == 0.0


@pytest.mark.parametrize("timeout", [None, 0, 3, 0.25, 1e12, math.inf])
def test_check_timeout_returns_its_argument(timeout: float | None) -> None:
    assert check_timeout("timeout", timeout) is timeout


@pytest.mark.parametrize("timeout", [-1, -0.001, -math.inf, math.nan])
def test_negative_seconds_and_nan_are_refused_by_name(timeout: float) -> None:
    with pytest.raises(ValueError, match=r"stall_timeout.*>= 0"):
        check_timeout("stall_timeout", timeout)
    with pytest.raises(ValueError, match="timeout"):
        Deadline(timeout)


@pytest.mark.parametrize("timeout", [True, False, "3", b"3", [3], 3j])
def test_non_numeric_timeouts_are_refused_by_name(timeout) -> None:
    with pytest.raises(TypeError, match=r"stall_timeout.*seconds"):
        check_timeout("stall_timeout", timeout)
    with pytest.raises(TypeError, match="timeout"):
        Deadline(timeout)


@pytest.mark.parametrize("seconds", [0.0, 0.25, 60.0])
def test_short_timeouts_are_not_clamped(seconds: float) -> None:
    assert clamp_timeout(seconds) == seconds


@pytest.mark.parametrize("seconds", [math.inf, 1e12, threading.TIMEOUT_MAX * 2])
def test_long_timeouts_are_clamped_to_what_locks_polls_and_sockets_take(seconds: float) -> None:
    clamped = clamp_timeout(seconds)
    assert 60.0 < clamped < seconds
    assert threading.Lock().acquire(timeout=clamped)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(clamped)
        theirs.send(b"x")
        poller = select.poll()
        poller.register(ours, select.POLLIN)
        assert poller.poll(clamped * 1000) == [(ours.fileno(), select.POLLIN)]


@pytest.mark.parametrize(
    ("timeout", "within", "left"), [(2.0, 0.5, 0.5), (2.0, 3.0, 2.0), (None, 3.0, 3.0), (2.0, None, 2.0)]
)
def test_within_takes_the_earlier_deadline(clock, timeout, within, left) -> None:
    for deadline in (Deadline(timeout), RevocableDeadline(timeout, lambda: False)):
        assert deadline.within(within).remaining() == left
    assert Deadline(None).within(None).remaining() == math.inf


def test_a_revoked_deadline_has_expired(clock) -> None:
    revoked = False
    deadline = RevocableDeadline(2.0, lambda: revoked)
    step = deadline.within(1.0)
    assert (deadline.remaining(), deadline.expired, step.remaining(), step.expired) == (2.0, False, 1.0, False)
    revoked = True
    assert (deadline.remaining(), deadline.expired, step.remaining(), step.expired) == (0.0, True, 0.0, True)


def test_a_revocable_deadline_expires_by_itself_too(clock) -> None:
    deadline = RevocableDeadline(2.0, lambda: False)
    clock.advance(2.0)
    assert deadline.expired


@pytest.mark.parametrize("seconds", [-1e-9, -1.0, -math.inf])
def test_negative_timeouts_are_clamped_to_zero(seconds: float) -> None:
    """As the time that is left may be that is looked at twice."""
    assert clamp_timeout(seconds) == 0.0
