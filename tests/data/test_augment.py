"""EDM's augmentation: flips and shifts exactly, warps against a slow way and a closed form, labels, ranks, the loop."""

import csv
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch as th

from cm.config.flags import parse
from cm.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from cm.data import augment
from cm.data.augment import AUGMENT_LABELS, SYM6, AugmentBatch, AugmentPipe, Transforms, _warp, apply, augmented
from cm.data.loader import load_data
from cm.distributed import setup as dist
from cm.errors import UserError
from cm.karras_diffusion import KarrasDenoiser
from cm.logging import logger
from cm.random_util import DummyGenerator, SampleStreams
from cm.samplers.sample import SampleOptions, sample
from cm.setup import data as run_data
from cm.train_util import TrainLoop
from cm.types import Batch
from support import tf32
from support.training import BATCH
from support.warm import mpi_program

NAMES = [field.name for field in dataclasses.fields(Transforms)]
PICTURES = th.randn(5, 3, 8, 10, dtype=th.float64, generator=th.Generator().manual_seed(0))


def transforms(count=5, **values):
    given = {name: th.zeros(count, dtype=th.float64) for name in NAMES}
    return Transforms(**given | {name: th.full((count,), value, dtype=th.float64) for name, value in values.items()})


# ---- the filter and the warp ----


def test_the_filter_is_an_orthonormal_one_with_six_vanishing_moments():
    h = np.array(SYM6)
    assert h.sum() == pytest.approx(math.sqrt(2), abs=1e-12)
    for shift in range(0, 12, 2):
        assert h[shift:] @ h[: 12 - shift] == pytest.approx(float(shift == 0), abs=1e-12)
    k = np.arange(12)
    for moment in range(6):                                         # printed to 1e-16, times 11^5
        assert ((-1.0) ** k * k**moment) @ h == pytest.approx(0, abs=1e-9 * 11**moment)


def test_nothing_is_nothing_and_flips_are_exact():
    assert apply(PICTURES, transforms()) is not None
    assert th.equal(apply(PICTURES, transforms()), PICTURES)
    assert th.equal(apply(PICTURES, transforms(x_flip=1)), PICTURES.flip(3))
    assert th.equal(apply(PICTURES, transforms(y_flip=1)), PICTURES.flip(2))
    assert th.equal(apply(PICTURES, transforms(x_flip=1, y_flip=1)), PICTURES.flip(2, 3))
    some = dataclasses.replace(transforms(), x_flip=th.tensor([0, 1, 0, 0, 1.0]).double())
    expected = th.stack([img.flip(2) if flip else img for img, flip in zip(PICTURES, some.x_flip)])
    assert th.equal(apply(PICTURES, some), expected)


@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (1, 0), (0, -2), (3, 2), (-6, 4)])
def test_whole_pixels_are_exact(dx, dy):
    """Content moves right and down; what comes in is mirrored at the border."""
    inverse = th.tensor([[1, 0, -dx], [0, 1, -dy]], dtype=th.float64).expand(5, 2, 3)
    result = _warp(PICTURES, inverse)
    rows, columns = (np.arange(n) - d for n, d in ((8, dy), (10, dx)))
    expected = PICTURES[:, :, mirror(rows, 8)][:, :, :, mirror(columns, 10)]
    th.testing.assert_close(result, expected, rtol=0, atol=5e-11)           # the printed filter is exact to 1e-12
    th.testing.assert_close(_warp(PICTURES.float(), inverse), expected.float(), rtol=0, atol=5e-5)   # places in float32


def mirror(index, n):
    """... 2 1 0 1 2 ... n-1 n-2 ..."""
    index = np.abs(index) % (2 * n - 2)
    return np.where(index < n, index, 2 * n - 2 - index)


