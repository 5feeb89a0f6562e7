"""The order of a run: the same samples whatever the ranks and workers, from any start, without end."""

import os
import signal
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch as th
from PIL import Image

from cm.data import image_source
from cm.data.decode import resize_shorter_side
from cm.data.loader import load_data, random_crop
from cm.data.order import EpochOrder, offsets_of_rank
from cm.errors import UserError
from cm.types import Batch

N = 37
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), dtype=np.uint8)
LABELS = np.random.default_rng(1).integers(0, 5, N)


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, arr_0=PIXELS, arr_1=LABELS)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same images in files, in another order, larger than they are asked for."""
    path = tmp_path_factory.mktemp("folder")
    for i, pixels in enumerate(PIXELS):
        Image.fromarray(pixels.repeat(2, 0).repeat(3, 1)).save(path / f"{LABELS[i]}_{i:02d}.png")
    return str(path)


def take(count, **options):
    """The first batches of a run."""
    stream = load_data(**{"image_size": 8, "seed": 3, **options})
    return [next(stream) for _ in range(count)]


def samples(batches):
    """{position: (image index, class, pixels)} of batches; no position comes twice."""
    found = {}
    for batch in batches:
        for row in range(len(batch)):
            position = int(batch.positions[row])
            assert position not in found
            label = int(batch.cond["y"][row]) if batch.cond else None
            found[position] = int(batch.indices[row]), label, batch.images[row].numpy().tobytes()
    return found


# ---- drop-in ----


def test_batches_unpack_as_images_and_conditioning(npz):
    data = load_data(data_dir=npz, batch_size=5, image_size=8, class_cond=True)
    assert iter(data) is data
    batch = next(data)
    images, cond = batch
    assert isinstance(batch, Batch) and len(batch) == 5
    assert images.dtype == th.float32 and images.shape == (5, 3, 8, 8) and images.is_contiguous()
    assert images.min() >= -1 and images.max() <= 1
    assert set(cond) == {"y"} and cond["y"].dtype == th.int64 and cond["y"].shape == (5,)
    images, cond = next(load_data(data_dir=npz, batch_size=5, image_size=8))
    assert cond == {}


def test_pixels_and_labels_belong_together(npz):
    for batch in take(5, data_dir=npz, batch_size=10, class_cond=True, random_flip=False):
        expected = PIXELS[batch.indices].transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1
        np.testing.assert_array_equal(batch.images, expected)
        np.testing.assert_array_equal(batch.cond["y"], LABELS[batch.indices])


def test_deterministic_is_the_order_of_the_set(npz):
    batches = take(6, data_dir=npz, batch_size=10, deterministic=True)
    assert th.cat([batch.indices for batch in batches]).tolist() == [i % N for i in range(60)]


def test_options_are_keywords_and_misspelt_ones_raise(npz):
    with pytest.raises(TypeError):
        load_data(npz, 4, 8)
    with pytest.raises(TypeError, match="random_flips"):
        load_data(data_dir=npz, batch_size=4, image_size=8, random_flips=True)


def test_the_global_stream_of_torch_is_left_alone(folder):
    before = th.get_rng_state()
    take(2, data_dir=folder, batch_size=4, num_workers=1)
    assert th.equal(th.get_rng_state(), before)


# ---- order ----


def test_every_epoch_shows_every_image_once_and_in_another_order(npz):
    order = th.cat([batch.indices for batch in take(37, data_dir=npz, batch_size=4)]).reshape(4, N)
    assert (order.sort(dim=1).values == th.arange(N)).all()
    assert len({tuple(epoch.tolist()) for epoch in order}) == 4
    other = th.cat([batch.indices for batch in take(37, data_dir=npz, batch_size=4, seed=4)]).reshape(4, N)
    assert (order == other).float().mean() < 0.2


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_same_samples(npz, world):
    """Position, image, class, flip: all the pixels. Step s holds exactly the positions s*8 .. s*8+7."""
    alone = take(12, data_dir=npz, batch_size=8, class_cond=True)
    ranks = [
        take(12, data_dir=npz, batch_size=8 // world, class_cond=True, rank=rank, world_size=world)
        for rank in range(world)
    ]
    for step in range(12):
        of_step = samples(batches[step] for batches in ranks)
        assert sorted(of_step) == list(range(step * 8, step * 8 + 8))
        assert of_step == samples([alone[step]])
    for rank, batches in enumerate(ranks):
        assert all((batch.positions % world == rank).all() for batch in batches)


def test_ranks_may_have_unequal_shares(npz):
    alone = samples(take(10, data_dir=npz, batch_size=8))
    shares = [3, 3, 2]
    ranks = [
        take(10, data_dir=npz, batch_size=share, rank=rank, world_size=3, global_batch=8)
        for rank, share in enumerate(shares)
    ]
    assert samples(batch for batches in ranks for batch in batches) == alone


@pytest.mark.parametrize("start", [8, 72, 37 * 1000 + 24])
def test_a_run_goes_on_at_any_start(npz, start):
    """Also on other ranks than it began with, and a thousand epochs on without drawing them."""
    resumed = take(6, data_dir=npz, batch_size=8, start=start)
    assert resumed[0].positions.tolist() == list(range(start, start + 8))
    if start < 100:
        whole = samples(take(16, data_dir=npz, batch_size=8))
        assert samples(resumed).items() <= whole.items()
    halves = [take(6, data_dir=npz, batch_size=4, rank=rank, world_size=2, start=start) for rank in range(2)]
    assert samples(halves[0] + halves[1]) == samples(resumed)


@pytest.mark.parametrize("options", [{}, {"random_crop": True}], ids=["centre", "crop"])
def test_workers_change_nothing(folder, options):
    """At 37 images and batches of 10 the run crosses epochs within batches; two processes work in turns."""
    batches = {
        workers: take(12, data_dir=folder, batch_size=10, class_cond=True, num_workers=workers, **options)
        for workers in (0, 1, 2)
    }
    for workers in (1, 2):
        for ours, theirs in zip(batches[workers], batches[0], strict=True):
            assert th.equal(ours.positions, theirs.positions)
            assert samples([ours]) == samples([theirs])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_may_exceed_the_set(npz, workers):
    batch, = take(1, data_dir=npz, batch_size=100, num_workers=workers)
    counts = th.bincount(batch.indices, minlength=N)
    assert len(batch) == 100 and counts.min() == 2 and counts.max() == 3
    assert sorted(batch.indices[:N].tolist()) == list(range(N))


@pytest.mark.parametrize("workers", [0, 1])
def test_fewer_images_than_ranks_need(tmp_path, workers):
    """Three images for two ranks of four: every step is full, and all images are shown equally often."""
    for i in range(3):
        Image.fromarray(PIXELS[i]).save(tmp_path / f"a_{i}.png")
    ranks = [
        take(3, data_dir=str(tmp_path), batch_size=4, rank=rank, world_size=2, num_workers=workers)
        for rank in range(2)
    ]
    found = samples(batch for batches in ranks for batch in batches)
    assert sorted(found) == list(range(24))
    assert np.bincount([index for index, _, _ in found.values()]).tolist() == [8, 8, 8]


def test_workers_live_on_past_epochs(folder):
    stream = load_data(data_dir=folder, image_size=8, batch_size=10, num_workers=2)
    workers = [worker.pid for worker in stream._batches._workers]
    for _ in range(15):
        next(stream)
    assert [worker.pid for worker in stream._batches._workers] == workers


@pytest.mark.parametrize(("kind", "options", "workers"), [
    ("npz", {}, 0), ("folder", {}, 0), ("folder", {"random_crop": True}, 1), ("npz", {"num_workers": 1}, 1),
])
def test_how_many_workers_there_are(request, kind, options, workers):
    stream = load_data(data_dir=request.getfixturevalue(kind), image_size=8, batch_size=2, **options)
    assert len(getattr(stream._batches, "_workers", [])) == workers


def test_sets_too_large_for_memory_have_a_worker(folder, monkeypatch):
    monkeypatch.setattr(image_source, "CACHE_BYTES", 1000)
    stream = load_data(data_dir=folder, image_size=8, batch_size=2)
    assert len(stream._batches._workers) == 1
    assert len(next(stream)) == 2


def test_order_against_a_slow_implementation():
    """One position at a time, in any order of epochs."""
    order = EpochOrder(10, seed=5)
    together = order(np.arange(3, 47))
    alone = [int(EpochOrder(10, seed=5)(np.array([position]))[0]) for position in range(3, 47)]
    assert together.tolist() == alone
    assert sorted(alone[7:17]) == list(range(10))                       # positions 10..19 are epoch 1


def test_order_holds_one_epoch():
    order = EpochOrder(100_000, seed=0)
    order(np.arange(10))
    tracemalloc.start()
    for epoch in range(1, 6):
        order(np.arange(10) + epoch * 100_000)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1.1 * 800_000 and peak < 2.2 * 800_000


# ---- augmentation ----


def test_half_of_the_samples_are_mirrored_by_a_coin_of_their_own(npz):
    plain, mirrored = PIXELS.transpose(0, 3, 1, 2), PIXELS[:, :, ::-1].transpose(0, 3, 1, 2)
    flips = []
    for batch in take(100, data_dir=npz, batch_size=16):
        bytes_ = ((batch.images + 1) * 127.5).round().numpy().astype(np.uint8)
        is_plain = (bytes_ == plain[batch.indices]).all((1, 2, 3))
        is_mirrored = (bytes_ == mirrored[batch.indices]).all((1, 2, 3))
        assert (is_plain ^ is_mirrored).all()
        flips += list(zip(batch.indices.tolist(), is_mirrored.tolist()))
    coins = np.array([flip for _, flip in flips])
    assert abs(coins.mean() - 0.5) < 0.06                               # 1600 coins: 4.8 standard errors
    assert all(0 < np.mean([flip for i, flip in flips if i == image]) < 1 for image in range(N))


def test_flips_do_not_depend_on_the_order_of_images(npz):
    shuffled = samples(take(5, data_dir=npz, batch_size=8))
    straight = samples(take(5, data_dir=npz, batch_size=8, deterministic=True))
    unflipped = samples(take(5, data_dir=npz, batch_size=8, random_flip=False))
    straight_unflipped = samples(take(5, data_dir=npz, batch_size=8, deterministic=True, random_flip=False))
    for position in shuffled:
        flipped = shuffled[position] != unflipped[position]
        assert flipped == (straight[position] != straight_unflipped[position])


def test_random_crops_are_squares_of_the_picture():
    """Each crop is a window of one of the allowed sizes; all sizes and both ends of every margin occur."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8))
    windows = {}
    for shorter in (8, 9, 10):                                          # 8 / 0.8 = 10
        pixels = np.asarray(resize_shorter_side(picture, shorter))
        for top in range(pixels.shape[0] - 7):
            for left in range(pixels.shape[1] - 7):
                windows[pixels[top : top + 8, left : left + 8].tobytes()] = shorter, top, left
    rng = np.random.default_rng(1)
    seen = {windows[random_crop(picture, 8, rng).tobytes()] for _ in range(2000)}
    assert seen == set(windows.values())


