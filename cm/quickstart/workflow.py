"""From images to a few-step generator: inspect the images, measure, plan, then run each stage once."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from cm.data.sources import open_source
from cm.errors import UserError
from cm.io import storage
from cm.io.outputs import Output, check_outputs
from cm.io.terminal import size_text, without_controls
from cm.quickstart import results
from cm.quickstart.look import Findings, describe, look, refuse_damaged
from cm.quickstart.plan import HEUN_STEPS, START_FACTOR, Machine, Plan, Speed, Wish, make_plan
from cm.quickstart.stages import Commands, Stage, execute

LOOK_SHARE, MEASURE_SHARE = 0.02, 0.05                      # of the time, at most, for what comes before the plan
REAL_IMAGES = 10_000                                        # largest number of images in the reference
DIGITS = "digits"
PLAN_FILE = "plan.json"
EVALUATED_FILE = "evaluated.json"
PARTS = {"found": Findings, "machine": Machine, "plan": Plan}   # of the plan's file, beside the order
TWO_STEPS = f"0,{HEUN_STEPS // 2 - 1},{HEUN_STEPS - 1}"


@dataclass(frozen=True)
class Order:
    """The request of the user.

    :param wish: the choices on which the plan depends.
    :param ranks: number of ranks; 0: start commands without mpiexec.
    :param scripts: the folder of the commands.
    :param options: more flags for both trainings.
    :param inception: the feature extractor of the evaluation; empty: none.
    """

    data_dir: str
    out: Path
    wish: Wish
    ranks: int
    scripts: Path
    options: tuple[str, ...] = ()
    inception: str = ""
    trust_extractor: bool = False

    def remembered(self) -> dict[str, Any]:
        """The flags that must not change when the command is continued."""
        wish = dataclasses.asdict(self.wish)
        del wish["evaluates"]                               # numbers may be added later
        return {"data_dir": self.data_dir, **wish, "ranks": self.ranks, "train_options": shlex.join(self.options)}


class Workflow:
    """The stages of one request.

    :raises UserError: if the folder holds another order, or cannot be written.
    """

    def __init__(self, order: Order):
        self.order, self.out, self.start_time = order, order.out, time.monotonic()
        source = order.data_dir if os.path.exists(order.data_dir) else None
        check_outputs([Output("--out", order.out, "folder")], {"--data_dir": source})
        check_extractor(order.inception)
        self.kept = self.read_kept()
        self.commands = Commands(order.out, order.scripts, order.ranks)

    def read_kept(self) -> dict[str, Any] | None:
        """The plan of an earlier start, if there is one.

        :raises UserError: if it is for another order, naming what differs, or cannot be read.
        """
        path = self.out / PLAN_FILE
        if not path.exists():
            return None
        try:
            kept = json.loads(path.read_text())
            known = kept["order"]
        except (ValueError, KeyError, TypeError):
            raise self.damaged() from None
        differing = [f"--{name} {known.get(name)} instead of {value}" for name, value in self.order.remembered().items()
                     if known.get(name) != value]
        if differing:
            raise UserError(f"{self.out} was started with other flags ({', '.join(differing)}): give the same to "
                            "resume, or another --out to start again")
        return kept

    def damaged(self) -> UserError:
        """The error for a plan that cannot be read."""
        return UserError(f"{self.out / PLAN_FILE} is damaged: remove it to plan again, or choose another --out")

    # --- before the work -------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Inspect the images, measure and plan, or take the plan of an earlier start; then print the plan."""
        if self.kept is None:
            found = look(self.order.data_dir, self.order.wish.labels, LOOK_SHARE * 3600 * self.order.wish.hours)
            print(without_controls("\n".join(["What there is", *indented(describe(found))])), flush=True)
            refuse_damaged(found)
            machine = self.measure(found)
            plan = make_plan(found, machine, self.order.wish, time.monotonic() - self.start_time)
            self.write(found, machine, plan)
        else:
            try:
                found, machine, plan = (restored(kind, self.kept[name]) for name, kind in PARTS.items())
            except (KeyError, TypeError, ValueError):
                raise self.damaged() from None
            print(f"The plan of an earlier start: {self.out / PLAN_FILE}")
            print(without_controls("\n".join(indented(describe(found)))))
        self.found, self.plan = found, plan
        print(without_controls("\n".join(["What was chosen", *indented(self.describe_plan(machine))])), flush=True)

    def measure(self, found: Findings) -> Machine:
        """Start the measuring command on all ranks, and add the time that its start took."""
        storage.make_folder(self.out)
        request, result = self.out / "request.json", self.out / "measured.json"
        wish = self.order.wish
        storage.write_json(request, {"found": dataclasses.asdict(found), "wish": dataclasses.asdict(wish),
                                     "seconds": MEASURE_SHARE * 3600 * wish.hours})
        stage = Stage("measuring a few steps", result, ("-m", "cm.quickstart.measure", str(request), str(result)),
                      self.order.ranks)
        print(f"[{stage.name}]", flush=True)
        start_time = time.monotonic()
        result.unlink(missing_ok=True)
        if status := execute(stage.command):
            raise UserError(f"measuring ended with status {status}; see its messages above")
        content = json.loads(result.read_text())
        start = time.monotonic() - start_time - content["seconds"]
        return dataclasses.replace(restored(Machine, content["machine"]), start=START_FACTOR * max(0.0, start))

    def write(self, found: Findings, machine: Machine, plan: Plan) -> None:
        """Write the plan, and the settings of both trainings as files for --config."""
        for name, flags, command in (("teacher", plan.teacher, "cm-train"),
                                     ("student", self.student_flags(plan), "cm-distill")):
            text = f"# Written by cm-quickstart, for {command} --config.\n" + yaml.safe_dump(flags, sort_keys=False)
            storage.write_bytes(self.out / f"{name}.yaml", text.encode())
        parts = dict(zip(PARTS, map(dataclasses.asdict, (found, machine, plan))))
        content = {"order": self.order.remembered(), **parts}
        storage.write_json(self.out / PLAN_FILE, content)   # last, so that an existing plan is complete

    def student_flags(self, plan: Plan) -> dict[str, Any]:
        """The flags of the student, with the teacher's folder: its best or newest average is used."""
        return {"teacher_model_path": str(self.out / "teacher"), **plan.student}

    def describe_plan(self, machine: Machine) -> list[str]:
        """The plan with its times and memory, as lines of text."""
        plan, teacher, student = self.plan, self.plan.teacher, self.plan.student
        train = plan.times["training the teacher"] + plan.times["training the student"]
        share = plan.times["training the teacher"] / max(train, 1e-9)
        lines = [
            f"machine: {machine.device}, {machine.precision}, {machine.ranks} rank(s)",
            f"network: {plan.network}, {plan.parameters:,} parameters, images of {plan.image_size}x{plan.image_size}x"
            f"{teacher['channels']}, {'with' if teacher['class_cond'] else 'without'} classes",
            f"teacher: EDM, {teacher['total_training_steps']} steps of {plan.batch} images, learning rate "
            f"{teacher['lr']:g}, {'mirrored at random' if teacher['random_flip'] else 'never mirrored'}",
            f"student: {plan.method.upper()}, {student['total_training_steps']} steps; the teacher has {share:.0%} of "
            "the time for training",
            f"samples: {plan.num_samples} of each method",
            f"memory of a rank: about {size_text(plan.memory)}",
            f"time: {clock(sum(plan.times.values()))} of {clock(3600 * self.order.wish.hours)}",
            *(f"  {name}: {clock(value)}" for name, value in plan.times.items()),
        ]
        return lines + [f"note: {note}" for note in self.notes()]

    def notes(self) -> Iterator[str]:
        """Notes on what the user may not expect."""
        seen = self.plan.teacher["total_training_steps"] * self.plan.batch
        if seen < 20_000:
            yield (f"the teacher sees only {seen} images: expect first shapes, and give more --hours for more")
        if self.found.images < 1000:
            yield (f"{self.found.images} images are few: with much time the network learns them by heart")
        if not self.evaluates:
            yield self.how_to_evaluate()

    def how_to_evaluate(self) -> str:
        """A note on how to get metrics, if there are none."""
        command = shlex.join(["cm-classifier", "--data_dir", self.order.data_dir, "--image_size",
                              str(self.plan.image_size), "--out", "classifier.ts"])
        own = f", or with a small classifier of your own classes ({command})" if self.found.has_classes else ""
        return ("no Frechet distance, precision and recall: they need a feature extractor. Start the same command "
                f"again with --inception FILE (docs/evaluation.md){own}; finished stages are kept")

    # --- the work ----------------------------------------------------------------------------------------------------

    @property
    def inception(self) -> str:
        """The extractor of this start, else of an earlier one; empty: none, or the digits' classifier."""
        return self.order.inception or self.evaluated_with() or ""

    @property
    def evaluates(self) -> bool:
        """Whether metrics are computed."""
        return bool(self.inception) or self.order.data_dir == DIGITS

    def evaluated_with(self) -> str | None:
        """The extractor of the existing metrics; None without metrics."""
        path = self.out / EVALUATED_FILE
        return json.loads(path.read_text())["inception"] if path.exists() else None

    @cached_property
    def methods(self) -> dict[str, tuple[str, str, tuple[str, ...]]]:
        """Folder of samples -> name of the method, its run, and how it is sampled."""
        student, steps = self.plan.method.upper(), str(HEUN_STEPS)
        return {
            "samples_teacher": (f"EDM teacher, Heun {steps}", "teacher", ("--sampler", "heun", "--steps", steps)),
            "samples_onestep": (f"{student}, one step", "student", ("--sampler", "onestep")),
            "samples_twostep": (f"{student}, two steps", "student",
                                ("--sampler", "multistep", "--steps", steps, "--ts", TWO_STEPS)),
        }

    def stages(self) -> list[Stage]:
        """All commands in their order."""
        plan, make, options = self.plan, self.commands, self.order.options
        shape = f"{plan.image_size}x{plan.image_size}x{plan.teacher['channels']}"
        stages = [
            make.training("teacher", "edm_train", "--config", str(self.out / "teacher.yaml"), *options),
            make.training("student", "cm_train", "--config", str(self.out / "student.yaml"), *options),
        ]
        for key, (name, run, how) in self.methods.items():
            stages.append(make.sampling(key, name, self.out / run, plan.num_samples, "--batch_size", "64", *how))
        if self.evaluates:
            own = not self.inception
            extractor = ("--inception", str(self.out / "classifier.ts"), "--class_accuracy") if own else (
                "--inception", self.inception, *(["--trust_extractor"] if self.order.trust_extractor else []))
            stages += [make.classifier(DIGITS, plan.image_size)] if own else []
            stages += [
                make.evaluation(key, name, self.out / key / f"samples_{plan.num_samples}x{shape}.npz", *extractor)
                for key, (name, _, _) in self.methods.items()
            ]
        return [*stages, make.report(["teacher", "student"])]

    def run(self) -> None:
        """Run all stages that are not done; end with the table, the picture and the report."""
        self.check_evaluated()
        for stage in self.stages():
            stage.run("quickstart")
        real, path = self.out / "real.npz", self.out / "samples.png"
        folders = {name: self.out / key for key, (name, _, _) in self.methods.items()}
        results.picture(path, real, "real images", folders)
        print("\n" + results.table([results.row(name, folder) for name, folder in folders.items()], self.note()))
        spent, planned = time.monotonic() - self.start_time, sum(self.plan.times.values())
        print(f"\n{clock(spent)} since this start; {clock(planned)} were planned for all. The picture: {path}; "
              f"the trainings: {self.out / 'report.html'}")
        if not self.evaluates:
            print(without_controls(f"Left out: {self.how_to_evaluate()}"))

    def check_evaluated(self) -> None:
        """Write the real images, and record the extractor: metrics of two extractors must not be in one table.

        :raises UserError: if an earlier start has used another extractor.
        """
        channels = self.plan.teacher["channels"]
        real, path = self.out / "real.npz", self.out / EVALUATED_FILE
        if not real.exists():
            source = open_source(self.order.data_dir, self.plan.image_size, labels=self.order.wish.labels,
                                 channels=channels)
            results.write_real(real, source, REAL_IMAGES)
        if not self.evaluates:
            return
        known = self.evaluated_with()
        if known is not None and known != self.inception:
            raise UserError(f"{self.out} was evaluated with {known or 'a classifier of the digits'}: give the same "
                            f"--inception, or remove {path} and the metrics.json beside the samples")
        storage.write_json(path, {"inception": self.inception})

    def note(self) -> str:
        """A note on the metrics in the table."""
        if self.inception:
            return f"* in the features of {self.inception}, {self.plan.num_samples} samples of each method"
        return ("* in the features of a small classifier of digits that this command trains; not Inception FID, and "
                "not comparable with it")


def check_extractor(inception: str) -> None:
    """:raises UserError: if the file of the extractor does not exist; it is better to know this before training."""
    path = inception.rpartition(":")[2]
    if not path or inception in ("torch", "tf") or "://" in inception or os.path.exists(inception):
        return
    if not os.path.exists(path):
        raise UserError(f"--inception {inception}: there is no such file")


def restored(kind: Any, content: dict[str, Any]) -> Any:
    """A dataclass of this package from its JSON."""
    if kind is Machine:
        speeds = tuple(Speed(**{**each, "steps": tuple(map(tuple, each["steps"]))}) for each in content["speeds"])
        return Machine(**{**content, "speeds": speeds})
    if kind is Findings:
        content = {**content, "sides": tuple(content["sides"]), "damaged": tuple(content["damaged"])}
    return kind(**content)


def indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def clock(seconds: float) -> str:
    """'1 h 05 min', '3 min 20 s' or '12 s'."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"
