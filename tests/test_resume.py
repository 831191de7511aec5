"""No run is ever lost: resuming is exact, signals stop at once, faults cost nothing, and damaged files are refused."""

import contextlib
import copy
import fcntl
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import random
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import unittest.mock
import zipfile

import conftest
import pytest
import torch
from conftest import SMALL, forked
from tensorboard.summary.writer import event_file_writer
from tensorboard.summary.writer.record_writer import RecordWriter
from test_cli import CORRIDOR, FAST, MAZE, SILENT, WALKER, fails, load_weights, logged_tags, read_csv, still_pictures  # noqa: F401

import drac_amort
import drac_diffus
import drac_runner as runner

# TensorBoard reads the logs of one second in the order of their names: 1000010 comes after 1000009, 10 before 9.
event_file_writer._global_uid = event_file_writer.AtomicCounter(1_000_000)
FULL_DISK = OSError(28, "No space left on device")


@pytest.fixture
def script():
    """One script is enough where no actor is involved: their sources are compared in test_actors.py."""
    return drac_amort


def flags_of(script, steps, *others, env_id=CORRIDOR):
    """Two environments, chapters of 60 steps."""
    own = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL[script].items()]
    collection = ["--num-envs", "2", "--n-steps", "2", "--hold-steps", "3", "--learning-starts", "50"]
    intervals = ["--checkpoint-interval", "30", "--evaluation-interval", "100", "--evaluation-episodes", "3"]
    others = ["--final-trials", "0", "--total-timesteps", str(steps), *others]
    return ["--env-id", env_id, *own, *FAST, *collection, *intervals, *others]


def but_for_chapters(text):
    """What was said, without the warning of chapters that are shorter than an episode."""
    return "".join(line for line in text.splitlines(keepends=True) if " cuts episodes of " not in line)


def values_of(folder):
    """Everything that a run logged, but times and speeds."""
    tags = logged_tags(folder)
    tags.pop("charts/steps_per_second", None)
    return {tag: [(event.step, event.value) for event in events] for tag, events in tags.items()}


def assert_same_run(folder, reference):
    if (reference / "evaluations.csv").exists():
        assert (folder / "evaluations.csv").read_bytes() == (reference / "evaluations.csv").read_bytes()
    expected, found = load_weights(reference), load_weights(folder)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    if (reference / "best_model.pt").exists():
        best = [torch.load(path / "best_model.pt", weights_only=True) for path in (reference, folder)]
        assert same(*(model["weights"] for model in best)) and best[0]["global_step"] == best[1]["global_step"]
    assert values_of(folder) == values_of(reference)


def contents(folder):
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}


def load_checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@contextlib.contextmanager
def at_step(script, step, action):
    """Call `action` when an environment step is stored for the `step`-th time."""
    add, counter = script.ReplayBuffer.add, itertools.count(1)

    def watched(self, *columns):
        add(self, *columns)
        if next(counter) == step:
            action()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.ReplayBuffer, "add", watched)
        yield


def fail(*args, **kwargs):
    raise RuntimeError("stopped for the test")


def run_until(script, step, argv):
    """Let a fault stop the script's main after so many iterations."""
    with at_step(script, step, fail), pytest.raises(RuntimeError, match="stopped for the test"):
        script.main(argv)


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    """The folder of a run of 300 steps that Ctrl-C stopped in its second chapter."""
    script, run_dir = drac_amort, tmp_path_factory.mktemp("stopped") / "runs of mine"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with at_step(script, 50, lambda: os.kill(os.getpid(), signal.SIGINT)):
        argv = [*flags_of(script, 300, "--gamma", "0.9", "--seed", "7"), "--run-dir", str(run_dir)]
        with pytest.raises(SystemExit) as exit_info:
            script.main(argv)
    (folder,) = run_dir.iterdir()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    assert f"--resume '{folder}'" in exit_info.value.code
    rows = load_checkpoint(folder)["rows"]
    assert rows.untyped_storage().nbytes() == rows.nbytes, "the filled part of the ring alone"
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A copy of that folder for each test."""
    return shutil.copytree(stopped_once, tmp_path / "runs of mine" / stopped_once.name)


@pytest.fixture(autouse=True)
def no_fork_outlives_its_test():
    """A failure would let pytest wait for one without end."""
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


# Exactness


def killed_at(main, step, argv):
    with at_step(sys.modules[main.__module__], step, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        main(argv)


@pytest.mark.parametrize(
    ("script", "env_id", "num_envs", "steps", "kills"),
    [(drac_amort, MAZE, 4, 480, (20, 70)), (drac_diffus, WALKER, 2, 240, (20, 70))],
)
def test_a_killed_and_resumed_run_is_bit_identical(script, env_id, num_envs, steps, kills, tmp_path):
    """In the first chapter and, once resumed, in the third from there."""
    flags = ["--num-envs", str(num_envs), "--n-steps", "3", "--evaluation-interval", str(steps // 4)]
    argv = flags_of(script, steps, *flags, env_id=env_id)
    run_dir = tmp_path / "killed"
    undisturbed = forked(tmp_path, script.main, [*argv, "--run-dir", str(tmp_path / "reference")])
    command = [*argv, "--run-dir", str(run_dir)]
    for kill in (*kills, math.inf):
        process = forked(tmp_path, killed_at, script.main, kill, command)
        process.join(timeout=120)
        assert process.exitcode == (0 if kill == math.inf else -signal.SIGKILL)
        (folder,) = run_dir.iterdir()
        command = ["--resume", str(folder)]
    undisturbed.join()
    assert undisturbed.exitcode == 0 and but_for_chapters((tmp_path / "stderr").read_text()) == ""
    (reference,) = (tmp_path / "reference").iterdir()
    assert_same_run(folder, reference)


def test_a_run_that_stops_anywhere_resumes_exactly(script, tmp_path):
    """In the first chapter, at a chapter's borders, in the last; the ring of 50 rows wraps after 100 steps."""
    argv = flags_of(script, 300, "--buffer-size", "100")
    reference = script.main([*argv, "--run-dir", str(tmp_path / "reference")])
    for iteration in (30, 31, 110, 149):
        run_until(script, iteration, [*argv, "--run-dir", str(tmp_path / f"stopped at {iteration}")])
        (folder,) = (tmp_path / f"stopped at {iteration}").iterdir()
        assert load_checkpoint(folder)["global_step"] == (iteration - 1) // 30 * 60
        script.main(["--resume", str(folder)])
        assert load_checkpoint(folder)["rows"].shape == (50, 2, 8)
        assert_same_run(folder, reference)


