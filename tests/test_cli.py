"""The command line, in-process: what a run leaves behind, what bad input is told, and what a fault costs."""

import contextlib
import csv
import ctypes
import dataclasses
import importlib.util
import io
import itertools
import json
import os
import random
import resource
import shlex
import shutil
import subprocess
import sys
import threading
import types
import typing
import unittest.mock
from functools import partial
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from conftest import Corridor, one_script
from gymnasium.envs.mujoco.half_cheetah_v4 import HalfCheetahEnv
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import drac_amort
import drac_diffus
import drac_runner as runner
import envs

MAZE, WALKER, CORRIDOR = "MultiGoalPointMaze-Simple-v0", "Walker2d-v4", "Test/Corridor-v0"
SHORT = ["--total-timesteps", "300", "--learning-starts", "280", "--evaluation-episodes", "2", "--final-trials", "0"]
FAST = ["--hidden-size", "32", "--batch-size", "32"]
SILENT = ["--evaluation-interval", "0"]
IDS = ["MultiGoalPointMaze-Simple-v0", "MultiGoalPointMaze-Medium-v0", "MultiGoalPointMaze-Hard-v0"]
IDS += ["LevelGeneration-MultiFacet-v0", "LevelGeneration-Puzzle-v0", "Humanoid-v4", "Pendulum-v1"]
A_MAP = ["1111111", "1g0r0g1", "1111111"]


@pytest.fixture(autouse=True)
def still_pictures(monkeypatch):
    """A picture takes a tenth of a second, a moving one a whole; test_envs.py looks at them."""
    monkeypatch.setattr(envs, "animate_trajectories", lambda *args: args[-1].write(b"GIF"))
    for name in ("plot_trajectories", "plot_levels"):
        monkeypatch.setattr(envs, name, lambda *args: args[-1].write(b"\x89PNG"))


def read_csv(run_folder):
    with (run_folder / "evaluations.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def load_weights(run_folder):
    return torch.load(run_folder / "model.pt", weights_only=True)["weights"]


def logged_tags(run_folder):
    events = EventAccumulator(str(run_folder))
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def fails(capsys, start, code=2):
    """Call `start`; return the one sentence with which it ended."""
    with pytest.raises(SystemExit) as exit_info:
        start()
    output = capsys.readouterr()
    message = exit_info.value.code if isinstance(exit_info.value.code, str) else output.err
    assert (1 if isinstance(exit_info.value.code, str) else exit_info.value.code) == code
    assert message.strip().count("\n") == 0 and "Traceback" not in message
    return message


# Flags


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("env_id", IDS)
def test_every_default_has_the_type_and_the_range_of_its_flag(script, env_id, paper):
    assert (
        runner.check_flags(script.default_args(env_id, paper))
        == runner.parse_args(script, ["--env-id", env_id, *["--paper"] * paper])[0]
    )


def test_every_flag_has_a_type_and_an_interval_for_the_command_line_and_for_files(script):
    """Of every interval: a bound, the value beside it inside, and the one outside."""
    intervals = 0
    for name, kind in typing.get_type_hints(script.Args, include_extras=True).items():

        def refused(value, name=name):
            try:
                runner.check_flags(script.Args(**{name: value}))
            except ValueError as error:  # or it contradicts another flag
                return str(error).startswith(f"--{name.replace('_', '-')} must be") and repr(value) in str(error)
            return False

        wrong = [[], b"x", 1j, torch.tensor(1)]
        if typing.get_origin(kind) is typing.Annotated:
            kind, interval = typing.get_args(kind)
            for bound, closed, outward in zip(
                interval[1:-1].split(","), interval[:: len(interval) - 1], (-1, 1), strict=True
            ):
                bound, closed = float(bound), closed in "[]"
                if np.isinf(bound):
                    continue
                inside, outside = (
                    int(bound) + sign if kind is int else float(np.nextafter(bound, sign * np.inf))
                    for sign in (-outward, outward)
                )
                assert [refused(value) for value in (inside, kind(bound), outside)] == [False, not closed, True], name
            wrong += [None, True, "1", np.nan, np.inf, -1 if kind is int else -1.0, 5.0 if kind is int else 5]
            intervals += 1
        elif kind is bool:
            wrong += [None, 0, 1, "True"]
        else:
            wrong += [0, True] + [None] * (name not in ("evaluate", "resume"))
            wrong += ["another"] * (typing.get_origin(kind) is typing.Literal)
        assert all(refused(value) for value in wrong), name
    assert intervals == {drac_amort: 22, drac_diffus: 22}[script]


def test_help_explains_every_flag_and_shows_the_real_defaults(script, capsys):
    def shown(*argv):
        with pytest.raises(SystemExit) as exit_info:
            script.main([*argv, "--help"])
        assert exit_info.value.code == 0
        return " ".join(capsys.readouterr().out.replace("│", " ").split())

    text = shown()
    for field in dataclasses.fields(script.Args):
        assert f"--{field.name.replace('_', '-')}" in text
    assert text.count("(default:") == len(dataclasses.fields(script.Args)), "a flag without an explanation"
    assert all(f"(default: {value})" in text for value in (100000, 0.77, 16, 5, 20.0))
    assert "(default: 1000000)" in shown("--env-id", WALKER), "those of the environment"
    paper = shown("--paper")
    assert all(f"(default: {value})" in paper for value in (17, "disjoint", 0.8, "True")) and "0.77" not in paper
    assert script is drac_amort or ("(default: hard)" in paper and "(default: 20)" in paper)


def test_the_defaults_are_the_best_found_on_mazes_and_the_papers_with_paper(script):
    names = ["total_timesteps", "beta", "num_envs", "n_steps", "hold_steps", "num_action_samples", "pairing"]
    names += ["matmul_precision"]

    def defaults(*argv):
        args, _ = runner.parse_args(script, list(argv))
        return [getattr(args, name) for name in names]

    beta = {drac_amort: 0.5, drac_diffus: 0.2}[script]
    for env_id, steps in zip(IDS, (100_000, 200_000, 300_000), strict=False):
        assert defaults("--env-id", env_id) == [steps, 0.77, 16, 5, 20.0, 4, "all", "auto"]
        assert defaults("--env-id", env_id, "--paper") == [steps, 0.8, 1, 1, 1.0, 17, "disjoint", "highest"]
    assert defaults("--env-id", "Humanoid-v4") == [1_000_000, beta, 1, 1, 1.0, 4, "all", "auto"]
    assert defaults("--env-id", "Humanoid-v4", "--paper") == [1_000_000, beta, 1, 1, 1.0, 17, "disjoint", "highest"]
    assert defaults("--env-id", "LevelGeneration-Puzzle-v0") == [500_000, 0.5, 1, 1, 1.0, 4, "all", "auto"]
    assert defaults("--env-id", "Pendulum-v1") == [1_000_000, 0.2, 1, 1, 1.0, 4, "all", "auto"]
    others = ["--beta", "0.3", "--num-envs", "7", "--pairing", "all", "--total-timesteps", "7000"]
    overridden = defaults("--env-id", IDS[2], *others, "--paper")
    assert overridden == [7000, 0.3, 7, 1, 1.0, 17, "all", "highest"]


def test_the_diffusion_actor_is_short_and_smooth_on_mazes_and_the_papers_with_paper():
    def defaults(*argv):
        args, _ = runner.parse_args(drac_diffus, list(argv))
        return args.diffusion_steps, args.clip

    assert defaults("--env-id", MAZE) == (5, "tanh")
    assert defaults("--env-id", WALKER) == (20, "tanh")
    assert defaults("--env-id", MAZE, "--paper") == defaults("--env-id", WALKER, "--paper") == (20, "hard")
    assert defaults("--env-id", MAZE, "--paper", "--diffusion-steps", "3", "--clip", "tanh") == (3, "tanh")


# Whole runs


@pytest.mark.parametrize("env_id", [MAZE, WALKER])
def test_a_short_run_learns_and_leaves_every_promised_file(script, run, capfd, monkeypatch, env_id):
    start, save = {}, runner.Run.save

    def save_and_keep_the_first(run, *args, **state):
        start.update({name: weight.clone() for name, weight in run.agent.state_dict().items() if name not in start})
        save(run, *args, **state)

    monkeypatch.setattr(runner.Run, "save", save_and_keep_the_first)
    folder = run(*SHORT, "--evaluation-interval", "200", "--final-trials", "1", env_id=env_id)
    maze = env_id == MAZE
    steps = [0, 208, 304] if maze else [0, 200, 300]  # a maze's 16 environments take 16 steps at once
    assert folder.name.startswith(f"{env_id}__{script.__name__}__1__")
    expected = {"config.json", "evaluations.csv", "model.pt", "best_model.pt", "checkpoint.pt", "summary.json", ".lock"}
    expected |= {"trajectories.png", "episodes.gif"} if maze else set()
    files = {file.name for file in folder.iterdir()}
    assert files - expected == {name for name in files if name.startswith("events.out.tfevents")}
    assert expected < files and len(files) == len(expected) + 1

    trained = load_weights(folder)
    for name, weight in start.items():
        assert trained[name].isfinite().all() and not torch.equal(trained[name], weight), f"{name} did not change"

    config = json.loads((folder / "config.json").read_text())
    assert config["env_id"] == env_id and config["versions"]["torch"] == torch.__version__
    rows = read_csv(folder)
    assert [row["global_step"] for row in rows] == steps
    metrics = {"episodic_return_mean", "episodic_return_std", "episodic_length_mean"}
    if maze:
        metrics |= {"success_rate", "reachable_modes", "multi_goal_score", "goal_0", "goal_1", "goal_2", "goal_3"}
        assert (folder / "trajectories.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / "episodes.gif").read_bytes().startswith(b"GIF")
    assert set(rows[0]) == {"global_step"} | metrics
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["episodic_return_mean"] == rows[-1]["episodic_return_mean"]
    trials = [
        "success_rate",
        "reachable_modes",
        "multi_goal_score",
        "removal_sr5",
        "removal_sr5_release",
        "obstacle_sr5",
    ]
    expected = {f"{prefix}_{trial}" for prefix in ("final", "final_held") for trial in trials}
    assert {name for name in summary if name.startswith("final") and "goal_" not in name.replace("multi_goal", "")} == (
        expected if maze else set()
    )
    best = max(rows, key=lambda row: row["episodic_return_mean"])  # the first of equals
    assert summary["best_episodic_return_mean"] == best["episodic_return_mean"]
    assert torch.load(folder / "best_model.pt", weights_only=True)["global_step"] == best["global_step"]
    tags = logged_tags(folder)
    assert [event.step for event in tags["evaluation/episodic_return_mean"]] == steps
    assert "evaluation/global_step" not in tags and summary["global_step"] == steps[-1]
    final = {name for name in summary if name.startswith("final")}
    assert final == {name.removeprefix("evaluation/") for name in tags if name.startswith("evaluation/final")}
    output = capfd.readouterr()
    assert str(folder) in output.out and "episodic_return_mean" in output.out
    assert output.err == "", "no progress bar without a terminal, and no warnings of other packages"


def test_losses_and_episodes_are_logged(script, run, monkeypatch):
    monkeypatch.setattr(runner, "LOG_INTERVAL", 150)
    tags = logged_tags(run(*SHORT, "--learning-starts", "100", *SILENT, *FAST))
    losses = {"qf_loss", "qf_values", "actor_loss", "diversity", "target_diversity", "alpha", "actor_grad_norm"}
    charts = {"episodic_return", "episodic_length", "steps_per_second"}
    assert set(tags) == {f"losses/{name}" for name in losses} | {f"charts/{name}" for name in charts}
    assert [event.step for event in tags["losses/qf_loss"]] == [150, 300]
    assert all(np.isfinite(event.value) for events in tags.values() for event in events)
    assert all(event.value > 0 for event in tags["losses/actor_grad_norm"])
    assert max(event.value for event in tags["charts/episodic_length"]) == 7


def test_flags_reach_what_they_set(script, run, monkeypatch):
    batches, rings, evaluations, trials, holds = [], [], [], [], []
    update, create, hold = script.DrAC.update, script.ReplayBuffer.__init__, script.HeldLatents.__init__

    def watched_update(self, batch):
        batches.append(len(batch.rewards))
        return update(self, batch)

    def watched_create(self, *args):
        create(self, *args)
        rings.append((self.rows.shape[:2], self.n_steps, self.gamma))

    def watched_hold(self, actor, hold_steps, *generator):
        holds.append(hold_steps)
        hold(self, actor, hold_steps, *generator)

    def watched_evaluation(policy, make, num_episodes, seed, *others):
        evaluations.append((num_episodes, seed))
        return {"episodic_return_mean": 0.0}

    def watched_trials(policy, make, num_trials, seed):
        trials.append((num_trials, seed))
        return {"success_rate": 0.5}

    monkeypatch.setattr(script.DrAC, "update", watched_update)
    monkeypatch.setattr(script.ReplayBuffer, "__init__", watched_create)
    monkeypatch.setattr(script.HeldLatents, "__init__", watched_hold)
    monkeypatch.setattr(runner, "evaluate_policy", watched_evaluation)
    monkeypatch.setattr(runner, "final_trials", watched_trials)
    length = ["--total-timesteps", "60", "--learning-starts", "40", "--updates-per-step", "3", "--num-envs", "4"]
    evaluation = ["--evaluation-interval", "30", "--evaluation-episodes", "7", "--final-trials", "2", "--seed", "5"]
    run(*length, *evaluation, "--batch-size", "8", "--buffer-size", "50", "--n-steps", "2", "--hold-steps", "9")
    assert batches == 3 * 5 * [8], "three after each of the steps 44, 48, .., 60 of all environments"
    assert rings == [((13, 4), 2, 0.99)], "50 transitions, rounded up to whole rows of all environments"
    (episodes, seed), *others = evaluations
    assert episodes == 7 and others == 2 * [(7, seed)], "after steps 0, 32 and 60"
    assert trials == 2 * [(2, seed)], "with fresh noise, and with held"
    fresh, training, *evaluations = holds
    assert fresh == 1.0 and sorted(training) == [1.0, 9.0, 9.0, 9.0]
    assert evaluations == [1.0, 1.0, 1.0, runner.HELD_STEPS] and runner.HELD_STEPS > 1


@one_script
@pytest.mark.parametrize("alone", [False, True])
def test_updates_and_acting_have_the_matmul_precision_asked_for(script, copied, monkeypatch, tmp_path, alone):
    script, seen = copied() if alone else script, []
    runner.set_matmul_precision(script.Args())
    automatic = "highest" if alone else torch.get_float32_matmul_precision()
    for owner, name in ((script.DrAC, "update"), (script.Collector, "step")):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name), seen))
    for precision in ("medium", "highest", "high", "auto"):
        seen.clear()
        flags = ["--total-timesteps", "4", "--learning-starts", "2", "--matmul-precision", precision, *SILENT]
        folder = script.main(["--env-id", "Pendulum-v1", "--run-dir", str(tmp_path / "runs"), *flags])
        precision = precision if precision != "auto" else automatic
        assert seen == 6 * [precision]
        assert alone or json.loads((folder / "config.json").read_text())["matmul_precision"] == precision


