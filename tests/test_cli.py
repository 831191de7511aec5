"""The command line, in-process: what a run leaves behind, what bad input is told, and what a fault costs."""

import csv
import dataclasses
import json
import pickle
import subprocess
import sys
import typing

import numpy as np
import pytest
import torch
from conftest import SMALL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import drac_amort
import drac_diffus

SHORT = ["--total-timesteps", "300", "--learning-starts", "280", "--evaluation-episodes", "2", "--final-trials", "0"]
FAST = ["--hidden-size", "32", "--batch-size", "32"]


def read_csv(run_folder):
    with (run_folder / "evaluations.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def load_weights(run_folder):
    return torch.load(run_folder / "model.pt", weights_only=True)["weights"]


def logged_tags(run_folder):
    events = EventAccumulator(str(run_folder))
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


# Flags


def test_every_default_has_the_type_of_its_annotation(script):
    for field in dataclasses.fields(script.Args):
        if typing.get_origin(field.type) is typing.Literal:
            assert field.default in typing.get_args(field.type)
        elif field.name in ("evaluate", "resume"):
            assert field.default is None
        else:
            assert type(field.default) is field.type, field.name


def test_help_explains_every_flag_and_shows_the_real_defaults(script, capsys):
    with pytest.raises(SystemExit) as exit_info:
        script.main(["--help"])
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(script.Args):
        assert f"--{field.name.replace('_', '-')}" in text
    assert text.count("(default:") == len(dataclasses.fields(script.Args)), "a flag without a docstring"
    assert "(default: 100000)" in text and "(default: 0.8)" in text
    with pytest.raises(SystemExit):
        script.main(["--env-id", "Walker2d-v4", "--help"])
    assert "(default: 1000000)" in capsys.readouterr().out.replace("\n", " "), "those of the environment"


def test_the_defaults_are_the_papers_for_its_environments(script):
    for env_id, steps, beta in (
        ("MultiGoalPointMaze-Simple-v0", 100_000, 0.8),
        ("MultiGoalPointMaze-Medium-v0", 200_000, 0.8),
        ("MultiGoalPointMaze-Hard-v0", 300_000, 0.8),
        ("Humanoid-v4", 1_000_000, {drac_amort: 0.5, drac_diffus: 0.2}[script]),
        ("Pendulum-v1", 1_000_000, 0.2),
    ):
        args, _ = script.parse_args(["--env-id", env_id])
        assert (args.total_timesteps, args.beta) == (steps, beta)
    args, _ = script.parse_args(["--env-id", "Humanoid-v4", "--beta", "0.3", "--total-timesteps", "7000"])
    assert (args.total_timesteps, args.beta) == (7000, 0.3)


# Whole runs


@pytest.mark.parametrize("env_id", ["MultiGoalPointMaze-Simple-v0", "Walker2d-v4", "Humanoid-v4"])
def test_a_short_run_learns_and_leaves_every_promised_file(script, run, capfd, monkeypatch, env_id):
    start, save = {}, script.save

    def save_and_keep_the_first(file, agent, *args):
        start.update({name: weight.clone() for name, weight in agent.state_dict().items() if name not in start})
        save(file, agent, *args)

    monkeypatch.setattr(script, "save", save_and_keep_the_first)
    folder = run(*SHORT, "--evaluation-interval", "200", "--final-trials", "1", env_id=env_id)
    maze = "PointMaze" in env_id
    assert folder.name.startswith(f"{env_id}__{script.SCRIPT}__1__")
    expected = {"config.json", "evaluations.csv", "model.pt", "checkpoint.pt", "summary.json", ".lock"}
    expected |= {"trajectories.png"} if maze else set()
    files = {file.name for file in folder.iterdir()}
    assert files - expected == {name for name in files if name.startswith("events.out.tfevents")}
    assert expected < files and len(files) == len(expected) + 1

    trained = load_weights(folder)
    for name, weight in start.items():
        assert trained[name].isfinite().all() and not torch.equal(trained[name], weight), f"{name} did not change"

    config = json.loads((folder / "config.json").read_text())
    assert config["env_id"] == env_id and config["versions"]["torch"] == torch.__version__
    rows = read_csv(folder)
    assert [row["global_step"] for row in rows] == [0, 200, 300]
    metrics = {"episodic_return_mean", "episodic_return_std", "episodic_length_mean"}
    if maze:
        metrics |= {"success_rate", "reachable_modes", "multi_goal_score", "goal_0", "goal_1", "goal_2", "goal_3"}
        assert (folder / "trajectories.png").read_bytes().startswith(b"\x89PNG")
    assert set(rows[0]) == {"global_step"} | metrics
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["episodic_return_mean"] == rows[-1]["episodic_return_mean"]
    assert ({"removal_sr5", "obstacle_sr5"} <= set(summary)) == maze
    assert summary["best_episodic_return_mean"] == max(row["episodic_return_mean"] for row in rows)
    tags = logged_tags(folder)
    assert [event.step for event in tags["evaluation/episodic_return_mean"]] == [0, 200, 300]
    assert "evaluation/global_step" not in tags and summary["global_step"] == 300
    output = capfd.readouterr()
    assert str(folder) in output.out and "episodic_return_mean" in output.out
    assert output.err == "", "no progress bar without a terminal, and no warnings of other packages"


def test_losses_and_episodes_are_logged(script, run, monkeypatch):
    monkeypatch.setattr(script, "LOG_INTERVAL", 150)
    tags = logged_tags(run(*SHORT, "--learning-starts", "100", "--evaluation-interval", "0", *FAST))
    losses = {"qf_loss", "qf_values", "actor_loss", "diversity", "target_diversity", "alpha", "actor_grad_norm"}
    charts = {"episodic_return", "episodic_length", "steps_per_second"}
    assert set(tags) == {f"losses/{name}" for name in losses} | {f"charts/{name}" for name in charts}
    assert [event.step for event in tags["losses/qf_loss"]] == [150, 300]
    assert all(np.isfinite(event.value) for events in tags.values() for event in events)
    assert all(event.value > 0 for event in tags["losses/actor_grad_norm"])
    assert max(event.value for event in tags["charts/episodic_length"]) == 7


def test_flags_reach_what_they_set(script, run, monkeypatch):
    batches, capacities, precisions, evaluations, trials = [], [], [], [], []
    update, create = script.DrAC.update, script.ReplayBuffer.__init__

    def counted_update(self, batch):
        batches.append(len(batch.rewards))
        return update(self, batch)

    def watched_create(self, capacity, *args):
        capacities.append(capacity)
        create(self, capacity, *args)

    def watched_evaluation(policy, env_id, num_episodes, seed, folder):
        evaluations.append((num_episodes, seed))
        return {"episodic_return_mean": 0.0}

    monkeypatch.setattr(script.DrAC, "update", counted_update)
    monkeypatch.setattr(script.ReplayBuffer, "__init__", watched_create)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precisions.append)
    monkeypatch.setattr(script, "evaluate_policy", watched_evaluation)
    monkeypatch.setattr(script, "final_trials", lambda policy, env_id, *args: trials.append(args) or {})
    length = ["--total-timesteps", "30", "--learning-starts", "20", "--updates-per-step", "3"]
    evaluation = ["--evaluation-interval", "15", "--evaluation-episodes", "7", "--final-trials", "2", "--seed", "5"]
    run(*length, *evaluation, "--batch-size", "8", "--buffer-size", "25", "--matmul-precision", "high")
    assert batches == 3 * (30 - 20) * [8]
    assert capacities == [25] and precisions == ["high"]
    assert evaluations == 3 * [(7, 105)], "after steps 0, 15 and 30"
    assert trials == [(2, 105)]


