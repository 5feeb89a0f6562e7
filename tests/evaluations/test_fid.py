"""fid.py: one number from folders, zips and npz files on any number of ranks, and references the evaluator reads."""

import json
import os
import zipfile

import numpy as np
import pytest
import torch as th
from PIL import Image
from torch import nn

from cm.errors import UserError
from evaluations.command import prepare_output
from evaluations.engine.image_files import open_pictures
from evaluations.engine.statistics_cache import StatisticsCache
from evaluations.evaluator import evaluate
from evaluations.features import load_extractor, save_torchscript
from evaluations.fid import calc, choose, main, ref, report
from evaluations.flags import fid_parser
from support.mpi import program
from support.warm import mpiexec, python

N = 70


class Tiny(nn.Module):
    """Six features, as many spatial ones, and logits; NaN for an image whose first value is 255."""

    def __init__(self, seed: int):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, stride=4)
        generator = th.Generator().manual_seed(seed)
        with th.no_grad():
            for weight in self.parameters():
                weight.copy_(th.randn(weight.shape, generator=generator) / 4)

    def forward(self, images: th.Tensor) -> dict[str, th.Tensor]:
        x = self.conv(images.float() / 32).relu()
        x = th.where((images[:, 0, 0, 0] == 255)[:, None, None, None], float("nan"), x)
        return {"features": x.mean((2, 3)), "spatial": x[:, :2, :2, :2]}


class Wide(nn.Module):
    def forward(self, images: th.Tensor) -> th.Tensor:
        return images.float().flatten(1)


def write_folder(folder, images, labels=None):
    """As NVlabs/edm lays a data set out."""
    names = [f"{i // 50:05d}/img{i:08d}.png" for i in range(len(images))]
    for name, image in zip(names, images):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    if labels is not None:
        (folder / "dataset.json").write_text(json.dumps({"labels": [[n, int(k)] for n, k in zip(names, labels)]}))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One set of images three times, a reference, and extractors."""
    folder = tmp_path_factory.mktemp("fid")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (N, 8, 12, 3), dtype=np.uint8)            # not square
    labels = rng.integers(0, 5, N)
    np.savez(folder / "samples.npz", images, labels)
    write_folder(folder / "samples", images, labels)
    with zipfile.ZipFile(folder / "samples.zip", "w") as archive:
        for path in sorted((folder / "samples").rglob("*")):
            archive.write(path, path.relative_to(folder / "samples").as_posix())
    np.savez(folder / "ref.npz", rng.integers(30, 255, (90, 8, 12, 3), dtype=np.uint8))
    for seed in (0, 1):
        save_torchscript(Tiny(seed), f"{folder}/{seed}.ts", f"tiny{seed}", "none")
    save_torchscript(Wide(), f"{folder}/wide.ts", "wide", "none")
    return folder


@pytest.fixture(scope="module")
def extractor(data):
    return load_extractor(f"{data}/0.ts", trusted=True)


def distance(data, extractor, images="samples.npz", reference="ref.npz", num=N, **options):
    return calc(str(data / images), str(data / reference), extractor, num=num, **options)["value"]


def evaluated(reference, samples, extractor, metric="fid", **options):
    return list(evaluate(reference, samples, extractor, metrics=[metric], **options)["metrics"].values())[0]


# --- the number ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 32, 64])
def test_the_distance_is_the_evaluators(data, extractor, batch):
    theirs = evaluated(data / "ref.npz", data / "samples.npz", extractor, batch_size=batch)["value"]
    # The same batches pass through the network, and the sums are float64.
    assert distance(data, extractor, batch_size=batch) == pytest.approx(theirs, rel=1e-9) and theirs > 0.1


def test_folder_zip_and_npz_agree(data, extractor):
    for num in (N, 40):
        npz = distance(data, extractor, num=num)
        assert distance(data, extractor, "samples", num=num) == npz
        assert distance(data, extractor, "samples.zip", num=num) == npz


def test_more_images_than_asked_for_are_a_seeded_choice(data, extractor, tmp_path):
    order = np.arange(N)
    np.random.RandomState(3).shuffle(order)                                 # the rule of EDM
    with np.load(data / "samples.npz") as batch:
        np.savez(tmp_path / "chosen.npz", batch["arr_0"][np.sort(order[:40])])
    chosen = calc(str(tmp_path / "chosen.npz"), str(data / "ref.npz"), extractor, num=40)["value"]
    assert distance(data, extractor, num=40, seed=3) == chosen
    assert distance(data, extractor, num=40, seed=4) != chosen
    assert np.array_equal(choose(N, N, 3), np.arange(N))


def test_a_data_set_is_a_reference(data, extractor, tmp_path):
    """In a folder, a zip or an npz; EDM's commands need a statistics file."""
    ref(f"{data}/samples", f"{tmp_path}/statistics.npz", extractor)
    by_statistics = calc(f"{data}/ref.npz", f"{tmp_path}/statistics.npz", extractor, num=90)
    for name in ("samples", "samples.zip", "samples.npz"):
        found = calc(f"{data}/ref.npz", f"{data}/{name}", extractor, num=90)
        assert found["value"] == by_statistics["value"] > 0.1
        assert (found["reference_source"], found["reference_count"]) == ("images", N)


