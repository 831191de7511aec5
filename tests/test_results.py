"""The pages' tables are what results.csv says, and results.csv is what runs wrote."""

import functools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "assets/results"))
import noiseless  # noqa: E402
import plot_levels  # noqa: E402
import plot_results  # noqa: E402

import drac_amort  # noqa: E402
import drac_diffus  # noqa: E402
import drac_runner as runner  # noqa: E402
import envs  # noqa: E402


def test_no_table_is_typed_by_hand():
    blocks = plot_results.tables(plot_results.read())
    texts = [page.read_text() for page in plot_results.PAGES]
    for text in texts:
        assert plot_results.fill(text, blocks) == text, "run python assets/results/plot_results.py"
    places = re.findall("<!-- results: (.*) -->", "".join(texts))
    assert sorted(places) == sorted(blocks), "one place for each table"
    changed = {**blocks, "simple": blocks["simple"].replace("4 of 4", "3 of 4", 1)}
    assert plot_results.fill(texts[2], changed) != texts[2]


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


def test_other_settings_and_shorter_runs_stay_out_of_the_tables():
    rows = plot_results.read()
    sac = plot_results.last(plot_results.select(rows, environment=plot_results.HARD, algorithm="sac", hold_steps=20.0))
    cheetah = plot_results.select(rows, environment="HalfCheetah-v4", seed=3)
    before = plot_results.tables(rows)
    odd = []
    for name, value in (("global_step", "4000"), ("variant", "another network"), ("target_entropy", "auto")):
        odd += [{**row, "run": f"{row['run']}9{name}", name: value, "final_success_rate": "0"} for row in sac]
    for name, value in (("gamma", "0.9"), ("diversity_mean", "arithmetic"), ("hold_steps", "20.0")):
        odd += [{**row, "run": f"{row['run']}9{name}", name: value, "episodic_return_mean": "0"} for row in cheetah]
    assert plot_results.tables(rows + odd) == before


def test_what_no_table_is_about_is_not_collected(tmp_path):
    """An evaluation is no training, and a maze of one's own is not the simple one, unless a name says so."""
    run = tmp_path / "MultiGoalPointMaze-Simple-v0__drac_amort__7__20260101-000000-000000"
    run.mkdir()
    (run / "evaluations.csv").write_text("global_step,success_rate\n0,0.1\n")
    (run / "config.json").write_text(json.dumps({"evaluate": "model.pt", "env_kwargs": "{}"}))
    with pytest.raises(SystemExit, match="an evaluation"):
        plot_results.collect(run)
    (run / "config.json").write_text(json.dumps({"evaluate": None, "env_kwargs": '{"maze_map": "mine.txt"}'}))
    with pytest.raises(SystemExit, match="mine.txt.* --variant"):
        plot_results.collect(run)
    assert plot_results.collect(run, "my maze")[0]["variant"] == "my maze"
    (run / "config.json").write_text(json.dumps({"alpha_lr": 1e-6, "z_dim": 16}))
    with pytest.raises(SystemExit, match="alpha_lr 1e-06: .* --variant"):
        plot_results.collect(run)
    (run / "config.json").write_text(json.dumps({"cuda": True}))
    with pytest.raises(SystemExit, match="of a GPU: .* --variant"):
        plot_results.collect(run)


def test_only_the_newest_run_of_full_length_stands_for_a_seed():
    environment = plot_results.SIMPLE
    settings = {name: str(value) for name, value in vars(plot_results.drac_amort.default_args(environment)).items()}
    settings |= {"algorithm": "drac_amort", "environment": environment, "matmul_precision": "medium", "seed": "1"}
    runs = {"old": ("20260101", 100_000), "newest": ("20260102", 100_000), "short": ("20260103", 4_000)}
    rows = [
        settings
        | {"run": f"{environment}__drac_amort__1__{day}", "global_step": str(steps), "final_success_rate": name}
        for name, (day, steps) in runs.items()
    ]
    found = plot_results.default_runs(rows, plot_results.drac_amort, environment)
    assert [row["final_success_rate"] for row in found] == ["newest"]
    assert plot_results.both_libraries(rows, plot_results.drac_amort, environment) == found
    rows.append(rows[1] | {"matmul_precision": "highest", "run": f"{environment}__drac_amort__1__20260104"})
    assert len(plot_results.both_libraries(rows, plot_results.drac_amort, environment)) == 2


