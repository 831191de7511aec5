"""Level generation: what a distance between latents is worth in tiles, and the figures of quality against diversity.

    python assets/results/plot_results.py --add runs/<run> ...  # first: rows in results.csv
    python assets/results/plot_levels.py --add runs/<run> ...   # measure policies: rows in level_policies.csv
    python assets/results/plot_levels.py                        # draw level_distances.png and level_tradeoff.png
    python assets/results/plot_levels.py --draw runs/<run> ...  # levels of each run's policy, in assets/levels.png

A policy is measured in the states of 20 episodes: 8 actions of each of 400 states, pair by pair. SAC's models need
stable-baselines3.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parents[1]))
from plot_results import LABELS, Row, last, load_agent, read, write  # noqa: E402

import drac_amort  # noqa: E402
import drac_diffus  # noqa: E402
from envs import LATENT_DIM, LevelGeneration, generate_levels, level_image, play_episodes  # noqa: E402

STATES, ACTIONS, EPISODES = 400, 8, 20
STYLES = ("MultiFacet", "Puzzle")
MARKERS = {"drac_amort": "o", "drac_diffus": "s", "sac": "^"}
COLOURS = {"0.2": "#0072B2", "0.5": "#009E73", "0.8": "#D55E00"}  # by beta
COLOURS |= {"-20.0": "#56B4E9", "-5.0": "#E69F00", "10.0": "#CC79A7"}  # by SAC's target entropy


@dataclass
class Args:
    add: tuple[Path, ...] = ()  # folders of runs, whose policies are measured
    draw: tuple[Path, ...] = ()  # folders of runs, of whose policies four levels each are drawn, all from one start


def distances(generator: torch.nn.Module, actions: np.ndarray) -> tuple[float, float]:
    """Between the actions (K, S, 20) of one state each: the geometric mean of latent distances as a beta, and tiles."""
    tiles = generator.decode(actions.reshape(-1, LATENT_DIM)).reshape(*actions.shape[:2], -1)
    pairs = [(i, j) for i in range(len(actions)) for j in range(i)]
    latent = np.array([np.linalg.norm(actions[i] - actions[j], axis=-1) for i, j in pairs])
    differing = np.mean([(tiles[i] != tiles[j]).sum(axis=-1) for i, j in pairs])
    return float(np.exp(np.log(latent + 1e-5).mean()) / LATENT_DIM**0.5), float(differing)


def load_policy(run: Path, algorithm: str) -> Callable[[np.ndarray], np.ndarray]:
    """The stochastic policy of a run: observations (N, 100) to actions (N, 20)."""
    if algorithm == "sac":
        from stable_baselines3 import SAC

        model = SAC.load(run / "model.zip", device="cpu")
        return lambda obs: model.predict(obs, deterministic=False)[0]
    script = {"drac_amort": drac_amort, "drac_diffus": drac_diffus}[algorithm]
    agent = load_agent(script, run)
    if agent.args.env_kwargs != "{}":  # another generator: these figures are of the project's own
        raise SystemExit(f"error: {run} has env_kwargs {agent.args.env_kwargs}")
    return lambda obs: script.act(agent.actor, obs, agent.actor.sample_latents(1, len(obs)))


def measure(run: Path) -> dict[str, str | float]:
    """What a policy does with its latents."""
    environment, algorithm = run.name.split("__")[:2]
    style = environment.split("-")[1]
    policy = load_policy(run, algorithm)
    torch.manual_seed(0)
    seen = []
    make = partial(drac_amort.make_env, environment, max_episode_steps=STATES // EPISODES)
    play_episodes(lambda obs, starts: seen.append(obs) or policy(obs), [make() for _ in range(EPISODES)], EPISODES, 0)
    actions = np.stack([policy(np.concatenate(seen)) for _ in range(ACTIONS)])  # (K, S, 20)
    latent, tiles = distances(LevelGeneration().generator, actions)
    row = {"run": run.name, "algorithm": algorithm, "style": style, "latent_distance": latent, "tiles": tiles}
    row["beyond_0.95"] = float((np.abs(actions) > 0.95).mean())  # the share of coordinates near a bound
    return row


def references() -> dict[str, np.ndarray]:
    """Latent distance (as a beta) and tiles of pairs that no policy chose: curves (points, 2)."""
    generator, rng = LevelGeneration().generator, np.random.default_rng(0)

    def corners(flips: int) -> np.ndarray:
        base = rng.choice([-1.0, 1.0], (STATES, LATENT_DIM))
        signs = np.where(rng.random((STATES, LATENT_DIM)).argsort(axis=1) < flips, -1.0, 1.0)
        return np.stack([base, base * signs])

    def uniform(share: float) -> np.ndarray:
        first, second = rng.uniform(-1, 1, (2, STATES, LATENT_DIM))
        return np.stack([first, first + share * (second - first)])

    flipped = [distances(generator, corners(flips)) for flips in range(1, 11)]
    apart = [distances(generator, uniform(share)) for share in np.arange(0.1, 1.01, 0.1)]
    return {"corners, 1 to 10 signs flipped": np.array(flipped), "uniform latents, apart by a share": np.array(apart)}


def mark(axes: Axes, x: float, y: float, algorithm: str, setting: str) -> None:
    """A run's point, named in the legend if it is the first of its kind."""
    label = f"{LABELS[algorithm]}, {'target entropy' if algorithm == 'sac' else 'β'} {setting}"
    known = label in axes.get_legend_handles_labels()[1]
    style = {"color": COLOURS.get(setting, "black"), "marker": MARKERS[algorithm], "linestyle": "none", "markersize": 8}
    axes.plot(x, y, **style, label=None if known else label)


