"""From the runs to the README: one table of all evaluations, and the tables and figures of both READMEs made from it.

    python assets/results/plot_results.py                         # rewrite the tables, redraw the curves
    python assets/results/plot_results.py --add runs/<run> ...    # the same, with new or grown runs in results.csv
    python assets/results/plot_results.py --pictures TITLE=FILE.png ...   # assets/hard.png, of several

results.csv has one row per evaluation. The last row of a run that reached its end also has the final trials and the
minutes.
"""

import csv
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import matplotlib.image
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
PAGES = [ROOT / "README.md", FOLDER / "README.md", FOLDER / "one_step.md"]
sys.path.insert(0, str(ROOT))
import drac_amort  # noqa: E402
import drac_diffus  # noqa: E402
import drac_runner as runner  # noqa: E402
from envs import hypervolume  # noqa: E402

SETTINGS = ["seed", "beta", "num_envs", "n_steps", "hold_steps", "num_action_samples", "pairing", "diversity_mean"]
SETTINGS += ["gamma", "hidden_size", "diffusion_steps", "clip", "target_entropy", "matmul_precision"]
MAZES = {name.lower(): f"MultiGoalPointMaze-{name}-v0" for name in ("Simple", "Medium", "Hard")}
SIMPLE, MEDIUM, HARD = MAZES.values()
# The settings of the runs of one_step.md, where a table says nothing else.
ONE_STEP = {"beta": 0.8, "gamma": 0.99, "hidden_size": 256, "num_action_samples": 4, "pairing": "all", "variant": ""}
ONE_STEP |= {"num_envs": 1, "n_steps": 1, "hold_steps": 1.0, "diversity_mean": "geometric"}
ONE_STEP["matmul_precision"] = "highest"
# Settings without a column of their own: a run in which one is not as usual is a variant.
USUAL = ["z_dim", "actor_lr", "critic_lr", "alpha_lr", "tau", "batch_size", "buffer_size", "learning_starts"]
USUAL += ["updates_per_step"]
LABELS = {"drac_amort": "DrAmort", "drac_diffus": "DrDiffus", "sac": "SAC", "hold_steps": "hold steps (1: fresh noise)"}
LABELS["num_action_samples"] = "M"
MUJOCO = ("Hopper-v4", "Walker2d-v4", "HalfCheetah-v4", "Ant-v4", "Humanoid-v4", "Swimmer-v4")
# Mean returns of SAC after 1,000,000 steps: CleanRL's documentation (v4), rl-baselines3-zoo's benchmark (v3).
CLEANRL = {"Hopper-v4": "2,310", "Walker2d-v4": "3,591", "HalfCheetah-v4": "9,635", "Humanoid-v4": "4,996"}
ZOO = {"Hopper-v4": "2,326", "Walker2d-v4": "3,863", "HalfCheetah-v4": "9,535", "Ant-v4": "4,616"}
Row = dict[str, str]


@dataclass
class Args:
    add: tuple[Path, ...] = ()  # folders of runs whose rows enter results.csv, in place of what it had of them
    variant: str = ""  # of the added runs: a change of the code, described in README.md beside this file
    pictures: tuple[str, ...] = ()  # TITLE=FILE.png of each, which side by side make assets/hard.png
    policies: tuple[Path, ...] = ()  # folders of runs, whose actors become assets/models/{task}_{script}[_paper].pt
    actions: tuple[Path, ...] = ()  # two folders of DrAmort's runs, whose actions at the start make actions.png


def collect(run: Path, variant: str = "") -> list[Row]:
    """The rows of a run's folder, strings as in the file. Empty strings are left out, here and in `read`."""
    config = json.loads((run / "config.json").read_text())
    if config.get("evaluate"):
        raise SystemExit(f"error: {run} is an evaluation, not a training run")
    if config.get("env_kwargs", "{}") != "{}" and not variant:
        raise SystemExit(f"error: {run} has env_kwargs {config['env_kwargs']}: name it with --variant")
    if config.get("cuda") and "-v4__" not in run.name and not variant:  # MuJoCo's table says so in words
        raise SystemExit(f"error: {run} is of a GPU: name it with --variant")
    for name in USUAL:
        if not variant and name in config and config[name] != getattr(drac_amort.Args, name):
            raise SystemExit(f"error: {run} has {name} {config[name]}: name it with --variant")
    environment, algorithm = run.name.split("__")[:2]
    head = {"run": run.name, "algorithm": algorithm, "environment": environment, "variant": variant}
    head |= {name: str(config.get(name, "")) for name in SETTINGS}
    head["matmul_precision"] = config.get("matmul_precision", "highest")  # runs from before this flag
    with (run / "evaluations.csv").open() as file:
        rows = [{name: value for name, value in (head | row).items() if value} for row in csv.DictReader(file)]
    if (run / "summary.json").exists():
        summary = json.loads((run / "summary.json").read_text())
        if str(summary["global_step"]) == rows[-1]["global_step"]:
            rows[-1] |= {name: str(value) for name, value in summary.items()}
    return rows


