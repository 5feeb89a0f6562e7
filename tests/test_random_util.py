"""Draws belong to samples: not to batches, ranks, worlds or runs of another length."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch as th

from cm.random_util import (
    GENERATORS,
    SampleStreams,
    SharedDropout,
    _generators,
    get_generator,
    labels_for,
    rng_state,
    set_rng_state,
    stream_seed,
    stream_seeds,
    undisturbed,
)
from cm.types import NoiseSource

GOLDEN = json.loads((Path(__file__).parent / "data" / "generators.json").read_text())
DETERMINISTIC = ["determ", "determ-indiv"]


def all_draws(source, n, device="cpu"):
    """One of each kind of draw, in a fixed order."""
    return [
        source.randn(n, 3, 4, 4),
        source.rand(n),
        source.randint(0, 1000, (n,)),
        source.randn_like(th.zeros(n, 2, device=device)),
        source.randn(n, 3, 4, 4),
    ]


def rows_of(draws, rows):
    return [draw[rows] for draw in draws]


def assert_same(a, b):
    for left, right in zip(a, b, strict=True):
        assert left.dtype == right.dtype and th.equal(left, right)


def run_in_batches(kind, num_samples, batch, world, seed=0, claimed=None):
    """All draws of samples 0..num_samples-1, in order, when `world` ranks of `batch` rows each work them off."""
    kept = [None] * num_samples
    for rank in range(world):
        generator = get_generator(kind, num_samples if claimed is None else claimed, seed, rank, world)
        for done in range(0, num_samples, batch * world):
            generator.set_done_samples(done)
            draws = all_draws(generator, batch)
            for k in range(batch):
                index = done + rank + k * world
                if index < num_samples:
                    kept[index] = rows_of(draws, k)
    return [th.stack(rows) for rows in zip(*kept)]


# ---- streams of samples ----


def test_a_row_depends_on_its_key_only():
    together = all_draws(SampleStreams(7, range(6)), 6)
    assert_same(rows_of(together, [4]), all_draws(SampleStreams(7, [4]), 1))
    assert_same(rows_of(together, [5, 0, 3]), all_draws(SampleStreams(7, th.tensor([5, 0, 3])), 3))


def test_small_rows_are_deterministic_too():
    """torch draws fewer than 16 normal numbers by another rule, which keeps one back for the next call."""
    together = SampleStreams(7, range(4))
    first, second = together.randn(4), together.randn(4, 3)
    alone = SampleStreams(7, [2])
    assert th.equal(alone.randn(1), first[2:3]) and th.equal(alone.randn(1, 3), second[2:3])


def test_seed_stream_and_key_all_matter():
    base = SampleStreams(1, [10], "train").randn(1, 32)
    for other in (SampleStreams(2, [10], "train"), SampleStreams(1, [11], "train"), SampleStreams(1, [10], "flip")):
        assert not th.isclose(other.randn(1, 32), base).any()


def test_keys_beyond_32_bits_have_their_own_streams():
    """`manual_seed` on the CPU would make twins of keys whose hashes agree in 32 bits; states are written in full."""
    twins = th.Generator().manual_seed(5), th.Generator().manual_seed(5 + 2**32)
    assert th.equal(th.randn(20, generator=twins[0]), th.randn(20, generator=twins[1]))
    a, b = _generators(np.array([5, 5 + 2**32], np.uint64))
    assert not th.isclose(th.randn(20, generator=a), th.randn(20, generator=b)).any()


def test_seeds_never_meet():
    keys = np.arange(50_000)
    seeds = [stream_seeds(seed, stream, keys) for seed in (0, 1, -1, 2**40) for stream in ("train", "sample")]
    assert len(np.unique(np.concatenate(seeds))) == 8 * len(keys)
    assert seeds[0].dtype == np.uint64


def test_seeds_are_well_mixed():
    """Neighbouring keys differ in half of the 64 bits: 10,000 pairs give a mean of 32 with error 0.04."""
    seeds = stream_seeds(0, "train", np.arange(10_001))
    flips = np.unpackbits((seeds[1:] ^ seeds[:-1])[:, None].view(np.uint8), axis=1).sum(1)
    assert abs(flips.mean() - 32) < 0.2 and flips.min() > 10
    assert abs((seeds >> np.uint64(63)).mean() - 0.5) < 0.02           # 4 standard errors


def test_one_seed_for_torch_and_numpy():
    seed = stream_seed(3, "order", 12)
    assert seed == int(stream_seeds(3, "order", [12])[0])
    th.Generator().manual_seed(seed)
    np.random.Philox(key=seed)


def test_uniform_numbers_against_another_implementation():
    """SplitMix64 in Python's integers fills numpy's Mersenne Twister; torch makes a float of the lowest 24 bits."""
    seed = 2856272058677294818                                          # frozen: a change breaks resumed runs
    assert stream_seeds(42, "train", [0, 1, 2**40]).tolist() == [seed, 18080344562287859578, 15705632505482455497]
    words = []
    for k in range(1, 313):
        z = (seed + k * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        words += [z % 2**32, z >> 32]
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": np.array(words, np.uint32), "pos": 624}}
    expected = (twister.random_raw(1000) & (2**24 - 1)) / 2**24
    assert SampleStreams(42, [0]).rand(1, 1000)[0].tolist() == expected.tolist()


def test_pooled_draws_have_the_right_statistics():
    """1,048,576 normal numbers: standard error of the mean 0.001, of the variance 0.0014, of a correlation 0.0156."""
    x = SampleStreams(0, range(256)).randn(256, 4096)
    assert abs(x.mean()) < 0.005 and abs(x.var() - 1) < 0.007
    between_rows = th.corrcoef(x) - th.eye(256)
    assert between_rows.abs().max() < 0.09                              # largest of 32,640: 4.6 errors are usual
    u = SampleStreams(0, range(4096)).rand(4096)
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.02  # first draws of streams, error 0.0045
    first = SampleStreams(0, range(4096)).randn(4096)
    assert abs(first.mean()) < 0.07 and abs(first.var() - 1) < 0.1      # errors 0.0156 and 0.022
    counts = th.bincount(SampleStreams(0, range(4096)).randint(3, 7, (4096,)), minlength=8)
    assert counts[:3].sum() == 0 and counts[7] == 0
    assert (counts[3:7] - 1024).abs().max() < 140                       # error 27.7


def test_dtypes_and_devices():
    def streams():
        return SampleStreams(0, [3, 4])

    single = streams().randn(2, 20)
    assert single.dtype == th.float32
    assert th.equal(streams().randn(2, 20, dtype=th.bfloat16), single.bfloat16())
    assert th.equal(streams().randn(2, 20, dtype=th.float16), single.half())
    double = streams().randn(2, 20, dtype=th.float64)
    assert double.dtype == th.float64 and not th.equal(double, double.float().double())
    assert streams().randint(0, 5, (2,), dtype=th.int32).dtype == th.int32
    assert streams().randn_like(th.zeros(2, 3, dtype=th.float16)).dtype == th.float16
    assert th.equal(streams().randn((2, 20)), single)
    assert SampleStreams(0, [3], device="meta").randn(1, 3).device.type == "meta"
    assert streams().randn(2, 3, device="meta").device.type == "meta"


@pytest.mark.cuda
def test_a_gpu_gets_the_values_of_the_cpu(gpu):
    draws = all_draws(SampleStreams(0, range(5), device=gpu), 5, gpu)
    assert all(draw.device.type == gpu for draw in draws)
    assert_same([draw.cpu() for draw in draws], all_draws(SampleStreams(0, range(5)), 5))


@pytest.mark.parametrize("shape", [(3, 4), (1,), ()])
def test_the_first_axis_is_the_batch(shape):
    with pytest.raises(ValueError, match="2 samples: the first axis must be 2"):
        SampleStreams(0, [0, 1]).randn(*shape)


def test_no_rows():
    assert SampleStreams(0, []).randn(0, 3).shape == (0, 3)


# ---- generators for sampling ----


@pytest.mark.parametrize("kind", GENERATORS)
def test_every_generator_is_a_noise_source(kind):
    generator = get_generator(kind, num_samples=8, seed=3)
    assert isinstance(generator, NoiseSource)
    generator.set_done_samples(0)
    assert isinstance(generator.for_samples([1, 2]), NoiseSource)
    x, u, labels, like, _ = all_draws(generator, 2)
    assert x.shape == (2, 3, 4, 4) and u.shape == (2,) and like.shape == (2, 2)
    assert labels.dtype == th.int64 and ((labels >= 0) & (labels < 1000)).all()


def test_unknown_generator_lists_the_choices():
    with pytest.raises(ValueError, match="'deterministic'.*dummy, determ, determ-indiv"):
        get_generator("deterministic")


def test_dummy_is_the_global_stream():
    th.manual_seed(0)
    expected = th.randn(2, 3)
    th.manual_seed(0)
    assert th.equal(get_generator("dummy", 10, 5).randn(2, 3), expected)


@pytest.mark.parametrize("kind", DETERMINISTIC)
@pytest.mark.parametrize(("batch", "world"), [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (1, 4), (2, 4)])
def test_samples_ignore_batch_size_and_ranks(kind, batch, world):
    """Also where the last batch reaches past the last sample: surplus rows disturb nobody."""
    assert_same(run_in_batches(kind, 6, batch, world), run_in_batches(kind, 6, 6, 1))


@pytest.mark.parametrize("kind", DETERMINISTIC)
def test_samples_ignore_the_length_of_the_run(kind):
    assert_same(run_in_batches(kind, 4, 4, 1, claimed=50_000), run_in_batches(kind, 4, 4, 1))
    assert_same(run_in_batches(kind, 4, 2, 1, claimed=0), run_in_batches(kind, 4, 4, 1))


def test_samples_of_different_seeds_differ_everywhere():
    """One long stream of seed 0 against one of seed 1, at every shift of whole samples."""
    zero, one = (get_generator("determ-indiv", 6, seed).randn(20, 48) for seed in (0, 1))
    assert not (zero[:, None] == one[None]).all(-1).any()


@pytest.mark.parametrize("kind", DETERMINISTIC)
@pytest.mark.parametrize("scenario", ["world1_batch2", "world1_batch3", "world1_batch4", "world2_batch2"])
def test_rows_go_to_the_same_samples_as_in_the_original(kind, scenario):
    """Which sample each row of each rank is, read off the original's numbers and off ours."""
    world = int(scenario[5])
    originals = [call["rows"] for call in GOLDEN["scenarios"][kind]["world1_batch6"]][0]
    ours = get_generator(kind, 6, seed=42).randn(6, 3, 4, 4)
    for batch in GOLDEN["scenarios"][kind]["set_done_samples"][scenario]:
        generator = get_generator(kind, 6, 42, batch["rank"], world)
        generator.set_done_samples(batch["done"])
        drawn = generator.randn(len(batch["rows"]), 3, 4, 4)
        for k, row in enumerate(batch["rows"]):
            if batch["done"] + batch["rank"] + k * world < 6:           # from there on the original repeats sample 5
                assert th.equal(drawn[k], ours[originals.index(row)])


