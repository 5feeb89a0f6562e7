"""The stable target field against closed forms and against its definition, one sample and one reference at a time."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch as th
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cm.diffusion.noise_sampling import UniformSampler
from cm.errors import UserError
from cm.objectives.edm import EDM
from cm.objectives.stf import CHUNK, STF, peers, stable_target
from cm.random_util import SampleStreams
from cm.types import Batch, Networks
from support.gaussian import Gaussian, Mixture

F64 = th.float64
ROOT = Path(__file__).resolve().parents[2]


def plain(sigma):
    return th.ones_like(sigma)


def shrink(x, sigma, **cond):
    return 0.5 * x


def draw_batch(n=6, references=10, seed=0, dtype=th.float32, cond=None, reference_cond=None):
    """n images that stand among bytes of references, at positions 3, 4, ..."""
    generator = th.Generator().manual_seed(seed)
    pixels = th.randint(0, 256, (references, 3, 4, 4), generator=generator, dtype=th.uint8)
    positions = th.arange(references)
    mine = slice(3, 3 + n)
    return Batch(
        pixels[mine].to(dtype) / 127.5 - 1, cond or {}, positions[mine],
        references=Batch(pixels, reference_cond or {}, positions),
    )


def loss(objective, batch):
    return objective(Networks(shrink, nn.Module()), batch, 0, SampleStreams(5, batch.positions))


def all_of(x, references):
    return th.ones(len(x), len(references), dtype=th.bool)


# --- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [UniformSampler([0.002, 0.3, 80.0]), None])
def test_with_one_image_it_is_edm(law):
    laws = {} if law is None else {"schedule_sampler": law}
    batch = draw_batch(1, 1 + 3)
    batch.references = batch.references.rows(3, 4)                  # itself alone
    edm, stf = loss(EDM(plain, **laws), batch), loss(STF(plain, **laws), batch)
    assert th.equal(edm.loss, stf.loss) and th.equal(edm.sigma, stf.sigma)
    assert stf.logs["effective_references"].tolist() == [1]


@pytest.mark.parametrize("sigma", [0.01, 0.3, 3.0, 80.0])
def test_against_the_definition(sigma):
    """Differences and squares one by one, in float64; more references than fit in a chunk."""
    batch = draw_batch(6, CHUNK + 40)
    x = batch.images + sigma * th.randn(batch.images.shape, generator=th.Generator().manual_seed(1))
    may = peers(batch, batch.references)
    target, effective = stable_target(x, batch.images, th.full((6,), sigma), batch.references, may)
    y = batch.references.images.double() / 127.5 - 1                # the sample's own image is among them
    for i in range(6):
        logits = th.stack([-(x[i].double() - one).square().sum() / (2 * sigma**2) for one in y])
        w = logits.softmax(0)
        expected = (w[:, None, None, None] * y).sum(0)
        th.testing.assert_close(target[i].double(), expected, rtol=0, atol=2e-6)    # x and sigma are float32
        assert effective[i].item() == pytest.approx(1 / w.square().sum().item(), rel=1e-4)


def test_near_twins_are_told_apart_at_low_noise():
    """Images that differ by one grey level in one pixel, at noise of half that: |x|^2 - 2 x.y + |y|^2 in float32 fails.
    """
    pixels = th.full((2, 3, 32, 32), 200, dtype=th.uint8)
    pixels[1, 0, 0, 0] = 201
    images, sigma = pixels.float() / 127.5 - 1, 0.005
    batch = Batch(images[:1], {}, th.tensor([0]), references=Batch(pixels, {}, th.tensor([0, 1])))
    may = peers(batch, batch.references)
    target, _ = stable_target(images[:1], images[:1], th.tensor([sigma]), batch.references, may)
    shared = 1 / (1 + math.exp((1 / 127.5) ** 2 / (2 * sigma**2)))
    assert (target - images[0])[0, 0, 0, 0].item() == pytest.approx(shared / 127.5, abs=1e-6)


# --- what it tends to ------------------------------------------------------------------------------------------------


def targets_of(bed_sample, D, sigma, n, trials, generator, d):
    """Errors of `trials` targets against E[x0|x], each with n - 1 references of its own: [trials,d]."""
    errors = []
    for _ in range(trials):
        own, x_noise = bed_sample(1), th.randn(1, d, generator=generator, dtype=F64)
        x, others = own + sigma * x_noise, bed_sample(n - 1)
        level = th.tensor([sigma], dtype=F64)
        target, _ = stable_target(x, own, level, Batch(others), all_of(x, others))
        errors.append(target - D(x, sigma))
    return th.cat(errors)


def gaussian_sampler(s, d, generator):
    return lambda n: s * th.randn(n, d, generator=generator, dtype=F64)


@pytest.mark.parametrize("n, published", [(1, 0.124), (8, 0.054), (64, 0.013), (512, 0.0023)])
def test_the_error_falls_with_the_references(n, published):
    """Mean squared error per dimension on Gaussian data, s = sigma = 0.5, d = 4; at n = 1 the posterior variance."""
    generator = th.Generator().manual_seed(n)
    errors = targets_of(gaussian_sampler(0.5, 4, generator), Gaussian(0.0, 0.5).D, 0.5, n, 1500, generator, 4)
    assert errors.square().mean().item() == pytest.approx(published, rel=0.12)      # 1500 draws: about 3%, heavy tails


def test_little_noise_gains_little_and_much_noise_gains_everything():
    """At low noise only the sample's own image is likely; at high noise all are, and the target is their mean."""
    generator, s = th.Generator().manual_seed(0), 0.5
    for sigma, n, expected in [(0.05, 64, 0.5**2 * 0.05**2 / (0.5**2 + 0.05**2)), (80.0, 64, 0.5**2 / 64)]:
        errors = targets_of(gaussian_sampler(s, 4, generator), Gaussian(0.0, s).D, sigma, n, 600, generator, 4)
        assert errors.square().mean().item() == pytest.approx(expected, rel=0.15)