def add(rows: list[Row], run: Path, variant: str) -> list[Row]:
    """The rows with those of a run's folder, in place of what they had of it."""
    # A run that has grown keeps the final trials that it had played at its former end.
    trials = {
        row["global_step"]: {name: row[name] for name in row if name == "minutes" or name.startswith("final_")}
        for row in select(rows, run=run.name)
    }
    others = [row for row in rows if row["run"] != run.name]
    return others + [trials.get(row["global_step"], {}) | row for row in collect(run, variant)]


def read(name: str = "results.csv") -> list[Row]:
    """The rows of a table in this folder."""
    with (FOLDER / name).open() as file:
        return [{name: value for name, value in row.items() if value != ""} for row in csv.DictReader(file)]


def write(rows: list[Row], name: str = "results.csv") -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with (FOLDER / name).open("w", newline="") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def load_agent(script: ModuleType, run: Path) -> drac_amort.DrAC:
    """The agent of a run's model.pt. Its `args` are the run's flags."""
    model = runner.load(script, run / "model.pt")
    with script.make(model["config"]) as env:
        sizes = *env.observation_space.shape, *env.action_space.shape
    agent = script.DrAC(model["config"], *sizes, torch.device("cpu"))
    agent.load_state_dict(model["weights"], strict=False)  # the actor's may be all
    return agent


def select(rows: list[Row], **settings: object) -> list[Row]:
    return [row for row in rows if all(row.get(name, "") == str(value) for name, value in settings.items())]


def as_usual(rows: list[Row], usual: dict[str, object]) -> list[Row]:
    """The rows whose settings, as far as they have them, are these."""
    return [row for row in rows if all(row.get(name, str(value)) == str(value) for name, value in usual.items())]


def at(rows: list[Row], step: int) -> list[Row]:
    return [row for row in rows if int(row["global_step"]) == step]


def marks(rows: list[Row]) -> list[Row]:
    """The rows at 100,000 steps, 200,000 and so on."""
    return [row for row in rows if int(row["global_step"]) in range(100_000, 10_000_000, 100_000)]


def last(rows: list[Row]) -> list[Row]:
    """Each run's last row."""
    return list({row["run"]: row for row in rows}.values())


def of_length(rows: list[Row], steps: int) -> list[Row]:
    """The rows of those runs that end at this step."""
    ends = {row["run"]: int(row["global_step"]) for row in rows}
    return [row for row in rows if ends[row["run"]] == steps]


def started(row: Row) -> str:
    """The time at which the run of a row began."""
    return row["run"].split("__")[3]


def newest(rows: Iterable[Row]) -> list[Row]:
    """Each seed's newest run."""
    return sorted({row["seed"]: row for row in sorted(rows, key=started)}.values(), key=lambda row: int(row["seed"]))


def one_step_runs(rows: list[Row], environment: str) -> list[Row]:
    """The rows of SAC and DrAmort on a maze one step at a time, with fresh noise in collection or held."""
    rows = [row for row in select(rows, environment=environment) if row["algorithm"] in ("sac", "drac_amort")]
    settings = {name: value for name, value in ONE_STEP.items() if name != "hold_steps"}
    rows = as_usual(rows, {**settings, "target_entropy": 1.0})
    return sorted(rows, key=lambda row: (row["algorithm"], float(row.get("hold_steps", 1)), int(row["seed"])))


def number(row: Row, name: str, digits: int) -> str:
    return f"{float(row[name]):,.{digits}f}" if name in row else "–"