def test_runs_repeat_bit_for_bit_and_evaluation_does_not_disturb_them(run):
    flags = ["--total-timesteps", "150", "--learning-starts", "50", "--evaluation-episodes", "3", *FAST]
    flags += ["--latent-hold", "0.5"]
    first, second = run(*flags, "--evaluation-interval", "60"), run(*flags, "--evaluation-interval", "60")
    silent, other_seed = run(*flags, "--evaluation-interval", "0"), run(*flags, "--seed", "2")
    assert (first / "evaluations.csv").read_bytes() == (second / "evaluations.csv").read_bytes()
    assert not (silent / "evaluations.csv").exists()
    weights = load_weights(first)
    for name, weight in weights.items():
        assert torch.equal(weight, load_weights(second)[name]), name
        assert torch.equal(weight, load_weights(silent)[name]), name
        assert not torch.equal(weight, load_weights(other_seed)[name]), name


def test_actions_are_rescaled_and_only_terminations_stop_the_bootstrap(script, run, monkeypatch):
    stored, envs = [], []
    add, make_env = script.ReplayBuffer.add, script.make_env
    monkeypatch.setattr(script.ReplayBuffer, "add", lambda self, *row: (stored.append(row), add(self, *row)))
    monkeypatch.setattr(script, "make_env", lambda env_id: envs.append(make_env(env_id)) or envs[-1])
    run(*SHORT, "--evaluation-interval", "0", *FAST)
    stored_actions = np.array([action for _, action, *_ in stored])
    assert np.abs(stored_actions).max() <= 1
    np.testing.assert_allclose(np.array(envs[0].unwrapped.actions), 3 * stored_actions + 1, atol=1e-5)
    truncated = 0
    for (_, _, reward, next_obs, terminated), (obs, *_) in zip(stored, stored[1:], strict=False):
        assert terminated == (next_obs[0] > 5) and reward == pytest.approx(-abs(next_obs[0]))
        truncated += not np.array_equal(next_obs, obs) and not terminated
    assert truncated > 10 and any(terminated for *_, terminated in stored)