def test_the_limit_of_the_covariance():
    """For a fixed x in one dimension n Var[target] tends to E_y[(p(x|y) / p(x))^2 (y - D)^2], a Gaussian integral."""
    s, t, x, n, trials = 0.5, 0.5, 0.6, 1000, 2000
    generator, v = th.Generator().manual_seed(3), s**2 + t**2
    D = s**2 * x / v
    own = D + (s * t / v**0.5) * th.randn(trials, 1, generator=generator, dtype=F64)        # x0 given x
    errors = []
    for row in own:
        others, point = s * th.randn(n - 1, 1, generator=generator, dtype=F64), th.tensor([[x]], dtype=F64)
        target, _ = stable_target(point, row[None], th.tensor([t], dtype=F64), Batch(others), all_of(point, others))
        errors.append(target.item() - D)

    def density(variance):
        return math.exp(-x**2 / (2 * variance)) / math.sqrt(2 * math.pi * variance)

    half = s**2 + t**2 / 2
    mean, variance = s**2 * x / half, s**2 * t**2 / 2 / half
    limit = density(half) / density(v) ** 2 / (2 * t * math.pi**0.5) * (variance + (mean - D) ** 2)
    assert n * th.tensor(errors).var().item() == pytest.approx(limit, rel=0.12)     # 2000 draws: 3%; terms of 1 / n: 1%


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_few_references_reduce_the_variance_without_bias(sigma):
    """Given x, with two references besides the image itself: no bias at all, not only in the limit."""
    trials, s, x = 3000, 0.5, 0.9
    generator, v = th.Generator().manual_seed(6), s**2 + sigma**2
    D, posterior = s**2 * x / v, s * sigma / v**0.5
    own = D + posterior * th.randn(trials, 1, generator=generator, dtype=F64)
    others = s * th.randn(2 * trials, 1, generator=generator, dtype=F64)
    mine = th.arange(2 * trials) // 2 == th.arange(trials)[:, None]                 # each trial has two of its own
    points, level = th.full((trials, 1), x, dtype=F64), th.full((trials,), sigma, dtype=F64)
    target, _ = stable_target(points, own, level, Batch(others), mine)
    assert target.var() < 0.95 * posterior**2
    assert abs(target.mean().item() - D) < 4 * target.std().item() / trials**0.5


@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.0])
def test_on_the_mixture_it_tends_to_the_optimal_denoiser(sigma):
    bed, generator = Mixture.stored(), th.Generator().manual_seed(4)

    def sample(n):
        k = th.multinomial(bed.w, n, replacement=True, generator=generator)
        return bed.mu[k] + bed.s[k][:, None] * th.randn(n, 2, generator=generator, dtype=F64)

    own, few, many = sample(200), sample(100), sample(40_000)
    x = own + sigma * th.randn(200, 2, generator=generator, dtype=F64)
    level = th.full((200,), sigma, dtype=F64)

    def rms(others):
        target, _ = stable_target(x, own, level, Batch(others), all_of(x, others))
        return (target - bed.D(x, sigma)).square().mean().sqrt().item()

    assert rms(many) < 0.02 * bed.mu.std().item()
    assert rms(many) < rms(few) / 8                                 # a factor sqrt(400) = 20, less the spread


# --- whom it listens to ----------------------------------------------------------------------------------------------


def test_only_references_of_the_samples_class():
    labels = th.arange(10) % 3
    batch = draw_batch(6, 10, cond={"y": labels[3:9]}, reference_cond={"y": labels})
    found = peers(batch, batch.references)
    for i in range(6):
        expected = [j for j in range(10) if labels[j] == labels[3 + i] and j != 3 + i]
        assert found[i].nonzero().flatten().tolist() == expected


