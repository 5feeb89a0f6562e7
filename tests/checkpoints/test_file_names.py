"""The names of the files of a checkpoint."""

from cm.checkpoints.file_names import file_name, manifest_name, parse_name, steps


def test_names_are_those_of_guided_diffusion():
    assert file_name("model", 10) == "model000010.pt"
    assert file_name("ema_0.9999", 10) == "ema_0.9999_000010.pt"
    assert file_name("target_model", 1_234_567) == "target_model1234567.pt"
    for name in ("model", "opt", "trainer", "target_model", "teacher_model", "ema_0.9999", "ema_0.9999432189950708"):
        assert parse_name("/runs/model5.1/" + file_name(name, 100)) == (name, 100)
    assert parse_name("cd_imagenet64_l2.pt") is None


def test_a_step_is_there_once_its_manifest_is(tmp_path):
    for name in ("model000002.pt", manifest_name(4), manifest_name(1_234_567), "checkpoint_000006.json.partial"):
        (tmp_path / name).touch()
    assert steps(str(tmp_path)) == [4, 1_234_567]