def slow_warp(image, inverse):
    """One channel [H,W] pixel by pixel: convolution sums over the mirrored image, bilinear by hand, decimation."""
    height, width = image.shape
    h = np.array(SYM6)

    def upsampling(n):                                              # [u, pixel] for u = -4n .. 6n
        matrix = np.zeros((10 * n + 1, n))
        for row, u in enumerate(range(-4 * n, 6 * n + 1)):
            for x in range(-n + 1, 2 * n - 1):
                if 0 <= u - 2 * x + 5 < 12:
                    matrix[row, mirror(np.array([x]), n)[0]] += h[u - 2 * x + 5]
        return matrix

    fine = upsampling(height) @ image @ upsampling(width).T

    def value(u, v):
        left, top = math.floor(u), math.floor(v)
        a, b = u - left, v - top
        corners = fine[top + 4 * height : top + 4 * height + 2, left + 4 * width : left + 4 * width + 2]
        return np.array([1 - b, b]) @ corners @ np.array([1 - a, a])

    result = np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            for m in range(12):
                for n in range(12):
                    x = (2 * j + n - 5) / 2 - (width - 1) / 2
                    y = (2 * i + m - 5) / 2 - (height - 1) / 2
                    x, y = inverse @ np.array([x, y, 1])
                    result[i, j] += h[m] * h[n] * value(2 * x + width - 1, 2 * y + height - 1)
    return result


@pytest.mark.parametrize("values", [
    {"angle": 0.7}, {"scale": -0.6, "shift_x": 0.3, "shift_y": -1.1}, {"stretch": 1.2, "stretch_angle": 2.5},
    {"scale": 0.5, "angle": -2.0, "stretch": -0.7, "stretch_angle": 0.4, "shift_x": -0.8, "shift_y": 0.6},
])
def test_warps_against_a_slow_way(values):
    image = PICTURES[:1, :1]
    inverse = written_out(8, 10, **values)
    th.testing.assert_close(transforms(1, **values).inverse(8, 10)[0], th.tensor(inverse), rtol=0, atol=1e-12)
    result = apply(image, transforms(1, **values))
    np.testing.assert_allclose(result[0, 0], slow_warp(image[0, 0].numpy(), inverse), rtol=0, atol=1e-12)


def written_out(height, width, scale=0.0, angle=0.0, stretch=0.0, stretch_angle=0.0, shift_x=0.0, shift_y=0.0):
    """Places in the image from places in the result: the inverses of each transform, the last one first."""
    def turn(a):
        return np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])

    def shift(x, y):
        return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])

    s, t = 2 ** (0.2 * scale), 2 ** (0.2 * stretch)
    stretching = turn(-stretch_angle) @ np.diag([1 / t, t, 1]) @ turn(stretch_angle)
    whole = np.diag([1 / s, 1 / s, 1]) @ turn(angle) @ stretching @ shift(-shift_x * width / 8, -shift_y * height / 8)
    return whole[:2]


def test_a_slow_wave_is_seen_where_the_map_says():
    """A closed form: cos(k . x) sampled on 24x24 pixels, warped, is cos(k . (A x + t)) where no border is near."""
    side = 24
    place = th.arange(side, dtype=th.float64) - (side - 1) / 2
    y, x = th.meshgrid(place, place, indexing="ij")

    def wave(x, y):
        return th.cos(0.3 * x - 0.2 * y + 0.4)

    some = transforms(1, scale=0.8, angle=0.5, stretch=0.5, stretch_angle=1.0, shift_x=0.2, shift_y=-0.3)
    (a, b, c), (d, e, f) = some.inverse(side, side)[0].tolist()
    inner = slice(8, 16)
    result = apply(wave(x, y)[None, None], some)[0, 0][inner, inner]
    # A bilinear step of half a pixel errs by at most h^2 |k|^2 / 8 = 0.004 at |k| = 0.36. The filter's centre of mass
    # lies 0.098 half pixels beside its tap, and the map turns that before it is undone: 0.07 |A - 1| |k| = 0.013.
    th.testing.assert_close(result, wave(a * x + b * y + c, d * x + e * y + f)[inner, inner], rtol=0, atol=0.017)


def test_chunks_change_nothing(monkeypatch):
    some = AugmentPipe(1.0).draw(SampleStreams(0, range(5)), 5)
    whole = apply(PICTURES, some)
    monkeypatch.setattr(augment, "CHUNK_NUMBERS", 1)
    th.testing.assert_close(apply(PICTURES, some), whole, rtol=0, atol=1e-12)