def goals(row: Row, prefix: str = "") -> str:
    counts = (row.get(f"{prefix}goal_{i}") for i in range(8))
    return ", ".join(count for count in counts if count is not None)


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def maze_table(rows: list[Row], settings: tuple[str, ...] = ("seed",), final: bool = True) -> str:
    """One line per row, with the final trials (whose 500 episodes then replace the evaluation's 100) or without."""
    header = [*(LABELS.get(name, name) for name in settings), "steps", "success", "goals", "episodes per goal"]
    header += ["multi-goal score"]
    header += ["removal SR5", "same, release's rule", "obstacle SR5", "minutes"] if final else []
    lines = []
    for row in rows:
        prefix = "final_" if final and "final_success_rate" in row else ""
        line = [LABELS.get(row.get(name, "–"), row.get(name, "–")) for name in settings]
        line += [f"{int(row['global_step']):,}", number(row, f"{prefix}success_rate", 3)]
        line += [f"{row[f'{prefix}reachable_modes']} of {len(goals(row).split(','))}", goals(row, prefix)]
        line.append(number(row, f"{prefix}multi_goal_score", 2))
        if final:
            tests = ("removal_sr5", "removal_sr5_release", "obstacle_sr5")
            line += [*(number(row, f"final_{name}", 3) for name in tests), number(row, "minutes", 0)]
        lines.append(line)
    return markdown(header, lines)


def default_runs(rows: list[Row], script: ModuleType, environment: str, **flags: object) -> list[Row]:
    """The last row of a script's newest finished run of each seed, with today's defaults for all flags but these."""
    defaults = {**asdict(script.default_args(environment)), "variant": "", "matmul_precision": None, **flags}
    names = [name for name in (*SETTINGS, "variant") if defaults.get(name) is not None and name != "seed"]
    rows = select(rows, algorithm=script.__name__, environment=environment, **{name: defaults[name] for name in names})
    return newest(row for row in at(last(rows), defaults["total_timesteps"]) if "final_success_rate" in row)


def spread(rows: list[Row], name: str, digits: int, median_only: bool = False) -> str:
    """Median and range over runs; of two, the range."""
    values = [float(row[name]) for row in rows if name in row]
    if not values:
        return "–"
    middle, low, high = (f"{value:.{digits}f}" for value in (np.median(values), min(values), max(values)))
    if low == high or median_only:
        return middle
    return f"{low}–{high}" if len(values) == 2 else f"{middle} ({low}–{high})"


def both_libraries(rows: list[Row], script: ModuleType, environment: str, **flags: object) -> list[Row]:
    """Of each seed the newest run with MKL's matrix products and that with oneDNN's: float32 both, but other bits."""
    mkl, onednn = (
        default_runs(rows, script, environment, **flags, matmul_precision=name) for name in ("highest", "medium")
    )
    return mkl + onednn


UNIFORM = "uniform random actions"
SAC = "SAC, N = 16, n = 5"
SAC_LIKE_DRAC = f"{SAC}, held noise, entropy 1.3"
PAPER = "DrAmort as published (`--paper`)"
DRAMORT, DRDIFFUS = "**DrAmort, default**", "**DrDiffus, default**"
SHOWN = (SAC_LIKE_DRAC, PAPER, DRAMORT, DRDIFFUS)  # in README, of every maze


def ways_to_train(rows: list[Row], environment: str) -> dict[str, list[Row]]:
    """The last rows of all finished runs on a maze, by the way in which they were trained."""
    finished = [row for row in last(select(rows, environment=environment)) if "final_success_rate" in row]
    paper = drac_amort.default_args(environment, paper=True)
    one_step = select(at(one_step_runs(finished, environment), paper.total_timesteps), algorithm="drac_amort")

    def sac(**settings: float) -> list[Row]:
        """Runs of full length. A setting that is not named, or that a run's row does not have yet, is 1."""
        usual = {"num_envs": "1", "n_steps": "1", "hold_steps": "1.0", "target_entropy": "1.0"}
        runs = [usual | row for row in select(finished, algorithm="sac", variant="")]
        steps = paper.total_timesteps if "num_envs" in settings else 100_000
        return newest(at(select(runs, **(usual | settings)), steps))

    like_drac = {"num_envs": 16, "n_steps": 5}
    return {
        UNIFORM: newest(select(finished, algorithm="uniform")),
        "SAC, one step at a time": sac(),
        "SAC, one step at a time, entropy 1.3": sac(hold_steps=1.0001, target_entropy=1.3),
        SAC: sac(**like_drac),
        f"{SAC}, held only when acting": sac(**like_drac, hold_steps=1.0001),
        f"{SAC}, held noise": sac(**like_drac, hold_steps=20.0),
        f"{SAC}, held only when acting, entropy 1.3": sac(**like_drac, hold_steps=1.0001, target_entropy=1.3),
        SAC_LIKE_DRAC: sac(**like_drac, hold_steps=20.0, target_entropy=1.3),
        PAPER: default_runs(rows, drac_amort, environment, **asdict(paper)),
        "DrAmort, one step at a time": select(one_step, hold_steps=1.0),
        "DrAmort, one step at a time, noise held for 5 steps": select(one_step, hold_steps=5.0),
        DRAMORT: both_libraries(rows, drac_amort, environment),
        DRDIFFUS: both_libraries(rows, drac_diffus, environment),
    }


