"""Which samples lose their class: the right share, and the same ones whatever the ranks and microbatches."""

import pytest
import torch as th

from cm.data.label_dropout import drop_labels, with_label_dropout
from cm.types import Batch

K = 10


def batch_of(positions):
    positions = th.as_tensor(positions)
    return Batch(th.zeros(len(positions), 3, 1, 1), {"y": positions % K, "other": positions}, positions)


def dropped(positions, p=0.1, seed=0):
    return drop_labels(batch_of(positions), p, seed, K).cond["y"] == K


def test_the_share_is_p_and_the_others_keep_their_class():
    """20000 draws err by 0.002; the classes share alike."""
    positions = th.arange(20000)
    result = drop_labels(batch_of(positions), 0.1, 0, K)
    lost = result.cond["y"] == K
    assert lost.double().mean() == pytest.approx(0.1, abs=0.007)
    assert th.equal(result.cond["y"][~lost], positions[~lost] % K) and th.equal(result.cond["other"], positions)
    of_class = th.stack([lost[positions % K == k].double().mean() for k in range(K)])
    assert of_class.min() > 0.07 and of_class.max() < 0.13
    assert not dropped(positions, p=0.0).any()


def test_a_sample_loses_its_class_by_its_position_alone():
    whole = dropped(th.arange(240))
    by_rank = [dropped(th.arange(rank, 240, 3)) for rank in range(3)]
    assert th.equal(th.stack(by_rank, 1).flatten(), whole)
    assert th.equal(th.cat([dropped(part) for part in th.arange(240).split(7)]), whole)
    assert th.equal(dropped(th.arange(100, 240)), whole[100:]), "a resumed run"
    assert not th.equal(dropped(th.arange(240), seed=1), whole)


def test_a_stream_keeps_references_and_ends_its_loader():
    class Loader:
        closed = False

        def __init__(self, start):
            self.start = start

        def __next__(self):
            batch = batch_of(range(self.start, self.start + 50))
            batch.references = batch_of(range(5))
            return batch

        def close(self):
            Loader.closed = True

    stream = with_label_dropout(Loader, 0.5, 3, K)(200)
    batch = next(stream)
    assert th.equal(batch.cond["y"] == K, dropped(th.arange(200, 250), 0.5, 3)) and batch.references.cond["y"].max() < K
    stream.close()
    assert Loader.closed


def test_positions_are_needed():
    with pytest.raises(ValueError, match="label dropout is drawn for the positions of samples"):
        drop_labels(Batch(th.zeros(1, 3, 1, 1), {"y": th.zeros(1)}), 0.1, 0, K)
