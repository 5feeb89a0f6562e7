"""The order of a stream, its resume position and its split over ranks, against a list of all images."""

import numpy as np
import pytest

from cm.data.loader import load_data
from cm.data.reference_batches import with_references
from cm.data.streams import Item, Sequence, StreamedSource, WindowOrder
from cm.errors import UserError
from support.shards import numbers, picture, write_shards

SIZES = (5, 0, 7, 3, 8)                                             # 23 images
WINDOW = 6


class Counted:
    """A stream in memory that remembers what was read of it."""

    data_dir, num_parts = "memory", len(SIZES)

    def __init__(self, sizes=SIZES):
        self.sizes, self.read, self.counted = sizes, [], []

    def count(self, part):
        self.counted.append(part)
        return self.sizes[part]

    def items(self, part):
        for i in range(self.sizes[part]):
            number = sum(self.sizes[:part]) + i
            self.read.append(number)
            yield Item(f"part {part} image {i}", picture(number), number % 3)


def labels_of(items):
    return [int(item.name.split()[1]) * 100 + int(item.name.split()[3]) for item in items]


def test_each_epoch_reads_every_image_once_in_an_order_of_parts_of_its_own():
    items = labels_of(Sequence(Counted(), 5, shuffle=True).take(0, 4 * 23))
    epochs = [items[start : start + 23] for start in range(0, 92, 23)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 23 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    for epoch in epochs:
        parts = [label // 100 for label in epoch]
        assert sum(a != b for a, b in zip(parts, parts[1:])) == 3, "a part is read from front to back"
    plain = labels_of(Sequence(Counted(), 5, shuffle=False).take(0, 30))
    assert plain == [*sorted(epochs[0]), *sorted(epochs[0])[:7]]


@pytest.mark.parametrize("start", [0, 4, 5, 22, 23, 24, 50, 23 * 1000 + 11])
def test_any_place_is_found_by_counting(start):
    stream = Counted()
    whole = Sequence(Counted(), 5, shuffle=True).take(start, 9) if start > 100 else (
        Sequence(Counted(), 5, shuffle=True).take(0, start + 9)[start:])
    sequence = Sequence(stream, 5, shuffle=True)
    assert labels_of(sequence.take(start, 9)) == labels_of(whole)
    assert len(stream.counted) <= len(SIZES), "each part once, however far it is"
    assert len(stream.read) <= 9 + max(SIZES), "parts before it are passed over"
    assert labels_of(sequence.take(start + 12, 2)) == labels_of(Sequence(Counted(), 5, True).take(start + 12, 2))
    assert labels_of(sequence.take(0, 2)) == labels_of(Sequence(Counted(), 5, True).take(0, 2)), "and backwards"


def test_windows_are_shuffled_by_their_number_alone():
    order = WindowOrder(3, WINDOW)
    everything = order(np.arange(60))
    for window in range(10):
        here = everything[window * WINDOW : (window + 1) * WINDOW]
        assert sorted(here) == list(range(window * WINDOW, (window + 1) * WINDOW))
    places = everything.reshape(10, WINDOW) % WINDOW
    assert len({tuple(row) for row in places}) > 5, "each in an order of its own"
    assert np.array_equal(order(np.array([7, 29, 41])), everything[[7, 29, 41]])
    assert np.array_equal(WindowOrder(3, WINDOW, shuffle=False)(np.arange(60)), np.arange(60))


def test_only_the_windows_of_a_batch_are_held():
    stream = Counted()
    source = StreamedSource(stream, 8, window=WINDOW)
    for first in range(0, 120, 8):
        source.gather(np.arange(first, first + 8))
        assert len(source._held) <= 3
    assert source.images(np.array([119])).shape == (1, 8, 8, 3)
    assert len(stream.read) == 120, "each image once, as long as the run goes forward"


def test_an_empty_stream_and_latents_are_refused():
    empty = Counted((0,) * len(SIZES))
    with pytest.raises(UserError, match="memory has no images in its 5 part"):
        StreamedSource(empty, 8).gather(np.arange(2))
    with pytest.raises(UserError, match="--channels 4: the image files of memory"):
        StreamedSource(Counted(), 8, channels=4)


# ---- through the loader, from tar files ----


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("stream") / "shards", SIZES)


def batches(shards, count, **options):
    usual = dict(data_dir=shards, batch_size=4, image_size=8, class_cond=True, seed=3, shuffle_window=WINDOW,
                 num_workers=0)
    stream = load_data(**{**usual, **options})
    found = [next(stream) for _ in range(count)]
    stream.close()
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_see_the_same_global_batches(shards, world):
    alone = batches(shards, 12)
    ranks = [batches(shards, 12, batch_size=4 // world, rank=rank, world_size=world) for rank in range(world)]
    for step, whole in enumerate(alone):
        shown = {p: (n, y) for batch in (rank[step] for rank in ranks)
                 for p, n, y in zip(batch.positions.tolist(), numbers(batch.images), batch.cond["y"].tolist())}
        found = numbers(whole.images)
        assert [shown[p] for p in whole.positions.tolist()] == [(n, n % 3) for n in found]
        assert whole.cond["y"].tolist() == [n % 3 for n in found]
    seen = [n for batch in alone for n in numbers(batch.images)]
    assert set(seen) == set(range(23)) and seen != sorted(seen)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"random_crop": True, "image_size": 6}, {"batch_size": 20}])
def test_a_run_goes_on_with_exactly_the_next_image(shards, workers, options):
    whole = batches(shards, 8, **options)
    later = batches(shards, 3, start=5 * len(whole[0]), num_workers=workers, **options)
    for expected, found in zip(whole[5:], later):
        assert (expected.images == found.images).all() and (expected.positions == found.positions).all()
        assert (expected.cond["y"] == found.cond["y"]).all() and (expected.indices == found.indices).all()


def test_references_of_a_stream_are_its_newest_images(shards):
    stream = load_data(data_dir=shards, batch_size=2, image_size=8, seed=3, shuffle_window=WINDOW, num_workers=0,
                       random_flip=False)
    found = with_references(stream, 6, 0, 0, 1, lambda own: [own])
    seen = [next(found) for _ in range(5)]
    newest = [n for batch in seen for n in numbers(batch.images)][-6:]
    assert seen[-1].references.images[:, 0, 0, 0].tolist() == newest


def test_classes_must_be_there_and_fit(shards, tmp_path):
    with pytest.raises(UserError, match=r"set-00\d.tar: member '0000\d\d.png' is of class 2, but the network has 2"):
        batches(shards, 3, num_classes=2)
    bare = write_shards(tmp_path / "bare", (4,), label="")
    with pytest.raises(UserError, match="set-000.tar: member '00000..png' has none .*cls or .json"):
        batches(bare, 1)
    assert batches(bare, 1, class_cond=False)[0].cond == {}