def groups_table(groups: dict[str, list[Row]], brief: bool = False) -> str:
    """One line per group of runs on mazes: medians and ranges over seeds (brief: of scores only), fresh noise and held.

    Steps are the mean length of the last evaluation's episodes, with fresh noise.
    """
    header = ["", "runs", "fresh: success", "goals", "score", "steps", "held: success", "goals", "score", "minutes"]
    rate = 2 if brief else 3
    columns = {"final_success_rate": rate, "final_reachable_modes": 0, "final_multi_goal_score": 2}
    columns["episodic_length_mean"] = 0
    columns |= {"final_held_success_rate": rate, "final_held_reachable_modes": 0, "final_held_multi_goal_score": 2}
    columns["minutes"] = 1
    lines = []
    for label, runs in groups.items():
        figures = [spread(runs, name, digits, brief and "score" not in name) for name, digits in columns.items()]
        lines += [[label, str(len(runs)), *figures]] if runs else []
    return markdown(header, lines)


def minutes_to_goals(rows: list[Row], end: Row) -> float:
    """Minutes until an evaluation of a run, whose last row is `end`, had all goals and a success of 0.95, or inf."""
    run = select(rows, run=end["run"], reachable_modes=len(goals(end).split(",")))
    steps = [int(row["global_step"]) for row in run if float(row["success_rate"]) >= 0.95]
    # A run's speed is nearly constant. Its minutes hold the final trials, too, up to a fifth of them.
    return float(end["minutes"]) * min(steps, default=math.inf) / int(end["global_step"])


def goals_table(rows: list[Row], mazes: dict[str, dict[str, list[Row]]]) -> str:
    """Minutes to all goals, a line per way and a column per maze: medians and ranges of the runs that got there."""
    lines = []
    for label in SHOWN:
        line = [label]
        for ways in mazes.values():
            minutes = [{"minutes": minutes_to_goals(rows, end)} for end in ways[label]]
            reached = [run for run in minutes if run["minutes"] < math.inf]
            line.append(f"{spread(reached, 'minutes', 1) if reached else 'never'}; {len(reached)} of {len(minutes)}")
        lines.append(line)
    return markdown(["", *mazes], lines)


def ablations_table(rows: list[Row]) -> str:
    """What the parts of the default do on the hard maze, the mean on the simple one: one changed, all others left."""
    changes = {
        "**default**": {},
        "M = 8 actions per state": {"num_action_samples": 8},
        "one-step targets (n = 1)": {"n_steps": 1},
        "one environment, as many updates": {"num_envs": 1, "total_timesteps": 18_750},
        "all environments draw afresh": {"hold_steps": 1.0},
        "all environments hold": {"variant": "all environments hold"},
    }
    groups = {label: both_libraries(rows, drac_amort, HARD, **flags) for label, flags in changes.items()}
    for mean in ("geometric", "arithmetic"):
        groups[f"simple maze: {mean} mean"] = both_libraries(rows, drac_amort, SIMPLE, diversity_mean=mean)
    return groups_table(groups)


def precision_table(rows: list[Row]) -> str:
    """The default flags on each maze, their matrix products computed in four ways."""
    products = {
        "MKL": {"matmul_precision": "highest"},
        "oneDNN": {"matmul_precision": "medium"},
        "oneDNN with AMX": {"matmul_precision": "medium", "variant": "AMX"},
        "factors rounded to bfloat16": {"matmul_precision": "medium", "variant": "factors rounded to bfloat16"},
    }
    groups = {
        f"{maze}, {label}": default_runs(rows, drac_amort, environment, **flags)
        for maze, environment in MAZES.items()
        for label, flags in products.items()
    }
    return groups_table(groups)


