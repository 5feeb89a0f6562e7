"""A metric that comes with one file and one line in `METRICS`: the same number everywhere."""

import inspect
import json
import textwrap

import numpy as np
import pytest
import torch as th
from torch import nn

from evaluations.evaluator import evaluate, main
from evaluations.features import load_extractor, save_torchscript
from evaluations.metrics import METRICS, default_names
from evaluations.metrics.base import POOLED, Metric, Number
from evaluations.th_evaluator import ThEvaluator
from support.warm import mpi_program

IMPORTS = "import numpy as np\nfrom evaluations.metrics.base import POOLED, Metric, Number"


class MeanDistance(Metric):
    results = {"mean_distance": ("Inception mean distance", "Mean distance")}
    moments = POOLED

    def least(self, settings):
        return 2

    def measure(self, ref, sample, settings, ranks):
        gap = ref.gaussian(POOLED).mu - sample.gaussian(POOLED).mu
        return {"mean_distance": Number(float(np.linalg.norm(gap)))}


class Brightest:
    """The largest logit of all samples, and their number: sums that add up, one of them by a histogram."""

    def __init__(self, counts=None):
        self.counts = np.zeros(3) if counts is None else counts

    def update(self, values, start):
        self.counts += np.bincount(values.argmax(1), minlength=3)

    def sums(self):
        return [self.counts.copy()]

    def with_sums(self, sums):
        return Brightest(sums[0])


class FirstClass(Metric):
    """Share of samples that are taken for class 0; a metric with sums of its own."""

    results = {"first_class": ("First class", "First class")}
    output, of_samples_alone, in_all = "logits", True, False

    def make_partial(self, settings, labels):
        return Brightest()

    def measure(self, ref, sample, settings, ranks):
        counts = sample.partial(self).counts
        return {"first_class": Number(float(counts[0] / counts.sum()))}


class Colours(nn.Module):
    def forward(self, images: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        x = images.float().mean((2, 3))
        return x, x


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new_metric")
    save_torchscript(Colours(), str(folder / "colours.ts"), "colours", "none")
    rng = np.random.default_rng(0)
    np.savez(folder / "ref.npz", rng.integers(0, 256, (40, 4, 4, 3), dtype=np.uint8))
    np.savez(folder / "samples.npz", rng.integers(0, 200, (31, 4, 4, 3), dtype=np.uint8))
    return folder


@pytest.fixture
def with_toys(monkeypatch):
    monkeypatch.setitem(METRICS, "mean_distance", MeanDistance())
    monkeypatch.setitem(METRICS, "first_class", FirstClass())


def colours(path):
    return np.load(path)["arr_0"].astype(np.float32).mean((1, 2)).astype(np.float64)


def expected(folder):
    return np.linalg.norm(colours(folder / "ref.npz").mean(0) - colours(folder / "samples.npz").mean(0))


def test_every_front_gives_its_number(folder, with_toys):
    files = str(folder / "ref.npz"), str(folder / "samples.npz")
    extractor = load_extractor(f"{folder}/colours.ts", trusted=True)
    result = evaluate(*files, extractor, metrics=["mean_distance", "first_class"])["metrics"]
    assert result["mean_distance"]["value"] == pytest.approx(expected(folder), rel=1e-6) and expected(folder) > 1
    assert result["mean_distance"]["label"] == "Mean distance (colours features, not Inception)"
    assert result["first_class"]["value"] == (colours(files[1]).argmax(1) == 0).mean()
    again = ThEvaluator(files[0], extractor, 4, metrics=["mean_distance", "first_class"]).evaluate_file(files[1])
    assert {key: each.value for key, each in again.items()} == {key: each["value"] for key, each in result.items()}
    assert "mean_distance" in default_names() and "first_class" not in default_names()


def test_the_command_line_knows_it(folder, with_toys, tmp_path, capsys):
    flags = [str(folder / "ref.npz"), str(folder / "samples.npz"), "--inception", str(folder / "colours.ts"),
             "--trust_extractor",
             "--cache", "off"]
    main([*flags, "--metrics", "mean_distance", "--json", str(tmp_path / "out.json")])
    assert "Mean distance (colours features, not Inception): " in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())["metrics"]["mean_distance"]
    assert written["value"] == pytest.approx(expected(folder), rel=1e-6)
    with pytest.raises(SystemExit):
        main([*flags, "--help"])
    assert "mean_distance" in capsys.readouterr().out
    with pytest.raises(SystemExit) as leaving:
        main([*flags, "--metrics", "mean_distanse"])
    assert leaving.value.code == 2 and "Did you mean 'mean_distance'" in capsys.readouterr().err


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_evaluator_gives_it_on_any_number_of_ranks(folder, tmp_path, ranks):
    """With every other metric, in the numbers of one process to 1e-9."""
    done = mpi_program(tmp_path, ranks, "\n".join([IMPORTS, inspect.getsource(MeanDistance), textwrap.dedent(f"""
        import json
        from cm.distributed import setup as dist
        from evaluations import evaluator
        from evaluations.metrics import METRICS

        METRICS["mean_distance"] = MeanDistance()

        def main():
            evaluator.main(["{folder}/ref.npz", "{folder}/samples.npz", "--inception", "{folder}/colours.ts",
                            "--trust_extractor", "--cache",
                            "off", "--batch_size", "7", "--split_size", "10", "--json", "{tmp_path}/{ranks}.json"])

        dist.run(main)
    """)]))
    assert done.rc == 0, done
    written = json.loads((tmp_path / f"{ranks}.json").read_text())
    assert written["settings"]["ranks"] == ranks and done.stdout.count("Mean distance") == 1
    extractor = load_extractor(f"{folder}/colours.ts", trusted=True)
    alone = evaluate(str(folder / "ref.npz"), str(folder / "samples.npz"), extractor,
                     batch_size=7, split_size=10)["metrics"]
    found = {key: fields["value"] for key, fields in written["metrics"].items()}
    assert found.pop("mean_distance") == pytest.approx(expected(folder), rel=1e-6)
    assert found == {key: pytest.approx(fields["value"], rel=1e-9) for key, fields in alone.items()}
    assert len(found) == 5


@pytest.mark.mpi
def test_a_feature_that_is_not_finite_is_an_error_of_every_rank(folder, tmp_path):
    images = np.load(folder / "samples.npz")["arr_0"].copy()
    images[20] = 255                                        # in the share of rank 1
    np.savez(tmp_path / "bad.npz", images)
    done = mpi_program(tmp_path, 2, f"""
        import numpy as np
        from cm.distributed import setup as dist
        from cm.errors import UserError
        from evaluations.evaluator import evaluate
        from evaluations.features import Features

        class Nan:
            id, name, resize, is_inception = "torch-0", "nan", "none", False

            def extract(self, images):
                x = images.astype(np.float32).mean((1, 2))
                x[x == 255] = np.nan
                return Features(x, None, None)

        def main():
            dist.setup_dist()
            try:
                evaluate("{folder}/ref.npz", "{tmp_path}/bad.npz", Nan(), metrics=["fid"], batch_size=16)
            except UserError as error:
                found = dist.all_gather_object(str(error))
            assert len(set(found)) == 1 and "features of image 20 are not finite" in found[0], found

        dist.run(main)
    """)
    assert done.rc == 0, done
