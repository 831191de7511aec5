"""The READMEs' tables are what results.csv says, and results.csv is what runs wrote."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "assets/results"))
import plot_results  # noqa: E402


def test_no_table_is_typed_by_hand():
    blocks = plot_results.tables(plot_results.read())
    texts = [readme.read_text() for readme in plot_results.READMES]
    for text in texts:
        assert plot_results.fill(text, blocks) == text, "run python assets/results/plot_results.py"
    places = re.findall("<!-- results: (.*) -->", "".join(texts))
    assert sorted(places) == sorted(blocks), "one place for each table"
    changed = {**blocks, "simple": blocks["simple"].replace("4 of 4", "3 of 4", 1)}
    assert plot_results.fill(texts[1], changed) != texts[1]


def test_runs_are_collected_with_their_settings_and_final_trials(tmp_path):
    run = tmp_path / "MultiGoalPointMaze-Simple-v0__drac_amort__7__20260101-000000-000000"
    run.mkdir()
    (run / "config.json").write_text(
        json.dumps({"seed": 7, "beta": 0.8, "hold_steps": 20.0, "env_id": "MultiGoalPointMaze-Simple-v0"})
    )
    (run / "evaluations.csv").write_text("global_step,success_rate,goal_0\n0,0.1,1\n50,0.9,2\n")
    rows = plot_results.collect(run)
    assert [(row["global_step"], row["seed"], row["hold_steps"], row["beta"]) for row in rows] == [
        ("0", "7", "20.0", "0.8"),
        ("50", "7", "20.0", "0.8"),
    ]
    (run / "summary.json").write_text(json.dumps({"global_step": 40, "final_removal_sr5": 0.5}))
    assert "final_removal_sr5" not in plot_results.collect(run)[-1], "of another step: the run went on"
    (run / "summary.json").write_text(json.dumps({"global_step": 50, "final_removal_sr5": 0.5}))
    assert (
        plot_results.collect(run)[-1]["final_removal_sr5"] == "0.5"
        and "final_removal_sr5" not in plot_results.collect(run)[0]
    )
