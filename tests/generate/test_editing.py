"""Edits: golden images of the original, projections against explicit orthogonal bases, what every sampler keeps."""

import pytest
import torch as th

from cm.config.schema import EDIT_NAMES
from cm.diffusion.schedules import karras_grid
from cm.errors import UserError
from cm.generate.editing import (
    CONSTRAINTS,
    EDITS,
    LUMA,
    Between,
    Colorize,
    Denoise,
    Inpaint,
    Interpolate,
    Stroke,
    SuperRes,
    constrained,
    run_edit,
    slerp,
)
from cm.karras_diffusion import KarrasDenoiser, iterative_colorization, iterative_inpainting, iterative_superres
from cm.random_util import SampleStreams
from cm.samplers import SAMPLERS, make_sampler
from support import golden
from support.gaussian import Gaussian, Scripted

SIZE = (12, 8)


def pictures(n: int = 5, seed: int = 0) -> th.Tensor:
    return 2 * th.rand(n, 3, *SIZE, generator=th.Generator().manual_seed(seed), dtype=th.float64) - 1


def half_mask() -> th.Tensor:
    return (th.rand(SIZE, generator=th.Generator().manual_seed(9)) < 0.5).to(th.uint8)


OPTIONS = {"inpaint": {"mask": half_mask()}, "colorize": {}, "superres": {"factor": 4}}


def constraint(name: str, images: th.Tensor):
    return CONSTRAINTS[name](images, **OPTIONS[name])


def brightness(images: th.Tensor) -> th.Tensor:
    return sum(weight * images[:, channel] for channel, weight in enumerate(LUMA))


