"""What sampling takes from how a model was trained: the sampler above all; one that does not fit is a warning."""

import pytest
import torch as th

from cm.checkpoints import manifest
from cm.config.flags import parse
from cm.config.sampling_schema import EditConfig, SampleConfig, SolverConfig
from cm.config.schema import DiffusionConfig, ModelConfig, RunConfig
from cm.errors import UserError
from cm.objectives import OBJECTIVES
from cm.samplers import SAMPLERS
from cm.samplers.heun import Heun
from cm.samplers.sample import SampleOptions
from cm.setup.objective import kind_of_result
from cm.setup.sample import inherit_model
from cm.setup.sampler import fits, level_of_images, sampler_of
from support.nets import plain_state_dict
from support.weights import TINY, sampling, tiny

FLAGS = ["--sampler", "multistep", "--steps", "40", "--ts", "0,24,39"]


@pytest.mark.parametrize("mode, ends_at", [("consistency_training", 0.002), ("ict", 0.002), ("ect", 0.0)])
def test_the_noise_of_the_next_step_is_added_to_an_image(mode, ends_at):
    """A function that ends at 0 gets all of it."""
    argv = [*FLAGS, "--training_mode", mode]
    settings = parse("", SampleConfig, SolverConfig, ModelConfig, DiffusionConfig, RunConfig, argv=argv, seed=42)
    sampler, sigmas = sampler_of(settings)
    assert level_of_images(settings) == sampler.sigma_min == ends_at
    assert sigmas.tolist() == pytest.approx([80, 0.8232, 0], rel=1e-3)

    class Ones:
        def randn_like(self, x):
            return th.ones_like(x)

    x = sampler.step(lambda x, sigma: 0 * x, th.zeros(1, 1, dtype=th.float64), th.tensor([80.0]), sigmas[1:2], Ones())
    assert x.item() == pytest.approx((sigmas[1].item() ** 2 - ends_at**2) ** 0.5, rel=1e-12)


