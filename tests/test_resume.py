"""No run is ever lost: resuming is exact, and faults cost nothing."""

import contextlib
import fcntl
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import SMALL
from test_cli import FAST, Canary, fails, load_weights, logged_tags, read_csv

import drac_amort
import drac_diffus

MAZE, WALKER, CORRIDOR = "MultiGoalPointMaze-Simple-v0", "Walker2d-v4", "Test/Corridor-v0"
FLAGS = [*FAST, "--learning-starts", "50", "--evaluation-episodes", "3", "--final-trials", "0", "--latent-hold", "0.5"]


@pytest.fixture
def script():
    """One script is enough where no actor is involved: their sources are compared in test_actors.py."""
    return drac_amort


def flags_of(script, env_id, steps, checkpoint_interval=100, evaluation_interval=150):
    own = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL[script].items()]
    intervals = ["--evaluation-interval", str(evaluation_interval), "--checkpoint-interval", str(checkpoint_interval)]
    return ["--env-id", env_id, *own, *FLAGS, *intervals, "--total-timesteps", str(steps)]


def values_of(folder):
    """Everything that a run logged, but times and speeds."""
    tags = logged_tags(folder)
    tags.pop("charts/steps_per_second", None)
    return {tag: [(event.step, event.value) for event in events] for tag, events in tags.items()}


def assert_same_run(folder, reference):
    assert (folder / "evaluations.csv").read_bytes() == (reference / "evaluations.csv").read_bytes()
    expected, found = load_weights(reference), load_weights(folder)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert values_of(folder) == values_of(reference)


def contents(folder):
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}


@pytest.fixture
def stopped(script, tmp_path, capsys):
    """The folder of a run that SIGINT stopped in its 150th step."""
    argv = flags_of(script, "Test/CorridorInterrupt-v0", 250)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    message = fails(capsys, lambda: script.main([*argv, "--run-dir", str(tmp_path / "runs of mine")]), code=1)
    (folder,) = (tmp_path / "runs of mine").iterdir()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert f"python {script.SCRIPT}.py --resume '{folder}'" in message
    return folder


def main_with_stderr_in(file, main, argv):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    main(argv)


@pytest.mark.parametrize(
    ("script", "env_id", "steps", "kills"), [(drac_amort, MAZE, 900, 5), (drac_diffus, WALKER, 500, 1)]
)
def test_a_killed_and_resumed_run_is_bit_identical(script, env_id, steps, kills, tmp_path):
    processes = multiprocessing.get_context("forkserver")  # forks of one that has imported everything: they start fast
    processes.set_forkserver_preload(["drac_amort", "drac_diffus"])

    def start(*argv):
        process = processes.Process(target=main_with_stderr_in, args=(tmp_path / "stderr", script.main, argv))
        process.start()
        return process

    argv = flags_of(script, env_id, steps, evaluation_interval=300)
    rng, run_dir = random.Random(env_id), tmp_path / "killed"
    undisturbed = start(*argv, "--run-dir", str(tmp_path / "reference"))
    command = [*argv, "--run-dir", str(run_dir)]
    for kill in range(kills + 1):
        seen = [file.stat().st_mtime_ns for file in run_dir.glob("*/checkpoint.pt")]
        process = start(*command)
        if kill < kills:
            while process.is_alive() and seen == [f.stat().st_mtime_ns for f in run_dir.glob("*/checkpoint.pt")]:
                time.sleep(0.005)
            time.sleep(0.3 * rng.random())
            process.kill()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if kill < kills else 0)
        (folder,) = run_dir.iterdir()
        command = ["--resume", str(folder)]
    undisturbed.join()
    assert undisturbed.exitcode == 0 and (tmp_path / "stderr").read_text() == ""
    (reference,) = (tmp_path / "reference").iterdir()
    assert_same_run(folder, reference)


def test_level_generation_and_a_wrapped_buffer_resume_exactly(script, tmp_path, monkeypatch):
    argv = [*flags_of(script, "LevelGeneration-MultiFacet-v0", 220, 50), "--buffer-size", "120"]
    monkeypatch.setattr(script, "evaluate", lambda *args: {"episodic_return_mean": 0.0})
    reference = script.main([*argv, "--run-dir", str(tmp_path / "reference")])
    stop_at(script, 180, monkeypatch)
    with pytest.raises(RuntimeError, match="stopped for the test"):
        script.main([*argv, "--run-dir", str(tmp_path / "stopped")])
    (folder,) = (tmp_path / "stopped").iterdir()
    monkeypatch.setattr(script.DrAC, "update", script.DrAC.update.__wrapped__)
    script.main(["--resume", str(folder)])
    expected, found = load_weights(reference), load_weights(folder)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert values_of(folder) == values_of(reference)


