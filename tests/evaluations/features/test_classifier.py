"""The classifier that stands in for Inception on small images, and the script that trains it."""

import json

import numpy as np
import pytest
import torch as th

from evaluations.features import load_extractor, save_torchscript
from evaluations.features.classifier import FEATURES, Classifier, accuracy, stratified_split, train_classifier
from support.warm import python


@pytest.fixture(scope="module")
def bars():
    """Horizontal, vertical and no bars: images [90,8,8,3] and labels."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 60, (90, 8, 8, 3), dtype=np.uint8), np.arange(90) % 3
    for image, label, place in zip(images, labels, rng.integers(1, 7, 90)):
        if label == 0:
            image[place] += 180
        elif label == 1:
            image[:, place] += 180
    return images, labels


def weights(model):
    return th.cat([param.flatten() for param in model.parameters()])


def test_it_gives_features_and_logits_without_bias():
    model = Classifier(5).eval()
    features, logits = model(th.randint(0, 256, (3, 3, 16, 16), dtype=th.uint8))
    assert features.shape == (3, FEATURES) and features.min() >= 0
    th.testing.assert_close(logits, features @ model.head.weight.T)


def test_it_learns(bars):
    images, labels = bars
    model = train_classifier(images[:60], labels[:60], 3, epochs=12, batch_size=20, progress=False)
    assert not model.training
    assert accuracy(model, images[60:], labels[60:]) >= 0.9                  # chance is a third
    assert accuracy(model, images[60:], labels[60:], batch_size=7) == accuracy(model, images[60:], labels[60:])


def test_the_seed_decides_and_the_global_state_is_left_alone(bars, monkeypatch):
    monkeypatch.setattr(th.cuda, "device_count", lambda: 2)     # which a training on the CPU leaves alone, too
    options = {"epochs": 1, "batch_size": 30, "progress": False}
    before, threads = th.random.get_rng_state(), th.get_num_threads()
    first, again, other = (train_classifier(*bars, 3, seed=seed, **options) for seed in (1, 1, 2))
    assert th.equal(before, th.random.get_rng_state()) and th.get_num_threads() == threads
    assert th.equal(weights(first), weights(again)) and not th.equal(weights(first), weights(other))


def test_no_image_is_left_out_of_an_epoch(bars, monkeypatch):
    seen = []
    forward = Classifier.forward
    monkeypatch.setattr(Classifier, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    train_classifier(*bars, 3, epochs=1, batch_size=40, progress=False)
    assert sum(seen) == 90 and min(seen) >= 40


def test_the_split_is_stratified_seeded_and_complete():
    labels = np.repeat([0, 1, 2], [40, 20, 8])
    kept, held_out = stratified_split(labels, 0.25, seed=3)
    assert sorted([*kept, *held_out]) == list(range(68))
    np.testing.assert_array_equal(np.bincount(labels[held_out]), [10, 5, 2])
    np.testing.assert_array_equal(held_out, stratified_split(labels, 0.25, seed=3)[1])
    assert not np.array_equal(held_out, stratified_split(labels, 0.25, seed=4)[1])


@pytest.mark.parametrize("holdout, message", [(0, "between 0 and 1"), (1.0, "between 0 and 1"), (0.01, "of class 0")])
def test_splits_that_leave_a_side_empty_are_refused(holdout, message):
    with pytest.raises(ValueError, match=message):
        stratified_split(np.zeros(10, int), holdout, seed=0)


def test_training_refuses_what_it_cannot_use(bars):
    with pytest.raises(ValueError, match="epochs=0"):
        train_classifier(*bars, 3, epochs=0)


def test_a_saved_classifier_is_an_extractor(bars, tmp_path):
    model = train_classifier(*bars, 3, epochs=1, progress=False)
    save_torchscript(model, str(tmp_path / "c.ts"), "bars-classifier", "none")
    extractor = load_extractor(str(tmp_path / "c.ts"))
    extracted = extractor.extract(bars[0])
    with th.inference_mode():
        features, logits = model(th.from_numpy(bars[0]).permute(0, 3, 1, 2))
    np.testing.assert_allclose(extracted.pool, features, atol=1e-5)
    np.testing.assert_allclose(extracted.logits, logits, atol=1e-5)
    assert extractor.name == "bars-classifier" and not extractor.is_inception


def run_script(*flags):
    return python(["scripts/classifier_train.py", *flags], timeout=200)


def test_the_script_reads_digits_with_its_defaults(tmp_path):
    """The digits themselves: the published promise is 97 % of those held out."""
    done = run_script("--out", str(tmp_path / "new" / "classifier.ts"))
    assert done.rc == 0, done
    facts = json.loads((tmp_path / "new" / "classifier.json").read_text())
    assert facts["held_out_accuracy"] >= 0.97
    assert facts["held_out_images"] + facts["training_images"] == 1797 and facts["classes"] == 10
    assert f"held-out accuracy: {facts['held_out_accuracy']:.2%} of {facts['held_out_images']} images" in done.stdout
    assert "deprecated" not in done.stderr and "100%" in done.stderr
    extractor = load_extractor(str(tmp_path / "new" / "classifier.ts"))
    assert extractor.id == facts["extractor"] and extractor.name == "digits-classifier"
    features = extractor.extract(np.zeros((2, 8, 8, 3), np.uint8))
    assert features.pool.shape == (2, 64) and features.logits.shape == (2, 10)


def test_the_script_refuses_images_without_classes(tmp_path):
    np.savez(tmp_path / "plain.npz", np.zeros((4, 8, 8, 3), np.uint8))
    done = run_script("--data_dir", str(tmp_path / "plain.npz"))
    assert done.rc == 2 and "has no class labels" in done.stderr and "Traceback" not in done.stderr