def sorted_legend(axes: Axes) -> tuple[list, list[str]]:
    """Handles and labels by the alphabet of the labels."""
    handles, labels = axes.get_legend_handles_labels()
    order = np.argsort(labels)
    return [handles[i] for i in order], [labels[i] for i in order]


def plot_distances(rows: list[Row], setting: dict[str, str], file: Path) -> None:
    """Tiles against latent distance: policies as points, pairs that no policy chose as lines."""
    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    curves = references()
    for style, axes in zip(STYLES, figure.subplots(1, 2, sharey=True), strict=True):
        for (name, points), line in zip(curves.items(), ("-", "--"), strict=True):
            axes.plot(*points.T, f"k{line}", linewidth=1, label=name)
        for row in rows:
            if row["style"] == style:
                mark(axes, float(row["latent_distance"]), float(row["tiles"]), row["algorithm"], setting[row["run"]])
        axes.set(
            xlabel="latent distance of two actions of a state / √20", ylabel="tiles of 256 that differ", title=style
        )
    axes.legend(*sorted_legend(axes), fontsize=7)
    figure.savefig(file)


def plot_tradeoff(rows: list[Row], setting: dict[str, str], file: Path) -> None:
    """Quality against diversity, a point per run: from different starts, and from the same."""
    figure = Figure(figsize=(10, 7.4), dpi=110, layout="constrained")
    panels = figure.subplots(2, 2, sharex="col")
    for style, column in zip(STYLES, panels.T, strict=True):
        for kind, name, axes in zip(("", "_same_start"), ("different starts", "the same start"), column, strict=True):
            for row in rows:
                if row["environment"].split("-")[1] == style:
                    quality, diversity = float(row["episodic_return_mean"]), float(row[f"final_level_diversity{kind}"])
                    mark(axes, quality, diversity, row["algorithm"], setting[row["run"]])
            axes.set(title=f"{style}, levels from {name}", ylabel="diversity: tiles of 5,376 that differ")
        axes.set_xlabel("quality: mean return of 30 episodes")
    handles, labels = sorted_legend(panels[0, 0])
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(file)


def draw_levels(runs: list[Path], setting: dict[str, str], file: Path) -> None:
    """Four levels of each policy, all from the same start."""
    figure = Figure(figsize=(14, 3.2 * len(runs)), dpi=100, layout="constrained")
    for run, part in zip(runs, np.atleast_1d(figure.subfigures(len(runs))), strict=True):
        environment, algorithm = run.name.split("__")[:2]
        policy = load_policy(run, algorithm)
        torch.manual_seed(0)
        make = partial(drac_amort.make_env, environment)
        way = f"{LABELS[algorithm]}, {'target entropy' if algorithm == 'sac' else 'β'} = {setting[run.name]}"
        part.suptitle(f"{environment.split('-')[1]}, {way}: four levels from one start", fontsize=13)
        for axes in part.subplots(4):
            axes.imshow(level_image(generate_levels(lambda obs, starts, policy=policy: policy(obs), make, 1, 1)[0]))
            axes.set_axis_off()
    figure.savefig(file)


def main() -> None:
    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
    add, draw = ([run.resolve() for run in runs] for runs in (args.add, args.draw))
    rows = {row["run"]: row for row in read("level_policies.csv")}
    rows |= {run.name: measure(run) for run in add}
    write(list(rows.values()), "level_policies.csv")
    runs = [row for row in last(read()) if row["environment"].startswith("LevelGeneration") and row["run"] in rows]
    setting = {row["run"]: row.get("target_entropy") or row["beta"] for row in runs}
    if missing := {run.name for run in (*add, *draw)} - set(setting):
        raise SystemExit(
            f"error: {', '.join(missing)}: not in results.csv (plot_results.py --add) or level_policies.csv"
        )
    if draw:
        draw_levels(draw, setting, FOLDER.parent / "levels.png")
    plot_distances([row for row in rows.values() if row["run"] in setting], setting, FOLDER / "level_distances.png")
    plot_tradeoff(runs, setting, FOLDER / "level_tradeoff.png")


if __name__ == "__main__":
    main()