def test_evaluate_reproduces_the_last_evaluation(script, run, capsys):
    flags = ["--evaluation-episodes", "4", "--final-trials", "1"]
    actor = {drac_amort: ["--z-dim", "3"], drac_diffus: ["--diffusion-steps", "2", "--clip", "tanh"]}[script]
    folder = run(*SHORT, *FAST, *flags, *actor, "--seed", "3", env_id="MultiGoalPointMaze-Simple-v0")
    again = run("--evaluate", str(folder / "model.pt"), *flags, env_id=None)
    assert read_csv(again) == read_csv(folder)[-1:]
    assert (again / "trajectories.png").exists()
    trained, evaluated = (json.loads((path / "summary.json").read_text()) for path in (folder, again))
    assert evaluated == {key: value for key, value in trained.items() if key in evaluated}
    trained, evaluated = (json.loads((path / "config.json").read_text()) for path in (folder, again))
    assert {name for name in trained if trained[name] != evaluated[name]} == {"evaluate", "run_dir"}
    corridor = str(run(*SHORT, *FAST) / "model.pt")
    assert read_csv(run("--evaluate", corridor, env_id=None)) == read_csv(run("--evaluate", corridor, env_id=None))
    assert read_csv(run("--evaluate", corridor, env_id=None)) != read_csv(
        run("--evaluate", corridor, "--seed", "9", env_id=None)
    )


def test_an_interrupted_evaluation_does_not_speak_of_resuming(script, run, capsys, monkeypatch):
    model = run(*SHORT, *FAST, "--evaluation-interval", "0") / "model.pt"

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "evaluate", interrupted)
    assert fails(capsys, lambda: run("--evaluate", str(model), env_id=None), code=1) == "interrupted"