@pytest.mark.parametrize("bits", [7, 10, 23], ids=["bfloat16", "TF32", "float32"])
def test_an_automatic_matmul_precision_is_medium_only_where_that_rounds_nothing(monkeypatch, bits):
    args = drac_amort.default_args(MAZE)
    runner.set_matmul_precision(args)
    probe = torch.randn(256, 256)
    assert args.matmul_precision == "auto" and torch.equal(probe @ torch.eye(256), probe), "whatever this machine does"

    def multiply(a, b):  # as a machine does that keeps so many bits of a factor where it may
        if torch.get_float32_matmul_precision() != "highest":
            fractions, exponents = a.double().frexp()
            a = torch.ldexp((fractions * 2 ** (bits + 1)).round() / 2 ** (bits + 1), exponents)
        return (a.double() * b.diagonal().double()).float()  # b is diagonal

    monkeypatch.setattr(torch.Tensor, "__matmul__", multiply)
    torch.set_float32_matmul_precision("highest")
    runner.set_matmul_precision(args)
    assert torch.get_float32_matmul_precision() == ("medium" if bits == 23 else "highest")
    runner.set_matmul_precision(dataclasses.replace(args, matmul_precision="medium"))
    assert torch.get_float32_matmul_precision() == "medium", "as asked for"
    runner.set_matmul_precision(dataclasses.replace(args, cuda=True))
    assert torch.get_float32_matmul_precision() == "highest", "on a GPU, which may round to TF32, without a probe"


def watched(method, seen):
    def watch(*args, **kwargs):
        seen.append(torch.get_float32_matmul_precision())
        return method(*args, **kwargs)

    return watch


def test_runs_repeat_bit_for_bit_and_evaluation_does_not_disturb_them(run):
    flags = ["--total-timesteps", "300", "--learning-starts", "100", "--evaluation-episodes", "3", *FAST]
    flags += ["--num-envs", "3", "--n-steps", "2", "--hold-steps", "2", "--checkpoint-interval", "40"]
    first, second = run(*flags, "--evaluation-interval", "60"), run(*flags, "--evaluation-interval", "60")
    silent, other_seed = run(*flags, *SILENT), run(*flags, *SILENT, "--seed", "2")
    assert (first / "evaluations.csv").read_bytes() == (second / "evaluations.csv").read_bytes()
    assert not (silent / "evaluations.csv").exists()
    weights = load_weights(first)
    for name, weight in weights.items():
        assert torch.equal(weight, load_weights(second)[name]), name
        assert torch.equal(weight, load_weights(silent)[name]), name
        assert not torch.equal(weight, load_weights(other_seed)[name]), name


def test_the_runs_seed_reaches_weights_environments_noise_and_evaluations(script, run, make_agent, monkeypatch):
    begun, drawn = [], []
    monkeypatch.setattr(runner, "train", lambda script, agent, *_: begun.append(agent) or {"global_step": 0})
    for seed in (1, 2):
        run("--seed", str(seed))
        agent = make_agent(2, 1, env_id=CORRIDOR, seed=seed)  # of equal weights
        evaluated = script.make_policy(agent)(np.zeros((1, 2)), np.ones(1, bool)).item()
        start = script.Collector(agent.args, agent.actor, 0).obs[0, 0]
        drawn.append([begun[-1].actor.fc1.weight[0, 0].item(), evaluated, start, torch.rand(()).item()])
    assert all(one != other for one, other in zip(*drawn, strict=True)), drawn


