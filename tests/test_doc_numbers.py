"""Numbers of the pages are those of the results files that their commands have written.

A number that is rounded on a page is rounded here in the same way. A page changes with its file, or this fails.
"""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def page(name: str) -> str:
    """The text of a page in one line, so that a sentence is found wherever it breaks."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def rows(name: str) -> set[str]:
    return set((ROOT / name).read_text(encoding="utf-8").splitlines())


def results(path: str) -> dict:
    return json.loads((ROOT / path).read_text())


def span(values: list[float]) -> str:
    """Lowest and highest value with two decimals, as the pages write a range."""
    low, high = (f"{value:.2f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


# --- docs/performance.md ----------------------------------------------------------------------------------------------

SUITES = {suite: {line["name"]: line for line in content["lines"]}
          for suite, content in results("benchmarks/results_cpu.json").items()}
VARIANTS = ("toolkit fp32", "toolkit bf16", "diffusers' network fp32", "diffusers' network bf16")


def ratios(suite: str, variant: str) -> list[float]:
    return [line["time_over_baseline"] for name, line in SUITES[suite].items() if name.endswith(variant)]


@pytest.mark.parametrize("suite, label", [
    ("train", "time of training steps (EDM, distillation, consistency training)"),
    ("sample", "time of sampling (one step, Heun)"),
])
def test_ratios_of_time(suite, label):
    cells = [span(ratios(suite, variant)) for variant in VARIANTS]
    assert f"| {label} | {' | '.join(cells)} |" in rows("docs/performance.md")


def test_ratios_of_memory():
    peaks = {name: line["peak_mib"] for name, line in SUITES["memory"].items()}
    kinds = sorted({name.split(",")[0] for name in peaks})
    cells = [span([peaks[f"{kind}, {variant}"] / peaks[f"{kind}, plain fp32"] for kind in kinds])
             for variant in VARIANTS[:2]]
    assert f"| peak memory of a step | {' | '.join(cells)} | | |" in rows("docs/performance.md")


def test_speed_beside_the_ceilings():
    fp32 = [line for suite in ("train", "sample") for name, line in SUITES[suite].items()
            if name.endswith("toolkit fp32")]
    gemm, conv = ([100 * line[share] for line in fp32] for share in ("share_of_gemm", "share_of_conv"))
    text = page("docs/performance.md")
    assert f"run at {min(gemm):.0f} to {max(gemm):.0f} % of the speed of large matrix products" in text
    assert f"at {min(conv):.0f} to {max(conv):.0f} % of the speed of its 3x3 convolutions" in text


def test_what_convolutions_in_bf16_allow():
    ceiling = results("benchmarks/results_cpu.json")["train"]["ceiling"]["conv"]
    least = [1e9 * line["achieved_gflops"] / ceiling["bf16"] for suite in ("train", "sample")
             for name, line in SUITES[suite].items() if name.endswith("plain fp32")]
    text = page("docs/performance.md")
    assert f"which are {ceiling['bf16'] / ceiling['fp32']:.1f} times as fast as in fp32 on this CPU" in text
    assert f"the network's operations would take {span(least)} of the plain implementation's time" in text


def test_operations_of_steps():
    lines = {name: line for name, line in SUITES["launches"].items() if line["launches_over_plain"]}
    fp32, bf16 = ([line["launches_over_plain"] for name, line in lines.items()
                   if name.endswith(f"toolkit {precision}") and "NFE" not in name] for precision in ("fp32", "bf16"))
    edm, heun, one = (lines[f"{name}, toolkit fp32"] for name in ("edm", "heun (9 NFE)", "onestep (1 NFE)"))
    text = page("docs/performance.md")
    assert f"operations on a GPU: {span(fp32)} of the plain implementation's in fp32 and {span(bf16)} in bf16" in text
    passes, rest = edm["note"].split()[0], edm["note"].split()[-4]
    parts = f"of which {passes} are passes of the network and {rest} are all the rest"
    assert f"EDM's step has {edm['launches']:,} operations, {parts}" in text
    assert (f"Sampling takes {heun['launches_over_plain']:.2f} of the plain implementation's operations with Heun's "
            f"method and {one['launches_over_plain']:.2f} in one step") in text
    compiled = SUITES["launches"]["onestep (1 NFE), toolkit compiled fp32"]["launches_over_plain"]
    assert f"one step then takes {compiled:.2f}, as counted in the code" in text


def test_steps_on_busy_cores():
    seconds = {(row["ranks"], row["loops"], row["way"]): row["seconds"]
               for row in results("benchmarks/busy_threads.json")["rows"] if row["network"] == "demo"}
    own, single, default = (seconds[1, 4, way] for way in ("toolkit", "one thread", "libgomp's default"))
    text = page("docs/performance.md")
    assert (f"takes {own:.2f} s on one rank with two threads, {single:.2f} s with one thread, and {default:.2f} s with "
            f"the default of libgomp; on free cores it takes {seconds[1, 0, 'toolkit']:.2f} s. Two ranks with one "
            f"thread each take {seconds[2, 4, 'toolkit']:.2f} s") in text
    assert max(own / single, seconds[2, 4, "toolkit"] / seconds[2, 4, "one thread"]) < 2 < default / single


def test_cost_of_the_objectives():
    # The median of ratios of neighbouring runs, which the benchmark writes as "1.02 of edm's time, ...".
    stf, sadpm, cdm, two = (SUITES["objectives"][name]["note"].split()[0] for name in (
        "stf, 4096 references", "sadpm, 2 steps", "cdm, 6 levels", "cdm, 2 levels",
    ))
    assert (f"STF takes {stf} times as long per step as EDM, SA-DPM {sadpm} times, CDM {cdm} times "
            f"({two} with two levels)") in page("docs/performance.md")


def test_cost_of_zips():
    notes = {name: line["note"].split()[0] for name, line in SUITES["data"].items()}
    without, worker = (notes[f"batches, {kind}, zip"] for kind in ("no worker", "one worker"))
    text = page("datasets/README.md")
    assert f"{without} of the folder's time without loader processes and {worker} with one" in text


def test_cost_of_evaluation():
    lines = SUITES["eval"]
    distance = lines["Frechet distance, 2048 pooled features"]["seconds"]
    moments = 50_000 / lines["moments, 2048 pooled features"]["images_per_second"]
    pairs = lines["precision and recall, 10000 x 10000, 2048 features"]["seconds"] * 25 / 60
    inception = lines["Inception-v3"]["images_per_second"]
    text = page("docs/performance.md")
    assert f"take about {pairs:.0f} minutes (extrapolated from 10,000 x 10,000)" in text
    assert f"the Fréchet distance {distance:.1f} s, the moments of 50,000 images {moments:.0f} s" in text
    assert f"Inception processes {inception:.0f} images/s" in text


def test_cost_of_opening_large_sets():
    edm, classes, folder, npz = results("benchmarks/large_sets.json")
    text = page("docs/performance.md")

    def cost(row, who):
        return f"{row[who]['cpu_seconds']:.1f} s", f"{row[who]['peak_mib']:.0f} MiB"

    def both(number, digits):
        low, high = sorted(row["plain"][number] for row in (edm, classes))
        return f"{low:.{digits}f} to {high:.{digits}f}"

    first, first_peak = cost(edm, "rank_0")
    second, second_peak = cost(classes, "rank_0")
    assert f"({edm['images']:,} images) takes rank 0 {first} of processor time and {first_peak} for a zip" in text
    assert f"{second} and {second_peak} for a zip with one folder per class" in text
    others = [row["other_ranks"] for row in (edm, classes)]
    assert (f"Each other rank needs {max(row['cpu_seconds'] for row in others):.1f} s and at most "
            f"{max(row['peak_mib'] for row in others):.0f} MiB") in text
    assert f"takes {both('cpu_seconds', 1)} s and {both('peak_mib', 0)} MiB on every rank" in text
    for row, words in ((folder, "A folder of as many files takes"), (npz, "as many images, of 10x10,")):
        own, plain = (f"{each['cpu_seconds']:.2f} s and {each['peak_mib']:.0f} MiB"
                      for each in (row["rank_0"], row["plain"]))
        assert f"{words} {own} (plain: {plain})" in text


# --- docs/choosing.md -------------------------------------------------------------------------------------------------

sys.path.insert(0, str(ROOT / "benchmarks"))
CONTEST = results("benchmarks/compare_digits.json")
ECT, MEAN_FLOW, TEACHER = "ECT of EDM", "MeanFlow", "EDM, slow clock"


def distances(training: str, sampler: str) -> list[float]:
    return [row["distance"] for row in CONTEST["scores"] if (row["training"], row["sampler"]) == (training, sampler)]


def test_the_table_of_methods_is_made_of_the_raw_results():
    from compare_methods import table

    assert set(table(CONTEST)) <= rows("docs/choosing.md")


SECONDS = results("benchmarks/compare_digits_seconds.json")


def test_what_equal_seconds_show():
    from bench.contest import TRAININGS
    from compare_methods import equal_seconds, table

    assert set(table(SECONDS)) <= rows("docs/choosing.md")
    assert SECONDS["steps"] == equal_seconds(CONTEST, {name: TRAININGS[name] for name in SECONDS["steps"]})
    fewest, most = sorted(SECONDS["steps"], key=SECONDS["steps"].get)[::len(SECONDS["steps"]) - 1]
    text = page("docs/choosing.md")
    assert f"from {SECONDS['steps'][fewest]} steps of {fewest} to {SECONDS['steps'][most]} of {most}" in text
    ends = {}
    for row in SECONDS["scores"]:
        if row["sampler"].endswith("one step"):
            ends.setdefault(row["training"], []).append(row["distance"])
    for name in ("iCT", MEAN_FLOW, ECT, "CT"):
        assert f"{min(ends[name]):.3g} to {max(ends[name]):.3g}" in text
    assert max(ends["iCT"]) > max(ends[MEAN_FLOW]) > min(ends["iCT"]) and max(ends[ECT]) > min(ends["iCT"])
    assert all(max(ends[MEAN_FLOW]) < min(ends[name]) for name in ("CT", "sCT", "CD of EDM", "sCD of EDM",
                                                                   "alpha-Flow of EDM"))
    assert all(min(ends[name]) < max(distances(name, "one step")) for name in ("CD of EDM", "sCD of EDM"))
    assert all(max(ends[name]) > min(distances(name, "one step")) for name in ("CD of EDM", "sCD of EDM"))


LONGER = results("benchmarks/compare_cifar10.json")


def test_the_table_of_longer_trainings_is_made_of_the_raw_results():
    from compare_methods import table

    assert set(table(LONGER)) <= rows("docs/choosing.md")
    images = {name: steps * LONGER["images_per_step"] for name, steps in LONGER["steps"].items()}
    assert {images.pop(name) for name in ("EDM, slow clock", "iCT")} == {96_000}
    assert set(images.values()) == {25_600}, "of the students"


def test_what_the_longer_trainings_show():
    ends = {(row["training"], row["sampler"]): row["distance"] for row in LONGER["scores"]}
    students = {name for name, _ in ends} - {"EDM, slow clock", "iCT"}
    for name in students:
        one, two = (next(ends[name, way] for way in (f"flow map, {steps}", steps) if (name, way) in ends)
                    for steps in ("one step", "two steps"))
        assert ends["EDM, slow clock", "Heun 18"] < two < one
    for name in {name for name, _ in ends}:
        curve = [row["distance"] for row in LONGER["curves"] if row["training"] == name]
        assert len(curve) >= 6 and curve[-1] < curve[0]
        assert curve[-1] < curve[-2] or name not in ("EDM, slow clock", "iCT")


@pytest.mark.parametrize("better, worse", [
    ((ECT, "two steps"), (TEACHER, "Heun 18")), ((TEACHER, "Heun 18"), ("EDM", "Heun 18")),
    *[((MEAN_FLOW, "flow map, one step"), (other, "one step"))
      for other in (ECT, "CD of EDM", "sCD of EDM", "sCT", "CT", "iCT")],
    (("sCT", "one step"), ("CT", "one step")), ((ECT, "one step"), ("CD of EDM", "one step")),
    (("CD of EDM", "one step"), ("alpha-Flow of EDM", "flow map, one step")),
    (("EDM", "ancestral 35"), ("EDM", "Heun 18, churn 10")), (("EDM", "Heun 18, churn 10"), ("EDM", "Heun 18")),
])
def test_a_method_is_called_better_where_the_seeds_do_not_overlap(better, worse):
    assert max(distances(*better)) < min(distances(*worse))
    text = page("docs/choosing.md")
    low, high = min(distances(*better)), max(distances(*better))
    assert f"{low:.3g} to {high:.3g}" in text


def test_what_cannot_be_told_apart_overlaps():
    assert max(distances(ECT, "two steps")) > min(distances(TEACHER, "ancestral 35"))


# --- docs/runs.md -----------------------------------------------------------------------------------------------------


def test_how_long_training_waits_for_a_save():
    sizes = results("benchmarks/save_stall.json")["millions of parameters"]
    small, large = ([f"{way['waits']:.2g}" for way in sizes[size].values()] for size in ("8", "300"))
    assert (f"training waits {small[0]} s for files, {small[1]} s for shares and {small[2]} s for shares in the "
            f"background with 8 million parameters, and {large[0]}, {large[1]} and {large[2]} s with 300 million"
            ) in page("docs/runs.md")


# --- README.md --------------------------------------------------------------------------------------------------------


def test_the_table_of_the_demo():
    for row in results("docs/demo.json")["methods"]:
        metrics = [f"{row[name]:.3f}" for name in ("frechet_distance", "precision", "recall")]
        accuracy = f"{row['class_accuracy']:.1%}".replace("%", " %")
        assert f"| {row['method']} | {row['nfe']} | {' | '.join(metrics)} | {accuracy} |" in rows("README.md")


# --- docs/samplers.md -------------------------------------------------------------------------------------------------

COST = results("docs/samplers/cost.json")


@pytest.mark.parametrize("panel", ["exact denoiser", "imperfect denoiser"])
def test_errors_of_the_samplers_against_cost(panel):
    for name, curve in COST[panel].items():
        cells = " | ".join(f"{error:.1e}" for _, error in curve)
        assert f"| {name} | {cells} |" in rows("docs/samplers.md")
        assert all(evaluations <= budget for (evaluations, _), budget in zip(curve, COST["budgets"]))


def test_measured_orders_of_the_samplers():
    for name, found in results("docs/samplers/orders.json")["samplers"].items():
        cells = " | ".join(f"{order:.2f} ({expected})" for order, expected in zip(found["orders"], found["expected"]))
        assert f"| {name} | {cells} | {found['strong_errors']['256']:.1e} |" in rows("docs/samplers.md")


def test_what_is_said_of_the_samplers_holds_in_the_table():
    exact, wrong = ({name: [error for _, error in curve] for name, curve in COST[panel].items()}
                    for panel in ("exact denoiser", "imperfect denoiser"))
    at = {budget: column for column, budget in enumerate(COST["budgets"])}
    order_one = {"euler", "ancestral", "sde", "ddim", "ddim, eta 1", "pc, ve", "pc, vp"}
    best = {budget: min(order_one, key=lambda name: exact[name][column]) for budget, column in at.items()}
    assert (best[8], best[16], best[32], best[64]) == ("pc, vp", "sde", "pc, vp", "pc, vp")
    for budget in (64, 128, 256):
        assert min(exact, key=lambda name: exact[name][at[budget]]) == "dpm"
    assert exact["ito"][at[64]] > exact["sde"][at[64]] and exact["ito"][at[128]] < exact["sde"][at[128]]
    # "reach 0.011 at": the first budget whose error is printed as 1.1e-02.
    reached = {name: next(budget for budget, column in at.items() if f"{wrong[name][column]:.1e}" == "1.1e-02")
               for name in ("heun", "dpm", "ito, eta 0", "euler", "ddim")}
    assert reached == {"heun": 64, "dpm": 64, "ito, eta 0": 128, "euler": 256, "ddim": 256}