# ---- what is drawn, and what the network is told ----


def test_labels_are_the_transforms():
    told = transforms(1, x_flip=1, scale=0.5, angle=2.0, stretch=0.3, stretch_angle=-1.0, shift_x=0.1, shift_y=-0.2)
    expected = [1, 0, 0.5, math.cos(2) - 1, math.sin(2), 0.3 * math.cos(1), -0.3 * math.sin(1), 0.1, -0.2]
    np.testing.assert_allclose(told.labels()[0], expected, rtol=1e-6)
    assert transforms().labels().shape == (5, AUGMENT_LABELS) and not transforms().labels().any()


def test_laws_of_the_transforms():
    """20000 draws at p = 0.12: frequencies and moments within five standard errors."""
    n, p = 20_000, 0.12
    drawn = AugmentPipe(p).draw(SampleStreams(1, range(n)), n)

    def close(found, expected, deviation, count):
        assert abs(float(found) - expected) < 5 * deviation / math.sqrt(count)

    close(drawn.x_flip.mean(), 0.5, 0.5, n)                         # mirrored whatever p is
    close(drawn.y_flip.mean(), p / 2, 0.24, n)
    for name in ("scale", "stretch", "shift_x", "shift_y"):
        value = getattr(drawn, name)
        chosen = value[value != 0]
        close(len(chosen) / n, p, 0.33, n)
        close(chosen.mean(), 0, 1, len(chosen))
        close(chosen.square().mean(), 1, math.sqrt(2), len(chosen))
    assert ((drawn.shift_x != 0) == (drawn.shift_y != 0)).all()
    turned = drawn.angle[drawn.angle != 0]
    close(len(turned) / n, p, 0.33, n)
    close(turned.square().mean(), math.pi**2 / 3, 3, len(turned))
    close((drawn.stretch_angle != 0).double().mean(), 0.5, 0.5, n)
    close(drawn.is_warp().double().mean(), 1 - (1 - p) ** 4, 0.5, n)        # each of them by a coin of its own


@pytest.mark.parametrize("p", [0, -0.1, 1.1])
def test_what_is_no_probability(p):
    with pytest.raises(ValueError, match="lies in"):
        AugmentPipe(p)


def test_ranks_augment_the_same_samples(images):
    def batches(world, steps=3):
        found = {}
        for rank in range(world):
            data = augmented(
                lambda start, rank=rank: load_data(
                    data_dir=images, batch_size=8 // world, image_size=8, class_cond=True, seed=3, rank=rank,
                    world_size=world, start=start, num_workers=0,
                ), 0.5, 7, th.device("cpu"),
            )(0)
            for _ in range(steps):
                batch = next(data)
                assert set(batch.cond) == {"y", "augment_labels"}
                for row, position in enumerate(batch.positions.tolist()):
                    found[position] = batch.images[row], batch.cond["augment_labels"][row]
        return [found[position] for position in sorted(found)]

    alone, shared = batches(1), batches(2)
    assert len(alone) == len(shared) == 24
    for (image, label), (other, told) in zip(alone, shared):
        assert th.equal(label, told)
        th.testing.assert_close(image, other, rtol=0, atol=1e-5)
    assert len({tuple(label.tolist()) for _, label in alone}) > 20
    assert not any(image.requires_grad for image, _ in alone)


def test_references_stay_as_they_are():
    references = Batch(PICTURES.float())
    batch = Batch(PICTURES.float(), {}, th.arange(5), th.arange(5), references)
    result = next(augmented(lambda start: iter([batch]), 1.0, 0, th.device("cpu"))(0))
    assert result.references is references and result.indices is batch.indices
    assert not th.equal(result.images, batch.images) and th.equal(references.images, PICTURES.float())


# ---- in training ----