def test_samples_can_be_named_outright():
    generator = get_generator("determ", 100, seed=5)
    batch = generator.randn(8, 3, 4)
    assert th.equal(generator.for_samples([6, 1]).randn(2, 3, 4), batch[[6, 1]])


def test_draws_of_a_batch_continue_and_a_new_batch_starts_afresh():
    generator = get_generator("determ", 100)
    first, second = generator.randn(2, 48), generator.randn(2, 48)
    assert not th.isclose(first, second).any()
    generator.set_done_samples(0)
    assert th.equal(generator.randn(2, 48), first)


def test_a_batch_of_another_size_must_be_announced():
    generator = get_generator("determ", 100)
    generator.randn(4, 3)
    with pytest.raises(ValueError, match="2 rows in a batch of 4 samples; call set_done_samples"):
        generator.randn(2, 3)
    generator.set_done_samples(4)
    generator.randn(2, 3)


def test_memory_does_not_grow_with_the_number_of_samples():
    def peak(num_samples):
        tracemalloc.start()
        get_generator("determ", num_samples).randn(2, 3)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(10)
    assert peak(10**9) < 100_000


# ---- labels ----


def test_labels_belong_to_samples():
    labels = labels_for(range(1000), seed=0, num_classes=10)
    assert labels.dtype == th.int64 and labels.shape == (1000,)
    assert th.equal(labels_for([17, 3], 0, 10), labels[[17, 3]])
    assert not th.equal(labels_for(range(1000), 1, 10), labels)
    counts = th.bincount(labels, minlength=10)
    assert len(counts) == 10 and (counts - 100).abs().max() < 48        # 5 standard errors
    with pytest.raises(ValueError, match="num_classes=0"):
        labels_for([0], 0, 0)