def test_a_chapter_seeds_every_source_of_random_numbers(script, make_agent):
    """Old environments draw from Python's and NumPy's global ones."""
    agent = make_agent(env_id=CORRIDOR)

    def drawn(iteration):
        script.Collector(agent.args, agent.actor, iteration)
        return random.random(), np.random.rand(), torch.rand(()).item()

    first, other, again = drawn(0), drawn(60), drawn(0)
    assert first == again and not set(first) & set(other)


def test_neighbouring_seeds_are_evaluated_on_starts_of_their_own(script, make_agent, monkeypatch):
    def evaluation_seed(seed):
        given = []
        result = {"episodic_return_mean": 0.0}
        monkeypatch.setattr(
            runner, "evaluate_policy", lambda policy, make, n, seed, *others: given.append(seed) or result
        )
        runner.evaluate(script, make_agent(seed=seed), unittest.mock.Mock(), 0, 1.0, last=False)
        return given[0]

    starts = [np.random.SeedSequence(evaluation_seed(seed)).generate_state(10) for seed in range(100)]
    assert len(np.unique(starts)) == 1000, "no start twice"


def watch_training(script, monkeypatch):
    """Keep what a run stores, its environments and the noise of its actions."""
    stored, made, noise = [], [], []
    add, make, act = script.ReplayBuffer.add, script.make, script.act

    def watched_add(buffer, *columns):
        stored.append([np.array(column) for column in columns])
        add(buffer, *columns)

    def watched_make(*args, **kwargs):
        made.append(make(*args, **kwargs))
        return made[-1]

    def watched_act(actor, obs, latents):
        noise.append(latents.clone())
        return act(actor, obs, latents)

    monkeypatch.setattr(script.ReplayBuffer, "add", watched_add)
    monkeypatch.setattr(script, "make", watched_make)
    monkeypatch.setattr(script, "act", watched_act)
    return stored, made, noise


def test_logged_returns_and_lengths_are_those_of_the_episodes(script, run, monkeypatch):
    stored, _, _ = watch_training(script, monkeypatch)
    folder = run("--num-envs", "3", "--total-timesteps", "300", *SILENT, *FAST)
    expected, sums = {"episodic_return": {}, "episodic_length": {}}, np.zeros((2, 3))
    for step, (*_, rewards, _, ends) in enumerate(stored[:-1], 1):  # the last is a chapter's cut
        sums += rewards, np.ones(3)
        if ends.any():
            for means, mean in zip(expected.values(), sums[:, ends].mean(axis=1), strict=True):
                means[3 * step] = mean
            sums[:, ends] = 0
    for name, means in expected.items():
        found = {event.step: event.value for event in logged_tags(folder)[f"charts/{name}"] if event.step < 300}
        assert len(means) > 10 and found == pytest.approx(means, rel=1e-5)


@one_script
def test_updates_have_batches_of_their_own_and_the_logged_gradient_is_the_actors(script, run, monkeypatch):
    batches, norms, update = [], [], script.DrAC.update

    def watched(self, batch):
        losses = update(self, batch)
        batches.append(batch.obs)
        norms.append(torch.cat([parameter.grad.flatten() for parameter in self.actor.parameters()]).norm().item())
        return losses

    monkeypatch.setattr(script.DrAC, "update", watched)
    monkeypatch.setattr(runner, "LOG_INTERVAL", 60)
    flags = ["--total-timesteps", "60", "--learning-starts", "56", "--updates-per-step", "3"]
    tags = logged_tags(run(*flags, *SILENT, *FAST))
    assert len(batches) == 12 and not any(torch.equal(*pair) for pair in itertools.combinations(batches, 2))
    assert tags["losses/actor_grad_norm"][-1].value == pytest.approx(norms[-1])


def test_every_fourth_environment_has_fresh_noise(script, make_agent):
    agent = make_agent(2, 1, env_id=CORRIDOR, num_envs=9, hold_steps=20.0)
    assert script.Collector(agent.args, agent.actor, 0).noise.hold_steps.tolist() == 2 * [20, 20, 20, 1] + [20]


def test_what_an_evaluation_asks_of_an_environment_outweighs_env_kwargs(script):
    args = script.Args(env_id=MAZE, env_kwargs='{"obstacles": false, "max_episode_steps": 40}')
    env = script.make(args, obstacles=True, max_episode_steps=20)
    assert env.unwrapped.obstacles and env.spec.max_episode_steps == 20
    assert script.make(args).spec.max_episode_steps == 40


def test_every_environment_has_its_own_seed_and_noise_and_stores_its_own_true_transitions(script, run, monkeypatch):
    """Three environments, a hundred steps of each, in chapters of forty."""
    stored, made, noise = watch_training(script, monkeypatch)
    flags = ["--num-envs", "3", "--total-timesteps", "298", "--checkpoint-interval", "40"]
    folder = run(*flags, *SILENT, *FAST)
    obs, actions, next_obs, rewards, terminations, ends = (np.stack(column) for column in zip(*stored, strict=True))
    assert json.loads((folder / "summary.json").read_text())["global_step"] == 300, "steps of all environments"
    assert obs.shape == next_obs.shape == (100, 3, 2) and actions.shape == (100, 3, 1)
    assert rewards.shape == terminations.shape == ends.shape == (100, 3)
    terminations = terminations.astype(bool)

    assert np.abs(actions).max() <= 1
    taken = [np.array([env.unwrapped.actions for env in made[i : i + 3]]) for i in (1, 4, 7)]  # (3, steps, 1) each
    np.testing.assert_allclose(np.concatenate(taken, axis=1).swapaxes(0, 1), 3 * actions + 1, atol=1e-5)
    moved = obs[..., 0] + 3 * actions[..., 0] + 1
    np.testing.assert_allclose(next_obs[..., 0], moved, atol=1e-4, err_msg="an episode's own last observation")
    np.testing.assert_allclose(rewards, -np.abs(next_obs[..., 0]), atol=1e-6)
    np.testing.assert_array_equal(terminations, next_obs[..., 0] > 5)

    age = np.zeros(3, int)
    for step in range(100):
        age += 1
        cut = step in (39, 79, 99)  # a chapter's last step
        np.testing.assert_array_equal(ends[step], terminations[step] | (age == 7) | cut)
        if step < 99:
            np.testing.assert_array_equal((next_obs[step] == obs[step + 1]).all(axis=1), ~ends[step])
        age[ends[step]] = 0
    assert (ends & ~terminations).sum() > 10 and terminations.any()

    firsts = np.concatenate([obs[start, :, 0] for start in (0, 40, 80)])
    assert len(set(firsts)) == 9, "nine seeds"
    assert all(len(latents.unbind(-2)) == 3 and len({tuple(x.flatten().tolist()) for x in latents.unbind(-2)}) == 3
               for latents in noise)  # fmt: skip


@pytest.mark.parametrize("num_envs", [1, 4])
def test_held_noise_changes_at_an_episodes_start_and_some_environments_draw_afresh(script, run, monkeypatch, num_envs):
    stored, _, noise = watch_training(script, monkeypatch)
    steps = ["--num-envs", str(num_envs), "--total-timesteps", str(60 * num_envs), "--learning-starts", "9"]
    run(*steps, *SILENT, *FAST, "--hold-steps", "1e9")
    ends = np.stack([columns[-1] for columns in stored])[:-1]  # (59, N)
    noise = torch.stack(noise).movedim(-2, 1).flatten(2)  # (60, N, .)
    changes = (noise[1:] != noise[:-1]).any(dim=-1).numpy()
    held = [i for i in range(num_envs) if (changes[:, i] == ends[:, i]).all()]
    fresh = [i for i in range(num_envs) if changes[:, i].all()]
    assert ends.any() and not ends.all()
    assert len(held) == (3 if num_envs == 4 else 1) and sorted(held + fresh) == list(range(num_envs))


def test_evaluate_reproduces_the_last_evaluation(script, run, capsys):
    flags = ["--evaluation-episodes", "4", "--final-trials", "1"]
    actor = {drac_amort: ["--z-dim", "3"], drac_diffus: ["--diffusion-steps", "2", "--clip", "hard"]}[script]
    folder = run(*SHORT, *FAST, *flags, *actor, "--seed", "3", env_id=MAZE)
    again = run("--evaluate", str(folder / "model.pt"), *flags, env_id=None)
    assert read_csv(again) == read_csv(folder)[-1:]
    assert (again / "trajectories.png").exists()
    trained, evaluated = (json.loads((path / "summary.json").read_text()) for path in (folder, again))
    assert evaluated == {key: value for key, value in trained.items() if key in evaluated}
    assert {"final_success_rate", "final_held_success_rate"} <= set(evaluated)
    trained, evaluated = (json.loads((path / "config.json").read_text()) for path in (folder, again))
    assert {name for name in trained if trained[name] != evaluated[name]} == {"evaluate", "run_dir", "hold_steps"}
    assert evaluated["hold_steps"] == 1, "fresh noise, as in training's evaluations"
    corridor = str(run(*SHORT, *FAST) / "model.pt")
    evaluations = [read_csv(run("--evaluate", corridor, *flags, env_id=None)) for flags in ([], [], ["--seed", "9"])]
    assert evaluations[0] == evaluations[1] != evaluations[2]