def test_statistics_of_folders_and_choices_are_cached(data, extractor, tmp_path):
    cache = StatisticsCache(tmp_path / "cache")
    write_folder(tmp_path / "images", np.load(data / "ref.npz")["arr_0"])

    def run(num, seed=0):
        return calc(str(tmp_path / "images"), f"{data}/samples.zip", extractor, num=num, seed=seed, cache=cache)

    first, again, other_seed, fewer = run(40), run(40), run(40, 1), run(30)
    assert (first["images_source"], first["reference_source"]) == ("images", "images")
    assert (again["images_source"], again["reference_source"]) == ("cached statistics",) * 2
    assert again["value"] == first["value"] not in (other_seed["value"], fewer["value"])
    assert other_seed["images_source"] == fewer["images_source"] == "images"
    assert "images: N=40, cached statistics; reference: N=70, cached statistics; extractor: tiny0" in report(again)
    Image.new("RGB", (12, 8), "blue").save(tmp_path / "images/00000/img00000003.png")
    assert run(90)["images_source"] == "images"


def test_groups_may_lie_anywhere_in_an_npz(data):
    images = np.arange(200, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    np.savez(data / "counted.npz", images)
    groups = [np.array([0, 5]), np.array([63, 64, 130]), np.array([131]), np.array([199])]
    taken = open_pictures(str(data / "counted.npz"), "--images").take(groups)
    assert [part[:, 0, 0, 0].tolist() for part in taken] == [group.tolist() for group in groups]


@pytest.mark.mpi
def test_two_ranks_give_the_number_and_the_reference_of_one(data, extractor, tmp_path):
    done = mpiexec(2, [program(tmp_path, f"""
        from cm.distributed import setup as dist
        from evaluations.fid import main

        def both():
            shared = ["--inception", "{data}/0.ts", "--trust_extractor", "--batch", "32"]
            main(["ref", "--data", "{data}/samples.zip", "--dest", "{tmp_path}/two.npz", "--images", "50", *shared])
            for name in ("few", "all"):                     # fewer batches than ranks, and an uneven share of them
                main(["calc", "--images", "{data}/samples", "--ref", "{data}/ref.npz", "--num",
                      "20" if name == "few" else "{N}", "--json", f"{tmp_path}/{{name}}.json", *shared])

        dist.run(both)
        """)])
    assert done.rc == 0, done
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and lines[0].startswith("wrote ") and "70 of 70" in done.stderr
    for name, num in (("few", 20), ("all", N)):
        value = json.loads((tmp_path / f"{name}.json").read_text())["value"]
        # The same batches pass through the network; only the order of float64 sums differs.
        assert value == pytest.approx(distance(data, extractor, "samples", num=num, batch_size=32), rel=1e-9)
    assert lines[-1] == f"{value:g}"
    ref(f"{data}/samples.zip", f"{tmp_path}/one.npz", extractor, num_images=50, batch_size=32)
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert one.files == two.files
        for key in one.files:
            same = np.array_equal if one[key].dtype.kind in "Uiu" else lambda a, b: np.allclose(a, b, 1e-9, 1e-9)
            assert same(one[key], two[key]), key


# --- references ----------------------------------------------------------------------------------------------------


def test_a_reference_serves_the_evaluator_as_its_images_do(data, extractor, tmp_path):
    made = tmp_path / "new" / "ref.npz"
    text = ref(f"{data}/samples", str(made), extractor, num_images=30)
    for metric in ("fid", "sfid"):
        stored = evaluated(made, data / "ref.npz", extractor, metric)
        images = evaluated(data / "samples.npz", data / "ref.npz", extractor, metric)
        assert stored["value"] == pytest.approx(images["value"], rel=1e-9)
        assert (stored["reference_source"], stored["reference_count"]) == ("stored statistics", N)
    assert evaluated(made, data / "ref.npz", extractor, "precision_recall")["reference_count"] == 30
    assert "mu_s [8]" in text and "of 70 images, 30 of them inside" in text
    with np.load(made) as written, np.load(data / "samples.npz") as batch:
        kept = choose(N, 30, 0)
        assert np.array_equal(written["arr_0"], batch["arr_0"][kept])
        assert np.array_equal(written["arr_1"], batch["arr_1"][kept])
        assert str(written["extractor"]) == extractor.id and int(written["num_images"]) == N


def test_a_reference_serves_calc_as_its_images_do(data, extractor, tmp_path):
    made = str(tmp_path / "ref.npz")
    ref(f"{data}/ref.npz", made, extractor)
    stored = calc(f"{data}/samples", made, extractor, num=N)
    assert stored["value"] == distance(data, extractor) and stored["reference_source"] == "stored statistics"
    with np.load(made) as written:
        assert not {"arr_0", "arr_1"} & set(written.files)
    assert distance(data, extractor, "ref.npz", made, num=90) == pytest.approx(0, abs=1e-9)
    with pytest.raises(UserError, match=f"ref.npz stores 6 features of {extractor.id}, and the extractor given is"):
        calc(f"{data}/samples", made, load_extractor(f"{data}/1.ts", trusted=True), num=N)


def test_a_reference_keeps_the_names_of_classes_and_other_ones_are_warned_of(data, extractor, tmp_path):
    with np.load(data / "samples.npz") as batch:
        images, labels = batch["arr_0"], batch["arr_1"] % 3
    for name, classes in {"animals": "cat dog fox", "other": "cat dog elk", "order": "dog cat fox"}.items():
        np.savez(tmp_path / f"{name}.npz", images, labels, class_names=np.array(classes.split()))
    ref(str(tmp_path / "animals.npz"), str(tmp_path / "ref.npz"), extractor)
    with np.load(tmp_path / "ref.npz") as written:
        assert written["class_names"].tolist() == ["cat", "dog", "fox"]

    def warned(name: str, number: int = len(images)) -> list[str]:
        result = calc(str(tmp_path / f"{name}.npz"), str(tmp_path / "ref.npz"), extractor, num=number)
        return [text for text in result["warnings"] if "class" in text]

    assert warned("animals") == []
    assert [text.partition(" measures")[0] for text in warned("other")] == [
        f"the classes of {tmp_path}/other.npz (cat, dog, elk) are not those of {tmp_path}/ref.npz (cat, dog, fox): "
        "only one of them has elk, and a distance between them"
    ]
    assert "number the same classes differently (dog, cat, fox and cat, dog, fox)" in warned("order")[0]


def test_a_reference_is_replaced_only_by_a_complete_one(data, extractor, tmp_path):
    dest, broken = tmp_path / "ref.npz", tmp_path / "broken"
    assert ref(f"{data}/samples", str(dest), extractor).startswith("wrote ")
    before = dest.read_bytes()
    write_folder(broken, np.zeros((4, 8, 12, 3), np.uint8))
    (broken / "00000/img00000002.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="img00000002.png.*cannot be read"):
        ref(str(broken), str(dest), extractor)
    assert dest.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["broken", "ref.npz"]
    assert ref(f"{data}/ref.npz", str(dest), extractor).startswith("replaced ")
    assert dest.read_bytes() != before
    with pytest.raises(UserError, match="is the data itself"):
        ref(f"{data}/ref.npz", f"{data}/../{data.name}/ref.npz", extractor)
    with pytest.raises(UserError, match="is a folder"):
        ref(f"{data}/samples", str(tmp_path), extractor)
    with pytest.raises(UserError, match="has 70 images, and --images asks for 71"):
        ref(f"{data}/samples", str(dest), extractor, num_images=71)


def test_a_failed_write_leaves_nothing(data, extractor, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="cannot write .*No space left"):
        ref(f"{data}/samples.npz", f"{tmp_path}/ref.npz", extractor)
    assert os.listdir(tmp_path) == []


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, message", [
    (1, "images.npz has 1 image; a covariance needs at least 2"),
    (9, "images.npz: the pool features of image 7 are not finite: the extractor tiny0"),
])
def test_images_that_make_no_covariance_are_refused(data, extractor, tmp_path, count, message):
    images = np.zeros((count, 8, 12, 3), np.uint8)
    images[7:8, 0, 0, 0] = 255                              # the extractor's cue for NaN
    path = str(tmp_path / "images.npz")
    np.savez(path, images)
    for command in (
        lambda: calc(path, f"{data}/ref.npz", extractor, num=count, batch_size=4),
        lambda: calc(f"{data}/samples", path, extractor, num=N, batch_size=4),
        lambda: ref(path, f"{tmp_path}/ref.npz", extractor, batch_size=4),
    ):
        with pytest.raises(UserError, match=message):
            command()