def test_runs_of_other_settings_are_no_further_seeds_on_mujoco():
    shared = {"environment": "Hopper-v4", "algorithm": "drac_amort", "beta": "0.5", "num_envs": "1", "n_steps": "1"}
    shared |= {"num_action_samples": "4", "pairing": "all", "hold_steps": "1.0"}
    others = [
        {"num_action_samples": "17", "pairing": "disjoint"},
        {"num_envs": "16"},
        {"variant": "x"},
        {"n_steps": "3"},
    ]
    rows = [
        shared
        | {"seed": seed, "run": f"Hopper-v4__drac_amort__{seed}__{day}", "global_step": step}
        | {"episodic_return_mean": f"{day}{step}", **other}
        for day, seed, other in ((2, "1", {}), (1, "1", {}), (3, "2", {}), *((4, "1", other) for other in others))
        for step in ("0", "5000", "10000")
    ]
    rows.append(rows[6] | {"global_step": "20000", "episodic_return_mean": "7"})  # seed 2 goes on
    rows.append(rows[8] | {"run": "Hopper-v4__drac_amort__2__5"})  # a newer run that is shorter
    other = {"1": {0: 40, 10: 410000}}
    assert plot_results.returns(rows, "Hopper-v4") == {
        "DrAmort, β = 0.5": {"1": {0: 20, 10: 210000}, "2": {0: 30, 10: 310000, 20: 7}},
        "DrAmort, β = 0.5, N = 16": other,
        "DrAmort, β = 0.5, n = 3": other,
        "DrAmort, β = 0.5, x": other,
    }


@pytest.mark.parametrize("file", sorted((ROOT / "assets/models").iterdir()), ids=lambda file: file.stem)
def test_the_policies_of_the_repository_can_be_played_and_name_no_path_of_a_machine(file):
    model = torch.load(file, weights_only=True)
    assert not [value for value in model["config"].values() if isinstance(value, str) and "/" in value]
    script = {"drac_amort": drac_amort, "drac_diffus": drac_diffus}[model["script"]]
    args, state = runner.parse_args(script, ["--evaluate", str(file)])
    with script.make(args) as env:
        sizes = *env.observation_space.shape, *env.action_space.shape, torch.device("cpu")
    agent = script.DrAC(args, *sizes)
    agent.fingerprint = env.unwrapped.fingerprint
    runner.restore(state, agent, None)  # refuses the weights on another maze or level generator
    if "Maze" in args.env_id:
        make = functools.partial(script.make, args)
        played = envs.evaluate_policy(script.make_policy(agent, 20.0), make, 40, seed=0)
        assert played["success_rate"] > 0.8 and played["reachable_modes"] >= 4


def test_minutes_to_all_goals_count_to_the_first_evaluation_that_has_them():
    def minutes(*evaluations):
        rows = [
            {"run": "r", "global_step": str(10 * i), "success_rate": success, "reachable_modes": modes, "goal_1": "1"}
            | {"goal_0": "1", "minutes": "8"}
            for i, (success, modes) in enumerate(evaluations)
        ]
        return plot_results.minutes_to_goals(rows, rows[-1])

    assert minutes(("0", "0"), ("0.99", "1"), ("0.95", "2"), ("1.0", "2"), ("0.5", "1")) == 4
    assert minutes(("0", "0"), ("0.949", "2"), ("1.0", "1")) == float("inf")


