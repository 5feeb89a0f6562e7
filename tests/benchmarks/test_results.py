"""Tables of the pages hold the numbers of the results files that their commands have written."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def table(page, first_column):
    """Rows of the table whose head begins so: name -> cells."""
    lines = (ROOT / page).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = [float(cell) for cell in cells]
    return rows


def test_warm_up_of_averages():
    results, names = json.loads((ROOT / "docs/training/ema_warmup.json").read_text()), {
        "the weights themselves": "the weights themselves", "none": "no warm-up",
        "0.05 of the images": "EDM's rule, the default",
        "(1 + k) / (10 + k)": "min(r, (1 + k) / (10 + k)) after k steps",
    }
    found = {name: [] for name in names.values()}
    for row in results["rows"]:
        found[names[row["average"]]].append(row["distance"])
    assert table("docs/training.md", "average") == found and results["ema_rate"] == "0.999"


def test_references_under_augmentation():
    results = json.loads((ROOT / "docs/methods/stf_augmented.json").read_text())
    found = {
        str(row["augment_references"]): [row["share_with_references"], row["effective_references"]]
        for row in results["rows"]
    }
    assert table("docs/methods.md", "`--augment_references`") == found and results["num_references"] == 512


def test_the_cost_of_fewer_levels_in_edits():
    results = json.loads((ROOT / "docs/editing/editing.json").read_text())
    found = {f"`{task}`": list(rms.values()) for task, rms in results["rms"].items()}
    assert table("docs/editing.md", "evaluations") == found and results["levels"] == 18
    assert list(results["rms"]["colorize"]) == ["1", "2", "5", "17"] and results["num_samples"] == 200