def test_a_sample_without_a_class_has_its_own_image_alone():
    """Its label is that of no class, which no reference has."""
    batch = draw_batch(6, 10, cond={"y": th.full((6,), 3)}, reference_cond={"y": th.arange(10) % 3})
    assert not peers(batch, batch.references).any()


def test_augmentation_of_others_does_not_leak():
    """An augmented sample's target is its own image; one that is not augmented never sees augmented references."""
    augmented = th.zeros(6, 9)
    augmented[[0, 4], 2] = 1.0
    batch = draw_batch(6, 10, cond={"augment_labels": augmented})   # references as they are in the data set
    found = peers(batch, batch.references)
    assert found.any(1).tolist() == [False, True, True, True, False, True]
    x, sigma = batch.images + 1.0, th.full((6,), 50.0)
    target, effective = stable_target(x, batch.images, sigma, batch.references, found)
    assert th.equal(target[[0, 4]], batch.images[[0, 4]]) and effective[0] == 1 and effective[1] > 8


def test_references_that_were_augmented_as_the_batch_all_count():
    """Whatever their transforms, as in the published code; of the sample's class where there are classes."""
    labels = th.arange(10) % 2
    transforms = th.randn(10, 9, generator=th.Generator().manual_seed(0))
    batch = draw_batch(6, 10, cond={"augment_labels": transforms[3:9], "y": labels[3:9]},
                       reference_cond={"augment_labels": transforms, "y": labels})
    found = peers(batch, batch.references)
    for i in range(6):
        expected = [j for j in range(10) if labels[j] == labels[3 + i] and j != 3 + i]
        assert found[i].nonzero().flatten().tolist() == expected


def test_the_network_is_told_its_own_conditioning():
    seen = {}

    def D(x, sigma, **cond):
        seen.update(cond)
        return x

    batch = draw_batch(4, 10, cond={"y": th.tensor([0, 1, 0, 1])}, reference_cond={"y": th.arange(10) % 2})
    STF(plain)(Networks(D, nn.Module()), batch, 0, SampleStreams(0, batch.positions))
    assert seen["y"] is batch.cond["y"]


def test_microbatches_do_not_change_the_loss():
    batch = draw_batch(6, 10)
    whole = loss(STF(plain), batch).loss
    parts = [loss(STF(plain), batch.rows(i, i + 2)).loss for i in (0, 2, 4)]
    th.testing.assert_close(th.cat(parts), whole, rtol=1e-6, atol=0)


def test_half_precision_does_not_reach_the_target():
    batch = draw_batch(6, 10)
    x, sigma = batch.images + 0.3, th.full((6,), 0.5)
    expected, _ = stable_target(x, batch.images, sigma, batch.references, peers(batch, batch.references))
    with th.autocast("cpu", th.bfloat16):
        target, _ = stable_target(x, batch.images, sigma, batch.references, peers(batch, batch.references))
    assert th.equal(target, expected)


def test_without_references_the_remedy_is_named():
    batch = draw_batch(2, 10)
    batch.references = None
    with pytest.raises(UserError, match="reference images.*--objective edm"):
        loss(STF(plain), batch)


class Largest(TorchDispatchMode):
    """The largest number of bytes of a tensor that any operation made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, th.Tensor) and tensor.untyped_storage().nbytes() > self.bytes:
                self.bytes = tensor.untyped_storage().nbytes()
        return result


def test_memory_is_samples_times_references_and_a_chunk():
    """8 samples, 1024 references of 3072 numbers: no tensor of all three, nor all references at once in float64."""
    B, n, d = 8, 1024, 3072
    references = Batch(th.zeros(n, 3, 32, 32, dtype=th.uint8))
    x = th.zeros(B, 3, 32, 32)
    with Largest() as largest:
        stable_target(x, x, th.ones(B), references, all_of(x, references))
    assert largest.bytes <= max(8 * B * (n + 1), 8 * CHUNK * d)


def test_the_picture_of_the_targets(tmp_path, monkeypatch):
    """The command on a few levels: EDM's targets scatter as the images given x do, more references scatter less."""
    options = {"levels": 3, "sigma_min": 0.5, "sigma_max": 50, "references": "1,16,256", "points": 32, "draws": 32}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["stf_targets.py", *words, "--log_dir", str(tmp_path)])
    runpy.run_path(str(ROOT / "benchmarks/stf_targets.py"), run_name="__main__")
    rows = json.loads((tmp_path / "stf_targets.json").read_text())
    by_n = {n: [row["trace"] for row in rows if row["references"] == n] for n in (1, 16, 256)}
    assert by_n[1][2] == pytest.approx(1, abs=0.1) and by_n[256][2] < 0.02
    assert all(a > b for a, b in zip(by_n[1][1:], by_n[16][1:])) and by_n[16][1] > by_n[256][1]
    assert all(abs(row["bias"]) < 0.02 for row in rows)
    assert Image.open(tmp_path / "stf_targets.png").size[0] > 300