def test_a_checkpoint_from_before_the_first_whole_window_resumes(script, tmp_path):
    argv = flags_of(script, 40, "--learning-starts", "0", "--n-steps", "9", "--checkpoint-interval", "4", *SILENT)
    reference = script.main([*argv, "--run-dir", str(tmp_path / "reference")])
    run_until(script, 6, [*argv, "--run-dir", str(tmp_path / "stopped")])
    (folder,) = (tmp_path / "stopped").iterdir()
    script.main(["--resume", str(folder)])
    assert_same_run(folder, reference)


def test_level_generation_resumes_exactly(script, tmp_path):
    argv = flags_of(script, 120, *SILENT, "--checkpoint-interval", "20", env_id="LevelGeneration-MultiFacet-v0")
    reference = script.main([*argv, "--run-dir", str(tmp_path / "reference")])
    run_until(script, 50, [*argv, "--run-dir", str(tmp_path / "stopped")])
    (folder,) = (tmp_path / "stopped").iterdir()
    script.main(["--resume", str(folder)])
    assert_same_run(folder, reference)


def test_a_finished_run_that_is_extended_equals_the_long_run(script, tmp_path):
    flags = ["--evaluation-interval", "120"]
    long = script.main([*flags_of(script, 240, *flags), "--run-dir", str(tmp_path / "long")])
    folder = script.main([*flags_of(script, 120, *flags), "--run-dir", str(tmp_path / "short")])
    script.main(["--resume", str(folder), "--total-timesteps", "240"])
    assert_same_run(folder, long)
    assert [row["global_step"] for row in read_csv(folder)] == [0, 120, 240]


def test_an_extension_that_stops_resumes_exactly(script, tmp_path):
    """The run ended within a chapter: its extension begins with the rest of it."""
    short = script.main([*flags_of(script, 150), "--run-dir", str(tmp_path / "short")])
    folders = [shutil.copytree(short, tmp_path / "runs" / name) for name in ("undisturbed", "early", "late")]
    extend = [["--resume", str(folder), "--total-timesteps", "340"] for folder in folders]
    script.main(extend[0])
    for iteration, folder, argv in zip((10, 60), folders[1:], extend[1:], strict=True):
        run_until(script, iteration, argv)
        script.main(argv)
        assert_same_run(folder, folders[0])


def test_an_extension_that_is_stopped_at_once_says_how_far_it_was_to_go(script, tmp_path, capsys):
    folder = script.main([*flags_of(script, 120), "--run-dir", str(tmp_path)])
    capsys.readouterr()
    with at_step(script, 5, lambda: os.kill(os.getpid(), signal.SIGINT)):
        argv = ["--resume", str(folder), "--total-timesteps", "240", "--evaluation-interval", "80", "--no-cuda"]
        message = fails(capsys, lambda: script.main(argv), code=1)
    command = shlex.split(message.split("python ")[1])
    assert command[1:] == argv, "the same command again"
    assert script.main(command[1:]) == folder
    assert json.loads((folder / "summary.json").read_text())["global_step"] == 240
    assert [row["global_step"] for row in read_csv(folder)][-3:] == [120, 160, 240]