def seeds_table(rows: list[Row], script: ModuleType) -> str:
    """One line per run with the default flags, all of its final trials."""
    header = ["maze", "seed", "products", "success", "goals", "episodes per goal", "score", "removal SR5"]
    header += ["release's rule", "obstacle SR5", "held: success", "goals", "episodes per goal", "score", "removal SR5"]
    header += ["obstacle SR5", "minutes"]
    lines = []
    for maze, environment in MAZES.items():
        for row in both_libraries(rows, script, environment):
            library = {"highest": "MKL", "medium": "oneDNN"}[row["matmul_precision"]]
            line = [maze, row["seed"], library]
            for prefix in ("final_", "final_held_"):
                line += [number(row, f"{prefix}success_rate", 3), row[f"{prefix}reachable_modes"], goals(row, prefix)]
                line += [number(row, f"{prefix}multi_goal_score", 2), number(row, f"{prefix}removal_sr5", 3)]
                line += [number(row, "final_removal_sr5_release", 3)] if prefix == "final_" else []
                line.append(number(row, f"{prefix}obstacle_sr5", 2))
            lines.append([*line, number(row, "minutes", 1)])
    return markdown(header, lines)


def defaults_search_table() -> str:
    """One line per run of search.jsonl: its settings, and its last evaluation with fresh noise and with held."""
    header = ["maze", "seed", "N", "n", "who holds", "β", "middle sum", "updates", "fresh: success", "goals", "score"]
    header += ["held: success", "goals", "score", "α"]
    lines = []
    for run in map(json.loads, (FOLDER / "search.jsonl").read_text().splitlines()):
        end = run["evaluations"][-1]
        kept = [1 / float(probability) for probability in run["redraw_probabilities"].split(",")]
        middle = f"{run['middle_sum']:g}{', centred' if run['bonus_centred'] else ''}" if run["middle_sum"] else "–"
        line = [run["map"], str(run["seed"]), str(run["num_envs"]), str(run["n_steps"])]
        line += [" ".join(f"{steps:g}" for steps in kept), f"{run['beta']:g}", middle]
        at_once = f" ({run['updates_per_step']} at once)" if run["updates_per_step"] > 1 else ""
        line.append(f"{end['iteration'] * run['updates_per_step']:,}{at_once}")
        for noise in ("fresh", "held20" if "held20" in end else "held10"):
            line += [f"{end[noise]['success']:.3f}", str(end[noise]["goals"]), f"{end[noise]['score']:.2f}"]
        lines.append([*line, f"{end['alpha']:.1f}"])
    return markdown(header, lines)


def success_table(runs: dict[str, list[Row]]) -> str:
    """Success in the first 30,000 steps, and the goals reached then: one line per run."""
    steps = range(0, 30_001, 5000)
    lines = []
    for label, rows in runs.items():
        if len(names := {row["run"] for row in rows}) != 1:
            raise ValueError(f"one run was expected, not {names}")
        by_step = {int(row["global_step"]): row for row in rows}
        lines.append([label, *(number(by_step[step], "success_rate", 2) for step in steps), goals(by_step[30_000])])
    return markdown(["success at", *(f"{step // 1000}k" for step in steps), "episodes per goal at 30k"], lines)


def way(row: Row) -> str:
    """How the run of a row learned a MuJoCo task."""
    label = LABELS[row["algorithm"]]
    settings = ("beta", "β", None), ("diffusion_steps", "T", None), ("num_envs", "N", "1"), ("n_steps", "n", "1")
    for name, symbol, usual in settings:
        if row.get(name, usual) != usual:
            label += f", {symbol} = {row[name]}"
    return f"{label}, {row['variant']}" if row.get("variant") else label


