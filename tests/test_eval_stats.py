"""Confidence intervals: known coverage, pairing, clustering, determinism."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from vtc.errors import VtcError
from vtc.eval.stats import Bootstrap, Interval, holm, sign_flip, spread, wilson


def marks(text: str) -> list[bool]:
    return [c == "1" for c in text]


def test_the_point_estimates_are_the_plain_shares():
    boot = Bootstrap(list("abcd"), resamples=500)
    assert boot.accuracy(marks("1101")).value == 0.75
    paired = boot.paired(marks("1000"), marks("1101"))
    assert paired.difference.value == -0.5 and paired.ratio.value == pytest.approx(1 / 3)


def test_coverage_of_a_binomial_is_about_what_is_asked():
    """200 questions at 70 %, 300 experiments: the 90 % interval must hold the truth in about 90 % of them."""
    rng = np.random.default_rng(1)
    boot = Bootstrap([str(i) for i in range(200)], resamples=600, confidence=0.90)
    inside = 0
    for _ in range(300):
        interval = boot.accuracy(rng.random(200) < 0.7)
        inside += interval.low <= 0.7 <= interval.high
    assert 0.84 < inside / 300 < 0.95  # three standard errors of the experiment around 90 %


def test_the_width_matches_the_normal_approximation():
    boot = Bootstrap([str(i) for i in range(400)], resamples=4000)
    interval = boot.accuracy([i % 4 != 0 for i in range(400)])
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.08)


def test_copies_of_a_question_about_one_image_add_no_confidence():
    answers = [i % 3 != 0 for i in range(60)]
    single = Bootstrap([str(i) for i in range(60)]).accuracy(answers)
    five = Bootstrap([str(i // 5) for i in range(300)]).accuracy([answers[i // 5] for i in range(300)])
    naive = Bootstrap([str(i) for i in range(300)]).accuracy([answers[i // 5] for i in range(300)])
    # the groups are numbered in another order, so the draws differ in detail
    assert five.high - five.low == pytest.approx(single.high - single.low, rel=0.15)
    assert naive.high - naive.low < 0.6 * (five.high - five.low)


def test_a_pair_of_equal_runs_has_no_uncertainty_and_pairing_narrows():
    rng = np.random.default_rng(2)
    boot = Bootstrap([str(i) for i in range(300)])
    base = rng.random(300) < 0.8
    same = boot.paired(base, base)
    assert same.difference == Interval(0.0, 0.0, 0.0) and same.ratio == Interval(1.0, 1.0, 1.0)
    nearly = base.copy()
    nearly[:6] = ~nearly[:6]
    paired = boot.paired(nearly, base).difference
    alone = boot.accuracy(nearly)
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)


def test_draws_depend_on_the_seed_only():
    groups = [str(i) for i in range(50)]
    answers = [i % 2 == 0 for i in range(50)]
    one, two = (Bootstrap(groups, seed=7).accuracy(answers) for _ in range(2))
    assert one == two
    assert (Bootstrap(groups, seed=8).weights != Bootstrap(groups, seed=7).weights).any()


def test_a_reference_that_is_never_right_has_no_share():
    boot = Bootstrap(list("abc"))
    assert boot.paired(marks("111"), marks("000")).ratio is None


def test_bad_input():
    with pytest.raises(VtcError, match="at least one question"):
        Bootstrap([])
    with pytest.raises(VtcError, match="2 answers do not match 3 questions"):
        Bootstrap(list("abc")).accuracy([True, False])


def test_spread_is_median_and_quintiles():
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0, 100.0]) == Interval(3.5, 2.0, 5.0)


# ------------------------------------------------------------------------------------------------------------ many comparisons
@pytest.mark.parametrize("differences", [[1, 1, 1, -1], [2, 1, -1, 3, 1], [1] * 8, [-3, -1, 2, 2, -1, -1], [0, 0, 5]])
def test_sign_flip_counts_every_sign_pattern(differences):
    d = np.array([x for x in differences if x])
    sums = [abs((d * signs).sum()) for signs in itertools.product((1, -1), repeat=len(d))]
    assert sign_flip(differences) == pytest.approx(np.mean([s >= abs(d.sum()) for s in sums]))


def test_sign_flip_is_the_binomial_test_with_one_question_an_image():
    """3 lost, 12 gained: McNemar's exact two-sided p."""
    tail = sum(math.comb(15, k) for k in range(4)) / 2**15
    assert sign_flip([1] * 12 + [-1] * 3 + [0] * 100) == pytest.approx(2 * tail)
    assert sign_flip([0, 0]) == sign_flip([]) == 1.0


def test_sign_flip_of_graded_scores_is_close_to_the_exact_one():
    whole = np.array([1, 1, -1, 1, 2, 1, -1, 1, 1, 3, -2, 1] * 4)
    assert sign_flip(whole / 7) == pytest.approx(sign_flip(whole), rel=0.25)


def test_equal_runs_are_rarely_called_different():
    rng = np.random.default_rng(3)
    boot = Bootstrap([str(i // 2) for i in range(120)])
    p = [boot.paired(rng.random(120) < 0.7, rng.random(120) < 0.7).p for _ in range(400)]
    assert np.mean(np.array(p) < 0.05) < 0.085  # three standard errors above 5 %


def test_holm_is_the_textbook_one():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_wilson_has_a_width_at_the_ends():
    assert wilson(0.0, 10).high == pytest.approx(0.2775, abs=1e-3) and wilson(0.0, 10).low == pytest.approx(0)
    assert wilson(0.5, 100).low == pytest.approx(0.4038, abs=1e-3)


def test_many_images_take_little_memory():
    boot = Bootstrap([str(i) for i in range(30_000)], resamples=400)
    assert boot.weights.nbytes == 400 * 30_000
    interval = boot.accuracy([i % 2 == 0 for i in range(30_000)])
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.5 / 30_000**0.5, rel=0.2)


def test_a_draw_is_of_the_questions_that_its_images_have():
    """Images with one, two and six questions: every draw is the share of right answers among the questions drawn."""
    groups, rng = list("abbcccccc"), np.random.default_rng(4)
    boot = Bootstrap(groups, resamples=200, seed=9)
    marks, images = rng.random(len(groups)), sorted(set(groups))
    value, draws = boot.draws(marks)
    assert value == pytest.approx(sum(marks) / 9)
    for weights, draw in zip(boot.weights.tolist(), draws, strict=True):
        drawn = [
            m
            for image, times in zip(images, weights, strict=True)
            for m, g in zip(marks, groups, strict=True)
            if g == image
            for _ in range(times)
        ]
        assert sum(weights) == 3 and draw == pytest.approx(sum(drawn) / len(drawn))
    assert len({len(groups) * d for d in draws}) > 5
