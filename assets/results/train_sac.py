"""The Gaussian baseline: Stable-Baselines3's SAC, evaluated by the same functions as DrAC.

    pip install stable-baselines3==2.9.2
    python assets/results/train_sac.py --env-id MultiGoalPointMaze-Hard-v0

All of Stable-Baselines3's defaults (networks, learning rates, batch, discount and tau are DrAC's too; the temperature
starts at 1 and has learning rate 3e-4), but for the target entropy, 1.0 as in the paper, and for updates from step 256
on (its actions are uniform until then, where DrAC's are the policy's from the first step). `--num-envs 16 --n-steps 5`
gives it the parallel environments and n-step targets of DrAC's defaults on mazes, `--hold-steps 20` their held noise,
too: in three of four environments the Gaussian's noise is held while data are collected, and the final trials are also
played with held noise. On MuJoCo, `--target-entropy auto --deterministic --evaluation-episodes 10` is
Stable-Baselines3's default, its mean action evaluated as well. The run leaves config.json, evaluations.csv,
summary.json, model.zip and, of mazes and levels, a picture.
"""

import csv
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO, Literal

import numpy as np
import torch
import tyro
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

sys.path.insert(0, str(Path(__file__).parents[2]))
from drac_amort import HeldLatents, make_env  # noqa: E402
from drac_runner import HELD_STEPS  # noqa: E402
from envs import evaluate_policy, final_trials  # noqa: E402


@dataclass
class Args:
    env_id: str = "MultiGoalPointMaze-Simple-v0"  # any that DrAC can be trained on
    seed: int = 1  # of the training; evaluation uses seed + 100
    total_timesteps: int = 100_000  # steps of all environments together
    num_envs: int = 1  # environments that step side by side, with one update after each of their steps
    n_steps: int = 1  # steps of reward in a target
    hold_steps: float = 1.0  # steps for which noise is held while data are collected (not in every 4th environment)
    target_entropy: float | Literal["auto"] = 1.0  # the temperature holds the policy's entropy there; auto: at -d
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # PyTorch's
    deterministic: bool = False  # evaluate the mean action, too
    evaluation_interval: int = 10_000  # steps between evaluations
    evaluation_episodes: int = 100  # episodes per evaluation, of the stochastic policy and of the mean action
    final_trials: int = 100  # groups of 5 episodes (mazes) or pairs of levels, at the end
    run_dir: str = "runs"  # folder that gets one sub-folder per run


class GaussianPolicy:
    """The actor of SAC as DrAC's are played: a function of obs and starts (see HeldLatents) whose noise may be held."""

    def __init__(self, sac: SAC, hold_steps: float | list[float]) -> None:
        self.sac, size = sac, sac.action_space.shape[0]
        latents = SimpleNamespace(fc1=sac.actor.mu, sample_latents=lambda m, n, _: torch.randn(m, n, size))
        self.noise = HeldLatents(latents, hold_steps)

    @torch.no_grad()
    def __call__(self, obs: np.ndarray, starts: np.ndarray) -> np.ndarray:
        mean, log_std, _ = self.sac.actor.get_action_dist_params(torch.as_tensor(obs, dtype=torch.float32))
        return torch.tanh(mean + log_std.exp() * self.noise(starts)[0]).numpy()


class HeldSAC(SAC):
    """SAC, but for the noise with which it collects data."""

    collector: GaussianPolicy
    starts: np.ndarray  # of episodes; Stable-Baselines3 does not note them here

    def _sample_action(self, learning_starts: int, *args: object, **kwargs: object) -> tuple[np.ndarray, np.ndarray]:
        if self.num_timesteps < learning_starts:
            return super()._sample_action(learning_starts, *args, **kwargs)
        actions = self.collector(self._last_obs, self.starts)
        return actions, actions  # what is played and what is stored: make_env has rescaled them

    def _store_transition(self, *args: object) -> None:
        *_, self.starts, _ = args  # buffer, actions, observations, rewards, ends, infos
        super()._store_transition(*args)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "collector"]