def test_an_actor_alone_can_be_evaluated(script, run, capsys, tmp_path):
    folder, file = run(*SHORT, *FAST), str(tmp_path / "actor.pt")
    model = torch.load(folder / "model.pt", weights_only=True)
    weights = {name: weight for name, weight in model["weights"].items() if name.startswith("actor.")}
    torch.save({**model, "weights": weights}, file)
    evaluated = [read_csv(run("--evaluate", path, env_id=None)) for path in (file, str(folder / "model.pt"))]
    assert evaluated[0] == evaluated[1]
    torch.save({**model, "weights": {name: weight for name, weight in weights.items() if "fc2" not in name}}, file)
    assert "actor.fc2.weight" in fails(capsys, lambda: run("--evaluate", file, env_id=None))


def test_evaluate_plays_with_held_noise_on_request(script, run, monkeypatch):
    model = run(*SHORT, *FAST, *SILENT) / "model.pt"
    noise, policies = [], script.HeldLatents.__call__

    def watched(self, starts):
        noise.append((policies(self, starts).clone(), starts.copy()))
        return noise[-1][0]

    monkeypatch.setattr(script.HeldLatents, "__call__", watched)
    run("--evaluate", str(model), "--hold-steps", "1e9", "--evaluation-episodes", "3", env_id=None)
    held = [torch.equal(x, y) for (x, _), (y, _) in itertools.pairwise(noise)]
    begun = [bool(starts.any()) for _, starts in noise[1:]]
    assert any(held) and all(same != start for same, start in zip(held, begun, strict=True))


@one_script
def test_final_trials_hold_noise_for_as_long_as_evaluate_is_asked_to(script, run, monkeypatch):
    made, make_policy = [], script.make_policy
    monkeypatch.setattr(script, "make_policy", lambda agent, steps=1.0: made.append(steps) or make_policy(agent, steps))
    flags = ["--evaluation-episodes", "1", "--final-trials", "1"]
    model = run(*SHORT, *FAST, *flags, "--hold-steps", "5", env_id=MAZE) / "model.pt"
    assert made[-2:] == [1, 20], "after training always the same"
    for hold, expected in (([], [1, 1, 20]), (["--hold-steps", "7"], [7, 1, 7])):
        run("--evaluate", str(model), *flags, *hold, env_id=None)
        assert made[-3:] == expected


@one_script
def test_a_resumed_runs_model_can_be_evaluated_and_flags_of_training_are_refused(script, run, capsys):
    folder = run(*SHORT, *FAST, *SILENT)
    script.main(["--resume", str(folder), "--total-timesteps", "350"])
    model = str(folder / "model.pt")
    evaluated = run("--evaluate", model, "--evaluation-episodes", "1", env_id=None)
    assert len(read_csv(evaluated)) == 1 and evaluated.parent != folder.parent, "in a folder of its own"
    message = fails(capsys, lambda: run("--evaluate", model, "--gamma", "0.5", "--beta", "0.3", env_id=None))
    assert message == "error: --beta 0.3 contradicts the run's 0.2\n", "the first of them"
    message = fails(capsys, lambda: run("--evaluate", model, "--no-cudagraphs", env_id=None))
    assert message == "error: --cudagraphs False contradicts the run's True\n"


@one_script
def test_evaluate_films_an_episode_where_the_environment_can_be_rendered(script, run, capfd, monkeypatch):
    short = ["--total-timesteps", "50", "--learning-starts", "49", *FAST, *SILENT]
    model = run(*short, env_id="LevelGeneration-MultiFacet-v0") / "model.pt"
    evaluating = ["--evaluate", str(model), "--evaluation-episodes", "1", "--final-trials", "0"]
    with Image.open(run(*evaluating, env_id=None) / "episodes.gif") as gif:
        assert 40 < gif.n_frames <= 51 and gif.size == (640, 128), "equal pictures are merged"
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(envs.LevelGeneration, "render", lambda self: raising(OSError("no screen")))
    folder = run(*evaluating, env_id=None)
    warning = capfd.readouterr().err
    assert not (folder / "episodes.gif").exists() and (folder / "summary.json").exists()
    assert warning.startswith("warning: episodes.gif") and "no screen" in warning and warning.count("\n") == 1
    assert "MUJOCO_GL" in warning, "what helps"
    silent = run(*short) / "model.pt"
    capfd.readouterr()
    run("--evaluate", str(silent), env_id=None)
    assert capfd.readouterr().err == "", "an environment that has no pictures"


@one_script
def test_an_interrupted_evaluation_does_not_speak_of_resuming(script, run, capsys, monkeypatch):
    model = run(*SHORT, *FAST, *SILENT) / "model.pt"

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "evaluate", interrupted)
    assert fails(capsys, lambda: run("--evaluate", str(model), env_id=None), code=1) == "interrupted"