def test_a_crash_of_the_environment_leaves_a_folder_that_resumes(script, tmp_path, monkeypatch):
    reference = script.main([*flags_of(script, 200), "--run-dir", str(tmp_path / "reference")])
    with monkeypatch.context() as patch:
        counter, step = itertools.count(1), conftest.Corridor.step
        patch.setattr(conftest.Corridor, "step", lambda *args: fail() if next(counter) == 150 else step(*args))
        with pytest.raises(RuntimeError, match="stopped for the test"):
            script.main([*flags_of(script, 200, *SILENT), "--run-dir", str(tmp_path / "crashed")])
    (folder,) = (tmp_path / "crashed").iterdir()
    script.main(["--resume", str(folder)])
    expected, found = load_weights(reference), load_weights(folder)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_an_evaluation_that_fails_costs_no_training_and_is_made_up_for(script, tmp_path, monkeypatch):
    """Wherever it fails, the run may even be extended before that is made up for. (`save`: of best_model.pt.)"""
    flags, evaluate = [*flags_of(script, 120, "--evaluation-interval", "60"), "--final-trials", "1"], runner.evaluate
    best_at_60 = lambda *args, **kwargs: evaluate(*args, **kwargs) | {"episodic_return_mean": -abs(args[3] - 60.0)}  # noqa: E731
    monkeypatch.setattr(runner, "evaluate", best_at_60)
    reference = script.main([*flags, "--run-dir", str(tmp_path / "reference")])
    script.main(["--resume", str(reference), "--total-timesteps", "180"])

    def failing(name, call):
        calls, function = itertools.count(), getattr(owners[name], name)

        def fail_at_call(*args, **state):
            counts = name != "save" or args[1:3] == ("best_model.pt", 60)
            return fail() if counts and next(calls) == call else function(*args, **state)

        return fail_at_call

    owners = {"evaluate_policy": runner, "final_trials": runner, "save": runner.Run}
    cases = [("evaluate_policy", 1, 60), ("evaluate_policy", 2, 120), ("final_trials", 0, 120), ("save", 0, 60)]
    for name, call, step in cases:
        run_dir = tmp_path / f"{name} {call}"
        with monkeypatch.context() as patch:
            patch.setattr(owners[name], name, failing(name, call))
            with pytest.raises(RuntimeError, match="stopped for the test"):
                script.main([*flags, "--run-dir", str(run_dir)])
        (folder,) = run_dir.iterdir()
        assert load_checkpoint(folder)["global_step"] == step
        script.main(["--resume", str(folder), "--total-timesteps", "180"])
        assert_same_run(folder, reference)


def test_resuming_goes_on_with_clocks_and_keeps_no_second_copy_of_the_rows(script, tmp_path, monkeypatch):
    """A step takes 0.01 s, an evaluation 5 s, all else no time."""
    add, evaluate, train, clock = script.ReplayBuffer.add, runner.evaluate, runner.train, [0.0]

    def tick(seconds, function, *args, **kwargs):
        clock[0] += seconds
        return function(*args, **kwargs)

    def train_without_the_rows(script, agent, buffer, run, state):
        assert buffer.size > 0 and "rows" not in state
        return train(script, agent, buffer, run, state)

    monkeypatch.setattr(runner, "LOG_INTERVAL", 150)
    monkeypatch.setattr(script.ReplayBuffer, "add", lambda *args: tick(0.01, add, *args))
    monkeypatch.setattr(runner, "evaluate", lambda *args, **kwargs: tick(5, evaluate, *args, **kwargs))
    monkeypatch.setattr(runner.time, "perf_counter", lambda: clock[0])
    flags = ["--evaluation-interval", "120"]
    long = script.main([*flags_of(script, 360, *flags), "--run-dir", str(tmp_path / "long")])
    short = script.main([*flags_of(script, 120, *flags), "--run-dir", str(tmp_path / "short")])
    monkeypatch.setattr(runner, "train", train_without_the_rows)
    script.main(["--resume", str(short), "--total-timesteps", "360"])
    minutes = [json.loads((folder / "summary.json").read_text())["minutes"] for folder in (long, short)]
    assert minutes[0] == pytest.approx((180 / 100 + 4 * 5) / 60)
    assert minutes[0] - 5.1 / 60 < minutes[1] <= minutes[0] + 1e-9, "but for the evaluation at the former end"
    for folder in (long, short):
        (speed,) = logged_tags(folder)["charts/steps_per_second"]
        assert speed.value == pytest.approx(200), "of both environments, without evaluations"


def test_resuming_a_finished_run_loses_nothing(script, tmp_path):
    flags = ["--evaluation-episodes", "1", "--final-trials", "1"]
    folder = script.main([*flags_of(script, 120, *flags, env_id=MAZE), "--run-dir", str(tmp_path)])
    before = shutil.copytree(folder, tmp_path / "before")
    script.main(["--resume", str(folder)])
    summaries = [json.loads((path / "summary.json").read_text()) for path in (before, folder)]
    assert abs(summaries[0].pop("minutes") - summaries[1].pop("minutes")) < 1 and summaries[0] == summaries[1]
    assert "final_held_success_rate" in summaries[1]
    assert (folder / "evaluations.csv").read_bytes() == (before / "evaluations.csv").read_bytes()
    for name in ("model.pt", "checkpoint.pt"):
        old, new = (torch.load(path / name, weights_only=True) for path in (before, folder))
        assert old.keys() == new.keys() and all(same(old[key], new[key]) for key in old.keys() - {"seconds", "config"})


def test_a_summary_is_of_the_runs_present_end(script, tmp_path):
    folder = script.main([*flags_of(script, 120), "--run-dir", str(tmp_path)])
    run_until(script, 10, ["--resume", str(folder), "--total-timesteps", "240"])
    assert not (folder / "summary.json").exists(), "an extension that was killed has none"