@pytest.mark.parametrize("latent_hold", [1, 0.25, 1e-9])
def test_held_latents_change_between_episodes_and_at_random(script, run, monkeypatch, latent_hold):
    used, act = [], script.DrAC.act
    monkeypatch.setattr(script.DrAC, "act", lambda self, obs, z, *args: used.append(z) or act(self, obs, z, *args))
    steps = ["--total-timesteps", "500", "--learning-starts", "499", "--evaluation-interval", "0"]
    folder = run(*steps, *FAST, "--latent-hold", str(latent_hold))
    starts = {0, *(event.step for event in logged_tags(folder)["charts/episodic_length"] if event.step < 500)}
    changes = {0, *(i for i in range(1, 500) if not torch.equal(used[i - 1], used[i]))}
    others = 500 - len(starts)
    assert len(used) == 500 and starts <= changes and others > 200
    assert len(changes - starts) == pytest.approx(others * latent_hold, abs=0.1 if latent_hold != 0.25 else 35)


def test_two_runs_started_at_once_get_folders_of_their_own(script, tmp_path):
    flags = ["--env-id", "Test/Corridor-v0", "--run-dir", str(tmp_path), "--evaluation-interval", "0", *FAST]
    folders = [script.main([*flags, "--total-timesteps", "2", "--learning-starts", "1"]) for _ in range(3)]
    assert len(set(folders)) == 3


def test_a_terminal_shows_a_progress_bar(script, run, monkeypatch, capsys):
    monkeypatch.setattr(script, "LOG_INTERVAL", 100)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(*SHORT, "--evaluation-interval", "0", *FAST)
    shown = capsys.readouterr().err
    assert all(part in shown for part in ("300/300", "return=", "alpha=", "diversity=", " of ", "steps/s"))


def test_the_script_runs_from_the_shell(script, tmp_path):
    actor = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL[script].items()]
    command = [sys.executable, script.__file__, *SHORT, "--run-dir", str(tmp_path / "out"), *FAST, *actor]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    (model,) = (tmp_path / "out").glob("MultiGoalPointMaze-Simple-v0__*/model.pt")
    assert result.stdout.startswith(f"training, steps 0 to 300: files in {model.parent}\nstep 0: mean return ")
    assert "\nstep 300: mean return " in result.stdout


# Bad input


def fails(capsys, start, code=2):
    """Call `start`; return the one sentence with which it ended."""
    with pytest.raises(SystemExit) as exit_info:
        start()
    output = capsys.readouterr()
    message = exit_info.value.code if isinstance(exit_info.value.code, str) else output.err
    assert (1 if isinstance(exit_info.value.code, str) else exit_info.value.code) == code
    assert message.strip().count("\n") == 0 and "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--env-id", "Walkr2d-v4"], ["Walkr2d", "Walker2d"]),
        (["--env-id", "MultiGoalPointMaze-Simpel-v0"], ["Simpel", "Simple"]),
        (["--env-id", "no-such-module:Thing-v0"], ["no-such-module"]),
        (["--env-id", ""], ["Malformed"]),
        (["--env-id", "Test/Discrete-v0"], ["Discrete(3)", "bounded"]),
        (["--env-id", "Test/Unbounded-v0"], ["inf", "bounded"]),
        (["--env-id", "Test/HalfBounded-v0"], ["inf", "bounded"]),
        (["--env-id", "Test/Integers-v0"], ["int64", "floats"]),
        (["--env-id", "Test/Fixed-v0"], ["bounded"]),
        (["--env-id", "Test/Dict-v0"], ["Dict", "observations"]),
        (["--env-id", "Test/Image-v0"], ["(8, 8, 3)", "one-dimensional"]),
        (["--beta", "0"], ["--beta", "above 0", "got 0.0"]),
        (["--beta", "nan"], ["--beta", "nan"]),
        (["--beta", "inf"], ["--beta", "inf"]),
        (["--actor-lr", "-1"], ["--actor-lr", "-1.0"]),
        (["--critic-lr", "nan"], ["--critic-lr"]),
        (["--alpha-lr", "0"], ["--alpha-lr"]),
        (["--num-action-samples", "1"], ["--num-action-samples", "[2, 2^31)", "got 1"]),
        (["--gamma", "1"], ["--gamma", "[0, 1)", "got 1.0"]),
        (["--tau", "0"], ["--tau", "(0, 1]"]),
        (["--latent-hold", "0"], ["--latent-hold", "(0, 1]"]),
        (["--batch-size", "512", "--buffer-size", "256"], ["--buffer-size", "--batch-size", "256"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--total-timesteps", "-5"], ["--total-timesteps", "got -5"]),
        (["--total-timesteps", "100"], ["--total-timesteps", "--learning-starts 256", "100"]),
        (["--hidden-size", "0"], ["--hidden-size"]),
        (["--evaluation-interval", "-1"], ["--evaluation-interval"]),
        (["--evaluation-episodes", "0"], ["--evaluation-episodes"]),
        (["--seed", "-1"], ["--seed"]),
        (["--hidden-size", str(10**30)], ["--hidden-size", "2^14"]),
        (["--buffer-size", str(10**30)], ["--buffer-size", "2^40"]),
        (["--buffer-size", str(10**12), "--total-timesteps", str(10**12)], ["memory"]),
        (["--evaluate", "no such file.pt"], ["no such file.pt", "No such file"]),
        (["--evaluate", "."], ["Is a directory"]),
    ],
    ids=lambda value: " ".join(value)[:40] if value and value[0].startswith("--") else "",
)
def test_bad_input_gets_one_sentence_and_starts_nothing(script, capsys, tmp_path, argv, parts):
    message = fails(capsys, lambda: script.main([*argv, "--run-dir", str(tmp_path / "runs")]))
    assert message.startswith("error: ")
    assert all(part in message for part in parts), message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("script", "flag"), [(drac_amort, "--z-dim"), (drac_diffus, "--diffusion-steps")])
