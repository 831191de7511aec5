"""MuJoCo policies played with their noise in its middle, and what their actions are like: rows in noiseless.csv.

    python assets/results/noiseless.py runs/<run> ...

The middle is z = 1/2 for DrAmort, 0 for DrDiffus, and SAC's mean action (its models need stable-baselines3).
`diversity` is the geometric mean distance of two actions of a state, over sqrt(d), as beta is, and `saturated` the
share of coordinates beyond +-0.95, both with fresh noise in the states that the policy visits. 10 episodes each way.
"""

import csv
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parents[1]))
import drac_amort  # noqa: E402
import drac_diffus  # noqa: E402
import drac_runner as runner  # noqa: E402
from envs import play_episodes  # noqa: E402

EPISODES, SEED = 10, 101


def play(act: Callable[[np.ndarray], np.ndarray], make: Callable[[], gym.Env]) -> tuple[float, np.ndarray]:
    """The mean return of the episodes, and all states that they visit."""
    seen, envs = [], [make() for _ in range(EPISODES)]
    episodes = play_episodes(lambda obs, starts: seen.append(obs) or act(obs), envs, EPISODES, SEED)
    lengths = np.array([len(episode.infos) - 1 for episode in episodes])
    states = np.concatenate([obs[lengths > step] for step, obs in enumerate(seen)])  # of episodes that go on
    return float(np.mean([episode.episodic_return for episode in episodes])), states


def measure(run: Path) -> dict[str, str | float]:
    """The row of a run."""
    environment, algorithm, seed, _ = run.name.split("__")
    make = partial(drac_amort.make_env, environment)
    if algorithm == "sac":
        from stable_baselines3 import SAC

        model = SAC.load(run / "model.zip", device="cpu")
        fresh, middle = (partial(model.predict, deterministic=mean) for mean in (False, True))
        fresh, middle = (lambda obs, act=act: act(obs)[0] for act in (fresh, middle))
    else:
        script, value = {"drac_amort": (drac_amort, 0.5), "drac_diffus": (drac_diffus, 0.0)}[algorithm]
        model = runner.load(script, run / "model.pt")
        make = partial(script.make, model["config"])
        agent = script.DrAC(
            model["config"], *make().observation_space.shape, *make().action_space.shape, torch.device("cpu")
        )
        agent.load_state_dict(model["weights"])
        draw = partial(agent.actor.sample_latents, 1)
        fresh = lambda obs: script.act(agent.actor, obs, draw(len(obs)))  # noqa: E731
        middle = lambda obs: script.act(agent.actor, obs, torch.full_like(draw(len(obs)), value))  # noqa: E731

    torch.manual_seed(0)
    row = {"run": run.name, "environment": environment, "algorithm": algorithm, "seed": seed}
    row["fresh"], states = play(fresh, make)
    row["middle"], _ = play(middle, make)
    first, second = (torch.as_tensor(fresh(states)) for _ in range(2))
    distances = torch.linalg.vector_norm(first - second, dim=1) + 1e-5
    row["diversity"] = (distances.log().mean().exp() / math.sqrt(first.shape[1])).item()
    row["saturated"] = (first.abs() > 0.95).float().mean().item()
    return row


def main() -> None:
    runner.keep_mujocos_warnings()  # or MuJoCo writes them to a file here
    table = FOLDER / "noiseless.csv"
    rows = {row["run"]: row for row in csv.DictReader(table.read_text().splitlines())} if table.exists() else {}
    for run in map(Path, sys.argv[1:]):
        rows[run.name] = measure(run)
        print(rows[run.name], flush=True)
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[run.name]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows.values())


if __name__ == "__main__":
    main()