def stop_at(script, step, monkeypatch):
    update, counter = script.DrAC.update, itertools.count(51)

    def failing(self, batch):
        if next(counter) == step:
            raise RuntimeError("stopped for the test")
        return update(self, batch)

    failing.__wrapped__ = update
    monkeypatch.setattr(script.DrAC, "update", failing)


def test_the_first_signal_ends_the_episode_and_leaves_a_checkpoint(script, stopped, tmp_path):
    checkpoint = torch.load(stopped / "checkpoint.pt", weights_only=True)
    assert 150 <= checkpoint["global_step"] < 158 and checkpoint["rows"].shape == (checkpoint["global_step"], 7)
    ends = logged_tags(stopped)["charts/episodic_return"]
    assert ends[-1].step == checkpoint["global_step"], "the episode was finished, and the logs closed"
    script.main(["--resume", str(stopped), "--total-timesteps", "250"])
    assert_same_run(stopped, script.main([*flags_of(script, CORRIDOR, 250), "--run-dir", str(tmp_path / "reference")]))


def test_a_power_cut_may_have_shortened_a_log_and_the_rows_are_not_kept_twice(script, stopped, monkeypatch):
    os.truncate(stopped / "evaluations.csv", 20)
    train = script.train

    def train_without_the_rows(args, env, agent, buffer, run, state):
        assert buffer.size > 0 and "rows" not in state
        return train(args, env, agent, buffer, run, state)

    monkeypatch.setattr(script, "train", train_without_the_rows)
    script.main(["--resume", str(stopped)])
    assert b"\0" not in (stopped / "evaluations.csv").read_bytes()


def test_a_second_signal_stops_at_once_and_the_checkpoint_stands(tmp_path):
    argv = [*flags_of(drac_amort, MAZE, 10**6), "--run-dir", str(tmp_path)]
    process = subprocess.Popen([sys.executable, drac_amort.__file__, *argv], stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("*/checkpoint.pt")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert "once more stops at once" in process.stderr.readline() + process.stderr.readline()
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)  # of the other kind
    assert "once more" not in process.communicate()[1]
    assert process.returncode in (-signal.SIGINT, 1), "1: the episode was over before the second signal came"
    (folder,) = tmp_path.iterdir()
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["script"] == "drac_amort"


def test_the_total_may_grow_and_clocks_go_on(script, tmp_path, monkeypatch):
    add, evaluate = script.ReplayBuffer.add, script.evaluate
    done = {"steps": 0, "evaluations": 0}  # a step takes 0.01 s, an evaluation 5 s, all else no time

    def add_and_tick(*args):
        done["steps"] += 1
        add(*args)

    def evaluate_and_tick(agent, args, run, *rest):
        assert not (run / "summary.json").exists(), "it is of the run's former end"
        done["evaluations"] += 1
        return evaluate(agent, args, run, *rest)

    monkeypatch.setattr(script, "LOG_INTERVAL", 250)
    monkeypatch.setattr(script.ReplayBuffer, "add", add_and_tick)
    monkeypatch.setattr(script, "evaluate", evaluate_and_tick)
    monkeypatch.setattr(script.time, "perf_counter", lambda: done["steps"] / 100 + 5 * done["evaluations"])
    short = script.main([*flags_of(script, CORRIDOR, 150, 1000, 300), "--run-dir", str(tmp_path / "a")])
    assert 150 - 7 <= torch.load(short / "checkpoint.pt")["global_step"] < 150, "the last episode's start"
    long = script.main([*flags_of(script, CORRIDOR, 300, 1000, 300), "--run-dir", str(tmp_path / "b")])
    script.main(["--resume", str(short), "--total-timesteps", "300"])
    assert_same_run(short, long)
    assert [row["global_step"] for row in read_csv(short)] == [0, 300], "not 150, which happened after the checkpoint"
    for folder in (short, long):
        (speed,) = logged_tags(folder)["charts/steps_per_second"]
        assert speed.value == pytest.approx(100), "without evaluations"
        assert json.loads((folder / "summary.json").read_text())["minutes"] == pytest.approx((300 / 100 + 2 * 5) / 60)


