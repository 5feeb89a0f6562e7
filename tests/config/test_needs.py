"""Flags that would be ignored: every option is known to act always, or beside what; and the commands refuse it."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from cm.checkpoints import manifest
from cm.config import objective_schema, sampling_schema, schema
from cm.config.flags import Origin, Provenance, Settings, parse
from cm.config.needs import ALWAYS, ELSEWHERE, FACTS, NEEDS, NEEDS_OF_DATA, Need, atoms_of, missing, refuse_idle
from cm.config.sampling_schema import SolverConfig
from cm.config.schema import TRAINING_SECTIONS
from cm.errors import UserError
from cm.generate.edit_tasks import TASKS
from cm.samplers import SAMPLERS
from cm.setup import rules
from cm.setup.data import open_data
from cm.setup.objective import flags_of_objectives
from support.as_module import as_module
from support.nets import plain_state_dict
from support.shards import write_shards
from support.weights import TINY, tiny

ROOT = Path(__file__).resolve().parents[2]
ROWS = (*NEEDS, *NEEDS_OF_DATA)
CLASSIFIER = as_module(ROOT / "scripts" / "classifier_train.py").ClassifierConfig
SECTIONS = [each for module in (schema, objective_schema, sampling_schema) for each in vars(module).values()
            if dataclasses.is_dataclass(each)] + [CLASSIFIER]
OPTIONS = {field.name for section in SECTIONS for field in dataclasses.fields(section)}


def test_every_option_acts_always_or_is_known_to_need_another():
    """A new option goes into the table with what it needs, or into one of the lists."""
    of_samplers = {field.name for field in dataclasses.fields(SolverConfig)
                   if any(field.name in kind.__dataclass_fields__ or field.name == "rho" for kind in SAMPLERS.values())}
    of_tasks = {option for task in TASKS.values() for option in task.options}
    known = {*(flag for row in ROWS for flag in row.flags if row.condition not in ("ref", "format!=files,dcp")),
             *ELSEWHERE, *flags_of_objectives(), *of_samplers, *of_tasks}
    assert OPTIONS - known - set(ALWAYS) == set(), "in no row of cm.config.needs, and not said to act always"
    assert {*known, *ALWAYS} - OPTIONS == set(), "no option of any command"
    assert set(ALWAYS) & known == set(), "said to act always, and to need another"


def test_conditions_name_flags_and_facts():
    for row in ROWS:
        atoms, _ = atoms_of(row.condition)
        assert {each.name for each in atoms} <= OPTIONS | FACTS.keys(), row.condition


def values_where(row, held):
    """Flags and facts such that each part of a condition holds, or none."""
    known = {}
    for atom in atoms_of(row.condition)[0]:
        known[atom.name] = held if not atom.values else atom.values[0] if held != atom.excluded else "other"
    return known


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.condition)
def test_every_row_is_held(row):
    for name in row.flags:
        def judged(held, kind=Provenance.COMMAND_LINE, value="x", name=name):
            known = {name: value} | values_where(row, held)
            facts = {fact: known.pop(fact) for fact in FACTS if fact in known}
            given = {name: Origin(kind, f"--{name}")}
            refuse_idle(Settings(known, given, defaults={name: "default"}), facts, [row])

        judged(held=True)
        judged(held=False, kind=Provenance.FILE)            # which may hold every flag of another run
        judged(held=False, value="default")
        if name not in values_where(row, False):
            with pytest.raises(UserError, match=rf"--{name} x has no effect without .*give that, too, or leave it out"):
                judged(held=False)


ROW = Need("loss_norm=pseudo-huber", ("huber_c", "b", "c", "d", "e", "f"))


@pytest.mark.parametrize("values, message", [
    ({"huber_c": 0.1}, "run.yaml sets what has no effect in this run: huber_c 0.1 (needs --loss_norm pseudo-huber)"),
    ({"huber_c": 0.1, "loss_norm": "pseudo-huber"}, None),
    ({"huber_c": 0.0}, None),
    (dict.fromkeys(ROW.flags, 1.0), "e 1.0 (needs --loss_norm pseudo-huber), and 1 more"),
])
def test_a_file_that_sets_it_is_told(values, message, capsys):
    known = {"loss_norm": "l2", **values}
    given = {name: Origin(Provenance.FILE, "run.yaml") for name in values}
    refuse_idle(Settings(known, given, defaults=dict.fromkeys(ROW.flags, 0.0)), {}, [ROW])
    said = "".join(capsys.readouterr())
    assert (message in said and said.count("\n") == 1) if message else not said


def test_what_is_not_known_is_not_judged():
    assert missing("teacher", {}) == missing("vae", {}) == missing("shrinking or scale_mode=doubling", {}) == []
    assert missing("shrinking or scale_mode=doubling", {"scale_mode": "fixed"}) == []
    wanted = missing("eval_interval or sample_interval", {"eval_interval": 0})
    assert [each.name for each in wanted] == ["eval_interval"]
    assert missing("arch=unet and num_head_channels=-1", {"arch": "unet", "num_head_channels": 8})[0].values == ("-1",)


@pytest.mark.parametrize("words, message", [
    ("--num_classes 5", "--num_classes 5 has no effect without --class_cond"),
    ("--labels folders", "--labels folders has no effect without --class_cond"),
    ("--num_heads 8 --arch ddpmpp", "--num_heads 8 has no effect without --arch unet, and this run has --arch ddpmpp"),
    ("--num_heads 8 --num_head_channels 32", "--num_heads 8 has no effect without --num_head_channels -1"),
    ("--second_time True", "--second_time True has no effect without --training_mode meanflow"),
    ("--dry_run_ranks 8", "--dry_run_ranks 8 has no effect without --dry_run"),
    ("--fp16_scale_growth 1", "--fp16_scale_growth 1.0 has no effect without --precision fp16 or --use_fp16"),
    ("--eval_ref x.npz", "--eval_ref x.npz has no effect without --eval_interval"),
    ("--eval_ema_rate 0.7", "--eval_ema_rate 0.7 has no effect without --eval_interval or --sample_interval"),
    ("--eval_samples 5 --sample_interval 1", "--eval_samples 5 has no effect without --eval_interval"),
    ("--vae_batch_size 4", "--vae_batch_size 4 has no effect without --vae"),
    ("--training_mode ict --schedule_sampler vp", "--schedule_sampler vp has no effect without --training_mode edm"),
    ("--training_mode sct --weight_schedule snr", "--weight_schedule snr has no effect without another"),
    ("--training_mode ict --teacher_dropout 0.5", "--teacher_dropout 0.5 has no effect without an objective that asks"),
    ("--training_mode ict --scale_mode fixed --stage_steps 5", "--stage_steps 5 has no effect without --pairs"),
    ("--training_mode ict --distill_steps_per_iter 5", "--distill_steps_per_iter 5 has no effect without --scale_mode"),
    ("--batch_size 3 --global_batch_size 8", "--batch_size 3 on 1 rank.* is 3 images per step, but --global"),
    ("--sample_interval 1 --eval_ts 0,5", "--eval_ts 0,5 is for --sampler multistep"),
])
def test_a_training_refuses_a_flag_that_it_would_ignore(words, message):
    settings = parse("", *TRAINING_SECTIONS, argv=words.split(), training_mode="edm")
    with pytest.raises(UserError, match=message):
        rules.resolve(settings, rules.TRAINING)


@pytest.mark.parametrize("words", [
    "--class_cond True --num_classes 5 --labels names", "--num_heads 8", "--training_mode ict --stage_steps 5",
    "--training_mode ect --stage_steps 5", "--batch_size 3 --global_batch_size 3",
    "--precision fp16 --fp16_scale_growth 1",
    "--num_heads 4 --num_head_channels 64 --weight_schedule karras", "--training_mode meanflow --second_time True",
    "--dropout 0.1 --dropout_resolutions 8", "--sample_interval 1 --eval_ts 0,39 --eval_sampler multistep",
])
def test_a_training_takes_what_acts(words):
    rules.resolve(parse("", *TRAINING_SECTIONS, argv=words.split(), training_mode="edm"), rules.TRAINING)


def test_data_of_the_other_kind(tmp_path):
    write_shards(tmp_path, [4])
    for words, message in ((["digits", "--shuffle_window", "7"], "--shuffle_window 7 has no effect without shards"),
                           ([str(tmp_path), "--cache_gib", "1"], "--cache_gib 1.0 has no effect without a --data_dir")):
        settings = parse("", *TRAINING_SECTIONS, argv=["--image_size", "8", "--data_dir", *words], training_mode="edm")
        with pytest.raises(UserError, match=message):
            open_data(settings)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint of a tiny network."""
    folder = tmp_path_factory.mktemp("model")
    config = {**TINY, "training_mode": "consistency_distillation"}
    return manifest.save(str(folder), 10, {"model": plain_state_dict(tiny())}, config, 40).path("model")