def patch_means(images: th.Tensor, factor: int) -> th.Tensor:
    n, c, height, width = images.shape
    return images.reshape(n, c, height // factor, factor, width // factor, factor).mean((3, 5))


KNOWN = {
    "inpaint": lambda x: x[:, :, half_mask().bool()],
    "colorize": brightness,
    "superres": lambda x: patch_means(x, 4),
}


# --- golden images ---------------------------------------------------------------------------------------------------


def golden_distiller(y: th.Tensor):
    D = KarrasDenoiser(distillation=True).bind(golden.build())
    return lambda x, sigma: D(x, sigma, y=y)


@pytest.mark.parametrize(
    "name, function", [("colorization", iterative_colorization), ("superres", iterative_superres)]
)
def test_golden_edits(name, function):
    draws = Scripted(*golden.tensor("edit/noise"))
    x, images = function(
        golden_distiller(golden.tensor("edit/y")), golden.tensor("edit/images"), golden.tensor("edit/x_T"), (0, 5, 9),
        steps=10, generator=draws,
    )
    golden.assert_close(x, f"edit/{name}/x")
    golden.assert_close(images, f"edit/{name}/images")


def test_golden_inpainting():
    draws = Scripted(*golden.tensor("edit/inpaint/noise"))
    mask, given = golden.tensor("edit/inpaint/mask"), golden.tensor("edit/inpaint/in_images")
    x, images = iterative_inpainting(
        golden_distiller(golden.tensor("edit/inpaint/y")), given, golden.tensor("edit/inpaint/x_T"), (0, 5, 9),
        steps=10, generator=draws, mask=mask,
    )
    golden.assert_close(x, "edit/inpaint/x")
    golden.assert_close(images, "edit/inpaint/images")
    assert th.equal(x[mask.bool()], given[mask.bool()])


@pytest.mark.parametrize("function", [iterative_colorization, iterative_superres])
def test_edits_draw_from_the_global_generator_by_default_and_take_float64(function):
    images, x = th.rand(2, 3, 16, 8), 80 * th.randn(2, 3, 16, 8, dtype=th.float64)
    x, kept = function(Gaussian(0.1, 0.5).f, images, x, (0, 2, 5), steps=6)
    assert x.dtype == kept.dtype == th.float64 and x.isfinite().all()


# --- projections -----------------------------------------------------------------------------------------------------


def orthogonal(first: th.Tensor) -> th.Tensor:
    """An orthogonal matrix whose first column points along `first`, by QR, as the paper completes it."""
    square = th.randn(len(first), len(first), generator=th.Generator().manual_seed(3), dtype=th.float64)
    square[:, 0] = first
    return th.linalg.qr(square)[0]


def replace_first_coordinate(known: th.Tensor, x: th.Tensor, Q: th.Tensor) -> th.Tensor:
    """Vectors [...,d]: into the basis of Q's columns, coordinate 0 from `known`, and back."""
    known, x = known @ Q, x @ Q
    return th.cat([known[..., :1], x[..., 1:]], -1) @ Q.T


def test_colorizing_replaces_one_coordinate_of_an_orthogonal_basis():
    images, x0 = pictures(), pictures(seed=1)
    Q = orthogonal(th.tensor(LUMA, dtype=th.float64))
    expected = replace_first_coordinate(images.movedim(1, -1), x0.movedim(1, -1), Q).movedim(-1, 1)
    th.testing.assert_close(Colorize(images).project(x0), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("factor", [2, 4])
def test_superresolution_replaces_one_coordinate_of_an_orthogonal_basis(factor):
    images, x0 = pictures(), pictures(seed=1)
    Q = orthogonal(th.ones(factor**2, dtype=th.float64))

    def patches(x):
        return th.nn.functional.unfold(x.flatten(0, 1)[:, None], factor, stride=factor).mT       # [N*C,L,p*p]

    moved = replace_first_coordinate(patches(images), patches(x0), Q)
    expected = th.nn.functional.fold(moved.mT, SIZE, factor, stride=factor).reshape(x0.shape)
    th.testing.assert_close(SuperRes(images, factor).project(x0), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype, atol", [(th.float32, 1e-6), (th.float64, 1e-14)])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_what_is_known_holds(name, dtype, atol):
    """For any batch, also where the sample is far away; a second projection changes nothing; the picture agrees too."""
    for n in (1, 3):
        images, x0 = pictures(n).to(dtype), pictures(n, seed=1).to(dtype)
        edit, known = constraint(name, images), KNOWN[name]
        moved = edit.project(x0)
        assert moved.dtype == dtype and moved.shape == images.shape and not th.equal(moved, images)
        for agreeing in (moved, edit.project(moved), edit.known):
            th.testing.assert_close(known(agreeing), known(images), rtol=0, atol=0 if name == "inpaint" else atol)
        th.testing.assert_close(edit.project(moved), moved, rtol=0, atol=2 * atol)
        th.testing.assert_close(edit.project(images), images, rtol=0, atol=2 * atol)


def test_inpainting_leaves_the_rest_to_the_sample_and_shows_it_black():
    images, x0, mask = pictures(), pictures(seed=1), half_mask().bool()
    edit = Inpaint(images, mask)
    assert th.equal(edit.project(x0), th.where(mask, images, x0))
    assert th.equal(edit.known, th.where(mask, images, -1.0))


def test_each_image_may_have_its_own_mask():
    images, x0 = pictures(2), pictures(2, seed=1)
    mask = th.tensor([1.0, 0.0]).view(2, 1, 1, 1)
    assert th.equal(Inpaint(images, mask).project(x0), th.stack([images[0], x0[1]]))


def test_the_known_part_of_colors_is_grey():
    grey = Colorize(pictures()).known
    assert th.equal(grey[:, 0], grey[:, 1]) and grey.abs().max() <= 1


@pytest.mark.parametrize("shape", [(12, 9), (8, 12), (2, 1, 12, 8), (1, 1, 1, 12, 8)])
def test_a_mask_of_another_size_is_refused(shape):
    with pytest.raises(UserError, match="does not fit"):
        Inpaint(pictures(), th.ones(shape))


def test_a_mask_of_grey_values_is_refused():
    with pytest.raises(UserError, match="1 where a pixel is known"):
        Inpaint(pictures(), 255 * half_mask())


@pytest.mark.parametrize("factor", [0, 1, 3, 5, 8])
def test_patches_must_tile_the_image(factor):
    with pytest.raises(UserError, match=f"superres_factor {factor} .* 12x8 .*choose one of: 2, 4"):
        SuperRes(pictures(), factor)


# --- samplers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [True, False])
def test_the_denoiser_is_clamped_before_it_is_projected(clip):
    images, x0 = pictures(), 3 * pictures(seed=1)
    edit = constraint("colorize", images)
    seen = constrained(lambda x, sigma, y: x * y, edit, clip)(x0, th.ones(5), y=1.0)
    assert th.equal(seen, edit.project(x0.clamp(-1, 1) if clip else x0))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_every_sampler_edits(name, sampler):
    images, rng = pictures(3), SampleStreams(0, range(3))
    solver = make_sampler(sampler, {"ts": (0, 2, 5)})
    edit = constraint(name, images)
    x = run_edit(Gaussian(0.1, 0.4).denoiser_for(sampler), edit, solver, solver.grid(6, 0.002, 80.0, 7.0), rng)
    assert x.isfinite().all() and not th.equal(x, images)
    th.testing.assert_close(KNOWN[name](x), KNOWN[name](images), rtol=0, atol=0 if name == "inpaint" else 1e-14)


def test_filling_in_approaches_the_conditional_distribution():
    """Two correlated Gaussian pixels, one known to be 0.8, and their exact consistency function.

    Given the known one the other has mean 0.8 * 0.2 / 0.25 = 0.64 and deviation sqrt(0.25 - 0.2^2 / 0.25) = 0.3. The
    finer the noise levels the nearer the loop comes: 0.25, 0.46, 0.59 at 10, 40, 160. Means of 2000 err by 0.008.
    """
    spread, directions = th.linalg.eigh(th.tensor([[0.25, 0.2], [0.2, 0.25]], dtype=th.float64))

    def f(x, sigma):
        shrink = ((spread + 0.002**2) / (spread + sigma[0] ** 2)).sqrt()
        return (x.flatten(1) @ directions * shrink @ directions.T).view_as(x)

    edit, gaps = Inpaint(th.tensor([0.8, 0.0], dtype=th.float64).expand(2000, 1, 1, 2), th.tensor([1, 0])), []
    for levels in (10, 40, 160):
        solver = make_sampler("multistep", {"ts": range(levels)})
        grid = solver.grid(levels, 0.002, 80.0, 7.0)
        known, filled = run_edit(f, edit, solver, grid, SampleStreams(0, range(2000)), clip_denoised=False).unbind(-1)
        assert (known == 0.8).all()
        gaps.append(0.64 - filled.mean().item())
    assert gaps[0] > gaps[1] > gaps[2] and abs(gaps[2]) < 0.08
    assert filled.std().item() == pytest.approx(0.3, abs=0.03)


# --- without a constraint --------------------------------------------------------------------------------------------


def test_strokes_begin_in_the_middle_of_the_grid():
    grid, images = karras_grid(10), pictures()
    edit = Stroke(images, grid[4].item())
    assert th.equal(edit.levels(grid), grid[4:])
    assert edit.levels(th.tensor([80.0, 0.01, 0.0], dtype=th.float64)).tolist() == [grid[4].item(), 0.01, 0.0]
    noise = th.ones_like(images)
    assert th.equal(edit.begin(0.5, Scripted(noise)), images + 0.5)


def test_denoising_is_one_evaluation_at_the_level_of_the_noise():
    bed, noisy, told = Gaussian(0.2, 0.5), pictures(), []

    def D(x, sigma):
        told.append(sigma.tolist())
        return bed.D(x, sigma)

    solver = make_sampler("multistep", {"ts": (0, 2, 5)})
    x = run_edit(D, Denoise(noisy, 0.7), solver, karras_grid(6), Scripted(), clip_denoised=False)
    assert th.equal(x, bed.D(noisy, 0.7)) and told == [[0.7] * 5]


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_interpolated_noise_is_noise_and_at_the_ends_the_samples_own(weight):
    n, w = 400, th.full((400,), weight)
    start, end = range(n), range(n, 2 * n)
    between = Between(SampleStreams(0, start), SampleStreams(0, end), w)
    draw, other = between.randn(n, 3, 8, 8), between.randn_like(th.empty(n, 3, 8, 8))
    # 76800 numbers: their deviation errs by 0.0026.
    assert draw.std().item() == pytest.approx(1, abs=0.01) and not th.equal(draw, other)
    for whose, at in ((start, 0.0), (end, 1.0)):
        if weight == at:
            own = SampleStreams(0, whose)
            assert th.equal(draw, own.randn(n, 3, 8, 8)) and th.equal(other, own.randn(n, 3, 8, 8))


def test_slerp_is_a_rotation_of_constant_speed():
    a, b = th.tensor([[2.0, 0.0]]), th.tensor([[0.0, 2.0]])
    for w in (0.25, 0.5, 0.9):
        angle = th.tensor(w * th.pi / 2)
        expected = 2 * th.stack([angle.cos(), angle.sin()])[None]
        th.testing.assert_close(slerp(a, b, th.tensor([w])), expected)


@pytest.mark.parametrize("scale", [1.0, 3.0, -1.0])
def test_slerp_of_parallel_vectors_is_linear(scale):
    a, w = th.tensor([[1.0, 2.0, -3.0]]), th.tensor([0.25])
    th.testing.assert_close(slerp(a, scale * a, w), a * (0.75 + 0.25 * scale))


def test_interpolation_begins_from_noise_alone():
    images, noise = pictures(), pictures(seed=1)
    assert th.equal(Interpolate(images).begin(80.0, Scripted(noise)), 80.0 * noise)


def test_the_tables():
    assert tuple(EDITS) == EDIT_NAMES and set(CONSTRAINTS) < set(EDITS)