def test_latent_distances_and_tiles_of_pairs_of_actions(monkeypatch):
    """Three actions of two states: the geometric mean over pairs and states, as a beta, and the tiles one by one."""
    generator, rng = envs.LevelGeneration().generator, np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (3, 2, 20)).astype(np.float32)
    pairs = [(actions[i, s], actions[j, s]) for i in range(3) for j in range(i) for s in range(2)]
    latent, tiles = plot_levels.distances(generator, actions)
    lengths = [np.sqrt(((x - y).astype(float) ** 2).sum()) for x, y in pairs]
    assert latent == pytest.approx(np.prod(lengths) ** (1 / 6) / 20**0.5, rel=1e-4)
    differing = [(generator.decode(x[None]) != generator.decode(y[None])).sum() for x, y in pairs]
    assert tiles == pytest.approx(np.mean(differing)) and tiles > 20
    monkeypatch.setattr(plot_levels, "STATES", 10)  # of which each flips as many
    corners = plot_levels.references()["corners, 1 to 10 signs flipped"]
    assert corners[:, 0] == pytest.approx(2 * np.sqrt(np.arange(1, 11) / 20), rel=1e-3)


@pytest.mark.parametrize("slope", [0.2, 2000.0])
def test_policies_without_noise(slope, tmp_path):
    """Of an actor a = tanh(slope (z_0 - 1/2)): two of its actions, if not bent, are slope / e^1.5 apart."""
    training = ["--env-id", "Pendulum-v1", "--total-timesteps", "257", "--evaluation-interval", "0"]
    run = drac_amort.main([*training, "--run-dir", str(tmp_path)])
    state = torch.load(run / "model.pt", weights_only=True)
    for weight in state["weights"].values():
        weight.zero_()
    fc1, bias, fc2, fc3 = (
        state["weights"][f"actor.{name}"] for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc3.weight")
    )
    fc1[:2, 3], bias[:2] = torch.tensor([slope, -slope]), torch.tensor([-slope / 2, slope / 2])
    fc2[:2, :2], fc3[0, :2] = torch.eye(2), torch.tensor([1.0, -1.0])
    torch.save(state, run / "model.pt")
    row = noiseless.measure(run)
    make = lambda **kwargs: drac_amort.make_env("Pendulum-v1", **kwargs)  # noqa: E731
    idle = envs.evaluate_policy(lambda obs, starts: np.zeros((len(obs), 1), np.float32), make, 10, 101)
    assert row["middle"] == pytest.approx(idle["episodic_return_mean"], rel=1e-5)
    assert row["fresh"] != pytest.approx(row["middle"], rel=1e-3)
    if slope < 1:
        assert row["diversity"] == pytest.approx(slope / np.e**1.5, rel=0.1) and row["saturated"] == 0
    else:
        assert row["saturated"] > 0.98


def test_hypervolumes_are_above_the_worst_of_all_runs():
    points = ("drac_amort", 1, 9, 9), ("drac_amort", 1, 30, 500), ("drac_amort", 2, 40, 300), ("sac", 1, 20, 100)
    table = plot_results.levels_table(
        [
            {"run": f"L__{algorithm}__{seed}__{i}", "environment": "L", "algorithm": algorithm, "seed": str(seed)}
            | {"beta": "0.2", "target_entropy": "1.0", "global_step": "400000", "playable_rate": "1", "num_envs": "16"}
            | {"episodic_return_mean": str(quality), "final_level_diversity": str(diversity)}
            for i, (algorithm, seed, quality, diversity) in enumerate(points)  # the first was run again
        ],
        "L",
    )
    assert "| DrAmort, β = 0.2 | 2 | 30.0–40.0 | 1.000 | 300–500 |" in table
    assert "quality 20.0, diversity 100" in table and "DrAmort, its 2 runs 6,000" in table, "10 x 400 + 10 x 200"


def test_readmes_python_runs(monkeypatch):
    played, trained = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(played, names)
    assert names["terminated"] or names["truncated"]
    assert len(names["policy"](np.zeros((3, 4)), np.ones(3, bool))) == 3
    exec(trained.replace("range(1_000)", "range(301)"), names)
    assert names["step"] == 300 and {"qf_loss", "diversity", "alpha"} <= set(names["losses"])