def test_a_full_disk_keeps_the_old_checkpoint_and_training_goes_on(script, tmp_path, monkeypatch, capsys):
    save, states = torch.save, []

    def save_until_full(content, stream):
        if "rows" in content and content["global_step"] > 150:
            stream.write(b"half of")
            raise OSError(28, "No space left on device")
        save(content, stream)
        states.append(content["global_step"])

    monkeypatch.setattr(torch, "save", save_until_full)
    folder = script.main([*flags_of(script, CORRIDOR, 300), "--run-dir", str(tmp_path)])
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["global_step"] in range(100, 150)
    assert torch.load(folder / "model.pt", weights_only=True)["global_step"] == 300
    assert not list(folder.glob("*.tmp"))
    warnings = capsys.readouterr().err
    assert "checkpoint.pt" in warnings and "No space left on device" in warnings


def test_no_checkpoints_but_that_of_an_interrupt(script, tmp_path, capsys):
    folder = script.main([*flags_of(script, CORRIDOR, 200, 0), "--run-dir", str(tmp_path / "a")])
    assert not (folder / "checkpoint.pt").exists()
    argv = [*flags_of(script, "Test/CorridorInterrupt-v0", 250, 0), "--run-dir", str(tmp_path / "b")]
    fails(capsys, lambda: script.main(argv), code=1)
    (folder,) = (tmp_path / "b").iterdir()
    assert (folder / "checkpoint.pt").exists()


def test_a_crash_of_the_environment_leaves_a_folder_that_resumes(script, tmp_path):
    argv = [*flags_of(script, "Test/CorridorCrash-v0", 200), "--run-dir", str(tmp_path / "a")]
    with pytest.raises(RuntimeError, match="the simulator crashed"):
        script.main(argv)
    (folder,) = (tmp_path / "a").iterdir()
    script.main(["--resume", str(folder)])  # the same environment crashes in its 150th step again: past our end
    assert_same_run(folder, script.main([*flags_of(script, CORRIDOR, 200), "--run-dir", str(tmp_path / "b")]))


@pytest.mark.parametrize("fault", ["NanReward", "HugeReward"])
def test_divergence_keeps_the_last_checkpoint(script, tmp_path, capsys, monkeypatch, fault):
    monkeypatch.setattr(script, "LOG_INTERVAL", 170)
    argv = [*flags_of(script, f"Test/Corridor{fault}-v0", 1000, checkpoint_interval=50), "--run-dir", str(tmp_path)]
    assert "is not finite at step" in fails(capsys, lambda: script.main(argv), code=1)
    (folder,) = tmp_path.iterdir()
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["global_step"] >= 100
    assert all(weight.isfinite().all() for weight in checkpoint["weights"].values())


# Checkpoints that are refused


def test_contradictions_name_both_values(script, stopped, capsys):
    before = contents(stopped)
    for flag, value, old in (
        ("--env-id", WALKER, "Test/CorridorInterrupt-v0"),
        ("--beta", "0.3", "0.2"),
        ("--seed", "2", "1"),
        ("--total-timesteps", "200", "250"),
        ("--learning-starts", "60", "50"),
        ("--run-dir", "elsewhere", "runs of mine"),
    ):
        message = fails(capsys, lambda flag=flag, value=value: script.main(["--resume", str(stopped), flag, value]))
        assert flag in message and value in message and old in message, message
    assert contents(stopped) == before