def test_images_of_two_sizes_are_refused_by_name(data, extractor, tmp_path):
    write_folder(tmp_path, np.zeros((3, 8, 12, 3), np.uint8))
    Image.new("RGB", (8, 8)).save(tmp_path / "00000/img00000002.png")
    message = "00000/img00000000.png is 12x8 and 00000/img00000002.png is 8x8"
    with pytest.raises(UserError, match=message):
        calc(str(tmp_path), f"{data}/ref.npz", extractor, num=3)
    np.savez(tmp_path / "square.npz", np.zeros((5, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="different sizes .*samples 8x12, .*square.npz 8x8"):
        calc(f"{data}/samples", f"{tmp_path}/square.npz", extractor, num=N)


def test_fewer_images_than_asked_for_are_an_error_with_both_numbers(data, extractor):
    with pytest.raises(UserError, match="has 70 images, and --num asks for 50000"):
        calc(f"{data}/samples", f"{data}/ref.npz", extractor)
    with pytest.raises(UserError, match="--num asks for 1:"):
        calc(f"{data}/samples", f"{data}/ref.npz", extractor, num=1)


def test_missing_files_are_refused(data, extractor, tmp_path):
    np.savez(tmp_path / "labels.npz", arr_1=np.arange(3))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(6), sigma=np.eye(6))
    (tmp_path / "empty").mkdir()
    for images, reference, message in [
        (tmp_path / "empty", data / "ref.npz", "no images in .*empty"),
        (tmp_path / "missing", data / "ref.npz", "--images .*missing does not exist"),
        (tmp_path / "statistics.npz", data / "ref.npz", "holds only statistics, no images"),
        (data / "samples", tmp_path / "missing.npz", "missing.npz does not exist"),
        (data / "samples", tmp_path / "labels.npz", r"neither images \(arr_0\) nor statistics \(mu, sigma\)"),
    ]:
        with pytest.raises(UserError, match=message):
            calc(str(images), str(reference), extractor, num=N)


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_number_is_the_last_line(data, extractor, tmp_path, capsys):
    out = tmp_path / "new" / "fid.json"
    main(["calc", f"--images={data}/samples", f"--ref={data}/ref.npz", f"--num={N}", f"--inception={data}/wide.ts",
          "--trust_extractor",
          f"--json={out}"])
    written, printed = json.loads(out.read_text()), capsys.readouterr()
    *warnings, provenance, number = printed.out.splitlines()
    assert number == f"{written['value']:g}"
    assert [text.split(" feature")[0] for text in warnings] == [
        f"warning: {count} images are fewer than the 288" for count in (70, 90)
    ]
    assert provenance == (
        "Frechet distance (wide features, not Inception)  [images: N=70; reference: N=90; "
        f"extractor: wide ({written['extractor']['id']}), resize: none]"
    )
    assert "70 of 70" in printed.err and "img/s" in printed.err


def test_samples_in_jpeg_are_warned_of(data, extractor, tmp_path):
    for i in range(3):
        Image.new("RGB", (12, 8), (40 * i, 0, 0)).save(tmp_path / f"{i}.jpg")
    warnings = calc(str(tmp_path), f"{data}/ref.npz", extractor, num=3)["warnings"]
    assert any("holds JPEG files, whose compression changes features" in text for text in warnings)
    assert not any("JPEG" in text for text in calc(f"{data}/samples", f"{data}/ref.npz", extractor, num=N)["warnings"])


def test_bad_input_is_one_line_and_status_2(data, tmp_path):
    done = python(["evaluations/fid.py", "calc", "--images", tmp_path, "--ref", data / "ref.npz",
                       "--inception", data / "0.ts", "--trust_extractor"])
    assert done.rc == 2 and done.stdout == "", done
    assert done.stderr.startswith(f"error: no images in {tmp_path}") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("flags", [
    ["calc", "--images", "x"], ["calc", "--images", "x", "--ref", "y", "--nums", "5"], ["both"],
    ["ref", "--data", "x", "--dest", "y", "--images", "-1"], ["ref", "--data", "x", "--dest", "y", "--batch", "0"],
])
def test_wrong_flags_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(flags)
    assert leaving.value.code == 2 and "error: " in capsys.readouterr().err


@pytest.mark.parametrize("words, flag", [
    (("calc", "--ref", "REF", "--json"), "--json"), (("ref", "--dest"), "--dest"),
])
@pytest.mark.parametrize("by_kind", [False, True])
@pytest.mark.parametrize("loses", ["0.ts", "0.ts.json", "plugin.py"])
def test_a_result_does_not_replace_the_extractor(data, tmp_path, monkeypatch, words, flag, by_kind, loses):
    """Nor what describes it, nor a plugin."""
    (tmp_path / "0.ts").write_bytes((data / "0.ts").read_bytes())
    for name in ("0.ts.json", "plugin.py"):
        (tmp_path / name).write_text("")
    command, *rest = [str(data / "ref.npz") if word == "REF" else word for word in words]
    samples = str(data / "samples.npz")
    args = fid_parser("").parse_args([
        command, "--images" if command == "calc" else "--data", samples, *rest, str(tmp_path / loses),
        "--plugin", str(tmp_path / "plugin.py"),
    ])
    monkeypatch.setenv("CM_INCEPTION", f"torchscript:{tmp_path}/0.ts" if by_kind else f"{tmp_path}/0.ts")
    with pytest.raises(UserError, match=f"{flag} .*{loses} is also the input .*, which would be lost"):
        prepare_output(args, flag)


def test_a_seed_without_a_choice_is_refused(data, monkeypatch, tmp_path):
    monkeypatch.setattr("evaluations.fid.ref", lambda *_, **__: pytest.fail("it was taken"))
    words = ["ref", "--data", str(data / "samples.npz"), "--dest", str(tmp_path / "r.npz"), "--seed", "4",
             "--inception", str(data / "0.ts"), "--trust_extractor"]
    with pytest.raises(UserError, match="--seed 4 chooses the --images that the file holds: give both, or neither"):
        main(words)