def test_the_actors_own_flag_has_a_range(script, flag, capsys):
    assert f"{flag} must be" in fails(capsys, lambda: script.main([flag, "0"]))
    assert f"{flag} must be" in fails(capsys, lambda: script.main([flag, str(2**31)]))


@pytest.mark.parametrize("argv", [["--beta", "much"], ["--pairing", "some"], ["--nonsense"], ["--seed", "1.5"]])
def test_malformed_flags_exit_with_2(script, capsys, tmp_path, argv):
    with pytest.raises(SystemExit) as exit_info:
        script.main([*argv, "--run-dir", str(tmp_path / "runs")])
    assert exit_info.value.code == 2
    assert argv[0] in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_bug_in_the_code_is_not_taken_for_bad_input(script, run, monkeypatch):
    monkeypatch.setattr(script.Actor, "__init__", lambda self, *sizes: torch.zeros(2).view(3))
    with pytest.raises(RuntimeError, match="shape"):
        run()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_an_error(script, capsys):
    assert "no CUDA GPU" in fails(capsys, lambda: script.main(["--cuda"]))


def test_a_run_folder_that_cannot_be_written(script, capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file") in fails(capsys, lambda: script.main(["--run-dir", str(tmp_path / "file")]))


class Canary:
    """Unpickling this would create a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_files_that_are_no_model(script, run, capsys, tmp_path):
    folder = run(*SHORT, *FAST, "--evaluation-interval", "0")
    good = (folder / "model.pt").read_bytes()
    model = torch.load(folder / "model.pt", weights_only=True)

    def evaluating(*argv):
        return lambda: script.main(["--evaluate", str(tmp_path / "m.pt"), "--run-dir", str(tmp_path / "none"), *argv])

    def rejected(content, *argv):
        if isinstance(content, bytes):
            (tmp_path / "m.pt").write_bytes(content)
        else:
            torch.save(content, tmp_path / "m.pt")
        return fails(capsys, evaluating(*argv))

    assert "m.pt" in rejected(good[: len(good) // 2])
    assert "m.pt" in rejected(b"")
    assert "m.pt" in rejected({"weights": torch.zeros(3)})
    assert "m.pt" in rejected([1, 2])
    assert "m.pt" in rejected({**model, "script": "another"})
    for missing in model:
        assert "m.pt" in rejected({key: value for key, value in model.items() if key != missing})
    assert "m.pt" in rejected({**model, "weights": [1, 2]})
    assert "m.pt" in rejected({**model, "weights": {**model["weights"], "raw_alpha": torch.tensor(torch.nan)}})
    assert "m.pt" in rejected({**model, "config": {**model["config"], "unknown": 1}})
    assert (
        "m.pt" in rejected(pickle.dumps(Canary(tmp_path / "canary"), protocol=2)) and not (tmp_path / "canary").exists()
    )
    assert "m.pt" in rejected({**model, "config": Canary(tmp_path / "canary")}) and not (tmp_path / "canary").exists()
    contradiction = rejected(good, "--env-id", "Walker2d-v4")
    assert "--env-id" in contradiction and "Walker2d-v4" in contradiction and "Test/Corridor-v0" in contradiction
    assert "--hidden-size" in rejected(good, "--hidden-size", "64")
    assert "size" in rejected({**model, "config": {**model["config"], "env_id": "Pendulum-v1"}})
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("env_id", "beta", "mean", "warns"),
    [
        ("Pendulum-v1", 0.51, "geometric", True),
        ("Pendulum-v1", 0.5, "geometric", False),
        ("Pendulum-v1", 0.51, "arithmetic", False),
        ("MultiGoalPointMaze-Simple-v0", 0.84, "geometric", True),
    ],
)
def test_a_beta_above_the_ceiling_is_warned_of(run, capsys, env_id, beta, mean, warns):
    flags = ["--beta", str(beta), "--evaluation-interval", "0", "--total-timesteps", "3", "--learning-starts", "2"]
    folder = run(*flags, *FAST, "--diversity-mean", mean, env_id=env_id)
    warning = capsys.readouterr().err
    run("--evaluate", str(folder / "model.pt"), "--evaluation-episodes", "1", "--final-trials", "0", env_id=None)
    assert capsys.readouterr().err == "", "evaluation trains nothing"
    assert warning.startswith("warning: ") == warns
    assert (f"--beta {beta}" in warning and "alpha will grow" in warning) == warns


# Faults


def only_run(tmp_path):
    (folder,) = (tmp_path / "run 0").iterdir()
    return folder


@pytest.mark.parametrize(
    ("fault", "quantity"),
    [("NanReward", "reward is not finite at step 150"), ("HugeReward", "qf_loss is not finite at step 170")],
)
def test_divergence_stops_with_step_and_quantity_and_keeps_the_last_good_model(
    script, run, capsys, tmp_path, monkeypatch, fault, quantity
):
    monkeypatch.setattr(script, "LOG_INTERVAL", 170)
    message = fails(capsys, lambda: run(*FAST, "--learning-starts", "20", env_id=f"Test/Corridor{fault}-v0"), code=1)
    folder = only_run(tmp_path)
    assert quantity in message and str(folder) in message
    assert all(weight.isfinite().all() for weight in load_weights(folder).values())


def test_an_action_that_is_not_finite_never_reaches_the_environment(script, run, monkeypatch, capsys):
    monkeypatch.setattr(script.DrAC, "act", lambda self, obs, *args: np.full((len(obs), 1), np.nan))
    message = fails(capsys, lambda: run("--evaluation-interval", "0"), code=1)
    assert "action is not finite at step 1" in message


def test_weights_that_are_not_finite_are_never_saved(script, make_agent, tmp_path):
    agent, file = make_agent(), tmp_path / "model.pt"
    script.save(file, agent, 1)
    good = file.read_bytes()
    agent.raw_alpha.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="raw_alpha is not finite at step 2"):
        script.save(file, agent, 2)
    assert file.read_bytes() == good


def test_a_crash_of_the_environment_shows_its_traceback_and_keeps_model_and_logs(run, tmp_path):
    with pytest.raises(RuntimeError, match="the simulator crashed"):
        run(*FAST, env_id="Test/CorridorCrash-v0")
    assert load_weights(only_run(tmp_path)) and logged_tags(only_run(tmp_path))["charts/episodic_return"]