class Told(th.nn.Module):
    """A network of the least kind that is told of the augmentation."""

    augment_dim = AUGMENT_LABELS

    def __init__(self):
        super().__init__()
        self.conv = th.nn.Conv2d(3, 3, 3, padding=1)
        self.of_labels = th.nn.Linear(AUGMENT_LABELS, 3, bias=False)
        self.seen = []

    def forward(self, x, timesteps, y=None, augment_labels=None):
        self.seen.append(augment_labels)
        shift = 0 if augment_labels is None else self.of_labels(augment_labels)[:, :, None, None]
        return self.conv(x) + shift


def train(images, directory, batch_size=BATCH):
    """Three steps with augmentation in this process, which may be one of several ranks."""
    logger.configure(str(directory), format_strs=["csv"], rank=dist.get_rank())
    settings = parse("", DataConfig, RunConfig, argv=["--augment", "0.5"])
    th.manual_seed(0)
    model = Told()

    def data(start):
        return load_data(
            data_dir=images, batch_size=batch_size, image_size=8, class_cond=True, start=start, num_workers=0,
            random_flip=False, rank=dist.get_rank(), world_size=dist.get_world_size(),
        )

    TrainLoop(
        model=model, diffusion=KarrasDenoiser(loss_norm="l2"), data=run_data.augment(settings, data, model),
        batch_size=batch_size, microbatch=3, lr=1e-2, ema_rate="0.9", log_interval=1, save_interval=100,
        total_training_steps=3, optimizer="adam",
    ).run_loop()
    logger.reset()
    return model


def losses(directory):
    with open(directory / "progress.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_the_network_is_told_in_training_and_not_in_sampling(images, tmp_path):
    model = train(images, tmp_path)
    assert [len(labels) for labels in model.seen] == [3, 3, 2] * 3
    assert th.cat(model.seen).abs().sum() > 0
    th.manual_seed(0)
    assert not th.equal(model.of_labels.weight, Told().of_labels.weight)
    model.seen.clear()
    sample(KarrasDenoiser(loss_norm="l2"), model, (2, 3, 8, 8), SampleOptions(2, "euler"), generator=DummyGenerator())
    assert model.seen == [None] * 2


@pytest.mark.mpi
def test_two_ranks_train_as_one(images, tmp_path):
    train(images, tmp_path / "one")
    done = mpi_program(tmp_path, 2, f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from cm.distributed import setup as dist
        from test_augment import train

        def main():
            dist.setup_dist()
            train({images!r}, Path({str(tmp_path / "two")!r}), {BATCH // 2})

        dist.run(main)
    """)
    assert done.rc == 0, str(done)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-5)


def test_a_network_that_cannot_be_told_is_refused():
    settings = parse("", DataConfig, argv=["--augment", "0.12"])
    with pytest.raises(UserError, match="--augment 0.12 needs a network .*conditioned on.*--augment_dim 9"):
        run_data.augment(settings, None, th.nn.Linear(1, 1))
    with pytest.raises(UserError, match="augment=2.0 is too large; the largest is 1"):
        run_data.augment(parse("", DataConfig, argv=["--augment", "2"]), None, Told())
    assert run_data.augment(parse("", DataConfig, argv=[]), "data", th.nn.Linear(1, 1)) == "data"


@pytest.mark.parametrize(("argv", "flips"), [
    ([], True), (["--augment", "0.1"], False), (["--augment", "0.1", "--random_flip", "True"], True),
])
def test_flips_that_the_network_is_not_told_of_are_off_unless_asked_for(images, argv, flips):
    sections = ModelConfig, DataConfig, TrainConfig, RunConfig
    settings = parse("", *sections, argv=["--data_dir", images, "--global_batch_size", "4", *argv])
    data = run_data.open_data(settings).stream
    assert settings.values["random_flip"] is flips and data.options["random_flip"] is flips


def test_a_run_in_tf32_moves_images_in_float32():
    """A place in an image would be known to a tenth of a pixel otherwise."""
    seen = []
    pipe = lambda images, rng: seen.append(tf32.now()) or (images, images)      # noqa: E731
    with tf32.at_first(True):
        AugmentBatch(pipe, 0, th.device("cpu"))(Batch(th.zeros(1, 3, 2, 2), positions=th.arange(1)))
    assert seen == [(False, False)]
