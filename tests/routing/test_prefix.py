"""How far everything is acked that went to several learners, against what was acked in fact."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from echo_torch.routing.prefix import MAX_SNAPSHOTS, AckedPrefix

LEARNERS = 3
STEPS = st.lists(st.tuples(st.integers(0, LEARNERS - 1), st.integers(1, 5), st.booleans()), max_size=60)


@given(STEPS)
def test_the_prefix_is_never_too_long_and_is_complete_in_the_end(steps: list[tuple[int, int, bool]]) -> None:
    prefix = AckedPrefix()
    owners: list[int] = []  # of each sample, in the order of sending
    sent, acked = [0] * LEARNERS, [0] * LEARNERS
    for learner, count, sends in steps:
        if sends:
            owners += [learner] * count
            sent[learner] += count
        else:
            acked[learner] = min(sent[learner], acked[learner] + count)
        prefix_length = prefix.update(len(owners), sent, acked)
        left = list(acked)
        for owner in owners[:prefix_length]:
            left[owner] -= 1
        assert min(left) >= 0
    assert prefix.update(len(owners), sent, sent) == len(owners)


def test_each_snapshot_is_reported_once_acked() -> None:
    prefix = AckedPrefix()
    assert [prefix.update(total, [total, 0], [0, 0]) for total in (2, 4, 6)] == [0, 0, 0]
    assert [prefix.update(6, [6, 0], [acked, 0]) for acked in (1, 2, 3, 5, 6)] == [0, 2, 2, 4, 6]


def test_too_many_snapshots_delay_the_prefix_but_never_overstate_it() -> None:
    prefix = AckedPrefix()
    many = MAX_SNAPSHOTS + 10
    for total in range(1, many + 1):
        assert prefix.update(total, [total], [0]) == 0
    assert prefix.update(many, [many], [MAX_SNAPSHOTS - 1]) == MAX_SNAPSHOTS - 1
    assert prefix.update(many, [many], [many - 1]) == MAX_SNAPSHOTS - 1
    assert prefix.update(many, [many], [many]) == many