def test_resuming_leaves_foreign_files_and_the_runs_own_config_alone(script, stopped):
    (stopped / "notes.csv").write_text("my,own\n1,2\n")
    (stopped / "weights.pt").write_bytes(b"mine")
    before = contents(stopped)
    script.main(["--resume", str(stopped)])
    after = contents(stopped)
    for name in ("notes.csv", "weights.pt", "config.json"):
        assert after[name] == before[name], name


def test_resuming_says_where_and_may_change_what_is_evaluated(script, stopped, capsys):
    flags = ["--evaluation-interval", "120", "--evaluation-episodes", "2"]
    saved_step = load_checkpoint(stopped)["global_step"]
    script.main(["--resume", str(stopped), *flags])
    assert capsys.readouterr().out.startswith(f"training from step {saved_step}: files in {stopped}\n")
    assert saved_step > 0
    assert [row["global_step"] for row in read_csv(stopped)] == [0, 120, 240, 300]


# Signals


def as_a_script(file, argv, folder, ignored=()):
    """What `python drac_amort.py ...` does, typed in `folder`."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    os.chdir(folder)
    sys.argv = [file, *argv]
    runpy.run_path(file, run_name="__main__")


def wait_for_a_checkpoint(process, folder):
    seen = [file.stat().st_mtime_ns for file in folder.glob("*/*/checkpoint.pt")]
    while process.is_alive() and seen == [file.stat().st_mtime_ns for file in folder.glob("*/*/checkpoint.pt")]:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_stops_a_script_at_once_and_says_how_to_go_on(script, number, tmp_path, monkeypatch):
    """In the midst of a chapter that would take for ever."""
    endless = ["--updates-per-step", "999999999", *SILENT]
    argv = [*flags_of(script, 10**6, *endless, env_id="Pendulum-v1"), "--run-dir", "runs of mine"]
    process = forked(tmp_path, as_a_script, script.__file__, argv, tmp_path)
    wait_for_a_checkpoint(process, tmp_path)
    time.sleep(0.3)
    os.kill(process.pid, number)
    process.join(timeout=30)
    assert process.exitcode == 1
    message = but_for_chapters((tmp_path / "stderr").read_text())
    assert message.startswith("stopped; to go on from the checkpoint of step ") and message.count("\n") == 1
    monkeypatch.chdir(tmp_path)
    head, command = message.split(": python ")
    (folder,) = tmp_path.glob("runs of mine/*")
    assert int(head.split()[-1].replace(",", "")) == load_checkpoint(folder)["global_step"]
    file, *command = shlex.split(command)
    assert os.path.samefile(file, script.__file__)
    resumed = []
    monkeypatch.setattr(runner, "train", lambda *args: resumed.append(args) or {"global_step": 0})
    assert script.main(command).parent.name == "runs of mine" and len(resumed) == 1


def test_a_hangup_that_nohup_ignores_stays_ignored(script, tmp_path):
    argv = [*flags_of(script, 10**6, *SILENT, env_id="Pendulum-v1"), "--run-dir", "runs"]
    process = forked(tmp_path, as_a_script, script.__file__, argv, tmp_path, [signal.SIGHUP])
    wait_for_a_checkpoint(process, tmp_path)
    os.kill(process.pid, signal.SIGHUP)
    wait_for_a_checkpoint(process, tmp_path)
    wait_for_a_checkpoint(process, tmp_path)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    process.join(timeout=30)
    assert process.exitcode == 1


def test_an_interrupt_is_heard_while_a_file_is_written(script, tmp_path, monkeypatch, capsys):
    """torch.save turns it into a RuntimeError, as it does with a full disk."""
    path_open, calls = pathlib.Path.open, []

    class Interrupted(io.FileIO):
        def write(self, data):
            calls.append(data)
            if len(calls) == 8:
                raise KeyboardInterrupt
            return super().write(data)

    def open_interrupted(path, *args, **kwargs):
        return Interrupted(path, "w") if path.name == "checkpoint.pt.tmp" else path_open(path, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "open", open_interrupted)
    argv = [*flags_of(script, 300), "--run-dir", str(tmp_path)]
    assert fails(capsys, lambda: script.main(argv), code=1) == "interrupted", "there is no checkpoint yet"
    assert not list(tmp_path.glob("*/*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_before_training_gets_one_word(script, capsys, monkeypatch, tmp_path, number):
    monkeypatch.setattr(script, "DrAC", lambda *args: os.kill(os.getpid(), number))
    handler = signal.signal(number, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        assert fails(capsys, lambda: script.main(["--run-dir", str(tmp_path)]), code=1) == "interrupted"
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, handler)


def test_an_interrupt_before_training_gets_one_word(script, capsys, monkeypatch, tmp_path):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "DrAC", interrupted)
    assert fails(capsys, lambda: script.main(["--run-dir", str(tmp_path)]), code=1) == "interrupted"


# Disks, pipes and logs that fail


def failing_save(monkeypatch, fails_for):
    """A disk that is full, half-way through the file, when `fails_for` says so of what torch.save is to write."""
    save = torch.save

    def save_or_fail(content, stream):
        if fails_for(content):
            stream.write(b"half of")
            raise FULL_DISK
        save(content, stream)

    monkeypatch.setattr(torch, "save", save_or_fail)


@pytest.mark.parametrize(("last_good", "told"), [(60, "checkpoint of step 60:"), (-1, "interrupted")])
def test_an_interrupt_names_the_last_checkpoint_that_could_be_written(script, tmp_path, monkeypatch, last_good, told):
    failing_save(monkeypatch, lambda content: "rows" in content and content["global_step"] > last_good)
    with at_step(script, 70, lambda: os.kill(os.getpid(), signal.SIGINT)), pytest.raises(SystemExit, match=told):
        script.main([*flags_of(script, 300, *SILENT), "--learning-starts", "299", "--run-dir", str(tmp_path)])


def test_a_best_model_that_once_could_not_be_written_makes_way_for_the_next_best(script, tmp_path, monkeypatch):
    returns = {0: 1.0, 100: 9.0, 200: 5.0, 300: 2.0}
    monkeypatch.setattr(
        runner, "evaluate", lambda *args: {"global_step": args[3], "episodic_return_mean": returns[args[3]]}
    )
    failing_save(monkeypatch, lambda content: content.get("best_return") == 9)
    folder = script.main([*flags_of(script, 300), "--learning-starts", "299", "--run-dir", str(tmp_path)])
    best = torch.load(folder / "best_model.pt", weights_only=True)
    assert (best["global_step"], best["best_return"]) == (200, 5)


def test_a_full_disk_keeps_the_last_checkpoint_and_the_exit_code_tells(script, tmp_path, monkeypatch, capsys):
    failing_save(monkeypatch, lambda content: "rows" in content and content["global_step"] > 150)
    with pytest.raises(SystemExit) as exit_info:
        script.main([*flags_of(script, 300), "--run-dir", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    assert load_checkpoint(folder)["global_step"] == 120
    assert torch.load(folder / "model.pt", weights_only=True)["global_step"] == 300
    assert not list(folder.glob("*.tmp"))
    warnings = capsys.readouterr().err
    assert warnings.count("\n") == 1 and warnings.startswith("warning: checkpoint.pt"), "one, though it failed twice"
    assert "No space left on device" in warnings
    message = exit_info.value.code
    assert "checkpoint.pt" in message and "model.pt" not in message and "No space left on device" in message
    monkeypatch.undo()
    script.main(["--resume", str(folder)])
    assert_same_run(folder, script.main([*flags_of(script, 300), "--run-dir", str(tmp_path / "reference")]))


def test_a_disk_with_room_for_one_model_gets_the_last_one(script, tmp_path, monkeypatch, capsys):
    def full(content):
        return not {"rows", "best_return"} & set(content) and any(tmp_path.glob("*/model.pt"))

    failing_save(monkeypatch, full)
    folder = script.main([*flags_of(script, 300), "--run-dir", str(tmp_path)])
    assert torch.load(folder / "model.pt", weights_only=True)["global_step"] == 300
    assert capsys.readouterr().err.count("warning: model.pt") == 1


def test_the_last_good_model_outlives_a_disk_that_never_recovers(script, tmp_path, monkeypatch, capsys):
    failing_save(monkeypatch, lambda content: "rows" not in content and content["global_step"] > 100)
    with pytest.raises(SystemExit, match="model.pt of .* could not be written: .*No space left on device"):
        script.main([*flags_of(script, 300), "--run-dir", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    assert torch.load(folder / "model.pt", weights_only=True)["global_step"] == 100


def test_a_best_model_that_cannot_be_written_fails_the_run(script, tmp_path, monkeypatch, capsys):
    failing_save(monkeypatch, lambda content: "best_return" in content)
    with pytest.raises(SystemExit, match="best_model.pt of .* could not be written: .*No space left on device"):
        script.main([*flags_of(script, 300), "--run-dir", str(tmp_path)])


def test_a_disk_that_has_become_read_only_ends_in_one_sentence(script, tmp_path, monkeypatch, capsys):
    failing_save(monkeypatch, lambda content: "rows" not in content and content["global_step"] > 100)
    unlink = pathlib.Path.unlink

    def refuse(file, missing_ok=False):
        if file.name == "model.pt":
            raise OSError(30, "Read-only file system")
        unlink(file, missing_ok)

    monkeypatch.setattr(pathlib.Path, "unlink", refuse)
    with pytest.raises(SystemExit, match="model.pt of .* could not be written: .*No space left on device"):
        script.main([*flags_of(script, 300), "--run-dir", str(tmp_path)])
    output, (folder,) = capsys.readouterr(), tmp_path.iterdir()
    assert torch.load(folder / "model.pt", weights_only=True)["global_step"] == 100
    assert "Read-only file system" in output.err and "global_step" in output.out, "the summary is printed"


def test_a_model_that_could_never_be_written_is_named_in_the_end(script, tmp_path, monkeypatch, capsys):
    failing_save(monkeypatch, lambda content: "rows" not in content)
    with pytest.raises(SystemExit, match="model.pt of .* could not be written: .*No space left on device"):
        script.main([*flags_of(script, 300), "--run-dir", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    assert load_checkpoint(folder)["global_step"] == 300, "from which it can be had"


@pytest.mark.parametrize(
    ("name", "env_id", "lost"),
    [("evaluations.csv", CORRIDOR, True), ("summary.json", CORRIDOR, False), ("trajectories.png", MAZE, False)],
)
def test_small_files_that_fail_cost_a_warning_and_the_run_goes_on(
    script, tmp_path, monkeypatch, capsys, name, env_id, lost
):
    path_open = pathlib.Path.open

    def open_or_fail(path, *args, **kwargs):
        if path.name == f"{name}.tmp":
            raise FULL_DISK
        return path_open(path, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "open", open_or_fail)
    argv = [*flags_of(script, 200, env_id=env_id), "--run-dir", str(tmp_path)]
    if lost:
        with pytest.raises(SystemExit, match=f"{name} of .* could not be written: .*No space left on device"):
            script.main(argv)
    else:
        script.main(argv)
    (folder,) = tmp_path.iterdir()
    warnings = but_for_chapters(capsys.readouterr().err)
    assert warnings.count("\n") == 1 and warnings.startswith(f"warning: {name} of {folder}")
    assert load_checkpoint(folder)["global_step"] == 200 and not (folder / name).exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_log_of_tensorboard_that_fails_costs_a_warning(script, tmp_path, monkeypatch, capsys):
    write, counter = RecordWriter.write, itertools.count()

    def write_or_fail(self, data):
        if next(counter) > 20:
            raise FULL_DISK
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", write_or_fail)
    folder = script.main([*flags_of(script, 300), "--run-dir", str(tmp_path)])
    assert load_checkpoint(folder)["global_step"] == 300
    warnings = capsys.readouterr().err
    assert warnings.count("\n") == 1 and warnings.startswith("warning: TensorBoard's log")


def test_an_interrupt_on_a_full_disk_says_how_to_go_on(script, stopped, monkeypatch, capsys):
    def close(self):
        raise OSError(28, "No space left on device")  # a new one: it keeps the interrupt as its context

    monkeypatch.setattr(runner.SummaryWriter, "close", close)
    with at_step(script, 50, lambda: os.kill(os.getpid(), signal.SIGINT)), pytest.raises(SystemExit, match="stopped;"):
        script.main(["--resume", str(stopped)])
    assert capsys.readouterr().err.startswith("warning: TensorBoard's log")
    monkeypatch.undo()
    script.main(["--resume", str(stopped)])  # the lock is free


def with_small_files(limit, *args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    as_a_script(*args)


def test_a_real_limit_on_file_sizes_ends_without_a_traceback(script, tmp_path):
    argv = [*flags_of(script, 600, "--hidden-size", "8", env_id="Pendulum-v1"), "--run-dir", "runs"]
    process = forked(tmp_path, with_small_files, 1500, script.__file__, argv, tmp_path)
    process.join()
    *warnings, error = (tmp_path / "stderr").read_text().splitlines()
    assert process.exitcode == 1 and error.startswith("error: best_model.pt, checkpoint.pt, model.pt of runs/")
    assert len(warnings) >= 2 and all(line.startswith("warning: ") for line in warnings)
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(read_csv(folder)) == 7 and (folder / "summary.json").exists()


class Pipe(io.TextIOWrapper):
    """A standard output, of which nobody is told that it fails."""

    def close(self):
        with contextlib.suppress(OSError):
            super().close()


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return Pipe(open(writer, "wb"))  # noqa: SIM115


@pytest.mark.parametrize(
    ("stdout", "cause"),
    [
        (broken_pipe, "Broken pipe"),
        (lambda: Pipe(open("/dev/full", "wb")), "No space left on device"),  # noqa: SIM115
        (lambda: Pipe(io.BytesIO(), encoding="ascii"), "'ascii' codec can't encode"),
    ],
    ids=["broken pipe", "full device", "ASCII"],
)
def test_a_standard_output_that_fails_costs_a_warning(script, tmp_path, monkeypatch, capsys, stdout, cause):
    monkeypatch.setattr(sys, "stdout", stdout())
    folder = script.main([*flags_of(script, 200), "--run-dir", str(tmp_path / "läufe")])
    monkeypatch.undo()
    assert len(read_csv(folder)) == 3 and (folder / "summary.json").exists()
    warnings = capsys.readouterr().err
    assert warnings.count("\n") == 1 and warnings.startswith("warning: stdout") and cause in warnings


def test_a_script_whose_reader_is_gone_ends_well(script, tmp_path):
    argv = [*flags_of(script, 200, *SILENT, env_id="Pendulum-v1"), "--run-dir", str(tmp_path)]
    with open("/dev/full", "wb") as full:
        command = [sys.executable, script.__file__, *argv]
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, encoding="utf-8")
    warnings = but_for_chapters(process.stderr)
    assert process.returncode == 0 and warnings.count("\n") == 1 and "warning: stdout" in warnings


def test_an_update_that_finds_no_memory_ends_the_run_in_one_sentence(script, stopped, capsys, monkeypatch):
    update = unittest.mock.Mock()
    with monkeypatch.context() as patch:
        patch.setattr(script.DrAC, "update", update)
        for error in (
            RuntimeError("DefaultCPUAllocator: can't allocate memory:\nyou tried"),
            RuntimeError("CUDA out of memory."),
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            MemoryError("Unable to allocate 1 TiB"),
            MemoryError(),
        ):
            update.side_effect = error
            message = fails(capsys, lambda: script.main(["--resume", str(stopped)]), code=1)
            assert message.startswith("error: ") and " ".join(str(error).split()) in message
            assert str(stopped) in message
            assert any(word in message for word in ("memory", "allocate", "ALLOC_FAILED"))
    script.main(["--resume", str(stopped)])


def test_a_run_of_cuda_graphs_goes_on_without_a_gpu_as_its_error_says(script, stopped, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checkpoint = load_checkpoint(stopped)
    checkpoint["config"] |= {"cuda": True, "cudagraphs": True}
    torch.save(checkpoint, stopped / "checkpoint.pt")
    message = fails(capsys, lambda: script.main(["--resume", str(stopped)]))
    script.main(["--resume", str(stopped), *message.split("(on the CPU: ")[1].rstrip(")\n").split()])


@pytest.mark.parametrize("fault", ["NanReward", "HugeReward"])
def test_divergence_keeps_the_last_checkpoint(script, tmp_path, capsys, monkeypatch, fault):
    """Rewards fail in the 20th iteration of the second chapter."""
    monkeypatch.setattr(runner, "LOG_INTERVAL", 10)
    flags = [*flags_of(script, 400, "--checkpoint-interval", "40", *SILENT), "--run-dir", str(tmp_path)]
    corridor, made = conftest.Corridor.__init__, itertools.count()

    def later(self, fault=None):
        corridor(self, fault, 20 if next(made) > 2 else 10**9)

    monkeypatch.setattr(conftest.Corridor, "__init__", later)
    argv = ["--env-id", f"Test/Corridor{fault}-v0", *flags[2:]]
    assert "is not finite at step" in fails(capsys, lambda: script.main(argv), code=1)
    (folder,) = tmp_path.iterdir()
    checkpoint = load_checkpoint(folder)
    assert checkpoint["global_step"] == 80
    assert all(weight.isfinite().all() for weight in checkpoint["weights"].values())


# Folders and files that are refused


def test_contradictions_name_both_values(script, stopped, capsys):
    before = contents(stopped)
    for flag, value, old in (
        ("--env-id", WALKER, CORRIDOR),
        ("--beta", "0.3", "0.2"),
        ("--seed", "2", "7"),
        ("--num-envs", "3", "2"),
        ("--n-steps", "3", "2"),
        ("--env-kwargs", '{"fault": null}', "{}"),
        ("--total-timesteps", "200", "300"),
        ("--learning-starts", "60", "50"),
        ("--checkpoint-interval", "60", "30"),
        ("--run-dir", "elsewhere", "runs of mine"),
    ):
        message = fails(capsys, lambda flag=flag, value=value: script.main(["--resume", str(stopped), flag, value]))
        assert flag in message and value in message and old in message, message
    assert contents(stopped) == before


def test_a_folder_in_use_is_left_alone(script, stopped, capsys):
    before = contents(stopped)
    with (stopped / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        message = fails(capsys, lambda: script.main(["--resume", str(stopped)]))
        assert f"another process is at work in {stopped}" in message and ".lock" in message
    assert contents(stopped) == before


@pytest.mark.parametrize("content", [b"", b"global_step,episod"])
def test_evaluations_of_which_nothing_was_written_are_made_anew(script, stopped, content):
    (stopped / "evaluations.csv").write_bytes(content)
    script.main(["--resume", str(stopped)])
    assert read_csv(stopped)[-1]["global_step"] == 300


@pytest.mark.parametrize(
    "content", [b"x,y\n1,2\n", b"global_step\nx\n", b"\xff\xfe\0", b"global_step\n0\n", b"0" * 140_000]
)
def test_evaluations_that_are_damaged_are_refused_and_left_alone(script, stopped, capsys, content):
    (stopped / "evaluations.csv").write_bytes(content)
    message = fails(capsys, lambda: script.main(["--resume", str(stopped)]))
    assert "evaluations.csv is damaged" in message and message.count("\n") == 1
    assert (stopped / "evaluations.csv").read_bytes() == content


class Canary:
    """Unpickling this would create a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.fixture
