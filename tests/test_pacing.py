"""Pacing keeps to what pays: on recorded drafts under several machines' costs, and against drafters that promise too much."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pacing_replay import DRAFTING, gain, recorded, replay, star, table

from subquad.ir.draft import DraftTree
from subquad.runtime.pacing import LONGEST, LOSS, MOST, REST, FixedPacing, MeasuredPacing
from subquad.runtime.pass_costs import WIDTHS, PassCosts

FLAT = table({1: 1, 4: 1.15, 8: 1.45, 16: 2.9})
"""A machine whose narrow passes are bound by reading the weights."""
STEEP = table({1: 1, 2: 1.3, 4: 1.6, 8: 2.0, 16: 3.3})
"""One on which a second row already costs a third."""
LINEAR = table({1: 1, 16: 16})
"""One on which verifying never pays."""


@pytest.mark.parametrize(("costs", "mean", "worst"), [(FLAT, 1.3, 0.98), (STEEP, 1.05, 0.93), (LINEAR, 0.9, 0.75)])
def test_recorded_generations_gain_where_they_can_and_lose_little_elsewhere(costs, mean: float, worst: float) -> None:
    pacing = MeasuredPacing()
    gains = [gain(pacing, generations, costs, n) for n, generations in enumerate(recorded().values())]
    assert statistics.mean(gains) >= mean, gains
    assert min(gains) >= worst, gains


def test_learnt_widths_beat_every_fixed_one_on_average() -> None:
    for costs in (FLAT, STEEP):
        found = {}
        for name, make in (("measured", MeasuredPacing), *((n, lambda n=n: FixedPacing(n)) for n in (1, 3, 7, 15))):
            pacing = make()
            found[name] = statistics.mean(gain(pacing, one, costs, n) for n, one in enumerate(recorded().values()))
        assert found["measured"] >= max(found.values()) - 0.05, found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 100), st.sampled_from([FLAT, STEEP, LINEAR]))
def test_a_drafter_that_promises_too_much_costs_a_bounded_number_of_passes(seed: int, percent: int, costs) -> None:
    """Nothing is ever accepted.  Each rest is preceded by at most LOSS passes' worth of losses and one pass more."""
    steps = [([percent] * 15, ())] * 600
    seconds, _, _ = replay(MeasuredPacing(), steps, costs, noise=0.02, seed=seed)
    rests = math.log2(LONGEST / REST) + 600 / LONGEST + 1
    worst = LOSS + costs(MOST) - 1
    assert seconds <= 600 * 1.03 + rests * 1.3 * (worst + 8 * DRAFTING) + 6 * costs(
        MOST
    )  # the last: widths are tried before their costs are known


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.3, 3.0), st.floats(0.0, 0.2))
def test_costs_are_learnt_through_noise_and_growing_contexts(seed: int, slope: float, noise: float) -> None:
    source, costs = random.Random(seed), PassCosts()
    true = {width: width ** (slope / 3) for width in WIDTHS}
    for n in range(600):
        width = source.choice(WIDTHS)
        costs.learn(width, (1 + n / 300) * true[width] * source.lognormvariate(0, noise))
    for width in WIDTHS:
        assert abs(math.log(costs.of(width) / costs.of(1) / true[width])) < 0.1 + noise


def test_a_plain_pass_comes_now_and_then_so_that_costs_can_be_compared() -> None:
    """Drafts of one width for ever would never show what that width costs."""
    pacing = MeasuredPacing()
    for _ in range(60):
        (tree,) = pacing.cut([star([99] * 15 if pacing.allowance(1) else [])])
        pacing.record([tree], len(tree), LINEAR(len(tree)))
    assert pacing.costs.of(16) > 6


def test_costs_between_known_widths_lie_between_theirs() -> None:
    costs = PassCosts.measured((2.0, 2.2, 3.0, 4.0, 8.0))
    assert costs.of(1) == pytest.approx(1.0)
    assert costs.of(4) == pytest.approx(1.5)
    assert costs.of(4) < costs.of(6) < costs.of(8)
    assert costs.of(16) == costs.of(20) == pytest.approx(4.0)


def test_an_interrupted_pass_moves_the_costs_little() -> None:
    costs = PassCosts.measured((1.0, 1.0, 1.0, 1.0, 1.0))
    for n in range(200):
        costs.learn((1, 8)[n % 2], 1.0)
    costs.learn(1, 1000.0)
    costs.learn(8, 1.0)
    assert 0.8 < costs.of(8) / costs.of(1) < 1.25


def test_rests_double_until_a_draft_pays() -> None:
    pacing, rests, resting = MeasuredPacing(), [], 0
    for _ in range(800):
        allowed = pacing.allowance(1)
        if allowed == 0:
            resting += 1
        elif resting:
            rests.append(resting)
            resting = 0
        (tree,) = pacing.cut([star([90] * 15 if allowed else [])])
        pacing.record([tree], 1, FLAT(len(tree)))
    long = [rest for rest in rests if rest >= REST]  # the others are single plain passes
    assert long[:4] == [REST, 2 * REST, 4 * REST, 8 * REST]
    assert max(rests) <= LONGEST
    while pacing.allowance(1) == 0:
        pacing.record([star([])], 1, 1.0)
    for _ in range(40):
        (tree,) = pacing.cut([star([90] * 7)])
        pacing.record([tree], len(tree), FLAT(len(tree)))
    assert pacing.allowance(1) == MOST - 1


def test_a_rest_ends_with_its_call() -> None:
    """The next text may draft well; if it does not either, it rests sooner than the first did."""
    pacing = MeasuredPacing()

    def tokens_before_rest() -> int:
        fed = 0
        while pacing.allowance(1) or pacing._wide:
            (tree,) = pacing.cut([star([90] * 15 if pacing.allowance(1) else [])])
            pacing.record([tree], 1, FLAT(len(tree)))
            fed += 1
        return fed

    first = tokens_before_rest()
    pacing.begin()
    assert pacing.allowance(1) == MOST - 1
    assert 0 < tokens_before_rest() < first


def test_pacing_shares_a_pass_among_the_rows_by_value() -> None:
    pacing = MeasuredPacing(most=8, costs=PassCosts.measured((1.0, 1.01, 1.03, 1.07, 1.2)))
    good = DraftTree.chain((1, 2, 3, 4, 5, 6), (1.0, 0.9, 0.9, 0.9, 0.9, 0.9))
    bad = DraftTree.chain((1, 2, 3, 4, 5, 6), (1.0, 0.001, 0.001, 0.001, 0.001, 0.001))
    one, none, two = pacing.cut([good, None, bad])
    assert none is None
    assert [len(tree) for tree in (one, two) if tree is not None] == [6, 1]
