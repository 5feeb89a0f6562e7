"""The report of real runs, looked at in a real browser, and as text."""

import html
import html.parser
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cm.errors import UserError
from cm.report.names import run_names
from cm.report.page import duration
from cm.report.tables import evenly
from support.as_module import as_module
from support.browser import chromium, needs_browser, screenshot
from support.nets import save_measure
from support.warm import python

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ["--config", ROOT / "configs/digits/ct.yaml", "--precision", "fp32", "--global_batch_size", 16,
         "--total_training_steps", 12, "--log_interval", 1, "--save_interval", 6, "--eval_interval", 4,
         "--eval_samples", 32]
COLOURS = {"light": ((36, 88, 211), (207, 74, 10)), "dark": ((130, 167, 255), (255, 155, 102))}    # of runs 0 and 1


def script(*words, expect=0):
    done = python([str(word) for word in words], timeout=120, env={"OPENAI_LOG_FORMAT": "csv"})
    assert done.rc == expect, done
    return done


def report(*words):
    """scripts/report.py in this process."""
    module = as_module(ROOT / "scripts/report.py")
    module.main(module.read_flags([str(word) for word in words]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two short trainings that differ in two flags, and their report."""
    folder = tmp_path_factory.mktemp("report")
    save_measure(folder)
    for name, lr, scales in (("slow", 1e-4, 12), ("fast", 3e-3, 20)):
        script(ROOT / "scripts/cm_train.py", *TRAIN, "--lr", lr, "--end_scales", scales, "--eval_ref",
               folder / "ref.npz", "--inception", folder / "tiny.ts", "--trust_extractor", "--log_dir", folder / name)
    (folder / "slow" / "metrics.json").write_text(json.dumps({"metrics": {
        "frechet_distance": {"label": "FID", "value": 12.3456789, "sample_count": 50000, "available": True},
    }}))
    report(folder / "slow", folder / "fast", "--out", folder / "report.html")
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def share(picture, colour, tolerance=12):
    return (np.abs(picture.astype(int) - colour).max(2) <= tolerance).sum()


def test_a_card_has_the_classes_with_their_numbers_of_images(folder, page):
    kept = json.loads((folder / "slow" / "classes.json").read_text())
    assert list(kept["classes"]) == [str(digit) for digit in range(10)]
    assert sum(kept["classes"].values()) == kept["images"]
    shown = ", ".join(f"{digit} {kept['classes'][str(digit)]}" for digit in range(8))
    assert f"<dt>Classes</dt><dd>10 <small>{shown}, and 2 more</small>" in page


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_the_curves_and_pictures_without_a_complaint(folder, scheme):
    flags = ["--force-dark-mode"] if scheme == "dark" else []
    picture, visit = screenshot(folder / "report.html", folder, 1400, 1900, *flags)
    assert visit.console == []
    assert picture.shape == (1900, 1400, 3)
    assert (picture[5, 5].mean() < 60) == (scheme == "dark")
    for colour in COLOURS[scheme]:
        assert share(picture[360:], colour) > 1500, "curves, below the cards"
    grey = (picture.max(2).astype(int) - picture.min(2) == 0) & (np.abs(picture[..., 0].astype(int) - 128) < 25)
    assert grey.sum() > 20_000, "pictures of samples of an untrained network"


@needs_browser
def test_values_stand_under_the_pointer(folder, page, tmp_path):
    """The page's own script on a pointer that the test moves; its policy would forbid the test's script."""
    move = """<script>
        const svg = document.querySelector("figure.plot svg"), frame = svg.getBoundingClientRect();
        svg.dispatchEvent(new PointerEvent("pointermove", {clientX: frame.right - 8, clientY: frame.top + 50}));
        document.title = document.getElementById("tip").innerText;</script>"""
    changed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace("</body>", move + "</body>")
    (tmp_path / "moved.html").write_text(changed, encoding="utf-8")
    visit = chromium(tmp_path / "moved.html", tmp_path, "--dump-dom")
    rows = (folder / "slow" / "progress.csv").read_text().splitlines()
    loss = float(dict(zip(rows[0].split(","), rows[-1].split(",")))["loss"])
    title = re.search(r"<title>(.*?)</title>", visit.dom, re.DOTALL)[1]
    assert "step 12" in title and "slow" in title and "fast" in title and f"{loss:.4g}" in title
    assert visit.console == []


@needs_browser
def test_hostile_text_is_text(folder, tmp_path, capsys):
    """Names, cells and flags that are HTML, even without the policy that would stop their scripts."""
    evil = "<img src=x onerror=\"document.title='owned'\"></script><script>document.title='owned'</script>"
    run = tmp_path / "a&<b>'\"onload=x"
    run.mkdir()
    column = evil.replace('"', '""')
    (run / "progress.csv").write_text(f'step,loss,"{column}"\n1,2,3\n2,3,4\n3,{evil[:5]},5\n')
    (run / "config.json").write_text(json.dumps({evil: evil, "total_training_steps": evil, "training_mode": [evil]}))
    (run / "best.json").write_text(json.dumps({"metric": evil, "value": evil, "settings": {"num_samples": evil}}))
    (run / "a.json").write_text(json.dumps({"metrics": {evil: {"value": evil}}, "label": [evil], "value": evil}))
    report(run, folder / "slow")
    assert "column 'loss': 1 cell(s) are no number" in capsys.readouterr().out
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page and page.count("<script") == page.count("</script>")
    open_page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    (tmp_path / "open.html").write_text(open_page, encoding="utf-8")
    visit = chromium(tmp_path / "open.html", tmp_path, "--dump-dom")
    assert visit.console == []
    assert re.search(r"<title>(.*?)</title>", visit.dom)[1].startswith("Training runs: a&amp;&lt;b&gt;")
    assert "&lt;img src=x" in visit.dom


def test_the_page_needs_nothing_but_itself(page):
    bare = page.replace('"http://www.w3.org/2000/svg"', "")                 # the name of a language, never fetched
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import|https?:|fetch\(|<link(?! rel="icon")', bare)
    assert "default-src 'none'" in html.unescape(page)


def test_everything_asked_for_is_on_the_page(folder, page):
    for title in ("Loss", "Noise levels N(k)", "Target decay μ(k)", "Gradient norm", "Fréchet distance", "Throughput"):
        assert title in page
    assert page.count("data:image/png;base64,") == 4, "2 runs, 2 saves"
    best = json.loads((folder / "fast" / "best.json").read_text())
    assert f"{best['value']:.6g}" in page and best["file"] in page and best["metric"] in page
    assert "12.3457" in page and ">50000<" in page, "what evaluator.py left"
    different = re.search(r'<table class="settings different[^"]*">.*?</table>', page, re.DOTALL)[0]
    assert re.findall(r"<code>(.*?)</code>", different) == ["end_scales", "lr"]
    assert page.count("<code>global_batch_size</code>") == 1, "all flags stand below"


def test_one_run_and_the_default_place(folder, tmp_path, capsys):
    run = tmp_path / "alone"
    shutil.copytree(folder / "slow", run, ignore=shutil.ignore_patterns("*.pt"))
    (run / "config.json").unlink()
    report(run, "--max_grids", 1)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "no config.json: the flags are not known" in capsys.readouterr().out and "no config.json" in page
    assert page.count("data:image/png;base64,") == 1 and "step 12<" in page


def test_names_that_are_no_text_are_written_all_the_same(tmp_path, capsys):
    run = tmp_path / os.fsdecode(b"run\xff")
    run.mkdir()
    rows = [{"step": step, "loss": 1 / step, "\ud800": step} for step in (1, 2)]
    (run / "progress.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "config.json").write_text(json.dumps({"data_dir": "\ud800"}))
    report(run)
    assert "run?" in capsys.readouterr().out
    assert "<h2>run?</h2>" in (run / "report.html").read_text(encoding="utf-8")


class Elements(html.parser.HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


EVIL = "<img src=x onerror=\"alert(1)\"></script><script>alert(1)</script>'{{ 7 * 7 }}\x1b[31m\x07"


def test_hostile_text_is_escaped(tmp_path, capsys):
    """Names, columns, flags, files and values, and names with control characters and bytes that are no UTF-8."""
    run = tmp_path / os.fsdecode(b"a&<b>'\"onload=x \x1b[31m \xff")
    run.mkdir()
    rows = [{"step": step, "loss": 1 / step, EVIL: step} for step in (1, 2)]
    (run / "progress.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "config.json").write_text(json.dumps({EVIL: EVIL, "total_training_steps": EVIL, "training_mode": [EVIL]}))
    (run / "best.json").write_text(json.dumps({"metric": EVIL, "value": EVIL, "settings": {"num_samples": EVIL}}))
    (run / f"{EVIL.replace('/', '')}.json").write_text(
        json.dumps({"metrics": {EVIL: {"value": EVIL}}, "label": [EVIL], "value": EVIL}))
    report(run, run)
    shown = capsys.readouterr().out
    written = (run / "report.html").read_text(encoding="utf-8")
    for text in (written, shown):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    elements = Elements(written)
    assert not [attributes for tag, attributes in elements.found if tag == "img"], "there are no pictures of samples"
    figures = [tag for tag, attributes in elements.found if attributes.get("class") == "plot"]
    assert len([tag for tag, _ in elements.found if tag == "script"]) == len(figures) + 2
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]
    assert elements.text.count("<img src=x onerror") >= 10 and "{{ 7 * 7 }}" in elements.text
    assert "a&<b>'\"onload=x ?[31m ?" in elements.text


def test_distances_of_different_features_are_said_not_to_be_comparable(folder, page, tmp_path):
    assert "not comparable" not in page
    run = tmp_path / "other"
    shutil.copytree(folder / "fast", run, ignore=shutil.ignore_patterns("*.pt"))
    best = json.loads((run / "best.json").read_text())
    best["settings"]["features"] = "torchscript-another"
    (run / "best.json").write_text(json.dumps(best))
    config = json.loads((run / "config.json").read_text())
    del config["lr"]
    (run / "config.json").write_text(json.dumps(config))
    report(folder / "slow", run, "--out", tmp_path / "report.html")
    changed = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "measured with different features, references or numbers of samples: not comparable" in changed
    different = re.search(r'<table class="settings different[^"]*">.*?</table>', changed, re.DOTALL)[0]
    assert re.findall(r"<code>(.*?)</code>", different) == ["end_scales"], "a flag that one run lacks"


@pytest.mark.parametrize("words, message", [
    (["{}/nowhere"], "nowhere does not exist"),
    (["{}/slow", "{}/nowhere"], "nowhere does not exist"),
    (["{}/slow/samples", "{}/tiny.ts"], "there is no run here: .*samples has no log .*; .*tiny.ts is not a folder"),
    (["{}/slow", "--out", "{}/tiny.ts/report.html"], "cannot create the folder .*tiny.ts"),
])
def test_bad_input_is_one_clear_error(folder, words, message):
    with pytest.raises(UserError, match=message):
        report(*(word.format(folder) for word in words))


def test_an_error_ends_the_command(folder):
    done = script(ROOT / "scripts/report.py", folder / "slow", folder / "nowhere", expect=2)
    assert "nowhere does not exist" in done.stderr and "Traceback" not in done.stderr, done


# --- many runs -----------------------------------------------------------------------------------------------------

MANY = 20


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """The page of twenty runs, among folders that are none."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(MANY):
        run = folder / f"run{number:02d}_of_{'ect' if number % 2 else 'a_method_with_a_rather_long_name' * 3}"
        (run / "samples").mkdir(parents=True)
        run.joinpath("progress.csv").write_text("".join(
            ["step,loss,fid\n", *(f"{step},{(number + 1) / step},{number + step}\n" for step in range(1, 9))]))
        run.joinpath("config.json").write_text(json.dumps(
            {"seed": number, "lr": [0.1, 0.2][number % 2], "data_dir": "/a/long/path" * 20, "arch": "unet"}))
        run.joinpath("best.json").write_text(json.dumps({"metric": "FID" * 30, "value": 1.5, "file": "best/" * 30}))
        run.joinpath("other.json").write_text(json.dumps({"text": "x" * 500}))
        for step in (2, 4, 8):
            Image.new("RGB", (264, 264), (step, number, 0)).save(run / f"samples/samples_{step:06d}.png")
    (folder / "notes.txt").write_text("no run")
    (folder / "empty").mkdir()
    (folder / "young").mkdir()
    (folder / "young/progress.csv").write_text("step,loss\n")
    report(*sorted(folder.iterdir()), "--out", folder / "report.html")
    return folder / "report.html"


def test_what_is_no_run_is_passed_over_and_named(many, capsys):
    page = many.read_text()
    report(many.parent / "notes.txt", many.parent / "run01_of_ect")
    told = capsys.readouterr().out
    assert "passed over: " in told and "notes.txt is not a folder" in told
    assert (many.parent / "run01_of_ect/report.html").exists(), "the first that is a run"
    for reason in ("notes.txt is not a folder", "empty has no log", "young/progress.csv has no row yet"):
        assert reason in page and "passed over: " in page
    assert f"{MANY} training runs" in page and "16 more</title>" in page


def test_twenty_runs_have_twenty_kinds_of_lines(many):
    page = many.read_text()
    legend = re.search(r'<p class="legend">(.*?)</p>', page, re.DOTALL)[1]
    kinds = re.findall(r'class="key (run-\d)".*?class="curve (dash-\d)"', legend)
    assert len(kinds) == len(set(kinds)) == MANY
    drawn = re.findall(r'<g data-run="(\d+)"><path class="curve (run-\d) (dash-\d)', page)
    assert all(kinds[int(number)] == (colour, dash) for number, colour, dash in drawn) and len(drawn) == 2 * MANY
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    for scheme in style.split("prefers-color-scheme: dark"):
        colours = [re.search(rf"--run-{number}: (#\w+)", scheme)[1] for number in range(8)]
        assert len(set(colours)) == 8
    dashes = [re.search(rf"\.dash-{number} {{ stroke-dasharray: ([\d. ]+)", style)[1] for number in (1, 2, 3)]
    assert len(set(dashes)) == 3


def test_the_newest_pictures_come_first(many):
    shots = re.search(r'<div class="shots" data-run="3">.*?</div></div>', many.read_text(), re.DOTALL)[0]
    assert re.findall(r"<figcaption>step (\d+)", shots) == ["8", "4", "2"]


def test_values_of_flags_name_their_runs(many):
    different = re.search(r'<table class="settings different[^"]*">.*?</table>', many.read_text(), re.DOTALL)[0]
    rate = re.search(r"<code>lr</code>.*?</tr>", different, re.DOTALL)[0]
    assert re.findall(r'<div>([\d.]+) <small>|data-run="(\d+)"', rate)[:3] == [("0.1", ""), ("", "0"), ("", "2")]
    assert "<code>arch</code>" not in different and "<code>seed</code>" in different


WIDTHS = (360, 480, 768, 1024, 1440, 2000)
LOOK = """<script>
  const found = {}, box = document.getElementById("filter");
  const seen = (query) => [...document.querySelectorAll(query)].filter((each) => each.checkVisibility()).length;
  const all = () => [seen(".cards .card"), seen(".legend span"), seen(".shots"),
    seen("figure.plot g[data-run] path") > 0];
  found.whole = all();
  box.value = "RUN03 ect"; box.dispatchEvent(new Event("input"));
  found.one = all(); found.count = document.getElementById("count").textContent;
  box.value = ""; box.dispatchEvent(new Event("input"));
  found.again = all();
  const [left, right] = document.querySelectorAll("#compare select");
  left.value = "4"; right.value = "7"; right.dispatchEvent(new Event("change"));
  found.heads = [...document.querySelectorAll("#pair h2")].map((each) => each.textContent.slice(0, 5));
  found.shots = [...document.querySelectorAll("#pair img")].map((each) => each.alt.slice(-6));
  found.rows = [...document.querySelectorAll("#differences tbody tr")].map((row) => row.innerText.split("\\t"));
  document.title = JSON.stringify(found);
</script>"""


@needs_browser
def test_filter_and_two_runs_side_by_side(many, tmp_path):
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", many.read_text())
    (tmp_path / "used.html").write_text(page.replace("</body>", LOOK + "</body>"))
    visit = chromium(tmp_path / "used.html", tmp_path, "--dump-dom")
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", visit.dom, re.DOTALL)[1]))
    assert visit.console == []
    assert found["whole"] == found["again"] == [MANY, MANY, MANY, True] and found["one"] == [1, 1, 1, True]
    assert found["count"] == f"1 of {MANY} runs"
    assert found["heads"] == ["run04", "run07"] and found["shots"] == ["step 8", "step 8"]
    assert found["rows"] == [["lr", "0.1", "0.2"], ["seed", "4", "7"]]


@needs_browser
def test_nothing_needs_sideways_scrolling(many, folder, tmp_path):
    """Of twenty runs and of two, with all details open, in frames of the widths of phones to large screens."""
    frames = ""
    for page in (many, folder / "report.html"):
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
        text = html.escape(text.replace("<details", "<details open"), quote=True)
        frames += "".join(f'<iframe width="{width}" height="900" srcdoc="{text}"></iframe>' for width in WIDTHS)
    (tmp_path / "frames.html").write_text(f"""<title></title><style>iframe {{ border: 0 }}</style>{frames}<script>
      const inner = (frame) => [...frame.contentDocument.querySelectorAll("body *")].some((each) =>
        each.scrollWidth > each.clientWidth + 1 && getComputedStyle(each).overflowX.match(/auto|scroll/));
      onload = () => document.title = JSON.stringify([...document.querySelectorAll("iframe")].map((frame) =>
        [frame.clientWidth, frame.contentDocument.documentElement.scrollWidth, inner(frame)]));</script>""")
    visit = chromium(tmp_path / "frames.html", tmp_path, "--dump-dom")
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", visit.dom, re.DOTALL)[1]))
    assert found == [[width, width, False] for width in WIDTHS] * 2


# --- parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paths, names", [
    (["runs/a", "runs/b"], ["a", "b"]),
    (["x/edm", "y/edm", "cd"], ["x/edm", "y/edm", None]),
    (["a", "a"], ["a (1)", "a (2)"]),
])
def test_names_tell_runs_apart(paths, names):
    found = run_names([Path(path) for path in paths])
    assert [name if name else each for name, each in zip(names, found)] == found and len(set(found)) == len(found)


def test_pictures_are_spread_over_the_run():
    assert evenly([1, 2, 3], 5) == [1, 2, 3]
    assert evenly(list(range(1, 101)), 4) == [25, 50, 75, 100]
    assert evenly([10, 20, 30], 2)[-1] == 30 and evenly([10, 20, 30], 1) == [30]


def test_durations():
    assert [duration(seconds) for seconds in (44.4, 600, 36_000, 6e5)] == ["44 s", "10 min", "10.0 h", "6.9 days"]
