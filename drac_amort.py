"""DrAmort: a multimodal policy for continuous control, trained by DrAC, the Diversity-regularized Actor-Critic.

A Gaussian actor learns one way to solve a task. DrAC's actors are free-form functions of state and noise, and learn
many. Such an actor has no tractable density, hence no entropy to regularize. DrAC makes do with samples:
  1. the actor ascends Q through its sampled actions f(s, z): the reparameterization gradient;
  2. diversity, the log of the geometric mean distance between pairs of actions, is rewarded in place of entropy;
  3. a learned temperature holds the diversity at a target.
The rest is SAC's. In this file the actor is *amortized*: one pass of an MLP turns state and noise into an action.

    python drac_amort.py                                 # several goals of a maze
    python drac_amort.py --env-id Walker2d-v4 --cuda     # MuJoCo, on a GPU

Source: Wang, Liu, Pan, "Learning Intractable Multimodal Policies with Reparameterization and Diversity Regularization",
NeurIPS 2025, https://arxiv.org/abs/2511.01374. Its symbols and their names here:

    s, a, r, s'   obs, actions, rewards, next_obs; the actions are scaled to [-1, 1]^d
    f(s, z)       actor(obs, latents), M = num_action_samples actions for each of B = batch_size states
    Q_i, Q'_i     qf, qf_target: both networks, and their slowly moving copies
    D(s), D^      diversity, and target_diversity, which beta sets; alpha is the temperature
"""

import copy
import csv
import json
import math
import os
import shlex
import signal
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs import evaluate_policy, final_trials, make_env

# The paper's settings for its environments. All others take those of Args.
MUJOCO = ("Ant-v4", "HalfCheetah-v4", "Hopper-v4", "Humanoid-v4", "Swimmer-v4", "Walker2d-v4")
LEVELS = ("LevelGeneration-MultiFacet-v0", "LevelGeneration-Puzzle-v0")
DEFAULTS = {
    "MultiGoalPointMaze-Simple-v0": dict(total_timesteps=100_000, beta=0.8, evaluation_episodes=100),
    "MultiGoalPointMaze-Medium-v0": dict(total_timesteps=200_000, beta=0.8, evaluation_episodes=100),
    "MultiGoalPointMaze-Hard-v0": dict(total_timesteps=300_000, beta=0.8, evaluation_episodes=100),
    **dict.fromkeys(LEVELS, dict(total_timesteps=500_000, beta=0.5, evaluation_episodes=30, final_trials=150)),
    **dict.fromkeys(MUJOCO, dict(total_timesteps=1_000_000, beta=0.5, evaluation_episodes=10)),
}

SCRIPT = Path(__file__).stem
FILE_FORMAT = 1  # of model.pt and checkpoint.pt
RESUMABLE = ["resume", "cuda", "cudagraphs", "matmul_precision", "total_timesteps"]  # the flags --resume may change
RESUMABLE += ["checkpoint_interval", "evaluation_interval", "evaluation_episodes", "final_trials"]
LOG_INTERVAL = 500  # steps between two looks at the losses, each of which waits for a GPU
DISTANCE_EPSILON = 1e-5  # keeps log-distances and their gradients finite where two actions coincide


@dataclass
class Args:
    env_id: str = "MultiGoalPointMaze-Simple-v0"  # any Gymnasium id with flat observations and bounded actions
    seed: int = 1  # seed of the networks, the training environment and the exploration; evaluation uses seed + 100
    cuda: bool = False  # train on a CUDA GPU
    cudagraphs: bool = False  # with --cuda: replay update and acting as CUDA graphs, free of Python's overhead
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of float32: high allows TF32, medium bfloat16
    run_dir: str = "runs"  # folder that gets one sub-folder per run
    evaluate: str | None = None  # a model.pt to evaluate instead of training; it brings environment and network
    resume: str | None = None  # a run's folder to continue in; total-timesteps may grow, evaluations and device change
    total_timesteps: int = 1_000_000  # environment steps; the default is the paper's for its environments
    beta: float = 0.2  # target diversity, a fraction of sqrt(action dimensions); again the default is the paper's
    num_action_samples: int = 4  # M, the actions sampled per state to estimate the diversity; cost grows in proportion
    pairing: Literal["all", "disjoint"] = "all"  # use all M(M-1)/2 pairs, or M/2 disjoint ones (the paper: M = 17)
    diversity_mean: Literal["geometric", "arithmetic"] = "geometric"  # of the distances; the other is an ablation
    z_dim: int = 16  # dimensions of the actor's uniform noise
    hidden_size: int = 256  # width of the two hidden layers, actor and critics
    actor_lr: float = 3e-4  # learning rate of the actor
    critic_lr: float = 3e-4  # learning rate of the critics
    alpha_lr: float = 5e-3  # learning rate of the diversity temperature
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # share of the critics that enters their targets at every update
    batch_size: int = 256  # transitions per update
    buffer_size: int = 1_000_000  # transitions kept for replay
    latent_hold: float = 1.0  # probability per step that the policy that collects data redraws its noise; the paper: 1
    learning_starts: int = 256  # updates begin after this many steps
    updates_per_step: int = 1  # updates per environment step
    checkpoint_interval: int = 50_000  # steps between checkpoints, if episodes end in time; 0: only when interrupted
    evaluation_interval: int = 5_000  # steps between evaluations, first and last included; 0: none, and no final trials
    evaluation_episodes: int = 10  # episodes per evaluation; the default is 100 on mazes, 30 in level generation
    final_trials: int = 100  # groups of 5 episodes (mazes) or pairs of levels for the paper's final tests; 0: none


