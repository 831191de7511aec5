"""What an actor knows, and what fresh noise shows of it: mazes played with noise held for 1 to 40 steps.

python assets/results/plot_hold.py --add runs/<run> ...   # play trained policies: rows in hold.csv, 200 episodes each
python assets/results/plot_hold.py                        # draw hold.png
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parents[1]))
from plot_results import load_agent, read, write  # noqa: E402

import drac_amort  # noqa: E402
from envs import evaluate_policy  # noqa: E402

HOLDS, EPISODES = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0), 200
METRICS = ("multi_goal_score", "success_rate", "reachable_modes")  # the last one is not drawn


@dataclass
class Args:
    add: tuple[Path, ...] = ()  # folders of DrAmort's runs on mazes


def play(run: Path) -> list[dict[str, str | float]]:
    """One row per hold."""
    agent = load_agent(drac_amort, run)
    rows = []
    for hold in HOLDS:
        policy = drac_amort.make_policy(agent, hold)
        metrics = evaluate_policy(policy, partial(drac_amort.make, agent.args), EPISODES, seed=0)  # mazes draw nothing
        row = {"run": run.name, "maze": run.name.split("-")[1].lower(), "hold_steps": hold}
        rows.append(row | {name: metrics[name] for name in METRICS})
    return rows


def main() -> None:
    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
    rows = read("hold.csv")
    for run in map(Path.resolve, args.add):
        rows = [row for row in rows if row["run"] != run.name] + play(run)
    write(rows, "hold.csv")
    figure = Figure(figsize=(11, 5.4), dpi=100, layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey="row")
    for maze, column in zip(("simple", "medium", "hard"), panels.T, strict=True):
        for metric, axes in zip(METRICS, column, strict=False):
            runs = {row["run"] for row in rows if row["maze"] == maze}
            values = [[float(row[metric]) for row in rows if row["run"] == run] for run in sorted(runs)]
            for line in values:
                axes.plot(HOLDS, line, color="#0072B2", alpha=0.3, linewidth=1)
            axes.plot(HOLDS, np.median(values, axis=0), color="#0072B2", marker="o", linewidth=2)
            axes.set(xscale="log", xticks=HOLDS, xticklabels=[f"{hold:g}" for hold in HOLDS])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        column[0].set_title(f"{maze} maze, {len(values)} seeds")
        column[-1].set_xlabel("noise held for so many steps when acting")
    for metric, axes in zip(METRICS, panels[:, 0], strict=False):
        axes.set_ylabel(metric.replace("_", " "))
    figure.savefig(FOLDER / "hold.png")


if __name__ == "__main__":
    main()
