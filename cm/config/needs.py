"""Flags that have an effect only together with others: a table, and the refusal of a flag that would be ignored.

A condition is one flag that is set ("vae"), that has one of some values ("arch=unet"), or none of them
("pairs!=grid"); several of these are joined by "and" or by "or". Conditions may also name facts that a command finds
out, the keys of `FACTS`. A command does not judge a condition on flags that it does not have, or on facts that it does
not know.

Flags of a single objective, sampler or editing task are listed with it (`options`, their fields, `TASKS`). Flags whose
condition does not fit into a row are checked where they are used (`ELSEWHERE`). All other flags always have an effect
(`ALWAYS`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from cm.config.flags import Provenance, Settings, same
from cm.config.sampling_schema import SampleConfig, SolverConfig
from cm.config.schema import DiffusionConfig, LatentConfig, ModelConfig
from cm.errors import UserError
from cm.logging import logger

FACTS = {
    "dry_run": "--dry_run",
    "shards": "shards in --data_dir",
    "single_images": "a --data_dir that is no set of shards",
    "teacher": "an objective that asks a teacher at every step",
    "flow_map": "--training_mode meanflow or alphaflow, which set it themselves",
    "shrinking": "--pairs shrinking, or --scale_mode doubling",
}
"""What a command finds out -> what a message says is missing."""


MOST_IDLE = 5                                               # flags in a warning


class Need(NamedTuple):
    """Flags, and when they act."""

    condition: str
    flags: tuple[str, ...]


def _names(*sections: type) -> tuple[str, ...]:
    return tuple(dict.fromkeys(field.name for section in sections for field in dataclasses.fields(section)))


NEEDS = (
    # the network
    Need("arch=unet", ("use_scale_shift_norm", "resblock_updown", "use_new_attention_order")),
    Need("arch=unet and num_head_channels=-1", ("num_heads", "num_heads_upsample")),
    Need("arch=unet,adm,edm2", ("num_head_channels",)),
    Need("class_cond", ("num_classes", "labels")),
    Need("dropout or teacher_model_path", ("dropout_resolutions",)),
    Need("flow_map", ("second_time",)),
    # training
    Need("training_mode=edm", ("schedule_sampler",)),
    Need("training_mode!=scd,sct,meanflow,alphaflow", ("weight_schedule",)),
    Need("teacher", ("teacher_dropout",)),
    Need("scale_mode=progdist or training_mode=progdist", ("distill_steps_per_iter",)),
    Need("shrinking or scale_mode=doubling", ("stage_steps", "stage_kimg")),
    Need("augment", ("augment_references",)),
    Need("precision=fp16 or use_fp16", ("fp16_scale_growth",)),
    Need("ema_rate", ("ema_rampup_ratio", "ema_device", "shard_ema")),
    Need("dry_run", ("dry_run_ranks",)),
    Need("eval_interval", ("eval_ref", "eval_samples", "inception", "trust_extractor")),
    Need("eval_interval or sample_interval", ("eval_batch_size", "eval_ema_rate", "allow_non_finite", "vae")),
    # a trained model
    Need("vae", ("vae_batch_size",)),
    Need("outdir", ("subdirs",)),
    Need("corrector_steps", ("snr",)),
    Need("ito_form=taylor", ("ito_laplacian",)),
    Need("solver=heun", ("alpha",)),
    Need("ref", ("inception", "trust_extractor", "vae", *_names(SampleConfig, SolverConfig))),
    Need("format=hf", ("license", "results", "picture")),
    Need("format=diffusers", ("num_train_timesteps",)),
    Need("format!=files,dcp", ("training_mode", *_names(ModelConfig, DiffusionConfig, LatentConfig))),
    Need("noised", ("classifier_width", "classifier_depth", "classifier_attention_resolutions")),
)

NEEDS_OF_DATA = (
    Need("single_images", ("cache_gib",)),
    Need("shards", ("shuffle_window",)),
)
"""Rows whose facts are known only after the data set has been opened."""

ELSEWHERE = (
    "learn_sigma", "null_class", "augment_dim",
    "total_kimg", "global_batch_size", "snapshot_ticks", "state_dump_ticks", "ema_snapshot_interval", "label_dropout",
    "latents", "teacher_model_path", "teacher_guide_scale", "teacher_guide_path", "teacher_guide_interval",
    "shard_size", "async_save", "eval_steps", "eval_ts",
    "ts", "steps", "s_churn", "s_tmin", "s_tmax", "s_noise", "class_label",
    "guide_scale", "guide_path", "guide_interval", "classifier_path", "classifier_scale", "images", "channels",
)
"""Flags that are refused with more words, where they are used."""

ALWAYS = (
    # the network, also where it is only described: the original's commands for sampling do so
    "arch", "image_size", "num_channels", "num_res_blocks", "attention_resolutions", "channel_mult", "class_cond",
    "dropout", "use_checkpoint", "use_fp16", "sigma_min", "sigma_max", "precond", "time_scale",
    # a run
    "log_dir", "log_formats", "seed", "precision", "device", "tf32", "compile", "verify_weights", "data_dir",
    "random_flip", "augment", "random_crop", "num_workers", "objective", "training_mode",
    "lr", "weight_decay", "lr_anneal_steps", "total_training_steps", "lr_rampup_kimg", "lr_decay_steps", "batch_size",
    "microbatch", "ema_rate", "ema_halflife_kimg", "grad_clip", "shard_optimizer", "parallel", "optimizer",
    "adam_beta1", "adam_beta2", "adam_eps", "log_interval", "save_interval", "tick_kimg", "checkpoint_dir",
    "keep_checkpoints", "milestone_interval", "checkpoint_format", "on_save_error", "profile", "timeout_seconds",
    "grace_seconds", "resume_checkpoint", "resume", "allow_other_classes", "eval_interval", "sample_interval",
    "eval_sampler", "eval_seed",                            # which the command that ends the log has, too
    # a trained model
    "model_path", "sampler", "num_samples", "seeds", "generator", "clip_denoised", "outdir",
    "rounding", "source", "dest", "format", "task", "begin", "end", "num_ts",
    "ref_batch", "run", "std", "step", "extrapolate", "ref",
    # a classifier
    "out", "noised", "epochs", "holdout",
)


class Atom(NamedTuple):
    """One part of a condition: a flag or a fact has one of these values, or none of them; without values, it is set."""

    name: str
    values: tuple[str, ...] = ()
    excluded: bool = False

    def holds(self, known: Mapping[str, Any]) -> bool:
        """Whether the condition is met by these flags and facts."""
        value = known[self.name]
        return (str(value) in self.values) != self.excluded if self.values else bool(value)

    def text(self, spelling: Callable[[str], str]) -> str:
        """The words of a message that asks for it.

        :param spelling: the name of a flag -> how the message writes it, see `Settings.spelling`.
        """
        if self.name in FACTS:
            return FACTS[self.name]
        flag = spelling(self.name)
        if self.excluded:
            return f"another {flag} than {' and '.join(self.values)}"
        return f"{flag} {' or '.join(self.values)}".rstrip()


def atoms_of(condition: str) -> tuple[list[Atom], bool]:
    """The parts of a condition, and whether all of them must hold; else one is enough."""
    joint = " and " in condition
    found = []
    for part in condition.split(" and " if joint else " or "):
        name, equals, values = part.partition("=")
        found.append(Atom(name.rstrip("!"), tuple(values.split(",")) if equals else (), name.endswith("!")))
    return found, joint


def missing(condition: str, known: Mapping[str, Any]) -> list[Atom]:
    """The parts of a condition that are not met; empty if the condition is met or cannot be judged.

    If the parts are joined by "or", one of those that are returned would be enough.

    :param known: flags and facts -> their values.
    """
    atoms, joint = atoms_of(condition)
    if any(each.name in FACTS and each.name not in known for each in atoms):
        return []
    failing = [each for each in atoms if each.name in known and not each.holds(known)]
    held = any(each.name in known and each.holds(known) for each in atoms)
    return [] if held and not joint else failing


def refuse_idle(settings: Settings, facts: Mapping[str, bool], needs: Sequence[Need] = NEEDS) -> None:
    """Refuse a flag of the command line that would be ignored, and warn of one in a file.

    :param facts: those of `FACTS` that the command knows.
    :raises UserError: for one that has another value than its default, naming what it would act beside.
    """
    known, in_file = {**settings.values, **facts}, {}
    for need in needs:
        wanted = missing(need.condition, known)
        for name in need.flags if wanted else ():
            if not settings.is_given(name):
                continue
            if name in settings.defaults and same(settings.values[name], settings.defaults[name]):
                continue
            joined = " and " if " and " in need.condition else " or "
            in_file[name] = asked = joined.join(each.text(settings.spelling) for each in wanted)
            if not settings.is_typed(name):
                continue
            has = [f"{settings.spelling(each.name)} {known[each.name]}" for each in wanted if each.values]
            here = f", and this run has {' and '.join(has)}" if has else ""
            raise UserError(f"{settings.given[name]} {settings.values[name]} has no effect without {asked}{here}: "
                            "give that, too, or leave it out")
    warn_of_idle(settings, in_file)


def warn_of_idle(settings: Settings, asked: Mapping[str, str]) -> None:
    """Warn of flags that a file sets and the run ignores; not an error, as a file may hold every flag of another run.

    :param asked: flag -> what it would need; those that no file sets are passed over.
    """
    idle = [name for name in asked if settings.provenance(name) == Provenance.FILE]
    if not idle:
        return
    words = [f"{name} {settings.values[name]} (needs {asked[name]})" for name in idle[:MOST_IDLE]]
    others = f", and {len(idle) - MOST_IDLE} more" if len(idle) > MOST_IDLE else ""
    logger.warn(f"{settings.given[idle[0]]} sets what has no effect in this run: {', '.join(words)}{others}")


def refuse_options_of_others(section: Any, users: Mapping[str, Sequence[str]], flag: str, chosen: str) -> None:
    """Refuse an option of one component if another component is chosen, such as --eta with --sampler heun.

    :param section: a config dataclass with the options.
    :param users: option -> the components that use it; fields that are not listed are not checked.
    :param flag: the flag that chooses a component.
    :param chosen: its value.
    :raises UserError: for an option that differs from its default and that the chosen component does not use.
    """
    for field in dataclasses.fields(section):
        value, owners = getattr(section, field.name), users.get(field.name, (chosen,))
        if value != field.default and chosen not in owners:
            raise UserError(f"--{field.name} {value} belongs to --{flag} {', '.join(owners)}, not to {chosen}; "
                            "drop one of them")