@pytest.mark.parametrize("script, words, message", [
    ("image_sample.py", "--model_path MODEL --subdirs True", "--subdirs True has no effect without --outdir"),
    ("image_sample.py", "--model_path MODEL --vae_batch_size 4", "--vae_batch_size 4 has no effect without --vae"),
    ("image_edit.py", "--model_path MODEL --vae_batch_size 4", "--vae_batch_size 4 has no effect without --vae"),
    ("ternary_search.py", "--model_path MODEL --ref_batch REF --s_noise 2", "--s_noise 2.0 is for samplers with churn"),
    ("convert_checkpoint.py", "MODEL OUT --license mit", "--license mit has no effect without --format hf"),
    ("convert_checkpoint.py", "MODEL OUT --to files --num_channels 64",
     "--num_channels 64 has no effect without another --to than files and dcp, and this run has --to files"),
    ("convert_checkpoint.py", "MODEL OUT --licence mit --to safetensors",
     "--licence mit has no effect without --to hf, and this run has --to safetensors"),
    ("classifier_train.py", "--classifier_width 64 --out OUT", "--classifier_width 64 has no effect without --noised"),
])
def test_a_command_refuses_a_flag_that_it_would_ignore(script, words, message, model, tmp_path, monkeypatch):
    np.savez(tmp_path / "ref.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    places = {"MODEL": model, "OUT": str(tmp_path / "out"), "REF": str(tmp_path / "ref.npz")}
    monkeypatch.setattr(sys, "argv", [script, *(places.get(word, word) for word in words.split())])
    monkeypatch.chdir(tmp_path)
    command = as_module(ROOT / "scripts" / script)
    with pytest.raises(UserError, match=message):
        command.main(command.read_flags())
    assert [each.name for each in tmp_path.iterdir()] == ["ref.npz"]
