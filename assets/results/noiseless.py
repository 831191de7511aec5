"""MuJoCo policies played with their noise in its middle, and what their actions are like: rows in noiseless.csv.

    python assets/results/noiseless.py runs/<run> ...

The middle is z = 1/2 for DrAmort, 0 for DrDiffus, and SAC's mean action (its models need stable-baselines3).
`diversity` is the geometric mean distance of two actions of a state, over sqrt(d), as beta is, and `saturated` the
share of coordinates beyond +-0.95, both with fresh noise in the states that the policy visits. 10 episodes each way.
"""

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
from plot_results import load_agent, read, write  # noqa: E402

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
    if algorithm == "sac":
        from stable_baselines3 import SAC

        model = SAC.load(run / "model.zip", device="cpu")
        make = partial(drac_amort.make_env, environment)

        def act(obs: np.ndarray, middle: bool = False) -> np.ndarray:
            return model.predict(obs, deterministic=middle)[0]
    else:
        script, value = {"drac_amort": (drac_amort, 0.5), "drac_diffus": (drac_diffus, 0.0)}[algorithm]
        agent = load_agent(script, run)
        make = partial(script.make, agent.args)

        def act(obs: np.ndarray, middle: bool = False) -> np.ndarray:
            latents = agent.actor.sample_latents(1, len(obs))
            return script.act(agent.actor, obs, torch.full_like(latents, value) if middle else latents)

    torch.manual_seed(0)
    row = {"run": run.name, "environment": environment, "algorithm": algorithm, "seed": seed}
    row["fresh"], states = play(act, make)
    row["middle"], _ = play(partial(act, middle=True), make)
    first, second = (torch.as_tensor(act(states)) for _ in range(2))
    distances = torch.linalg.vector_norm(first - second, dim=1) + 1e-5
    row["diversity"] = (distances.log().mean().exp() / math.sqrt(first.shape[1])).item()
    row["saturated"] = (first.abs() > 0.95).float().mean().item()
    return row


def main() -> None:
    runner.keep_mujocos_warnings()  # or MuJoCo writes them to a file here
    rows = {row["run"]: row for row in read("noiseless.csv")}
    for run in map(Path, sys.argv[1:]):
        rows[run.name] = measure(run)
        print(rows[run.name], flush=True)
        write(list(rows.values()), "noiseless.csv")


if __name__ == "__main__":
    main()