class Actor(nn.Module):
    """The amortized actor, a = f(s, z) = tanh(MLP([s, z])) with z ~ U[0, 1]^z_dim."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_size: int, z_dim: int) -> None:
        super().__init__()
        self.z_dim = z_dim
        self.fc1 = nn.Linear(obs_dim + z_dim, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)
        self.fc3 = nn.Linear(hidden_size, action_dim)

    def sample_latents(self, num_samples: int, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw all the noise of (num_samples, batch_size) actions: (M, B, z_dim)."""
        return torch.rand(num_samples, batch_size, self.z_dim, device=self.fc1.weight.device, generator=generator)

    def forward(self, obs: Tensor, latents: Tensor) -> Tensor:
        """Map obs (B, obs_dim) and latents (M, B, z_dim) to M actions per state: (M, B, action_dim) in [-1, 1]."""
        # fc1 on [s, z] is a sum over s and z: the share of s is the same for all samples, and computed once.
        w_obs, w_latents = self.fc1.weight.split([obs.shape[-1], self.z_dim], dim=1)
        x = F.relu_(F.linear(latents, w_latents) + F.linear(obs, w_obs, self.fc1.bias))
        x = F.relu_(self.fc2(x.flatten(0, 1)))
        return torch.tanh(self.fc3(x)).unflatten(0, latents.shape[:2])


class TwinQ(nn.Module):
    """Two independent Q networks, stacked: each layer of both is one batched matrix product."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in ((obs_dim + action_dim, hidden_size), (hidden_size, hidden_size), (hidden_size, 1)):
            bound = fan_in**-0.5  # nn.Linear's own initialization
            self.weights.append(torch.empty(2, fan_in, fan_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(2, 1, fan_out).uniform_(-bound, bound))

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Map obs (B, obs_dim) and actions (B, action_dim) to both values: (2, B)."""
        x = torch.cat([obs, actions], dim=-1).expand(2, -1, -1)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = F.relu_(torch.baddbmm(bias, x, weight))
        return torch.baddbmm(self.biases[-1], x, self.weights[-1]).squeeze(-1)


Batch = namedtuple("Batch", ["obs", "actions", "rewards", "next_obs", "terminations"])