# ---- the same dropout masks for two networks ----


DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.cuda, pytest.mark.skipif(not th.cuda.is_available(), reason="this machine has no GPU"),
])]


@pytest.mark.parametrize("device", DEVICES)
def test_networks_share_dropout_masks(device):
    def mask():
        return th.nn.functional.dropout(th.ones(64, device=device), 0.5)

    masks = SharedDropout(device)
    with masks:
        online = mask()
    with masks:
        target = mask()
    with masks:
        third = mask()
    after = mask()
    assert th.equal(online, target) and th.equal(online, third)
    assert not th.equal(online, after)


@pytest.mark.parametrize("device", DEVICES)
def test_a_network_without_dropout_does_not_turn_the_stream_back(device):
    """Else every step would see the masks of the one before."""
    state = rng_state(device)
    plain = th.rand(8, device=device), th.rand(8, device=device)
    set_rng_state(device, state)
    masks = SharedDropout(device)
    with masks:
        assert th.equal(th.rand(8, device=device), plain[0])
    with masks:
        pass
    assert th.equal(th.rand(8, device=device), plain[1])


def test_only_the_streams_of_one_device_are_kept(monkeypatch):
    before = th.get_rng_state()
    with undisturbed("cpu"):
        th.rand(3)
    assert th.equal(th.get_rng_state(), before)
    asked = []
    monkeypatch.setattr(th.random, "fork_rng", asked.append)
    undisturbed("cuda:1"), undisturbed("cpu")
    assert asked == [[th.device("cuda", 1)], []]