def returns(rows: list[Row], environment: str) -> dict[str, dict[str, dict[int, float]]]:
    """Returns every 10,000 steps on a MuJoCo environment, by thousands of steps.

    By way to learn, and of each by seed (the longest run; of two, the newer): DrAC with fresh noise and M = 4, SAC as
    usual.
    """
    usual = {"num_action_samples": 4, "pairing": "all", "hold_steps": 1.0, "gamma": 0.99, "hidden_size": 256}
    usual |= {"diversity_mean": "geometric", "clip": "tanh", "target_entropy": "auto"}
    curves = {}
    for row in sorted(as_usual(select(rows, environment=environment), usual), key=started):
        label = way(row)
        labels = {label: "episodic_return_mean", f"{label}, its mean action": "deterministic_episodic_return_mean"}
        for name, column in labels.items():
            if column in row and int(row["global_step"]) % 10_000 == 0:
                curve = curves.setdefault(name, {}).setdefault((row["seed"], row["run"]), {})
                curve[int(row["global_step"]) // 1000] = float(row[column])
    for name, runs in curves.items():
        by_length = sorted(runs.items(), key=lambda item: max(item[1]))  # a stable sort
        curves[name] = {seed: curve for (seed, _), curve in by_length if max(curve) > 0}
    return {name: runs for name, runs in curves.items() if runs}


def mujoco_table(rows: list[Row]) -> str:
    """One line per environment, way to learn and length of a run: medians and ranges of all seeds that got there."""
    header = ["", "", "steps", "seeds", "last", "best", "mean action: last", "best", "1,000,000 steps: CleanRL", "zoo"]
    lines = []
    for environment in MUJOCO:
        ways = returns(rows, environment)
        for label in sorted(label for label in ways if "mean action" not in label):
            for steps in sorted(set(map(max, ways[label].values()))):
                seeds = sum(steps in curve for curve in ways[label].values())
                line = [environment, label, f"{1000 * steps:,}", str(seeds)]
                for runs in (ways[label], ways.get(f"{label}, its mean action", {})):
                    ends = [
                        {"last": curve[steps], "best": max(curve[step] for step in curve if 0 < step <= steps)}
                        for curve in runs.values()
                        if steps in curve
                    ]
                    line += [spread(ends, "last", 0), spread(ends, "best", 0)]
                lines.append([*line, CLEANRL.get(environment, "–"), ZOO.get(environment, "–")])
    return markdown(header, lines)


def noiseless_table(rows: list[Row]) -> str:
    """One line per MuJoCo task and way to learn: what noiseless.py measured of the policies, medians and ranges."""
    header = ["", "", "seeds", "return: fresh noise", "in its middle", "diversity, as a β", "beyond ±0.95"]
    columns = {"fresh": 0, "middle": 0, "diversity": 2, "saturated": 2}
    ways, groups, lines = {row["run"]: way(row) for row in rows if row["environment"] in MUJOCO}, {}, []
    for row in read("noiseless.csv"):
        if row["run"] in ways:  # in results.csv
            groups.setdefault((MUJOCO.index(row["environment"]), ways[row["run"]]), []).append(row)
    for (task, label), runs in sorted(groups.items()):
        runs = newest(runs)
        figures = [spread(runs, name, digits) for name, digits in columns.items()]
        lines.append([MUJOCO[task], label, str(len(runs)), *figures])
    return markdown(header, lines)


def levels_table(rows: list[Row], environment: str) -> str:
    """One line per algorithm and setting, medians and ranges over seeds; below it the hypervolumes."""
    header = ["", "seeds", "quality: mean return", "joints playable", "diversity: tiles that differ", "geometric mean"]
    header.append("from the same start")
    columns = {"episodic_return_mean": 1, "playable_rate": 3, "final_level_diversity": 0}
    columns |= {"final_level_diversity_geometric": 0, "final_level_diversity_same_start": 0}
    rows = at(last(select(rows, environment=environment, variant="", num_envs=16)), 400_000)
    groups, lines = {}, []
    for row in rows:
        setting = f"target entropy {row['target_entropy']}" if row["algorithm"] == "sac" else f"β = {row['beta']}"
        groups.setdefault(f"{LABELS[row['algorithm']]}, {setting}", []).append(row)
    groups = {label: newest(runs) for label, runs in sorted(groups.items())}
    rows = [row for runs in groups.values() for row in runs]
    for label, runs in groups.items():
        figures = [spread(runs, name, digits) for name, digits in columns.items()]
        lines.append([label, str(len(runs)), *figures])

    def points(runs: list[Row]) -> list[tuple[float, float]]:
        return [(float(row["episodic_return_mean"]), float(row["final_level_diversity"])) for row in runs]

    worst, areas = np.min(points(rows), axis=0), []
    for algorithm in ("drac_amort", "drac_diffus", "sac"):
        runs = select(rows, algorithm=algorithm)
        groups = {f"seed {seed}": select(runs, seed=seed) for seed in sorted({row["seed"] for row in runs})}
        groups[f"its {len(runs)} runs"] = runs
        for label, group in groups.items():
            if area := hypervolume(points(group), worst):
                areas.append(f"{LABELS[algorithm]}, {label} {area:,.0f}")
    area = f"Hypervolume above the worst of all runs (quality {worst[0]:.1f}, diversity {worst[1]:.0f}): "
    return markdown(header, lines) + f"\n\n{area}{'; '.join(areas)}."


def tables(rows: list[Row]) -> dict[str, str]:
    """The pages' tables by the name of their place."""
    mazes = {maze: ways_to_train(rows, environment) for maze, environment in MAZES.items()}

    def short(**settings: object) -> list[Row]:
        """DrAmort's run of 30,000 steps on the simple maze: seed 1 where no other is named."""
        settings = {**ONE_STEP, "seed": 1, **settings}
        return of_length(select(rows, algorithm="drac_amort", environment=SIMPLE, **settings), 30_000)

    fresh = of_length(select(rows, algorithm="drac_amort", environment=SIMPLE, **ONE_STEP), 100_000)
    before_and_after = {}
    for seed in (1, 2):
        before_and_after |= {f"seed {seed}, before": select(fresh, seed=seed), f"seed {seed}, after": short(seed=seed)}
    samples = {"M = 4, all pairs": short(), "M = 8, all pairs": short(num_action_samples=8)}
    samples["M = 17, disjoint pairs"] = short(num_action_samples=17, pairing="disjoint")
    diffus = select(rows, algorithm="drac_diffus", environment=SIMPLE, diffusion_steps=5, **ONE_STEP)
    clips = {f"`{clip}`": select(diffus, clip=clip, seed=1) for clip in ("hard", "tanh")}
    hard = one_step_runs(rows, HARD)
    disjoint = select(rows, environment=HARD, **ONE_STEP | {"num_action_samples": 17, "pairing": "disjoint"})
    at_60k = at(select(hard, hold_steps=1.0), 60_000) + at(last(disjoint), 60_000)
    paper = [row for ways in mazes.values() for row in ways[PAPER]]
    columns = ("algorithm", "hold_steps", "seed")
    groups = {f"{maze}: {label}": runs for maze, ways in mazes.items() for label, runs in ways.items()}
    shown = {label: mazes["hard"][label] for label in (UNIFORM, SAC, *SHOWN)}
    others = [f"{maze}: {label}" for maze in ("simple", "medium") for label in (UNIFORM, *SHOWN)]
    return {
        "ways, hard": groups_table(shown, brief=True),
        "ways, others": groups_table({label: groups[label] for label in others}, brief=True),
        "ways": groups_table(groups),
        "goals": goals_table(rows, mazes),
        "precision": precision_table(rows),
        "ablations": ablations_table(rows),
        "search for the defaults": defaults_search_table(),
        "seeds, DrAmort": seeds_table(rows, drac_amort),
        "seeds, DrDiffus": seeds_table(rows, drac_diffus),
        "simple": maze_table(marks(one_step_runs(rows, SIMPLE)), columns),
        "simple, 20k": maze_table(at(short(seed=1) + short(seed=2), 20_000), final=False),
        "paper": maze_table(paper, ("environment", "seed")),
        "medium": maze_table(marks(one_step_runs(rows, MEDIUM)), columns),
        "hard": maze_table(marks(hard), columns),
        "hard, 60k": maze_table(at_60k, ("num_action_samples", "seed"), final=False),
        "search": maze_table(
            last(select(rows, environment=HARD, hidden_size=128)), ("hold_steps", "gamma", "variant"), final=False
        ),
        "samples": success_table(samples),
        "mean": success_table({"geometric": short(), "arithmetic": short(diversity_mean="arithmetic")}),
        "before and after": success_table(before_and_after),
        "diffus": maze_table(last(select(diffus, clip="tanh")) + at(fresh, 60_000), ("algorithm", "seed")),
        "clip": success_table(clips),
        "mujoco": mujoco_table(rows),
        "noiseless": noiseless_table(rows),
        "levels, MultiFacet": levels_table(rows, "LevelGeneration-MultiFacet-v0"),
        "levels, Puzzle": levels_table(rows, "LevelGeneration-Puzzle-v0"),
    }


def fill(readme: str, blocks: dict[str, str]) -> str:
    """The text with each of the blocks that it has a place for, between two comments."""
    for name, text in blocks.items():
        if (start := f"<!-- results: {name} -->\n") in readme:
            before, after = readme.split(start)
            _, after = after.split("<!-- end -->", 1)
            readme = f"{before}{start}{text}\n\n<!-- end -->{after}"
    return readme


def plot_hard(rows: list[Row], file: Path) -> None:
    """Success, goals reached and multi-goal score against steps on the hard maze: a colour per setting."""
    figure = Figure(figsize=(11, 3.8), dpi=110, layout="constrained")
    panels, colours, dashes = figure.subplots(1, 3), {}, ("-", "--", ":")
    for end in last(one_step_runs(rows, HARD)):
        hold, seed = end.get("hold_steps"), end["seed"]
        noise = "" if hold is None else ", fresh noise" if hold == "1.0" else f", noise held for {hold} steps"
        label = LABELS[end["algorithm"]] + noise
        style = {"color": colours.setdefault(label, f"C{len(colours)}"), "linestyle": dashes[(int(seed) - 1) % 3]}
        curve = select(rows, run=end["run"])
        for axes, metric in zip(panels, ("success_rate", "reachable_modes", "multi_goal_score"), strict=True):
            values = [[int(row["global_step"]) / 1000, float(row[metric])] for row in curve]
            axes.plot(*zip(*values, strict=True), **style, label=f"{label}, seed {seed}")
            axes.set(xlabel="steps / 1000", title=metric.replace("_", " "))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(file)


def plot_mujoco(rows: list[Row], file: Path) -> None:
    """Returns of DrAmort and SAC against steps, a panel per task: mean over seeds, range, and what is longer."""
    colours = {"DrAmort, β = 0.5": "C0", "SAC": "C1", "SAC, its mean action": "C2"}
    figure = Figure(figsize=(12.6, 7.6), dpi=110, layout="constrained")
    panels = figure.subplots(2, 3).flat
    for environment, axes in zip(MUJOCO, panels, strict=True):
        ways = returns(rows, environment)
        for label, colour in colours.items():
            curves = ways[label].values()
            steps = sorted(set.intersection(*map(set, curves)))  # where all were evaluated
            values = np.array([[curve[step] for step in steps] for curve in curves])
            axes.plot(steps, values.mean(axis=0), color=colour, label=label)
            axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2)
            for curve in curves:
                rest = [step for step in curve if step >= steps[-1]]
                axes.plot(rest, [curve[step] for step in rest], "--", color=colour)  # of one seed alone
        counts = sorted({len(ways[label]) for label in colours})
        title = f"{environment}, seeds: {' to '.join(map(str, counts))}"
        axes.set(title=title, xlabel="steps / 1000", ylabel="mean return of 10 episodes")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(file)