def test_crops_belong_to_positions(folder):
    batches = take(8, data_dir=folder, batch_size=37, random_crop=True, random_flip=False, num_workers=0)
    again = take(8, data_dir=folder, batch_size=37, random_crop=True, random_flip=False, num_workers=0)
    assert samples(batches) == samples(again)
    first_image = {pixels for i, _, pixels in samples(batches).values() if i == 0}
    assert len(first_image) > 1


# ---- what can go wrong ----


def test_classes_must_be_there(tmp_path, npz):
    Image.fromarray(PIXELS[0]).save(tmp_path / "picture.png")
    with pytest.raises(UserError, match="--class_cond needs a class for every .*, but 'picture.png' has no class"):
        load_data(data_dir=str(tmp_path), batch_size=1, image_size=8, class_cond=True)
    assert load_data(data_dir=str(tmp_path), batch_size=1, image_size=8).source.num_classes is None
    assert load_data(data_dir=npz, batch_size=1, image_size=8, class_cond=True).source.num_classes == 5


def test_a_missing_set_is_told_at_once():
    with pytest.raises(UserError, match="--data_dir is empty"):
        load_data(data_dir="", batch_size=1, image_size=8)


def test_a_batch_has_at_least_one_image(npz):
    with pytest.raises(UserError, match="--batch_size 0"):
        load_data(data_dir=npz, batch_size=0, image_size=8)