class ReplayBuffer:
    """A ring of transitions on the training device, one row each: one copy to store, one gather to sample."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device) -> None:
        self.columns = [obs_dim, action_dim, 1, obs_dim, 1]
        self.rows = torch.empty(capacity, sum(self.columns), device=device)
        self.position, self.size = 0, torch.zeros((), dtype=torch.int64, device=device)

    def add(self, obs: np.ndarray, action: np.ndarray, reward: float, next_obs: np.ndarray, terminated: bool) -> None:
        """Store one transition over the oldest. An episode cut by its time limit is not `terminated`: it bootstraps."""
        row = np.concatenate([obs, action, [reward], next_obs, [terminated]], dtype=np.float32)
        self.rows[self.position] = torch.from_numpy(row)
        self.position = (self.position + 1) % len(self.rows)
        self.size.add_(1).clamp_(max=len(self.rows))

    def sample(self, batch_size: int) -> Batch:
        """Draw B transitions uniformly: obs and next_obs (B, obs_dim), actions (B, action_dim), the others (B,)."""
        # Modulo a tensor: a replayed CUDA graph sees the buffer grow.
        indices = torch.randint(2**62, (batch_size,), device=self.rows.device) % self.size
        obs, actions, rewards, next_obs, terminations = self.rows[indices].split(self.columns, dim=1)
        return Batch(obs, actions, rewards.squeeze(1), next_obs, terminations.squeeze(1))


def pairwise_diversity(actions: Tensor, pairing: str = "all", mean: str = "geometric") -> Tensor:
    """Estimate D(s) = E[log |x - y|], x and y independent actions of the policy at s, without bias.

    Maps actions (M, B, action_dim) to (B,), averaging over all M(M-1)/2 pairs (a U-statistic), or over M//2 disjoint
    ones. Tight clusters, however far apart, cost this mean of logs dearly; the ablation's "arithmetic" one, little.
    """
    if pairing == "all":
        differences = torch.cat([actions[i + 1 :] - actions[i] for i in range(len(actions) - 1)])
    else:
        half = len(actions) // 2  # of the paper's 17 actions, the last is in no pair and serves Q alone
        differences = actions[:half] - actions[half : 2 * half]
    squared_distances = differences.square().sum(dim=-1) + DISTANCE_EPSILON**2  # (pairs, B)
    return 0.5 * squared_distances.log().mean(dim=0) if mean == "geometric" else squared_distances.sqrt().mean(dim=0)


class DrAC(nn.Module):
    """Actor, critics and temperature, and the update that trains them."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device) -> None:
        super().__init__()
        self.args = args
        self.diversity = partial(pairwise_diversity, pairing=args.pairing, mean=args.diversity_mean)
        self.actor = Actor(obs_dim, action_dim, args.hidden_size, args.z_dim)
        self.qf = TwinQ(obs_dim, action_dim, args.hidden_size)
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.raw_alpha = nn.Parameter(torch.zeros(()))
        self.to(device)
        adam = partial(torch.optim.Adam, fused=True, capturable=True)  # capturable: it may be part of a CUDA graph
        self.actor_optimizer = adam(self.actor.parameters(), lr=args.actor_lr)
        self.qf_optimizer = adam(self.qf.parameters(), lr=args.critic_lr)
        self.alpha_optimizer = adam([self.raw_alpha], lr=args.alpha_lr)
        self.optimizers = [self.actor_optimizer, self.qf_optimizer, self.alpha_optimizer]
        target_distance = args.beta * math.sqrt(action_dim)
        self.target_diversity = math.log(target_distance) if args.diversity_mean == "geometric" else target_distance

    def alpha(self) -> Tensor:
        """The temperature: exp(w) for w < 0 and 1 + w for w >= 0, so that it is positive and grows linearly."""
        return 1 + F.elu(self.raw_alpha)

    @torch.inference_mode()
    def act(self, obs: np.ndarray, latents: Tensor | None = None, actor: Callable | None = None) -> np.ndarray:
        """Map observations (N, obs_dim), and latents or fresh noise, to actions (N, action_dim), without gradients.

        `actor` is a CUDA graph of the actor, if there is one.
        """
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.raw_alpha.device)
        latents = self.actor.sample_latents(1, len(obs)) if latents is None else latents
        return (actor or self.actor)(obs, latents)[0].cpu().numpy()

    def critic_loss(self, batch: Batch, latents: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """y = r + gamma (1 - terminated) [min_i Q'_i(s', a') + alpha D(s')];  L = sum_i mean (Q_i(s, a) - y)^2."""
        with torch.no_grad():
            next_actions = self.actor(batch.next_obs, latents)
            next_values = self.qf_target(batch.next_obs, next_actions[-1]).amin(dim=0)
            next_values += self.alpha() * self.diversity(next_actions)
            targets = batch.rewards + self.args.gamma * (1 - batch.terminations) * next_values
        values = self.qf(batch.obs, batch.actions)  # (2, B)
        loss = (values - targets).square().mean(dim=1).sum()
        return loss, {"qf_loss": loss.detach(), "qf_values": values.detach().mean()}

    def actor_loss(self, obs: Tensor, latents: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L = -mean [min_i Q_i(s, f(s, z)) + alpha D(s)], f(s, z) one of D's actions; gradients flow through all."""
        actions = self.actor(obs, latents)
        diversity = self.diversity(actions).mean()
        loss = -(self.qf(obs, actions[-1]).amin(dim=0).mean() + self.alpha().detach() * diversity)
        return loss, {"actor_loss": loss.detach(), "diversity": diversity.detach()}

    def alpha_loss(self, diversity: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L = alpha (mean D - D^): alpha grows while the diversity is below its target."""
        loss = self.alpha() * (diversity - self.target_diversity)
        return loss, {"alpha": self.alpha().detach()}

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Take one gradient step on each loss. Returns their detached values, and never waits for the device."""
        num_samples, batch_size = self.args.num_action_samples, len(batch.rewards)
        qf_loss, qf_info = self.critic_loss(batch, self.actor.sample_latents(num_samples, batch_size))
        self.qf_optimizer.zero_grad()
        qf_loss.backward()
        self.qf_optimizer.step()
        with torch.no_grad():
            for target, source in zip(self.qf_target.parameters(), self.qf.parameters(), strict=True):
                target.lerp_(source, self.args.tau)

        actor_loss, actor_info = self.actor_loss(batch.obs, self.actor.sample_latents(num_samples, batch_size))
        self.actor_optimizer.zero_grad()
        actor_loss.backward(inputs=list(self.actor.parameters()))  # Q is a constant here: no gradients for its weights
        self.actor_optimizer.step()

        alpha_loss, alpha_info = self.alpha_loss(actor_info["diversity"])
        self.alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.alpha_optimizer.step()
        return {**qf_info, **actor_info, **alpha_info}


class CudaGraph:
    """A function of CUDA tensors: three calls run as they are to warm up, the fourth is captured, and it is replayed.

    A replay repeats the captured kernels on the same memory with new random numbers: inputs are copied there, all state
    must stay in the same tensors, and a result holds until the next call.
    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, function: Callable) -> None:
        self.function, self.calls = function, 0
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def __call__(self, *inputs: Tensor) -> Tensor | dict[str, Tensor]:
        self.calls += 1
        if self.calls < 4:  # not on the default stream, where nothing can be captured
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.calls == 4:
            self.inputs = [x.clone() for x in inputs]
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.outputs = self.function(*self.inputs)
        for static, x in zip(self.inputs, inputs, strict=True):
            static.copy_(x)
        self.graph.replay()
        return self.outputs


def check_finite(global_step: int, quantities: dict[str, Tensor | np.ndarray | float]) -> None:
    """Raise FloatingPointError, naming the step and the first quantity with a NaN or an infinity in it."""
    for name, value in quantities.items():
        if not torch.as_tensor(value).isfinite().all():
            raise FloatingPointError(f"{name} is not finite at step {global_step}")


def save(file: Path, agent: DrAC, global_step: int, state: dict | None = None) -> None:
    """Replace model.pt or checkpoint.pt by a whole one. The old one stands if that fails or a weight is not finite."""
    check_finite(global_step, weights := agent.state_dict())
    header = {"format": FILE_FORMAT, "script": SCRIPT, "config": asdict(agent.args), "global_step": global_step}
    temporary = file.with_suffix(".tmp")
    try:
        with temporary.open("wb") as stream:
            torch.save({**header, "weights": weights, **(state or {})}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except (OSError, RuntimeError) as error:  # a full disk, for one
        temporary.unlink(missing_ok=True)
        print(f"warning: {file} keeps its last state, since it could not be written:", error, file=sys.stderr)


def training_state(agent: DrAC, buffer: ReplayBuffer, env: gym.Env, run: Path, progress: dict) -> dict[str, object]:
    """All that an exact continuation needs beside the weights: what learns, what is random, how long the logs are."""
    generators = [np.random.get_state(legacy=False), env.unwrapped.np_random.bit_generator.state]
    return {
        "optimizers": [optimizer.state_dict() for optimizer in agent.optimizers],
        "rows": torch.from_numpy(buffer.rows[: buffer.size].cpu().numpy()),  # no copy, and of the filled part alone
        "position": buffer.position,
        "torch_generator": torch.get_rng_state(),
        "cuda_generator": torch.cuda.get_rng_state() if buffer.rows.is_cuda else None,
        "numpy_generators": json.dumps(generators, default=np.ndarray.tolist),
        "progress": progress,
        "logs": {file.name: file.stat().st_size for file in run.iterdir()},
    }


def restore(state: dict, agent: DrAC, buffer: ReplayBuffer, env: gym.Env) -> None:
    """Undo `training_state`, but for progress and logs. Takes the rows out of `state`: two copies may not fit."""
    for optimizer, values in zip(agent.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(values)
    rows, buffer.position = state.pop("rows"), state["position"]
    buffer.rows[: len(rows)] = rows
    buffer.size.fill_(len(rows))
    torch.set_rng_state(state["torch_generator"])
    if buffer.rows.is_cuda and state["cuda_generator"] is not None:
        torch.cuda.set_rng_state(state["cuda_generator"])
    numpy_state, env.unwrapped.np_random.bit_generator.state = json.loads(state["numpy_generators"])
    np.random.set_state(numpy_state)


def evaluate(agent: DrAC, args: Args, run: Path, global_step: int, last: bool) -> dict[str, float | int]:
    """Add a row to evaluations.csv, and draw mazes or levels; the last time, add the final trials."""
    seed = args.seed + 100  # of environments and noise of its own: training is the same with evaluation on or off
    generator = torch.Generator(agent.raw_alpha.device).manual_seed(seed)

    def policy(obs: np.ndarray) -> np.ndarray:
        return agent.act(obs, agent.actor.sample_latents(1, len(obs), generator))

    metrics = evaluate_policy(policy, args.env_id, args.evaluation_episodes, seed, run)
    row = {"global_step": global_step, **metrics}
    with (run / "evaluations.csv").open("a", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerows([row, row.values()] if file.tell() == 0 else [row.values()])
    return metrics | (final_trials(policy, args.env_id, args.final_trials, seed) if last else {})


def train(args: Args, env: gym.Env, agent: DrAC, buffer: ReplayBuffer, run: Path, state: dict | None) -> dict:
    """Interact, update and write to the run's folder, from the checkpoint `state` on if there is one; summarize."""
    # Step 0 is the untrained policy's evaluation; the environment's steps count from 1.
    # `progress["step"]` is that of the last checkpoint.
    fresh = {"step": -1, "summary": {}, "best": -math.inf, "return": math.nan, "seconds": 0.0}
    progress, sizes = (state["progress"], state["logs"]) if state else (fresh, {})
    for file in run.iterdir():
        if "tfevents" in file.name or file.suffix == ".csv":
            size = min(sizes.get(file.name, 0), file.stat().st_size)  # a power cut may have shortened it
            os.truncate(file, size)  # what happened after the checkpoint, happens again
    (run / "summary.json").unlink(missing_ok=True)
    print(f"training, steps {progress['step'] + 1:,} to {args.total_timesteps:,}: files in {run}", flush=True)
    writer = SummaryWriter(str(run))
    bar = tqdm(total=args.total_timesteps, initial=max(progress["step"], 0), unit=" steps", disable=None)
    obs, latents, losses, signals, clock = None, None, {}, [], time.perf_counter()
    actor, update = agent.actor, lambda: agent.update(buffer.sample(args.batch_size))
    if args.cudagraphs:
        actor, update = CudaGraph(actor), CudaGraph(update)
    start, logged = clock - progress["seconds"], max(progress["step"], 0)
    # The last checkpoint is written at the first start of an episode from here on: a longer run can continue there.
    last_start = args.total_timesteps - (env.spec.max_episode_steps or 0)

    def log(group: str, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            writer.add_scalar(f"{group}/{name}", value, global_step)

    def on_signal(number: int, _: object) -> None:
        signals.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)  # a second one, of either kind, stops at once
        print("\nstopping at the end of this episode; once more stops at once", file=sys.stderr)

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for global_step in range(progress["step"] + 1, args.total_timesteps + 1):
            if global_step > 0:
                if obs is None:  # between two episodes: only there can an environment's state be saved
                    interval, done, saved = args.checkpoint_interval, global_step - 1, progress["step"]
                    due = interval and (done // interval > saved // interval or saved < last_start <= done)
                    if signals or due:
                        writer.flush()
                        progress |= {"step": done, "seconds": time.perf_counter() - start}
                        save(run / "checkpoint.pt", agent, done, training_state(agent, buffer, env, run, progress))
                    if signals:
                        command = f"python {SCRIPT}.py --resume {shlex.quote(str(run))}"
                        raise KeyboardInterrupt(f"stopped at step {done}; continue with: {command}")
                    obs, _ = env.reset(seed=args.seed if global_step == 1 else None)
                if latents is None or np.random.random() < args.latent_hold:
                    latents = agent.actor.sample_latents(1, 1)
                action = agent.act(obs[None], latents, actor)[0]
                check_finite(global_step, {"observation": obs, "action": action})
                next_obs, reward, terminated, truncated, info = env.step(action)
                check_finite(global_step, {"observation": next_obs, "reward": reward})
                buffer.add(obs, action, reward, next_obs, terminated)
                obs = next_obs
                if terminated or truncated:
                    progress["return"] = float(info["episode"]["r"])
                    log("charts", {"episodic_return": progress["return"], "episodic_length": info["episode"]["l"]})
                    obs = latents = None
                bar.update()
            if global_step > args.learning_starts:
                for _ in range(args.updates_per_step):
                    losses = update()
            if global_step % LOG_INTERVAL == 0 and losses:
                check_finite(global_step, losses)
                now = time.perf_counter()
                speed, clock, logged = (global_step - logged) / (now - clock), now, global_step
                scalars = {name: value.item() for name, value in losses.items()}
                diversity = f"{scalars['diversity']:.2f} of {agent.target_diversity:.2f}"
                bar.set_postfix({"return": progress["return"], "alpha": scalars["alpha"], "diversity": diversity})
                grad_norm = nn.utils.get_total_norm([weight.grad for weight in agent.actor.parameters()]).item()
                log("losses", {**scalars, "target_diversity": agent.target_diversity, "actor_grad_norm": grad_norm})
                log("charts", {"steps_per_second": speed})
            last = global_step == args.total_timesteps
            evaluates = args.evaluation_interval and (global_step % args.evaluation_interval == 0 or last)
            if evaluates or last:
                save(run / "model.pt", agent, global_step)
            if evaluates:
                paused = time.perf_counter()
                metrics = evaluate(agent, args, run, global_step, last)
                log("evaluation", metrics)
                progress["best"] = best = max(progress["best"], metrics["episodic_return_mean"])
                progress["summary"] = {"global_step": global_step, **metrics, "best_episodic_return_mean": best}
                with bar.external_write_mode():
                    print(f"step {global_step:,}: mean return {metrics['episodic_return_mean']:.1f}", flush=True)
                clock += time.perf_counter() - paused
    finally:
        bar.close()
        writer.close()
        env.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return {"global_step": global_step, **progress["summary"], "minutes": (time.perf_counter() - start) / 60}


def parse_args(argv: list[str] | None) -> tuple[Args, dict | None]:
    """Read the flags. Returns them, and the file that --evaluate or --resume names. Raises ValueError on bad input."""
    defaults = replace(Args(), **DEFAULTS[Args.env_id])
    args, _ = tyro.cli(Args, args=argv, default=defaults, add_help=False, return_unknown_args=True)
    defaults, model = replace(Args(), **DEFAULTS.get(args.env_id, {})), None
    if args.evaluate is not None and args.resume is not None:
        raise ValueError("--evaluate and --resume exclude each other")
    file = args.evaluate if args.resume is None else Path(args.resume, "checkpoint.pt")
    if file is not None:
        try:
            model = torch.load(file, map_location="cpu", weights_only=True)
            defaults = replace(Args(**model["config"]), evaluate=None, resume=None)
            check_finite(model["global_step"], model["weights"])
            needed = {"progress", "logs"} if args.resume else set()
            if (model["script"], model["format"]) != (SCRIPT, FILE_FORMAT) or not needed <= set(model):
                raise ValueError
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}") from error
        except Exception as error:  # torch.load raises anything on a file that is not its own
            raise ValueError(f"{file} is damaged, of another version, or not of {SCRIPT}.py") from error
    if args.evaluate is not None:
        defaults = replace(defaults, cuda=False, cudagraphs=False, run_dir=Args.run_dir)
    # Again: the environment, or the file, sets the defaults.
    args = tyro.cli(Args, args=argv, default=defaults, description=__doc__.split("\n\n")[0])
    fixed = [flag for flag in vars(args) if model and flag not in RESUMABLE]
    for flag in ("env_id", "hidden_size", "z_dim") if args.evaluate is not None else fixed:
        if getattr(args, flag) != (saved := getattr(defaults, flag)):
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)} contradicts the run's {saved}")
    if args.resume and args.total_timesteps < defaults.total_timesteps:
        raise ValueError(f"--total-timesteps {args.total_timesteps} is less than the run's {defaults.total_timesteps}")
    for flags, accepted, holds in (
        ("evaluation_episodes updates_per_step batch_size", "in [1, 2^31)", lambda x: 0 < x < 2**31),
        ("hidden_size z_dim", "in [1, 2^14]", lambda x: 1 <= x <= 2**14),
        ("num_action_samples", "in [2, 2^31)", lambda x: 1 < x < 2**31),
        ("learning_starts evaluation_interval final_trials checkpoint_interval", "at least 0", lambda x: x >= 0),
        ("beta actor_lr critic_lr alpha_lr", "finite and above 0", lambda x: 0 < x < math.inf),
        ("seed", "in [0, 2^32)", lambda x: 0 <= x < 2**32),
        ("gamma", "in [0, 1)", lambda x: 0 <= x < 1),
        ("tau latent_hold", "in (0, 1]", lambda x: 0 < x <= 1),
        ("buffer_size", f"in [--batch-size {args.batch_size}, 2^40)", lambda x: args.batch_size <= x < 2**40),
        ("total_timesteps", f"above --learning-starts {args.learning_starts}", lambda x: x > args.learning_starts),
    ):
        for flag in flags.split():
            if not holds(getattr(args, flag)):
                raise ValueError(f"--{flag.replace('_', '-')} must be {accepted}, got {getattr(args, flag)}")
    if args.cuda and not torch.cuda.is_available():
        raise ValueError("--cuda was given, but PyTorch finds no CUDA GPU here")
    if args.cudagraphs and not args.cuda:
        raise ValueError("--cudagraphs works only with --cuda")
    return args, model


def main(argv: list[str] | None = None) -> Path:
    """Train, or evaluate a model, as the command line says. Returns the run's folder."""
    try:
        args, model = parse_args(argv)
        torch.set_float32_matmul_precision(args.matmul_precision)
        torch.manual_seed(args.seed)
        np.random.seed(args.seed)
        env = gym.wrappers.RecordEpisodeStatistics(make_env(args.env_id))
        obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
        device = torch.device("cuda" if args.cuda else "cpu")
        agent = DrAC(args, obs_dim, action_dim, device)
        try:
            if model is not None:
                agent.load_state_dict(model["weights"])
            if args.evaluate is None:
                buffer = ReplayBuffer(min(args.buffer_size, args.total_timesteps), obs_dim, action_dim, device)
            if args.resume is not None:
                restore(model, agent, buffer, env)
        except (LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            what = args.evaluate or (f"{args.resume}/checkpoint.pt" if args.resume else "the replay buffer")
            raise ValueError(f"{what} does not fit: {error}") from error
        name = f"{args.env_id}__{SCRIPT}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}".replace("/", "_")
        run = Path(args.run_dir, name) if args.resume is None else Path(args.resume)
        run.mkdir(parents=True, exist_ok=args.resume is not None)
        lock = FileLock(run / ".lock", blocking=False)
        lock.acquire()
        versions = {package: version(package) for package in ("torch", "gymnasium", "mujoco", "numpy")}
        (run / "config.json").write_text(json.dumps({**asdict(args), "versions": versions}, indent=2) + "\n")
    except (gym.error.Error, ImportError, ValueError, OSError) as error:
        reason = f"{run} is in use by a running process" if isinstance(error, Timeout) else str(error)
        print("error:", *reason.split(), file=sys.stderr)  # in one line
        sys.exit(2)
    # The logarithmic capacity of interval and square; for d > 2, E log |x - y| <= log(E |x - y|^2) / 2 <= log(2 d) / 2.
    ceiling = {1: 0.5, 2: 0.8346}.get(action_dim, math.sqrt(2))
    if args.beta > ceiling and args.diversity_mean == "geometric" and args.evaluate is None:
        print(f"warning: no policy exceeds {ceiling:.4g}, so with --beta {args.beta} alpha will grow", file=sys.stderr)
    try:
        if args.evaluate is not None:
            summary = {"global_step": model["global_step"]} | evaluate(agent, args, run, model["global_step"], True)
        else:
            summary = train(args, env, agent, buffer, run, model)
    except FloatingPointError as error:
        sys.exit(f"{error}; the last good model and the logs are in {run}")
    except KeyboardInterrupt as error:
        sys.exit(str(error) or "interrupted")
    finally:
        lock.release()
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for name, value in summary.items():
        print(f"{name:28}{value:12,.3f}" if isinstance(value, float) else f"{name:28}{value:12,}")
    print(f"files in {run}")
    return run


if __name__ == "__main__":
    main()
