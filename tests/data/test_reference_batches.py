"""Reference images: the newest of the whole run, the same on every number of ranks, from any start, read once."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch as th

from cm.data.augment import AugmentBatch, AugmentPipe
from cm.data.loader import load_data
from cm.data.reference_batches import with_references

B, SIZE = 8, 8


def alone(own):
    return [own]


def stream_of(rank=0, world_size=1, start=0, data_dir="digits", n=20, gather=alone, augment=None, **options):
    options = {"class_cond": True, "seed": 3, "num_workers": 0, **options}
    stream = load_data(data_dir=data_dir, batch_size=len(range(rank, B, world_size)), global_batch=B, image_size=SIZE,
                       rank=rank, world_size=world_size, start=start, **options)
    return stream, with_references(stream, n, start, rank, world_size, gather, augment)


def take(stream, steps):
    return list(itertools.islice(stream, steps))


def same(a, b):
    return th.equal(a.images, b.images) and th.equal(a.positions, b.positions) and th.equal(a.cond["y"], b.cond["y"])


@pytest.fixture(scope="module")
def whole():
    return take(stream_of()[1], 5)


def test_they_are_the_newest_images_of_the_run(whole):
    """Position for position what training was shown: images, flips and classes, ending with the step's own batch."""
    for k, batch in enumerate(whole):
        assert batch.references.positions.tolist() == list(range((k + 1) * B - 20, (k + 1) * B))
    shown = take(stream_of()[0], 5)
    last = whole[4].references                                      # positions 20..39
    images = th.cat([batch.images for batch in shown])[20:]
    assert last.images.dtype == th.uint8 and th.equal(last.images.float().div(127.5).sub(1), images)
    assert th.equal(last.cond["y"], th.cat([batch.cond["y"] for batch in shown])[20:])
    assert th.equal(whole[4].images, shown[4].images) and th.equal(whole[4].cond["y"], shown[4].cond["y"])


def test_before_the_first_step_they_are_real_images_too(whole):
    first = whole[0].references
    source = stream_of()[0].source
    known = {source.image(i).tobytes(): label for i, label in enumerate(source.labels)}
    for image, label in zip(first.images, first.cond["y"].tolist()):
        pixels = image.permute(1, 2, 0).numpy()
        assert known.get(pixels.tobytes(), known.get(np.ascontiguousarray(pixels[:, ::-1]).tobytes())) == label


def test_references_pass_through_the_augmentation_of_the_batch():
    """Those of a step are what training saw before, transform for transform; a run that starts later has the same."""
    augment = AugmentBatch(AugmentPipe(0.5), 7, th.device("cpu"))
    batches = take(stream_of(augment=augment)[1], 5)
    plain = take(stream_of()[0], 5)
    for batch, raw in zip(batches, plain):                          # the batch itself is transformed once
        shown = augment(raw)
        assert th.equal(batch.images, shown.images)
        assert th.equal(batch.cond["augment_labels"], shown.cond["augment_labels"])
    last = batches[4].references                                    # positions 20..39
    for name in ("augment_labels", "y"):
        assert th.equal(last.cond[name], th.cat([batch.cond[name] for batch in batches])[20:])
    assert th.equal(last.images, th.cat([batch.images for batch in batches])[20:])
    later = take(stream_of(start=4 * B, augment=augment)[1], 1)[0]
    assert th.equal(later.references.cond["augment_labels"], last.cond["augment_labels"])
    th.testing.assert_close(later.references.images, last.images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_rank_has_the_same(whole, world_size):
    barrier, slots = Barrier(world_size), [None] * world_size

    def rank(r):
        def gather(own):
            slots[r] = own
            barrier.wait()
            everybodys = list(slots)
            barrier.wait()                                          # before anybody speaks again
            return everybodys
        return take(stream_of(r, world_size, gather=gather)[1], 5)

    with ThreadPoolExecutor(world_size) as pool:
        ranks = list(pool.map(rank, range(world_size)))
    for batches in ranks:
        assert all(same(batch.references, one.references) for batch, one in zip(batches, whole))
    assert sum(len(batches[0]) for batches in ranks) == B


@pytest.mark.parametrize("step", [1, 4])
def test_a_resumed_run_has_the_same(whole, step):
    batch = take(stream_of(start=step * B)[1], 1)[0]
    assert same(batch.references, whole[step].references) and same(batch, whole[step])


@pytest.mark.parametrize("n", [B, B + 3, 2000])
def test_any_number_from_the_batch_to_more_than_the_set(n):
    for k, batch in enumerate(take(stream_of(n=n)[1], 2)):
        assert batch.references.positions.tolist() == list(range((k + 1) * B - n, (k + 1) * B))


def test_no_image_is_read_for_them_but_those_before_the_first_step():
    stream, batches = stream_of(n=20)
    read, images = [], stream.source.images
    stream.source.images = lambda indices: read.extend(indices.tolist()) or images(indices)
    take(batches, 10)
    assert len(read) == 10 * B + (20 - B)


def test_they_come_from_workers_too(whole):
    for batch, one in zip(take(stream_of(num_workers=1)[1], 3), whole):
        assert same(batch.references, one.references)