def outcome(script, stopped, monkeypatch, capsys):
    """Write a content to model.pt or checkpoint.pt, start from it, and return what was loaded, or None if refused."""
    loaded = []
    monkeypatch.setattr(
        runner,
        "evaluate",
        lambda script, agent, run, step, hold, last: loaded.append((agent, None, step)) or {"global_step": 0},
    )
    monkeypatch.setattr(
        runner, "train", lambda script, agent, buffer, run, state: loaded.append((agent, buffer, state)) or {}
    )

    def start(name, content):
        if isinstance(content, bytes):
            (stopped / name).write_bytes(content)
        else:
            torch.save(content, stopped / name)
        loaded.clear()
        argv = ["--evaluate", str(stopped / name)] if name == "model.pt" else ["--resume", str(stopped)]
        run_dir = [] if name == "checkpoint.pt" else ["--run-dir", str(stopped.parent.parent / "evaluated")]
        try:
            script.main([*argv, *run_dir])
        except SystemExit as error:
            message = capsys.readouterr().err
            assert error.code == 2 and message.startswith("error: ") and message.count("\n") == 1, message
            assert not loaded
            return None
        return loaded[0]

    return start


def changed(content, path, value):
    """A copy, with one entry, at the end of a path of keys, replaced or (for `Canary`, the class) left out."""
    content = copy.deepcopy(content)
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    if value is Canary:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return content


