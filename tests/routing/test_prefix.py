"""How far everything is acked that went to several learners, against what was acked in fact."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from echo_torch.routing.prefix import MOST_MOMENTS, Prefix

LEARNERS = 3
STEPS = st.lists(st.tuples(st.integers(0, LEARNERS - 1), st.integers(1, 5), st.booleans()), max_size=60)


@given(STEPS)
def test_never_more_than_the_first_ones_that_are_acked_and_all_in_the_end(steps: list[tuple[int, int, bool]]) -> None:
    prefix = Prefix()
    owners: list[int] = []  # of each sample, in the order of sending
    sent, acked = [0] * LEARNERS, [0] * LEARNERS
    for learner, count, sends in steps:
        if sends:
            owners += [learner] * count
            sent[learner] += count
        else:
            acked[learner] = min(sent[learner], acked[learner] + count)
        told = prefix.acked(len(owners), sent, acked)
        left = list(acked)
        for owner in owners[:told]:
            left[owner] -= 1
        assert min(left) >= 0
    assert prefix.acked(len(owners), sent, sent) == len(owners)


def test_each_moment_that_was_looked_at_is_told() -> None:
    prefix = Prefix()
    assert [prefix.acked(total, [total, 0], [0, 0]) for total in (2, 4, 6)] == [0, 0, 0]
    assert [prefix.acked(6, [6, 0], [acked, 0]) for acked in (1, 2, 3, 5, 6)] == [0, 2, 2, 4, 6]


def test_more_moments_than_are_remembered_are_told_later_and_not_wrongly() -> None:
    prefix = Prefix()
    many = MOST_MOMENTS + 10
    for total in range(1, many + 1):
        assert prefix.acked(total, [total], [0]) == 0
    assert prefix.acked(many, [many], [MOST_MOMENTS - 1]) == MOST_MOMENTS - 1
    assert prefix.acked(many, [many], [many - 1]) == MOST_MOMENTS - 1
    assert prefix.acked(many, [many], [many]) == many