def test_shares_must_fit_the_global_batch():
    assert offsets_of_rank(3, 1, 3, 8).tolist() == [1, 4, 7]
    with pytest.raises(UserError, match="rank 2 of 3 has 2 of the 8 images of a step, not 3"):
        offsets_of_rank(3, 2, 3, 8)
    with pytest.raises(ValueError, match="rank 2 is not one of 0..1"):
        offsets_of_rank(3, 2, 2, None)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_in_one_line(tmp_path, workers):
    for i in range(4):
        Image.fromarray(PIXELS[i]).save(tmp_path / f"a_{i}.png")
    (tmp_path / "a_2.png").write_bytes(b"hello")
    stream = load_data(
        data_dir=str(tmp_path), batch_size=2, image_size=8, deterministic=True, num_workers=workers
    )
    next(stream)
    with pytest.raises(UserError) as failure:
        next(stream)
    assert str(failure.value) == (
        f"{tmp_path}: image 2 (a_2.png) cannot be read: it is not an image. Replace or remove it."
    )


def test_a_killed_worker_ends_the_run_with_a_hint(folder):
    stream = load_data(data_dir=folder, batch_size=4, image_size=8, num_workers=1)
    next(stream)
    os.kill(stream._batches._workers[0].pid, signal.SIGKILL)
    time.sleep(0.2)                                                     # the news of it must not arrive just anywhere
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)DataLoader worker \(pid.*memory .*ran out.*--num_workers 0"):
        for _ in range(10):
            next(stream)                                                # what was read ahead comes first
    assert time.monotonic() - started < 10


def test_other_errors_get_no_hint(npz):
    stream = load_data(data_dir=npz, batch_size=4, image_size=8)
    stream._batches = iter(lambda: (_ for _ in ()).throw(RuntimeError("another")).__next__(), None)
    with pytest.raises(RuntimeError, match="^another$"):
        next(stream)


@pytest.mark.cuda
@pytest.mark.skipif(not th.cuda.is_available(), reason="pinned memory needs a GPU")
def test_pinned_images_are_the_same(npz):
    plain, = take(1, data_dir=npz, batch_size=8)
    pinned, = take(1, data_dir=npz, batch_size=8, pin_memory=True)
    assert pinned.images.is_pinned() and th.equal(pinned.images, plain.images)


@pytest.mark.parametrize("cache_bytes", [0, None])
def test_a_zip_gives_the_same_batches_in_any_worker_and_from_memory(folder, tmp_path, cache_bytes):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for file in Path(folder).iterdir():
            archive.write(file, file.name)
    expected = samples(take(9, data_dir=folder, batch_size=10, class_cond=True, num_workers=0))
    for workers in (0, 2):
        batches = take(9, data_dir=str(tmp_path / "images.zip"), batch_size=10, class_cond=True, num_workers=workers,
                       cache_bytes=cache_bytes)
        assert samples(batches) == expected
