"""--compile: the same results to rounding, nothing compiled twice, and a word where it cannot be."""

import copy
import shutil

import pytest
import torch as th

from cm.config.flags import parse
from cm.config.sampling_schema import GuidanceConfig, SampleConfig, SolverConfig
from cm.config.schema import SAMPLER_NAMES, DiffusionConfig, ModelConfig, RunConfig
from cm.data.loader import load_data
from cm.errors import UserError
from cm.karras_diffusion import KarrasDenoiser, karras_sample
from cm.logging import logger
from cm.networks import compile as compiling
from cm.networks.build import to_device
from cm.networks.compile import compile_network
from cm.random_util import get_generator
from cm.samplers import SAMPLERS
from cm.script_util import create_model
from cm.setup import run as run_util
from cm.setup.sampler import sampler_of
from cm.train_util import CMTrainLoop

CPU = th.device("cpu")


def graphs():
    """How many have been compiled."""
    return th._dynamo.utils.counters["stats"]["unique_graphs"]


def network(dropout=0.0, **options):
    th.manual_seed(0)
    model = create_model(8, 32, 1, "1", attention_resolutions="8", num_head_channels=32, use_scale_shift_norm=True,
                         dropout=dropout, **options)
    for param in model.parameters():
        if not param.any():
            th.nn.init.normal_(param, std=0.05)
    return to_device(model, CPU)


@pytest.fixture(autouse=True)
def fresh():
    th._dynamo.reset()
    th._dynamo.utils.counters.clear()
    yield
    logger.reset()


def consistency_run(folder, steps, compiled):
    """Consistency training whose N rises with every step: 3, 4, 5, ...; the graphs that each step compiled."""
    logger.configure(str(folder), format_strs=["log"])
    model, target = network(dropout=0.1), network(dropout=0.1)
    if compiled:
        for each in (model, target):
            compile_network(each, CPU, "aot_eager")
    loop = CMTrainLoop(
        model=model, target_model=target, teacher_model=None, teacher_diffusion=None,
        training_mode="consistency_training", ema_scale_fn=lambda step: (0.9, 3 + step),
        diffusion=KarrasDenoiser(distillation=True, loss_norm="l2", weight_schedule="uniform"), lr=1e-3, ema_rate="0.5",
        batch_size=4, log_interval=10, save_interval=100, total_training_steps=steps,
        data=lambda start: load_data(data_dir="digits", batch_size=4, image_size=8, start=start, num_workers=0),
    )
    counts, one_step = [], loop.run_step

    def counted(batch):
        one_step(batch)
        counts.append(graphs())

    loop.run_step = counted
    loop.run_loop()
    return counts


def test_training_is_the_same_and_no_n_compiles_anything_nor_does_a_resumed_run(tmp_path):
    """With dropout, whose masks online and target network share. Files of the one go on as the other."""
    counts = consistency_run(tmp_path / "compiled", 3, True)
    assert counts == [2, 2, 2], "online with gradients, target without"
    assert not th._dynamo.utils.counters["graph_break"]
    assert consistency_run(tmp_path / "plain", 4, False)[-1] == 2
    assert consistency_run(tmp_path / "compiled", 4, True) == [2], "other networks of one architecture share the code"
    before = flat(network().state_dict())
    for name in ("model", "target_model", "ema_0.5_"):
        files = [tmp_path / run / f"{name}000004.pt" for run in ("compiled", "plain")]
        ours, theirs = (th.load(file, weights_only=True) for file in files)
        assert list(ours) == list(theirs)
        moved, difference = (flat(theirs) - before).norm(), (flat(ours) - flat(theirs)).norm()
        assert moved > 1e-4 and difference < 1e-3 * moved           # plain arithmetic of float32


def flat(weights):
    return th.cat([value.flatten() for value in weights.values()])


@pytest.mark.parametrize("options", [{"arch": "ddpmpp"}, {"use_checkpoint": True, "resblock_updown": True}])
def test_other_networks_compile_whole_too(options):
    plain = network(**options)
    compiled = copy.deepcopy(plain)
    compile_network(compiled, CPU, "aot_eager")
    x, t = th.randn(2, 3, 8, 8), th.tensor([0.1, 5.0])
    results = []
    for model in (plain, compiled):
        with th.autocast("cpu", th.bfloat16, cache_enabled=False):
            out = model(x, t)
        out.square().mean().backward()
        results.append((out, flat({name: p.grad for name, p in model.named_parameters() if p.grad is not None})))
    (out, grad), (again, its) = results
    assert graphs() == 1
    assert (out - again).norm() < 0.02 * out.norm() and (grad - its).norm() < 0.05 * grad.norm()    # bf16 has 8 bits


def test_samples_are_the_same_and_only_another_size_of_batch_compiles_again():
    model = network()
    compiled = copy.deepcopy(model)
    compile_network(compiled, CPU, "aot_eager")
    assert list(compiled.state_dict()) == list(model.state_dict())
    diffusion = KarrasDenoiser(loss_norm="l2")

    def images(net, n, steps):
        generator = get_generator("determ", n, 0).for_samples(range(n))
        with th.inference_mode():
            return karras_sample(diffusion, net, (n, 3, 8, 8), steps, generator=generator)

    for n, steps, expected in ((4, 3, 1), (4, 5, 1), (3, 3, 2)):
        difference = (images(model, n, steps) - images(compiled, n, steps)).abs().max()
        assert difference < 1e-3, "a network of random weights makes the rounding of its first step larger"
        assert graphs() == expected


def test_a_copy_of_a_compiled_network_is_plain():
    model = network()
    compile_network(model, CPU, "aot_eager")
    copy.deepcopy(model)(th.zeros(1, 3, 8, 8), th.zeros(1))
    assert graphs() == 0


def sampling_settings(*argv):
    return parse("", SampleConfig, SolverConfig, GuidanceConfig, ModelConfig, DiffusionConfig, RunConfig, argv=argv)


def test_samplers_that_differentiate_the_network_are_refused():
    asking = [name for name in SAMPLER_NAMES if SAMPLERS[name].uses_jvp]
    assert asking == ["ito"]
    with pytest.raises(UserError, match="--compile True: --sampler ito differentiates .* drop --compile"):
        sampler_of(sampling_settings("--compile", "--sampler", "ito"))
    sampler_of(sampling_settings("--sampler", "ito"))
    sampler_of(sampling_settings("--compile", "--sampler", "heun"))


def test_without_a_compiler_the_flag_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="there is no no-such-compiler: install it, .* or drop --compile"):
        run_util.on_device(sampling_settings("--compile", "True"), network())
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs Triton"):
        compiling._check_compiler(th.device("cuda"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, which torch.compile needs on a CPU")
def test_generated_code_computes_the_same():
    """A residual block through the real compiler."""
    plain = network(dropout=0.5).middle_block[0]
    compiled = copy.deepcopy(plain)
    compile_network(compiled, CPU)
    x, emb, results = th.randn(2, 32, 8, 8), th.randn(2, 128), []
    for block in (plain, compiled):
        th.manual_seed(1)
        with th.no_grad():
            results.append(block(x, emb))
    assert graphs() == 1 and th.allclose(*results, atol=1e-5), "with the same dropout mask"
