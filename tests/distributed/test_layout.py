"""Whole networks have a trivial layout; the sizes of shards that ranks allow."""

import pytest
import torch as th

from cm.distributed.layout import WHOLE, choose_shard_size
from cm.errors import UserError


def test_what_is_whole_stays_as_it_is():
    tensors = [th.randn(3, 2), th.tensor(4.0)]
    for same in (WHOLE.masters(tensors), WHOLE.gather(tensors), WHOLE.gather_to_main(tensors)):
        assert all(one is other for one, other in zip(same, tensors, strict=True))
    assert all(part.data_ptr() == whole.data_ptr() for part, whole in zip(WHOLE.parts(tensors), tensors, strict=True))
    assert WHOLE.norm([tensor.double() for tensor in tensors]).item() == pytest.approx(
        sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5, rel=1e-12
    )


def test_shards_lie_within_a_machine_unless_the_user_says_otherwise():
    assert choose_shard_size(0, 16, [8, 8]) == 8
    assert choose_shard_size(4, 16, [8, 8]) == 4
    assert choose_shard_size(16, 16, [8, 8]) == 16


@pytest.mark.parametrize("size, ranks, per_node, words", [
    (0, 12, [8, 4], "have 8, 4 ranks"), (3, 8, [8], "does not divide the 8 ranks; choose one of: 2, 4, 8"),
    (1, 8, [8], "what --parallel ddp does"), (0, 2, [1, 1], "what --parallel ddp does"),
])
def test_sizes_that_do_not_fit_are_refused(size, ranks, per_node, words):
    with pytest.raises(UserError, match=words):
        choose_shard_size(size, ranks, per_node)