def test_a_sampler_by_its_name_can_end_elsewhere_than_the_grid():
    options = SampleOptions(steps=40, sampler="multistep", ts=(0, 39))
    assert options.make_sampler().sigma_min == 0.002
    assert SampleOptions(steps=40, sampler="multistep", ts=(0, 39), ends_at=0.0).make_sampler().sigma_min == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A file of weights for each method of training."""
    weights, paths = plain_state_dict(tiny()), {}
    for mode in ("edm", "consistency_distillation", "consistency_training", "progdist", "ect", "scd"):
        folder = tmp_path_factory.mktemp(mode)
        config = {**TINY, "training_mode": mode, "scale_mode": "fixed", "start_scales": 6}
        paths[mode] = manifest.save(str(folder), 10, {"model": weights}, config, 40).path("model")
    return paths


@pytest.mark.parametrize("mode, sampler", [
    ("edm", "heun"), ("consistency_distillation", "onestep"), ("consistency_training", "onestep"),
    ("progdist", "progdist"), ("ect", "onestep"), ("scd", "onestep"),
])
def test_the_default_sampler_is_that_of_the_checkpoint(mode, sampler, trained, capsys):
    settings = sampling("--model_path", trained[mode])
    assert inherit_model(settings).sampler == sampler
    told = capsys.readouterr()
    assert "does not fit" not in told.out + told.err


@pytest.mark.parametrize("mode, asked, fit", [
    ("consistency_distillation", "heun", "onestep"), ("edm", "onestep", "heun"), ("progdist", "heun", "progdist"),
])
def test_a_sampler_that_does_not_fit_is_a_warning_that_names_the_fit_one(mode, asked, fit, trained, capsys):
    assert inherit_model(sampling("--model_path", trained[mode], "--sampler", asked)).sampler == asked
    told = capsys.readouterr()
    assert f"--sampler {asked} does not fit this model" in told.out + told.err
    assert f"use --sampler {fit}" in told.out + told.err


@pytest.mark.parametrize("mode", OBJECTIVES)
def test_its_own_sampler_fits_every_objective(mode):
    kind = OBJECTIVES[mode]
    assert fits(kind, kind.sampler)
    assert fits(kind, "multistep") == (kind.sampler == "onestep")


@pytest.mark.parametrize("words, message", [
    (("--s_noise", 1.1), "--s_noise 1.1 is for --s_churn above 0"), (("--s_tmax", 1), "--s_tmax 1.0 is for --s_churn"),
    (("--s_churn", 5, "--s_tmin", 5, "--s_tmax", 1), "--s_tmin 5 is above --s_tmax 1"),
    (("--sampler", "sde", "--s_tmin", 5, "--s_tmax", 1), "--s_tmin 5 is above --s_tmax 1"),
])
def test_noise_that_would_be_added_nowhere(words, message, trained):
    argv = ["--model_path", trained["edm"], *map(str, words)]
    settings = parse("", SampleConfig, SolverConfig, ModelConfig, DiffusionConfig, RunConfig, argv=argv)
    inherit_model(settings)
    with pytest.raises(UserError, match=message):
        sampler_of(settings)


@pytest.mark.parametrize("mode", ["consistency_training", "ect", "scd"])
def test_indices_choose_multistep_for_a_consistency_model(mode, trained):
    settings = sampling("--model_path", trained[mode], "--ts", "0,22,39")
    assert inherit_model(settings).sampler == "multistep"


def test_a_flow_map_has_a_sampler_of_its_own():
    assert kind_of_result("meanflow").sampler == kind_of_result("alphaflow").sampler == "flowmap"


def test_every_sampler_fits_something():
    assert fits(kind_of_result("edm"), "ito") and fits(kind_of_result("progdist"), "euler")
    assert fits(kind_of_result("consistency_distillation"), "multistep")


def test_a_new_sampler_or_method_says_itself_what_goes_with_it(monkeypatch):
    class Restart(Heun):
        networks = ("consistency_function",)

    class Straightened(OBJECTIVES["edm"]):
        result = "flow_map"

    monkeypatch.setitem(SAMPLERS, "restart", Restart)
    assert fits(kind_of_result("ect"), "restart") and not fits(kind_of_result("edm"), "restart")
    assert fits(Straightened, "flowmap") and fits(Straightened, "heun") and not fits(Straightened, "onestep")


def editing(*argv):
    sections = (EditConfig, SolverConfig, ModelConfig, DiffusionConfig, RunConfig)
    settings = parse("", *sections, argv=list(map(str, argv)))
    inherit_model(settings)
    return settings.values


@pytest.mark.parametrize("mode", ["consistency_distillation", "ect"])
@pytest.mark.parametrize("task", ["inpaint", "colorize", "superres", "stroke"])
def test_edits_visit_all_levels_that_the_model_was_trained_with(task, mode, trained):
    values = editing("--model_path", trained[mode], "--task", task)
    assert (values["sampler"], values["steps"], values["ts"]) == ("multistep", 6, "0,1,2,3,4,5")


def test_fewer_levels_of_edits(trained):
    path = trained["consistency_distillation"]
    assert editing("--model_path", path, "--ts", "0,3,5", "--steps", 6)["ts"] == "0,3,5"
    assert editing("--model_path", path, "--steps", 3)["ts"] == "0,1,2"
    for task in ("interpolate", "denoise"):
        assert editing("--model_path", path, "--task", task)["ts"] == "0,5"
    values = editing("--model_path", trained["edm"], "--mask_box", "0,0,2,2")
    assert (values["sampler"], values["steps"], values["ts"]) == ("heun", 40, "")


def test_the_grid_of_an_edit_has_every_level_of_the_models(trained):
    sections = (EditConfig, SolverConfig, ModelConfig, DiffusionConfig, RunConfig)
    settings = parse("", *sections, argv=["--model_path", trained["consistency_distillation"]])
    inherit_model(settings)
    _, grid = sampler_of(settings)
    assert len(grid) == 6 and grid[0] == pytest.approx(80) and grid[-1] == 0
