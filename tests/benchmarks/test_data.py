"""benchmarks/data.py runs, and compares what it says it compares."""

import importlib.util
import json
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "data.py"


def test_it_measures_every_store(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("benchmark_data", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--count", "60", "--image_size", "8", "--batch_size", "10", "--rounds", "3", "--json",
                 str(tmp_path / "numbers.json")])
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert {title: list(stores) for title, stores in numbers.items()} == {
        "bytes of the files": ["folder", "zip"],
        "decoded images": ["folder", "zip", "kept in memory"],
        "batches, one worker": ["folder", "zip"],
        "batches, no worker": ["folder", "zip", "kept in memory"],
    }
    for stores in numbers.values():
        assert stores["folder"]["ratio"] == 1 and all(store["microseconds"] > 0 for store in stores.values())
    assert numbers["decoded images"]["kept in memory"]["ratio"] < 0.5       # nothing is decoded: seen at 0.002
    assert "of the folder's time" in capsys.readouterr().out