def test_a_folder_in_use_is_left_alone(script, stopped, capsys):
    before = contents(stopped)
    with (stopped / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "in use" in fails(capsys, lambda: script.main(["--resume", str(stopped)]))
    assert contents(stopped) == before


def test_checkpoints_that_are_none(script, stopped, capsys, tmp_path):
    good = (stopped / "checkpoint.pt").read_bytes()
    checkpoint = torch.load(stopped / "checkpoint.pt", weights_only=True)
    needed = checkpoint.keys() - {"cuda_generator"}  # of use only on a GPU

    def rejected(content):
        if isinstance(content, bytes):
            (stopped / "checkpoint.pt").write_bytes(content)
        else:
            torch.save(content, stopped / "checkpoint.pt")
        before = contents(stopped)
        message = fails(capsys, lambda: script.main(["--resume", str(stopped)]))
        assert contents(stopped) == before
        return message

    for content in (
        good[: len(good) // 2],
        b"",
        [1, 2],
        {**checkpoint, "script": "another"},
        {**checkpoint, "format": 99},
        {**checkpoint, "config": {**checkpoint["config"], "unknown": 1}},
        {**checkpoint, "config": {**checkpoint["config"], "hidden_size": 48}},
        {**checkpoint, "optimizers": [{}, {}, {}]},
        {**checkpoint, "rows": torch.zeros(5, 3)},
        {**checkpoint, "numpy_generators": "[1, 2]"},
        {**checkpoint, "torch_generator": torch.zeros(3)},
        *({key: value for key, value in checkpoint.items() if key != missing} for missing in needed),
        {**checkpoint, "progress": Canary(tmp_path / "canary")},
    ):
        assert "checkpoint.pt" in rejected(content)
    assert not (tmp_path / "canary").exists()
    (stopped / "checkpoint.pt").write_bytes((stopped / "model.pt").read_bytes())
    assert "checkpoint.pt" in fails(capsys, lambda: script.main(["--resume", str(stopped)]))
    assert "checkpoint.pt" in fails(capsys, lambda: script.main(["--resume", str(tmp_path / "no such folder")]))
    both = ["--resume", str(stopped), "--evaluate", str(stopped / "model.pt")]
    assert "--resume" in fails(capsys, lambda: script.main(both))


# Random command lines

VALID = {
    "--beta": ["0.1", "0.33"],
    "--seed": ["0", "4294967295"],
    "--gamma": ["0", "0.99"],
    "--tau": ["1", "1e-3"],
    "--actor-lr": ["1e-5"],
    "--num-action-samples": ["2", "5"],
    "--pairing": ["all", "disjoint"],
    "--hidden-size": ["1", "7"],
    "--batch-size": ["1", "300"],
    "--buffer-size": ["5000"],
    "--learning-starts": ["0", "99"],
    "--checkpoint-interval": ["0", "7"],
    "--evaluation-interval": ["0", "1"],
    "--run-dir": ["läufe mit leerzeichen/ünï", "a 'quoted' folder"],
}
INVALID = {
    "--beta": ["0", "-1", "nan", "inf", "x", ""],
    "--seed": ["-1", "1.5", "4294967296", "9" * 40],
    "--gamma": ["1", "-0.1", "nan"],
    "--tau": ["0", "1.1", "-inf"],
    "--actor-lr": ["0", "nan", "1e999"],
    "--num-action-samples": ["1", "-3", "2147483648"],
    "--pairing": ["some", ""],
    "--hidden-size": ["0", "-7", "1e3", "9" * 30],
    "--batch-size": ["0", "2147483648"],
    "--buffer-size": ["0", "1099511627776"],
    "--learning-starts": ["-1", "1000", "nan"],
    "--checkpoint-interval": ["-5", "1.5"],
    "--evaluation-interval": ["-1"],
    "--env-id": ["", "Ünïcode-v0", "Walker2d-v99", "CartPole-v1"],
    "--evaluate": ["kein modell.pt", ""],
    "--resume": ["kein ordner", ""],
    "--cudda": ["1"],
}


@pytest.mark.parametrize("case", range(40))
def test_random_command_lines(script, case, tmp_path, monkeypatch, capsys):
    """Half of them have one wrong value: these get one message and start nothing. The others start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "train", lambda *args: {"global_step": 0})
    rng = random.Random(case)
    chosen = {flag: rng.choice(VALID[flag]) for flag in rng.sample(sorted(VALID), rng.randint(0, 5))}
    if case % 2:
        flag = rng.choice(sorted(INVALID))
        chosen[flag] = rng.choice(INVALID[flag])
    flags = {"--env-id": "Pendulum-v1", "--total-timesteps": "1000", **chosen}
    items = list(flags.items())
    rng.shuffle(items)
    argv = list(itertools.chain(*items))
    if case % 2:
        with pytest.raises(SystemExit) as exit_info:
            script.main(argv)
        assert exit_info.value.code == 2, argv
        message = capsys.readouterr().err
        assert message.strip() and "Traceback" not in message
        assert os.listdir(tmp_path) == [], argv
    else:
        assert script.main(argv).is_dir(), argv