@one_script
def test_runs_started_at_once_get_folders_of_their_own(script, tmp_path):
    flags = ["--env-id", f"json:{CORRIDOR}", "--run-dir", str(tmp_path), *SILENT, *FAST]  # any module will do
    folders = [script.main([*flags, "--total-timesteps", "2", "--learning-starts", "1"]) for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(folder.parent == tmp_path and ":" not in folder.name for folder in folders), "Windows takes no colons"


@one_script
def test_a_terminal_shows_a_progress_bar(script, run, monkeypatch, capsys):
    monkeypatch.setattr(runner, "LOG_INTERVAL", 100)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(*SHORT, *SILENT, *FAST, "--num-envs", "3")
    shown = capsys.readouterr().err
    assert all(part in shown for part in ("300/300", "alpha=", "diversity=", "steps/s"))


@one_script
def test_a_warning_stands_on_a_line_of_its_own(script, run, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(torch, "save", unittest.mock.Mock(side_effect=OSError("no space left")))
    with pytest.raises(SystemExit):
        run(*SHORT, *SILENT, *FAST)
    shown = capsys.readouterr().err
    assert "\rwarning: checkpoint.pt of" in shown or "\nwarning: checkpoint.pt of" in shown


@pytest.mark.parametrize("script", [drac_diffus])  # the other one: alone, below, and with a reader that is gone
def test_the_script_runs_from_the_shell_where_stderr_is_closed(script, tmp_path):
    command = [sys.executable, script.__file__, "--env-id", "Pendulum-v1", "--diffusion-steps", "3", *SHORT, *FAST]
    command = f"exec {shlex.join(command)} --run-dir out 2>&-"
    result = subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert result.returncode == 0 and list(tmp_path.glob("out/*/summary.json"))
    (model,) = tmp_path.glob("out/Pendulum-v1__*/model.pt")
    assert result.stdout.startswith(f"training: files in {model.parent.relative_to(tmp_path)}\nstep 0: mean return ")
    assert "\nstep 300: mean return " in result.stdout


@one_script
def test_a_chapters_environments_are_closed_before_the_next_are_made(script, run, monkeypatch):
    """A simulator may be one of a kind, and each costs memory."""
    opened, closed, most = [], [], []
    make, close = script.make_env, Corridor.close

    def watched_make(*args, **kwargs):
        opened.append(make(*args, **kwargs))
        most.append(len(opened) - len(closed))
        return opened[-1]

    monkeypatch.setattr(script, "make_env", watched_make)
    monkeypatch.setattr(Corridor, "close", lambda self: (closed.append(self), close(self)))
    flags = ["--num-envs", "2", "--checkpoint-interval", "50", "--evaluation-interval", "0"]
    run(*SHORT, *FAST, *flags)
    assert len(opened) == len({id(env) for env in closed}) > 2 * 3 and max(most) == 2


@one_script
def test_training_that_is_left_half_way_closes_its_environments(script, make_agent, monkeypatch):
    """By `break` in a notebook, Ctrl-C or a crash."""
    agent, closed = make_agent(2, 1, env_id=CORRIDOR, num_envs=3), []
    monkeypatch.setattr(Corridor, "close", lambda self: closed.append(self))
    training = script.train(agent, script.ReplayBuffer(agent.args, 2, 1, torch.device("cpu")))
    next(training)
    assert not closed
    training.close()
    assert len(closed) == 3


@one_script
def test_main_works_outside_the_main_thread(script, run):
    folders = []
    thread = threading.Thread(target=lambda: folders.append(run(*SHORT, *SILENT, *FAST)))
    thread.start()
    thread.join()
    assert load_weights(*folders)


@pytest.mark.parametrize(
    ("script", "seed", "batch_size", "steps"), [(drac_amort, 2, 64, 4000), (drac_diffus, 4, 64, 5600)]
)
def test_the_defaults_soon_reach_several_goals_of_the_simple_maze(script, seed, batch_size, steps, tmp_path):
    """After 250 updates; of the diffusion actor 350 that are cheaper."""
    flags = ["--final-trials", "0", "--run-dir", str(tmp_path)]
    training = ["--seed", str(seed), "--total-timesteps", str(steps), "--batch-size", str(batch_size)]
    folder = script.main([*flags, *training, "--evaluation-interval", str(steps), "--evaluation-episodes", "50"])
    first, last = read_csv(folder)
    (held,) = read_csv(script.main([*flags, "--evaluate", str(folder / "model.pt"), "--hold-steps", "20"]))
    assert last["success_rate"] > first["success_rate"] + 0.2
    assert held["success_rate"] > 0.4 and held["reachable_modes"] >= 2


# A map of one's own


@pytest.fixture
def a_map(tmp_path, monkeypatch):
    """A map's file, and the flag that chooses it."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "my maze.txt"
    file.write_text("\n".join(A_MAP))
    return file, ["--env-kwargs", json.dumps({"maze_map": file.name, "max_episode_steps": 40})]


@one_script
def test_a_custom_map_trains_evaluates_and_draws(script, run, a_map, monkeypatch):
    folder = run(*SHORT, *FAST, *a_map[1], env_id=MAZE)
    again = run(
        "--evaluate", str(folder / "model.pt"), "--evaluation-episodes", "2", "--final-trials", "1", env_id=None
    )
    for path in (folder, again):
        assert (path / "trajectories.png").read_bytes().startswith(b"\x89PNG")
        (*_, row) = read_csv(path)
        assert {"goal_0", "goal_1"} < set(row) and "goal_2" not in row and row["episodic_length_mean"] <= 40
    assert read_csv(again) == read_csv(folder)[-1:]
    assert "final_held_obstacle_sr5" in json.loads((again / "summary.json").read_text())


@one_script
def test_a_run_keeps_its_map(script, run, a_map, capsys, monkeypatch):
    """Its file is edited after the first checkpoint, and later lost."""
    file, map_flags = a_map
    starts, make = [], script.make
    other = "\n".join(row.replace("0r0", "r00") for row in A_MAP)

    def making(*args, **kwargs):
        env = make(*args, **kwargs)
        starts.append(env.unwrapped.start.tolist())
        return env

    def saving(*args):
        save_checkpoint(*args)
        file.write_text(other)

    save_checkpoint = runner.Run.save_checkpoint
    with monkeypatch.context() as patches:
        patches.setattr(script, "make", making)
        patches.setattr(runner.Run, "save_checkpoint", saving)
        folder = run(*SHORT, *FAST, "--checkpoint-interval", "8", *map_flags, env_id=MAZE)
    assert file.read_text() == other and len(starts) > 3 and all(start == starts[0] for start in starts)

    def resuming(steps, *argv):
        return script.main(["--resume", str(folder), "--total-timesteps", str(steps), *argv])

    capsys.readouterr()
    error = fails(capsys, lambda: resuming(320, *map_flags))
    assert "g0r0g" in error.partition("contradicts the run's")[2]
    file.write_text("\n".join(A_MAP) + "\n\n")
    resuming(320, *map_flags)  # the same map
    file.unlink()
    monkeypatch.chdir("/")
    evaluating = ["--evaluate", str(folder / "model.pt"), "--evaluation-episodes", "1", "--final-trials", "0"]
    assert "goal_1" in read_csv(run(*evaluating, env_id=None))[0]
    longer = [*evaluating, "--env-kwargs", '{"max_episode_steps": 50}']
    assert "goal_2" not in read_csv(run(*longer, env_id=None))[0], "what is not named stays the run's"
    resuming(340)
    assert "goal_2" in read_csv(run(*evaluating, "--env-kwargs", '{"maze_map": "simple"}', env_id=None))[0]


@one_script
def test_a_file_from_before_that_names_its_map(script, run, a_map, capsys):
    file, map_flags = a_map
    model = run(*SHORT, *FAST, *SILENT, *map_flags, env_id=MAZE) / "model.pt"
    state = torch.load(model, weights_only=True)
    state["config"]["env_kwargs"] = map_flags[1]
    torch.save(state, model)
    evaluating = partial(
        run, "--evaluate", str(model), "--evaluation-episodes", "1", "--final-trials", "0", env_id=None
    )
    evaluating()
    file.write_text("\n".join(row.replace("0r0", "r00") for row in A_MAP))
    assert "another one than in training" in fails(capsys, evaluating)
    file.unlink()
    assert "'my maze.txt'" in fails(capsys, evaluating)


# This file alone, and without envs.py


@pytest.fixture
def copied(script, tmp_path, monkeypatch):
    """Copy the script, and other files, into an empty folder, write more beside them, and import it from there."""

    def copy(*others, **contents):
        folder = tmp_path / "copied"
        folder.mkdir()
        for file in (script.__file__, *(module.__file__ for module in others)):
            shutil.copy(file, folder)
        for name in {"envs", "drac_runner"} - {module.__name__ for module in others}:
            monkeypatch.setitem(sys.modules, name, None)
        for name, content in contents.items():
            (folder / f"{name}.py").write_text(content)
            monkeypatch.delitem(sys.modules, name, raising=False)
            monkeypatch.syspath_prepend(folder)
        modules = []
        for name in (*(module.__name__ for module in others), script.__name__):
            spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
            modules.append(importlib.util.module_from_spec(spec))
            monkeypatch.setitem(sys.modules, name, modules[-1])
            spec.loader.exec_module(modules[-1])
        return modules[-1]

    return copy


@one_script
@pytest.mark.parametrize(
    ("name", "content", "broken"),
    [
        ("envs", "", False),
        ("envs", "import no_such_package", True),
        ("drac_runner", "import no_such_package", True),
        ("runner", "import no_such_package", False),  # anybody may have one: it is left alone
    ],
)
def test_other_packages_of_these_names_are_not_ours_but_a_broken_one_is_told_of(
    copied, tmp_path, name, content, broken
):
    others, argv = [runner] * (name != "drac_runner"), [*SHORT, *FAST, "--run-dir", str(tmp_path / "runs")]
    with pytest.raises(ModuleNotFoundError, match="no_such_package") if broken else contextlib.nullcontext():
        copied(*others, **{name: content}).main(["--env-id", CORRIDOR, *argv])
    assert len(list(tmp_path.glob("runs/*/summary.json"))) == (not broken)


@one_script
def test_a_script_alone_closes_its_environments(copied, tmp_path, monkeypatch):
    closed, close = [], Corridor.close
    monkeypatch.setattr(Corridor, "close", lambda self: (closed.append(self), close(self)))
    copied().main(["--env-id", CORRIDOR, *SHORT, *FAST, "--run-dir", str(tmp_path / "runs")])
    assert len(closed) == 2, "the one whose spaces it looks at, and the one it trains in"


@one_script
def test_without_envs_a_script_trains_and_evaluates_returns(copied, tmp_path):
    script = copied(runner)
    folder = script.main(["--env-id", "Pendulum-v1", *SHORT, *FAST, "--run-dir", str(tmp_path / "runs")])
    first, last = read_csv(folder)
    assert set(first) == {"global_step", "episodic_return_mean", "episodic_return_std"} and last["global_step"] == 300
    assert first["episodic_return_std"] > 0 and -2000 < last["episodic_return_mean"] < 0
    again = script.main(
        ["--evaluate", str(folder / "model.pt"), "--evaluation-episodes", "2", "--run-dir", str(tmp_path)]
    )
    assert read_csv(again) == read_csv(folder)[-1:]
    seen = []
    sys.modules["drac_runner"].evaluate_policy(
        lambda obs, starts: seen.append(starts.item()) or np.zeros((1, 1)), lambda: script.make_env("Pendulum-v1"), 2, 0
    )
    assert seen == 2 * [True, *199 * [False]], "held noise is drawn where an episode begins"


@one_script
def test_without_envs_a_maze_or_level_says_what_it_needs(copied, capsys):
    script = copied(runner)
    for env_id in ("Unknown/MultiGoalPointMaze-Simple-v0", "Unknown/LevelGeneration-Puzzle-v0"):  # the suite has envs
        assert "need envs.py beside this file" in fails(capsys, lambda env_id=env_id: script.main(["--env-id", env_id]))


@one_script
@pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium's
@pytest.mark.parametrize("others", [(), (runner,), (runner, envs)], ids=["alone", "runner", "all"])
@pytest.mark.parametrize("num_envs", [1, 2])
def test_odd_environments_are_trained_on_and_evaluated(copied, tmp_path, others, num_envs):
    script, argv = copied(*others), ["--env-id", "Test/Odd-v0", *SHORT, *FAST, "--run-dir", str(tmp_path / "runs")]
    folder = script.main([*argv, "--num-envs", str(num_envs)])
    if others:
        first, last = read_csv(folder)
        evaluated = script.main(["--evaluate", str(folder / "model.pt"), *argv[-2:]])
        assert first["episodic_return_mean"] < 0 and read_csv(evaluated) == [last]


@one_script
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_arrays_of_one_entry_are_taken_for_numbers(script, make_agent):
    agent = make_agent(2, 1, env_id="Test/Odd-v0", num_envs=3)
    collector, buffer = script.Collector(agent.args, agent.actor, 0), script.ReplayBuffer(agent.args, 2, 1, "cpu")
    positions = collector.obs[:, 0].copy()
    episodes = [collector.step(lambda *_: torch.zeros(1, 3, 1), buffer, 1, cut=False) for _ in range(7)]
    assert episodes == [*6 * [{}], {"episodic_return": pytest.approx(-7 * abs(positions).mean()), "episodic_length": 7}]
    np.testing.assert_allclose(buffer.rows[:7, :, -3:].sum(dim=0), [[-7 * abs(x), 0, 1] for x in positions], rtol=1e-5)


@one_script
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_a_step_is_stored_as_float32_whatever_it_returns(script, make_agent, monkeypatch):
    agent = make_agent(2, 1)
    answers = [([1, 0], -1, False, True, {}), ([1, 0], 1e39, False, False, {}), ([1e39, 0], -1, False, False, {})]
    env = unittest.mock.Mock(step=unittest.mock.Mock(side_effect=answers), reset=lambda **_: ([0.7, 0.3], {}))
    monkeypatch.setattr(script, "make", lambda _: env)
    collector, buffer = script.Collector(agent.args, agent.actor, 0), script.ReplayBuffer(agent.args, 2, 1, "cpu")
    step = partial(collector.step, lambda *_: torch.zeros(1, 1, 1), buffer)
    step(1, cut=False)
    np.testing.assert_array_equal(collector.obs, np.float32([[0.7, 0.3]]), "the next episode's, not rounded")
    for name in ("reward", "observation"):
        with pytest.raises(FloatingPointError, match=f"{name} is not finite at step 2"):
            step(2, cut=False)
    monkeypatch.setattr(env, "reset", lambda **_: ([1e39, 0.0], {}))
    with pytest.raises(FloatingPointError, match="observation is not finite at step 1"):
        script.Collector(agent.args, agent.actor, 0).step(lambda *_: torch.zeros(1, 1, 1), buffer, 1, cut=False)
    assert buffer.size == 1


@one_script
def test_one_entry_that_is_not_finite_is_enough(script):
    script.check_finite(7, obs=np.zeros(3), weights=torch.zeros(2, 2))
    for bad in (np.nan, np.inf, -np.inf):
        for quantity in (np.array([0.0, bad]), torch.tensor([[bad, 0.0]])):
            with pytest.raises(FloatingPointError, match="reward is not finite at step 7"):
                script.check_finite(7, obs=np.zeros(3), reward=quantity)


@one_script
def test_a_script_alone_trains_with_the_smallest_buffer(copied, tmp_path):
    argv = ["--num-envs", "16", "--n-steps", "5", "--buffer-size", "20", "--run-dir", str(tmp_path)]
    folder = copied().main(["--env-id", CORRIDOR, *SHORT, *FAST, *argv])
    assert torch.load(folder / "weights.pt", weights_only=False)["weights"]["raw_alpha"] != 0, "updates were made"


@one_script
@pytest.mark.parametrize("env_id", ["Walkr2d-v4", "Test/Discrete-v0", "Test/Dict-v0", "Test/Image-v0"])
def test_a_script_alone_refuses_what_it_cannot_train_on(copied, capsys, tmp_path, env_id):
    message = fails(capsys, lambda: copied().main(["--env-id", env_id, "--run-dir", str(tmp_path / "runs")]), code=1)
    assert message.startswith("error: ") and env_id in message and not (tmp_path / "runs").exists()


@one_script
@pytest.mark.parametrize("kwargs", ["[]", "{bad", "1"])
def test_a_script_alone_names_the_flag_of_wrong_env_kwargs(copied, capsys, tmp_path, kwargs):
    argv = ["--env-id", "Pendulum-v1", "--env-kwargs", kwargs, "--run-dir", str(tmp_path / "runs")]
    message = fails(capsys, lambda: copied().main(argv), code=1)
    assert message.startswith("error: ") and "--env-kwargs takes a JSON object" in message
    assert not (tmp_path / "runs").exists()


@one_script
@pytest.mark.parametrize("flags", [["--resume", "x"], ["--resume", ""], ["--evaluate", "x"], ["--cuda"]])
def test_a_script_alone_says_what_it_needs_for_more(copied, capsys, monkeypatch, flags):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    need = "--cuda a CUDA GPU" if flags == ["--cuda"] else "need drac_runner.py beside this file"
    assert need in fails(capsys, lambda: copied().main(flags), code=1)


def test_a_script_alone_learns_what_it_learns_in_company(script, copied, run, tmp_path):
    """The same weights, its training episodes in TensorBoard, and the same defaults."""
    flags = ["--env-id", "Pendulum-v1", "--total-timesteps", "320", "--num-envs", "2", "--n-steps", "2", *FAST]
    flags += ["--learning-starts", "150", "--matmul-precision", "highest", "--env-kwargs", '{"max_episode_steps": 50}']
    flags += ["--diffusion-steps", "4"] if script is drac_diffus else []
    company = run(*flags, *SILENT, env_id=None)
    folder = copied().main([*flags, "--run-dir", str(tmp_path / "runs")])
    file, expected = torch.load(folder / "weights.pt", weights_only=True), load_weights(company)
    weights, args = file["weights"], drac_amort.Args if "z_dim" in file["config"] else drac_diffus.Args
    assert args(**file["config"]).n_steps == 2
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())
    tags = logged_tags(folder)
    assert {"losses/diversity", "losses/alpha", "losses/qf_loss", "charts/episodic_length"} < set(tags)
    assert all(len(tags[tag]) > 1 and tags[tag][-1].value != tags[tag][0].value for tag in tags if "losses" in tag)
    returns = tags["charts/episodic_return"]
    assert [event.step for event in returns] == [100, 200, 300] and all(-1000 < event.value < 0 for event in returns)


@one_script
def test_a_script_alone_saves_its_weights_on_the_way(copied, tmp_path, monkeypatch):
    saved, save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda *args: saved.append(args) or save(*args))
    flags = ["--total-timesteps", "300", "--checkpoint-interval", "120", "--run-dir", str(tmp_path)]
    copied().main(["--env-id", CORRIDOR, *FAST, "--learning-starts", "60", *flags])
    assert len(saved) == 3
    files = {file.name: torch.load(file, weights_only=True)["weights"] for file in tmp_path.rglob("weights*.pt")}
    assert set(files) == {"weights_120.pt", "weights_240.pt", "weights.pt"}, "the next file does not touch a good one"
    learned = [weights["actor.fc1.weight"].sum().item() for weights in files.values()]
    assert len(set(learned)) == 3, learned


def test_a_script_alone_that_is_interrupted_leaves_its_weights(copied, tmp_path, capsys):
    with pytest.raises(SystemExit, match="interrupted"):
        copied().main(["--env-id", "Test/CorridorInterrupt-v0", *SHORT, *FAST, "--run-dir", str(tmp_path / "runs")])
    (file,) = (tmp_path / "runs").rglob("weights.pt")
    assert torch.load(file, weights_only=True)["weights"]["actor.fc1.weight"].isfinite().all()
    assert "\nstep 149: mean return of the last episodes -" in capsys.readouterr().out


@pytest.mark.parametrize("script", [drac_amort])
def test_a_script_alone_in_an_empty_folder_runs_from_the_shell(script, tmp_path):
    shutil.copy(script.__file__, tmp_path)
    command = [sys.executable, Path(script.__file__).name, "--env-id", "json:Pendulum-v1", *SHORT, *FAST]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0 and result.stderr == ""
    (weights,) = (tmp_path / "runs").glob("*/weights.pt")
    assert torch.load(weights, weights_only=True)["weights"]["actor.fc1.weight"].isfinite().all()
    first, last = result.stdout.splitlines()
    assert "without drac_runner.py" in first and str(weights.parent.relative_to(tmp_path)) in first
    assert weights.parent.name.startswith("json_Pendulum-v1__1__"), "Windows takes no colons"
    assert last.startswith("step 300: mean return of the last episodes -")


# Bad input


def raising(error):
    raise error


gym.register("Test/Endless-v0", lambda: gym.make("Pendulum-v1").unwrapped)
gym.register("Test/Assertion-v0", lambda: raising(AssertionError()), max_episode_steps=9)
gym.register("Test/Type-v0", lambda: raising(TypeError("two\nlines")), max_episode_steps=9)
gym.register("Test/Missing-v0", lambda: raising(ImportError("No module named 'x'")), max_episode_steps=9)


@one_script
@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--env-id", "Walkr2d-v4"], ["Walkr2d", "Walker2d"]),
        (["--env-id", "MultiGoalPointMaze-Simpel-v0"], ["Simpel", "Simple"]),
        (["--env-id", "no-such-module:Thing-v0"], ["no-such-module"]),
        (["--env-id", "../x:Y-v0"], ["../x:Y-v0", "cannot be made"]),
        (["--env-id", ""], ["Malformed"]),
        (["--env-id", "Test/Assertion-v0"], ["Test/Assertion-v0", "AssertionError"]),
        (["--env-id", "Test/Type-v0"], ["Test/Type-v0", "TypeError"]),
        (["--env-id", "Test/Missing-v0"], ["Test/Missing-v0", "No module named"]),
        (["--env-id", "Test/Endless-v0"], ["no time limit", "--env-kwargs '{\"max_episode_steps\": 1000}'"]),
        (["--env-id", "Test/Discrete-v0"], ["Discrete(3)", "bounded"]),
        (["--env-id", "Test/Unbounded-v0"], ["inf", "bounded"]),
        (["--env-id", "Test/HalfBounded-v0"], ["inf", "bounded"]),
        (["--env-id", "Test/Integers-v0"], ["int64", "floats"]),
        (["--env-id", "Test/Fixed-v0"], ["bounded"]),
        (["--env-id", "Test/Dict-v0"], ["Dict", "observations"]),
        (["--env-id", "Test/Image-v0"], ["(8, 8, 3)", "one-dimensional"]),
        (["--env-kwargs", "{"], ["--env-kwargs must be a JSON object, got {"]),
        (["--env-kwargs", ""], ["--env-kwargs must be a JSON object"]),
        (["--env-kwargs", "[1]"], ["--env-kwargs must be a JSON object, got [1]"]),
        (["--env-kwargs", "null"], ["--env-kwargs must be a JSON object, got null"]),
        (["--env-kwargs", '{"maze": 1}'], ["unexpected keyword argument 'maze'"]),
        (["--env-kwargs", '{"id": "x"}'], ["multiple values"]),
        (["--env-kwargs", '{"maze_map": "no such file.txt"}'], ["'no such file.txt'", "nor a text file"]),
        (["--env-kwargs", '{"maze_map": null}'], ["got None"]),
        (["--env-kwargs", '{"env_id": "Walker2d-v4"}'], ["cannot be made", "env_id"]),
        (["--env-kwargs", '{"maze_map": ["1111", "1rg1", "111"]}'], ["row 2 of the maze map has 3 cells"]),
        (["--env-kwargs", '{"max_episode_steps": 0}'], ["max_episode_steps"]),
        (["--env-kwargs", '{"max_episode_steps": -1}'], ["no time limit"]),
        (["--env-kwargs", '{"reward_type": "spare"}'], ["'spare'"]),
        (["--env-kwargs", "[" * 3000], ["--env-kwargs must be a JSON object"]),
        (["--beta", "0"], ["--beta", "(0, inf)", "got 0.0"]),
        (["--beta", "nan"], ["--beta", "nan"]),
        (["--beta", "inf"], ["--beta", "inf"]),
        (["--actor-lr", "-1"], ["--actor-lr", "-1.0"]),
        (["--critic-lr", "nan"], ["--critic-lr"]),
        (["--alpha-lr", "0"], ["--alpha-lr"]),
        (["--num-action-samples", "1"], ["--num-action-samples", "[2, 1000]", "got 1"]),
        (["--num-action-samples", "300000000"], ["--num-action-samples", "[2, 1000]"]),
        (["--gamma", "1"], ["--gamma", "[0, 1)", "got 1.0"]),
        (["--tau", "0"], ["--tau", "(0, 1]"]),
        (["--hold-steps", "0.2"], ["--hold-steps", "[1, inf)"]),
        (["--num-envs", "0"], ["--num-envs", "[1, 1e4]"]),
        (["--n-steps", "0"], ["--n-steps", "[1, 1000]"]),
        (["--n-steps", "9", "--num-envs", "4", "--buffer-size", "35"], ["--buffer-size", "--n-steps times --num-envs"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--total-timesteps", "-5"], ["--total-timesteps", "got -5"]),
        (["--total-timesteps", "256"], ["--total-timesteps", "--learning-starts 256"]),
        (["--hidden-size", "0"], ["--hidden-size"]),
        (["--evaluation-interval", "-1"], ["--evaluation-interval"]),
        (["--evaluation-episodes", "0"], ["--evaluation-episodes"]),
        (["--checkpoint-interval", "0"], ["--checkpoint-interval"]),
        (["--seed", "-1"], ["--seed"]),
        (["--hidden-size", str(10**30)], ["--hidden-size", "16384"]),
        (["--buffer-size", str(10**30)], ["--buffer-size", "1e12"]),
        (["--buffer-size", "999999999", "--total-timesteps", "999999999", "--env-id", "Humanoid-v4"], ["memory"]),
        (["--evaluate", "no such file.pt"], ["no such file.pt", "No such file"]),
        (["--evaluate", "."], ["Is a directory"]),
        (["--evaluate", ""], ["take a path"]),
        (["--resume", "no such folder"], ["no such folder", "No such file"]),
        (["--resume", ""], ["take a path"]),
        (["--evaluate", "a", "--resume", "b"], ["--evaluate and --resume exclude each other"]),
    ],
    ids=lambda value: " ".join(value)[:40] if value and value[0].startswith("--") else "",
)
@pytest.mark.filterwarnings("ignore:.*maximum and minimum values are equal")
def test_bad_input_gets_one_sentence_and_starts_nothing(script, capsys, monkeypatch, tmp_path, argv, parts):
    monkeypatch.setattr(runner, "train", lambda *args: pytest.fail("it starts"))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if "memory" in parts:  # some systems would promise its 2.8 TiB
        resource.setrlimit(resource.RLIMIT_AS, (2**41 if hard < 0 else min(2**41, hard), hard))
    try:
        message = fails(capsys, lambda: script.main([*argv, "--run-dir", str(tmp_path / "runs")]))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert message.startswith("error: ")
    assert all(part in message for part in parts), message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("script", "flag"), [(drac_amort, "--z-dim"), (drac_diffus, "--diffusion-steps")])
def test_the_actors_own_flag_has_a_range(script, flag, capsys):
    assert f"{flag} must be" in fails(capsys, lambda: script.main([flag, "0"]))
    assert f"{flag} must be" in fails(capsys, lambda: script.main([flag, str(2**31)]))


@one_script
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--beta", "much"], "could not convert string to float: 'much'"),
        (["--pairing", "some"], "('all', 'disjoint')"),
        (["--nonsense"], "--nonsense"),
        (["--latent-hold", "0.2"], "--latent-hold"),
        (["--seed", "1.5"], "--seed"),
        (["--num-envs"], "--num-envs"),
        (["--cuda", "1"], "1"),
        (["--total-timesteps", "5e3"], "--total-timesteps"),
    ],
)
def test_malformed_flags_get_one_sentence(script, capsys, monkeypatch, tmp_path, argv, part, encoding):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    message = fails(capsys, lambda: script.main([*argv, "--run-dir", str(tmp_path / "runs")]))
    assert message.startswith("error: ") and part in message and not (tmp_path / "runs").exists()


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


@one_script
@pytest.mark.parametrize(
    ("env_id", "beta", "mean", "warns"),
    [
        ("Pendulum-v1", 0.51, "geometric", True),
        ("Pendulum-v1", 0.5, "geometric", False),
        ("Pendulum-v1", 0.51, "arithmetic", False),
        (MAZE, 0.83, "geometric", False),
        (MAZE, 0.84, "geometric", True),
    ],
)
def test_a_beta_above_the_ceiling_is_warned_of(run, capsys, env_id, beta, mean, warns):
    flags = ["--beta", str(beta), *SILENT, "--total-timesteps", "80", "--learning-starts", "79"]
    folder = run(*flags, *FAST, "--diversity-mean", mean, env_id=env_id)
    warning = capsys.readouterr().err
    run("--evaluate", str(folder / "model.pt"), "--evaluation-episodes", "1", "--final-trials", "0", env_id=None)
    assert "--beta" not in capsys.readouterr().err, "evaluation trains nothing"
    assert warning.startswith("warning: ") == warns
    assert (f"--beta {beta}" in warning and "alpha will grow" in warning) == warns


@one_script
@pytest.mark.parametrize(("beta", "warns"), [(1.41, False), (1.42, True)])
def test_in_many_dimensions_the_ceiling_is_the_root_of_two(script, tmp_path, monkeypatch, capsys, beta, warns):
    monkeypatch.setattr(runner, "train", lambda *_: {"global_step": 0})
    hook = threading.excepthook
    script.main(["--env-id", WALKER, "--beta", str(beta), "--hidden-size", "8", "--run-dir", str(tmp_path)])
    assert ("alpha will grow" in capsys.readouterr().err) == warns
    assert threading.excepthook is hook, "put back"


@one_script
def test_a_run_that_fills_no_window_is_refused(script):
    with pytest.raises(ValueError, match="--n-steps times --num-envs"):
        runner.check_flags(script.Args(n_steps=100, num_envs=4, total_timesteps=399))
    runner.check_flags(script.Args(n_steps=100, num_envs=4, total_timesteps=400, buffer_size=400))


@one_script
@pytest.mark.parametrize(
    ("mode", "own"),
    [
        ("resume", {"total_timesteps", "evaluation_interval", "cudagraphs"}),
        ("evaluate", {"env_kwargs", "seed", "matmul_precision", "run_dir", "hold_steps"}),
    ],
)
def test_these_flags_of_a_run_may_change_and_no_others(script, monkeypatch, mode, own):
    config, accepted = script.Args(CORRIDOR, run_dir="of the training", hold_steps=20.0), set()
    monkeypatch.setattr(runner, "load", lambda *_: {"config": config})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def changed(name, kind):
        value, flag = getattr(config, name), f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            return [flag.replace("--", "--no-") if value else flag]
        if typing.get_origin(kind) is typing.Literal:
            return [flag, next(choice for choice in typing.get_args(kind) if choice != value)]
        if isinstance(value, int | float):
            return [flag, str(value / 2 if 0 < value < 1 else value + 1)]
        return [flag, {"{}": '{"fault": null}', CORRIDOR: "Pendulum-v1"}.get(value, "elsewhere")]

    for name, kind in typing.get_type_hints(script.Args).items():
        if name in ("evaluate", "resume"):
            continue
        try:
            runner.parse_args(script, [f"--{mode}", "x", *changed(name, kind)])
            accepted.add(name)
        except ValueError as error:
            assert f"--{name.replace('_', '-')} " in str(error) and "contradicts the run's" in str(error)
    assert accepted == own | {"cuda", "evaluation_episodes", "final_trials"}
    args, _ = runner.parse_args(script, [f"--{mode}", "x"])
    assert (args.run_dir, args.hold_steps) == (("of the training", 20) if mode == "resume" else ("runs", 1))


@one_script
def test_chapters_shorter_than_an_episode_are_warned_of(run, capsys):
    flags = ["--total-timesteps", "80", "--learning-starts", "79", *SILENT, *FAST]
    for limit, interval, warns in ((150, 149, True), (150, 150, False), (99, 98, True), (99, 99, False)):
        kwargs = json.dumps({"max_episode_steps": limit})
        run(*flags, "--num-envs", "2", "--checkpoint-interval", str(interval), "--env-kwargs", kwargs, env_id=MAZE)
        assert (f"interval {interval} cuts episodes of {limit} steps" in capsys.readouterr().err) == warns


# Faults


def only_run(tmp_path):
    (folder,) = (tmp_path / "run 0").iterdir()
    return folder


@one_script
@pytest.mark.parametrize(
    ("fault", "quantity"),
    [
        ("NanReward", "reward is not finite at step 150"),
        ("NanObservation", "observation is not finite at step 150"),
        ("HugeReward", "qf_loss is not finite at step 170"),
    ],
)
def test_divergence_stops_with_step_and_quantity_and_keeps_the_last_good_model(
    script, run, capsys, tmp_path, monkeypatch, fault, quantity
):
    monkeypatch.setattr(runner, "LOG_INTERVAL", 170)
    message = fails(capsys, lambda: run(*FAST, "--learning-starts", "20", env_id=f"Test/Corridor{fault}-v0"), code=1)
    folder = only_run(tmp_path)
    assert quantity in message and str(folder) in message
    assert all(weight.isfinite().all() for weight in load_weights(folder).values())


def test_an_action_that_is_not_finite_never_reaches_the_environment(script, run, monkeypatch, capsys):
    monkeypatch.setattr(script, "act", lambda actor, obs, latents: np.full((len(obs), 1), np.nan))
    message = fails(capsys, lambda: run(*SILENT), code=1)
    assert "action is not finite at step 1" in message


@one_script
@pytest.mark.filterwarnings("ignore:.*not within the observation space")
def test_a_start_that_is_not_finite_is_not_blamed_on_the_actor(script, run, monkeypatch, capsys):
    monkeypatch.setattr(Corridor, "reset", lambda self, **kwargs: (np.full(2, np.nan, np.float32), {}))
    assert "observation is not finite at step 1" in fails(capsys, lambda: run(*SILENT), code=1)


def test_weights_that_are_not_finite_are_never_saved(script, make_agent, tmp_path):
    agent = make_agent(run_dir=str(tmp_path))
    agent.fingerprint = ""
    with runner.Run(script, agent, {}) as run:
        run.save("model.pt", 1)
        good = (run.path / "model.pt").read_bytes()
        agent.raw_alpha.data.fill_(torch.nan)
        with pytest.raises(FloatingPointError, match="raw_alpha is not finite at step 2"):
            run.save("model.pt", 2)
    assert (run.path / "model.pt").read_bytes() == good


def test_a_crash_of_the_environment_shows_its_traceback_and_keeps_model_and_logs(run, tmp_path):
    with pytest.raises(RuntimeError, match="the simulator crashed"):
        run(*FAST, env_id="Test/CorridorCrash-v0")
    assert load_weights(only_run(tmp_path)) and logged_tags(only_run(tmp_path))["charts/episodic_return"]


# Random command lines: of each flag, values that are fine with all other fine ones, and values that never are.

TOO_MANY = "9" * 40
FLAGS = {
    "env_id": (["Pendulum-v1", MAZE, CORRIDOR], ["", "Ünïcode-v0", "Walker2d-v99", "CartPole-v1", "../x:Y-v0", "a\0b"]),
    "env_kwargs": (["{}", '{"max_episode_steps": 5}'], ["", "[1]", "{", '{"max_episode_steps": "x"}', '{"\0": 1}']),
    "seed": (["0", "4294967295"], ["-1", "1.5", "4294967296", TOO_MANY, ""]),
    "paper": ([None], ["1"]),
    "cuda": ([], [None, "yes"]),
    "cudagraphs": ([None], ["1"]),
    "matmul_precision": (["auto", "medium", "highest"], ["low", "", "Medium"]),
    "run_dir": (["läufe mit leerzeichen/ünï", "a 'quoted' folder", ""], ["file/in the way", "a\0b", "x" * 300]),
    "evaluate": ([], ["kein modell.pt", "", ".", "a\0b", "file"]),
    "resume": ([], ["kein ordner", "", "a\0b", "file"]),
    "total_timesteps": (["50000", "70001"], ["0", "-5", "5e4", "nan", "1000000000", TOO_MANY]),
    "num_envs": (["1", "16"], ["0", "-1", "10001", "1.0"]),
    "n_steps": (["1", "1000"], ["0", "1001", "x"]),
    "hold_steps": (["1", "1e308"], ["0.99", "0", "-1", "nan", "inf", ""]),
    "beta": (["1e-300", "0.33", "1e300"], ["0", "-1", "nan", "inf", "x", ""]),
    "num_action_samples": (["2", "1000"], ["1", "-3", "1001", "2147483648"]),
    "pairing": (["all", "disjoint"], ["some", "", "ALL"]),
    "diversity_mean": (["geometric", "arithmetic"], ["harmonic"]),
    "z_dim": (["1", "16384"], ["0", "16385", "-1"]),
    "diffusion_steps": (["1", "1000"], ["0", "1001"]),
    "clip": (["tanh", "hard"], ["soft", ""]),
    "hidden_size": (["1", "16384"], ["0", "-7", "16385", "1e3", TOO_MANY]),
    "actor_lr": (["1e-5", "1e300"], ["0", "-1", "nan", "1e999"]),
    "critic_lr": (["1e-5"], ["0", "inf"]),
    "alpha_lr": (["1e-5"], ["-0.0", "x"]),
    "gamma": (["0", "0.99"], ["1", "-0.1", "nan"]),
    "tau": (["1", "1e-300"], ["0", "1.1", "-inf"]),
    "batch_size": (["1", "1000000"], ["0", "1000001", "2147483648"]),
    "buffer_size": (["50000", "999999999999"], ["0", "1", "1000000000000", "-1"]),
    "learning_starts": (["0", "99"], ["-1", "1000000000000", "nan"]),
    "updates_per_step": (["1", "999999999"], ["0", "1000000000"]),
    "checkpoint_interval": (["1", "999999999"], ["0", "-5", "1.5"]),
    "evaluation_interval": (["0", "999999999999"], ["-1", "1000000000000"]),
    "evaluation_episodes": (["1", "999999999"], ["0", "x"]),
    "final_trials": (["0", "999999999999"], ["-1", "1000000000000"]),
    "no_such_flag": ([], ["1", None]),
}


@pytest.mark.filterwarnings("ignore")
def test_random_command_lines_start_or_get_one_sentence(script, tmp_path, monkeypatch):
    """Half of them with one wrong value, of every flag once."""
    own = {field.name for field in dataclasses.fields(script.Args)} | {"no_such_flag"}
    assert own <= set(FLAGS), "a new flag has no values here"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    drac, started, rng = script.DrAC, [], random.Random(script.__name__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runner, "SummaryWriter", unittest.mock.Mock())
    monkeypatch.setattr(runner, "version", lambda package: "1")
    monkeypatch.setattr(runner, "train", lambda *args: started.append(args) or {"global_step": 0})
    monkeypatch.setattr(
        script,
        "DrAC",
        lambda args, *sizes: drac(dataclasses.replace(args, hidden_size=min(args.hidden_size, 8)), *sizes),
    )

    def tokens(name, value):
        flag = f"--{name.replace('_', '-')}"
        return [flag] if value is None else [f"{flag}={value}"] if rng.random() < 0.5 else [flag, value]

    faulty = [name for name in sorted(own) if FLAGS[name][1]]
    for case in range(2 * len(faulty)):
        wrong = case % 2 * [faulty[case // 2]]
        fine = rng.sample([name for name in sorted(own - set(wrong)) if FLAGS[name][0]], k=rng.randint(0, 6))
        items = [tokens(name, rng.choice(FLAGS[name][name in wrong])) for name in [*wrong, *fine]]
        rng.shuffle(items)
        argv = ["--total-timesteps", "60000", *itertools.chain(*items)]
        started.clear()
        stderr = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
            try:
                code = script.main(argv) and 0
            except SystemExit as error:
                code = error.code
            except Exception as error:
                raise AssertionError(shlex.join(argv)) from error
        message = stderr.getvalue()
        assert code == (2 if wrong else 0) and len(started) == (not wrong), (argv, message)
        assert message.count("\n") == bool(message) and (len(message) > 15 or not wrong), (argv, message)
        assert not message or message.startswith("error: " if wrong else "warning: "), (argv, message)


@one_script
def test_mujocos_warnings_are_told_once_and_leave_no_file(run, tmp_path, monkeypatch, capfd):
    """HalfCheetah's model file, not ours to change, is of an old style, which MuJoCo says each time that it is read."""

    def unstable(self):
        self.data.qvel[:] = np.nan
        mujoco.mj_step(self.model, self.data)
        return self._get_obs()

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for reset_model in (HalfCheetahEnv.reset_model, unstable):
        monkeypatch.setattr(HalfCheetahEnv, "reset_model", reset_model)
        run(*SHORT, *FAST, "--env-kwargs", '{"max_episode_steps": 50}', env_id="HalfCheetah-v4")
        text = "warning: MuJoCo: Nan, Inf or huge value in QVEL\n"
        assert capfd.readouterr().err == (text if reset_model is unstable else "")
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
@one_script
def test_glibc_is_told_to_keep_the_memory_that_an_update_frees(script, run, monkeypatch):
    """Else some hundreds of pages per update are fetched from the kernel again, in most processes."""
    told, library = [], ctypes.CDLL(None)
    glibc = types.SimpleNamespace(mallopt=lambda *option: told.append((*option, library.mallopt(*option))))
    monkeypatch.setattr(runner, "ctypes", types.SimpleNamespace(CDLL=lambda _: glibc))
    monkeypatch.setattr(runner, "train", lambda *_: {"global_step": 0})
    run()
    assert told == [(-3, 2**25, 1), (-1, 2**28, 1)], "M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, both accepted"