def plot_actions(runs: tuple[Path, ...], file: Path) -> None:
    """2,000 actions of each run's policy at the start of its maze."""
    figure = Figure(figsize=(8, 4.2), dpi=110, layout="constrained")
    for run, axes in zip(runs, figure.subplots(1, len(runs)), strict=True):
        agent = load_agent(drac_amort, run)
        obs, _ = drac_amort.make(agent.args).reset(seed=0)
        torch.manual_seed(0)
        actions = drac_amort.act(agent.actor, np.tile(obs, (2000, 1)), agent.actor.sample_latents(1, 2000))
        axes.plot(*actions.T, ".", markersize=2, alpha=0.4)
        axes.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal", title=f"{agent.args.diversity_mean} mean")
    figure.savefig(file)


def main() -> None:
    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
    rows = read()
    for run in args.add:
        rows = add(rows, run.resolve(), args.variant)
    blocks = tables(rows)  # before anything is written: it raises if runs are not what a table expects
    plot_hard(rows, FOLDER / "hard_curves.png")
    plot_mujoco(rows, FOLDER / "mujoco.png")
    write(rows)
    if args.pictures:
        figure = Figure(figsize=(4 * len(args.pictures), 4.5), dpi=100, layout="constrained")
        for picture, axes in zip(args.pictures, figure.subplots(1, len(args.pictures), squeeze=False)[0], strict=True):
            title, _, file = picture.partition("=")
            axes.imshow(matplotlib.image.imread(file))
            axes.set_title(title, fontsize=13)
            axes.set_axis_off()
        figure.savefig(ROOT / "assets/hard.png", bbox_inches="tight")
    for run in args.policies:  # the actor alone: all that --evaluate needs
        model = torch.load(run / "model.pt", map_location="cpu", weights_only=True)
        model["weights"] = {name: weight for name, weight in model["weights"].items() if name.startswith("actor.")}
        model["config"] |= {"run_dir": "runs", "resume": None}  # no paths of this machine
        task, script = model["config"]["env_id"].split("-")[1].lower(), model["script"]
        paper = "_paper" if model["config"]["paper"] else ""
        torch.save(model, ROOT / f"assets/models/{task}_{script}{paper}.pt")
    if args.actions:
        plot_actions(args.actions, FOLDER / "actions.png")
    for page in PAGES:
        page.write_text(fill(page.read_text(), blocks))


if __name__ == "__main__":
    main()
