"""Images that are not finite end every kind of sampling, unless they are allowed."""

import numpy as np
import pytest
import torch as th

from cm.errors import UserError
from cm.generate.engine import SamplingPlan, sample_to_npz, sample_to_pngs
from cm.generate.finite import NonFiniteCount, finite_images
from cm.generate.png import PngFolder
from cm.generate.prefix_cache import PrefixCache
from cm.generate.schedule_scorer import Scorer
from cm.karras_diffusion import KarrasDenoiser
from cm.logging import logger
from cm.samplers.sample import SampleOptions
from cm.script_util import create_model
from support.warm import mpi_program

OPTIONS = SampleOptions(2, "euler")


@pytest.fixture(scope="module")
def broken():
    network = create_model(8, 32, 1, "1", attention_resolutions="8")
    with th.no_grad():
        network.out[2].bias.fill_(float("nan"))
    return network


def plan(**options):
    return SamplingPlan(num_samples=3, batch_size=2, image_size=8, seed=0, num_classes=None, **options)


def test_images_are_counted_and_not_pixels():
    images = th.zeros(4, 3, 2, 2)
    images[1, 0, 0, 0], images[3, 2] = float("nan"), float("inf")
    assert finite_images(images).tolist() == [True, False, True, False]
    count = NonFiniteCount(allowed=False)
    count.add(np.array([True]))
    count.check()
    count.add(finite_images(images))
    with pytest.raises(UserError, match=r"2 of 5 images drawn are not finite.*NaN.*--precision fp32 or bf16"):
        count.check()


def test_no_npz_is_left_unless_it_is_allowed(broken, tmp_path, monkeypatch):
    diffusion, warnings = KarrasDenoiser(loss_norm="l2"), []
    with pytest.raises(UserError, match="2 of 2 images drawn are not finite.*--allow_non_finite True"):
        sample_to_npz(broken, diffusion, plan(), str(tmp_path), "fp32", OPTIONS)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(logger, "warn", warnings.append)
    result = sample_to_npz(broken, diffusion, plan(allow_non_finite=True), str(tmp_path), "fp32", OPTIONS)
    assert not np.load(result.paths["samples"])["arr_0"].any()
    assert len(warnings) == 1 and "3 of 3 images drawn are not finite" in warnings[0]


def test_no_png_is_left(broken, tmp_path):
    folder = PngFolder(str(tmp_path), subdirs=False)
    with pytest.raises(UserError, match="2 of 2 images drawn are not finite"):
        sample_to_pngs(broken, KarrasDenoiser(loss_norm="l2"), plan(), folder, "fp32", OPTIONS)
    assert not list(tmp_path.glob("*.png"))
    result = sample_to_pngs(
        broken, KarrasDenoiser(loss_norm="l2"), plan(allow_non_finite=True), folder, "fp32", OPTIONS
    )
    assert result.drawn == 3 and len(list(tmp_path.glob("*.png"))) == 3


def test_an_infinite_network_is_not_clipped_to_white(tmp_path, broken):
    network = create_model(8, 32, 1, "1", attention_resolutions="8")
    with th.no_grad():
        network.out[2].bias.fill_(float("inf"))
    with pytest.raises(UserError, match="are not finite"):
        sample_to_npz(network, KarrasDenoiser(loss_norm="l2"), plan(), str(tmp_path), "fp32", OPTIONS)


def test_the_schedule_search_refuses_them_after_the_last_batch(broken):
    diffusion = KarrasDenoiser(loss_norm="l2", distillation=True)
    options = SampleOptions(5, "multistep")
    scorer = Scorer(broken, PrefixCache(diffusion, 1e6), plan(), options, evaluator=None)
    batches = scorer.batches((0, 2, 4))
    assert len(next(batches)[1]) == 2 and len(next(batches)[1]) == 1
    with pytest.raises(UserError, match="3 of 3 images drawn are not finite"):
        next(batches)


def test_every_rank_learns_of_the_images_of_one(tmp_path):
    code = """
        import numpy as np
        from cm.distributed import setup as dist
        from cm.errors import UserError
        from cm.generate.finite import NonFiniteCount

        def main():
            dist.setup_dist()
            count = NonFiniteCount(allowed=False)
            count.add(np.array([True, dist.get_rank() == 0]))
            try:
                count.check()
            except UserError as error:
                print("said", str(error)[:40], flush=True)

        dist.run(main)
    """
    done = mpi_program(tmp_path, 2, code)
    assert done.rc == 0 and done.stdout.count("said 1 of 4 images drawn are not finite") == 2, done