class Evaluation(BaseCallback):
    def __init__(self, args: Args, run: Path) -> None:
        super().__init__()
        self.args, self.run, self.start = args, run, time.perf_counter()

    def evaluate(self) -> None:
        args, seed = self.args, self.args.seed + 100
        state = torch.get_rng_state()
        torch.manual_seed(seed)

        def fresh(obs: np.ndarray, starts: np.ndarray, deterministic: bool = False) -> np.ndarray:
            return self.model.predict(obs, deterministic=deterministic)[0]

        def write(name: str, content: Callable[[BinaryIO], object]) -> None:
            with (self.run / name).open("wb") as stream:
                content(stream)

        make = partial(make_env, args.env_id)
        row = {"global_step": self.num_timesteps}
        row |= evaluate_policy(fresh, make, args.evaluation_episodes, seed, write)
        if args.deterministic:
            means = evaluate_policy(partial(fresh, deterministic=True), make, args.evaluation_episodes, seed)
            row |= {f"deterministic_{name}": value for name, value in means.items()}
        row["ent_coef"] = self.model.log_ent_coef.exp().item()
        with (self.run / "evaluations.csv").open("a", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerows([row, row.values()] if file.tell() == 0 else [row.values()])
        if self.num_timesteps >= args.total_timesteps:
            policies = {"final": fresh}
            if args.hold_steps > 1:
                policies["final_held"] = GaussianPolicy(self.model, HELD_STEPS)
            for prefix, policy in policies.items():
                trials = final_trials(policy, make, args.final_trials, seed)
                row |= {f"{prefix}_{name}": value for name, value in trials.items()}
            row["minutes"] = (time.perf_counter() - self.start) / 60
            (self.run / "summary.json").write_text(json.dumps(row, indent=2) + "\n")
        torch.set_rng_state(state)

    def _on_training_start(self) -> None:
        self.evaluate()

    def _on_step(self) -> bool:
        due = self.num_timesteps % self.args.evaluation_interval < self.args.num_envs
        if due or self.num_timesteps >= self.args.total_timesteps:
            self.model.save(self.run / "model.zip")
            self.evaluate()
        return True


def main() -> None:
    args = tyro.cli(Args, description=__doc__.split("\n\n")[0])
    torch.set_float32_matmul_precision(args.matmul_precision)
    settings = {"learning_starts": 256, "target_entropy": args.target_entropy, "device": "cpu", "seed": args.seed}
    counts = args.total_timesteps, args.num_envs, args.n_steps, args.evaluation_interval, args.evaluation_episodes
    if min(*counts, args.hold_steps) < 1 or min(args.seed, args.final_trials) < 0:
        raise SystemExit("error: steps, environments and evaluation's numbers must be at least 1, others not negative")
    try:
        envs = DummyVecEnv(args.num_envs * [partial(make_env, args.env_id)])
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    now = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6}"
    run = Path(args.run_dir, f"{args.env_id}__sac__{args.seed}__{now}")
    run.mkdir(parents=True)
    settings |= {"n_steps": args.n_steps, "train_freq": 1, "gradient_steps": 1}
    sac = HeldSAC("MlpPolicy", envs, **settings) if args.hold_steps > 1 else SAC("MlpPolicy", envs, **settings)
    if args.hold_steps > 1:
        sac.collector = GaussianPolicy(sac, [1.0 if i % 4 == 3 else args.hold_steps for i in range(args.num_envs)])
    config = {
        **asdict(args),
        "gamma": sac.gamma,
        "hidden_size": 256,
        "versions": {"stable_baselines3": version("stable-baselines3")},
    }
    (run / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    sac.learn(args.total_timesteps, Evaluation(args, run))
    print(f"files in {run}")


if __name__ == "__main__":
    main()