def test_wrong_flags_and_weights_and_missing_entries_are_refused(script, stopped, outcome):
    wrong = {int: [None, "1", 1.0, True, -1, [1]], float: [None, "0.2", 1, True, float("nan"), -1.0]}
    wrong |= {str: [None, 1, b"x"], bool: [None, 1, "True"], type(None): [1, True, b"x"]}
    for name in ("model.pt", "checkpoint.pt"):
        good = torch.load(stopped / name, weights_only=True)
        raw = (stopped / name).read_bytes()
        cases = [((key,), Canary) for key in ("script", "format", "config", "weights")]
        for flag in ("seed", "beta", "env_id", "cuda", "evaluate") if name == "model.pt" else ():  # one of each type
            cases += [(("config", flag), value) for value in wrong[type(good["config"][flag])]]
        cases += [(("config", flag), Canary) for flag in ("gamma", "seed", "hidden_size", "num_envs")]
        cases += [(("config", "unknown"), 1), (("config", "hidden_size"), 48), (("config",), None), (("config",), [1])]
        cases += [(("fingerprint",), "another"), (("script",), "another"), (("format",), 99), (("weights",), None)]
        cases += [(("weights", "actor.fc1.weight"), value) for value in (Canary, None, torch.zeros(3), 1)]
        cases += [(("weights", "unknown"), torch.zeros(3))]
        if name == "checkpoint.pt":
            cases += [(("weights", "raw_alpha"), Canary)]
            cases += [((key,), value) for key in ("rows", "optimizers") for value in (Canary, None)]
            cases += [(("rows",), torch.zeros(5, 3)), (("optimizers",), good["optimizers"][:2])]
        accepted = [
            (name, path, value) for path, value in cases if outcome(name, changed(good, path, value)) is not None
        ]
        assert accepted == []
        assert outcome(name, raw) is not None


