"""The Inception Score: golden values, its bounds, and parts that add up."""

import numpy as np
import pytest

from evaluations.metrics.inception_score import InceptionScore, inception_score
from support.golden_metrics import GOLDEN, expected


@pytest.mark.parametrize("split", [5000, 500, 100, 120])
def test_inception_score_is_golden(split):
    logits = GOLDEN["logits_sample"]
    score = InceptionScore(split)
    score.update(logits)
    np.testing.assert_allclose(score.per_chunk(), GOLDEN[f"is_per_split_{split}"], rtol=1e-12)
    assert inception_score(logits, split) == pytest.approx(expected(f"inception_score_split{split}"), abs=1e-12)
    assert inception_score(logits.astype(np.float32), split) == pytest.approx(
        expected(f"inception_score_split{split}"), abs=1e-6
    )


def test_inception_score_of_added_sums_is_that_of_the_whole():
    logits = GOLDEN["logits_sample"]
    parts = [InceptionScore(120) for _ in range(3)]
    for number, start in enumerate(range(0, 500, 64)):              # batches dealt out to three ranks
        parts[number % 3].update(logits[start : start + 64], start)
    tables = [part.sums()[0] for part in parts]                     # [chunks,2+K], of different lengths
    most = max(map(len, tables))
    total = parts[0].with_sums([sum(np.pad(table, [(0, most - len(table)), (0, 0)]) for table in tables)])
    assert total.finalize() == pytest.approx(expected("inception_score_split120"), abs=1e-12)


def test_inception_score_has_its_bounds():
    certain = 1000 * np.eye(10)[np.arange(200) % 10]                # e^-1000 underflows: plain p ln p would be NaN
    assert inception_score(certain) == pytest.approx(10, rel=1e-12)
    assert inception_score(np.zeros((50, 10))) == pytest.approx(1, abs=1e-12)
    shift = np.linspace(-700, 700, 500)[:, None]                    # softmax does not see it
    assert inception_score(GOLDEN["logits_sample"] + shift) == pytest.approx(
        expected("inception_score_split5000"), abs=1e-10
    )


def test_inception_score_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="split_size=0"):
        InceptionScore(0)
    with pytest.raises(ValueError, match="at least 1 image"):
        InceptionScore().finalize()
    score = InceptionScore()
    score.update(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="4 classes after logits of 3"):
        score.update(np.zeros((2, 4)))