def test_nothing_in_a_file_is_ever_run(script, stopped, outcome, tmp_path):
    good = load_checkpoint(stopped)
    for name, key in itertools.product(("model.pt", "checkpoint.pt"), ("config", "weights", "fingerprint", "extra")):
        assert outcome(name, {**good, key: Canary(tmp_path / "canary")}) is None
    assert not (tmp_path / "canary").exists()


def test_files_of_before_there_was_a_matmul_precision_go_on_with_the_highest(script, stopped, outcome):
    for name in ("model.pt", "checkpoint.pt"):
        old = torch.load(stopped / name, weights_only=True)
        assert old["config"].pop("matmul_precision") is not None
        agent, _, _ = outcome(name, old)
        assert agent.args.matmul_precision == torch.get_float32_matmul_precision() == "highest"


def test_files_that_are_none_of_ours(script, stopped, outcome, tmp_path, capsys):
    model, checkpoint = ((stopped / name).read_bytes() for name in ("model.pt", "checkpoint.pt"))
    for name in ("model.pt", "checkpoint.pt"):
        for content in (b"", b"PK", model[: len(model) // 2], [1, 2], torch.zeros(3), {"weights": torch.zeros(3)}):
            assert outcome(name, content) is None
    assert outcome("checkpoint.pt", model) is None
    assert outcome("model.pt", checkpoint) is not None, "a checkpoint has all that a model has"
    assert "checkpoint.pt" in fails(capsys, lambda: script.main(["--resume", str(tmp_path / "no such folder")]))
    (stopped / "model.pt").write_bytes(model)
    for contradiction in (["--env-id", WALKER], ["--hidden-size", "64"]):
        evaluating = ["--evaluate", str(stopped / "model.pt"), *contradiction]
        message = fails(capsys, lambda argv=evaluating: script.main(argv))
        assert all(part in message for part in contradiction)


def same(a, b):
    """Are two nested contents equal, bit by bit?"""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_damaged_files_are_refused_or_have_the_same_content(script, stopped, tmp_path):
    """400 single flipped bits and 100 truncations, of models and checkpoints."""
    rng, refused = random.Random(0), 0
    for name in ("model.pt", "checkpoint.pt"):
        good, content = (stopped / name).read_bytes(), runner.load(script, stopped / name)
        for case in range(250):
            damaged = bytearray(good)
            if case < 200:
                position = rng.randrange(8 * len(good))
                damaged[position // 8] ^= 1 << position % 8
            else:
                del damaged[rng.randrange(len(good)) :]
            (tmp_path / "damaged").write_bytes(damaged)
            try:
                assert same(runner.load(script, tmp_path / "damaged"), content), case
            except ValueError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 350


def test_a_model_of_the_other_script_is_named_as_such(script, stopped):
    other = {drac_amort: drac_diffus, drac_diffus: drac_amort}[script]
    with pytest.raises(ValueError, match=f"is of {script.__name__}.py and no model.pt .* of {other.__name__}.py"):
        runner.load(other, stopped / "model.pt")


def test_a_model_that_another_program_has_zipped_again_is_read(script, stopped, tmp_path):
    with zipfile.ZipFile(stopped / "model.pt") as source, zipfile.ZipFile(tmp_path / "model.pt", "w") as target:
        for part in source.infolist():
            target.writestr(part.filename, source.read(part))
    again, model = runner.load(script, tmp_path / "model.pt"), runner.load(script, stopped / "model.pt")
    assert same(again, model)
