"""DrDiffus: a multimodal policy for continuous control, trained by DrAC, the Diversity-regularized Actor-Critic.

SAC's Gaussian actor mostly learns one way to solve a task. DrAC's actors, free-form functions of state and noise, learn
many. Such an actor has no tractable density, hence no entropy to compute. DrAC makes do with samples:
  1. the actor ascends Q through a sampled action f(s, z): the reparameterization gradient;
  2. diversity, the log of the geometric mean distance between pairs of actions, is rewarded in place of entropy;
  3. a learned temperature holds the diversity at a target.
The rest is SAC's. In this file the actor is a *diffusion model*: T denoising steps turn pure noise into an action.

    python drac_diffus.py                                # all goals of a maze, in minutes
    python drac_diffus.py --env-id Walker2d-v4 --cuda    # MuJoCo, on a GPU

Source: Wang, Liu, Pan, "Learning Intractable Multimodal Policies with Reparameterization and Diversity Regularization",
NeurIPS 2025, https://arxiv.org/abs/2511.01374. Beyond it, and off with --paper: all pairs of 4 actions, and on mazes
parallel environments, targets over n steps, held noise, T = 5; and tanh, not a hard clip. Symbols and their names here:

    s, a, r, s'   obs, actions, rewards, next_obs; the actions are scaled to [-1, 1]^d
    f(s, z)       actor(obs, latents): M = num_action_samples actions, the last for Q, at each of B = batch_size states
    Q_i, Q'_i     qf, qf_target: both networks, and their slowly moving copies
    D(s), alpha   diversity, held at target_diversity = log(beta sqrt(d)) by the temperature
"""

import copy
import json
import math
import random
import sys
import time
import warnings
from collections import deque, namedtuple
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

if find_spec("envs"):
    import envs  # noqa: F401  # registers the paper's environments

# An interval says which values a flag may have; drac_runner.py checks it.
Count = Annotated[int, "[1, 1e9)"]
Natural = Annotated[int, "[0, 1e12)"]
Positive = Annotated[float, "(0, inf)"]
TIME_DIM = 16  # of the diffusion actor's time embedding


@dataclass
class Args:
    env_id: str = "MultiGoalPointMaze-Simple-v0"  # a Gymnasium id: flat observations, bounded float actions, time limit
    env_kwargs: str = "{}"  # JSON for gymnasium.make: {"maze_map": "my_maze.txt"}, {"max_episode_steps": 500}, ...
    seed: Annotated[int, "[0, 4294967295]"] = 1  # of networks, environments and noise; evaluation's own derive from it
    paper: bool = False  # defaults as published: one environment, one-step targets, fresh noise, 17 samples, hard clip
    cuda: bool = False  # run on a CUDA GPU
    cudagraphs: bool = True  # in training with --cuda, by drac_runner.py: CUDA graphs, about 5 times as fast on an H200
    matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto"  # auto: medium where exact, else highest
    run_dir: str = "runs"  # folder that gets one sub-folder per run
    evaluate: str | None = None  # a model.pt to evaluate instead of training; it brings environment and network
    resume: str | None = None  # a run's folder to continue in; total-timesteps may grow, evaluations and device change
    total_timesteps: Count = 1_000_000  # steps of all environments together
    num_envs: Annotated[int, "[1, 1e4]"] = 1  # N, the environments that step in turn, and act as one batch
    n_steps: Annotated[int, "[1, 1000]"] = 1  # n, the steps of reward in a critic's target before it bootstraps
    hold_steps: Annotated[float, "[1, inf)"] = 1.0  # mean steps that noise is held, 1: fresh; each 4th training env: 1
    beta: Positive = 0.2  # target diversity: geometric mean distance of two actions / sqrt(action dimensions)
    num_action_samples: Annotated[int, "[2, 1000]"] = 4  # M, the actions per state; 17 take 2 to 4 times as long
    pairing: Literal["all", "disjoint"] = "all"  # estimate diversity from all M(M-1)/2 pairs, or M//2 disjoint ones
    diversity_mean: Literal["geometric", "arithmetic"] = "geometric"  # of the distances; the other is an ablation
    diffusion_steps: Annotated[int, "[1, 1000]"] = 20  # T, the denoising steps per action; 20 cost 3 times as much as 5
    clip: Literal["tanh", "hard"] = "tanh"  # bound on x_0's estimates; hard (the paper) kills gradients beyond it
    hidden_size: Annotated[int, "[1, 16384]"] = 256  # width of the two hidden layers, actor and critics
    actor_lr: Positive = 3e-4  # learning rate of the actor
    critic_lr: Positive = 3e-4  # learning rate of the critics
    alpha_lr: Positive = 5e-3  # learning rate of the diversity temperature
    gamma: Annotated[float, "[0, 1)"] = 0.99  # discount factor
    tau: Annotated[float, "(0, 1]"] = 0.005  # weight of qf in its moving average, qf_target
    batch_size: Annotated[int, "[1, 1e6]"] = 256  # transitions per update
    buffer_size: Natural = 1_000_000  # transitions kept for replay
    learning_starts: Natural = 256  # steps before the first update; the policy itself acts, not uniform random actions
    updates_per_step: Count = 1  # updates per iteration, that is per N steps
    checkpoint_interval: Count = 20_000  # iterations, of N steps, between checkpoints, which cut episodes
    evaluation_interval: Natural = 10_000  # steps between evaluations, first and last included; 0: none at all
    evaluation_episodes: Count = 10  # episodes per evaluation
    final_trials: Natural = 100  # groups of 5 episodes (mazes) or pairs of levels for the paper's final tests; 0: none


def default_args(env_id: str, paper: bool = False) -> Args:
    """The flags' defaults on an environment: those of Args, but for the ones that are set here."""
    args = Args(env_id=env_id, paper=paper)
    task = env_id.rpartition(":")[2].partition("-v")[0]  # Gymnasium takes ids with a module, and without a version
    mazes = {"Simple": 100_000, "Medium": 200_000, "Hard": 300_000}
    mazes = {f"MultiGoalPointMaze-{name}": steps for name, steps in mazes.items()}
    if task in mazes:
        args.total_timesteps, args.beta = mazes[task], 0.8
        args.evaluation_interval, args.evaluation_episodes = args.total_timesteps // 10, 100
        if not paper:  # the best found; at the paper's beta, near the ceiling of 0.8346 (d = 2), alpha keeps growing
            args.checkpoint_interval = 3_125  # of 16 environments: 50,000 steps
            args.num_envs, args.n_steps, args.hold_steps, args.beta = 16, 5, 20.0, 0.77
            args.diffusion_steps = 5
    elif task in ("LevelGeneration-MultiFacet", "LevelGeneration-Puzzle"):
        args.total_timesteps, args.beta, args.evaluation_episodes, args.final_trials = 500_000, 0.5, 30, 150
    if paper:
        args.num_action_samples, args.pairing, args.clip, args.matmul_precision = 17, "disjoint", "hard", "highest"
    return args


# THE METHOD: networks, noise, replay, diversity, losses and the update.


class Actor(nn.Module):
    """The diffusion actor: x_T ~ N(0, I) is denoised in T steps of DDPM (Ho et al. 2020), and x_0 is the action.

    The network predicts the noise in x_t, but with no denoising loss: Q and D train it through all T steps. tanh bounds
    the x_0 that it implies; DDPM and the paper clip that. Given the noise, `latents`, the chain is deterministic.
    """

    def __init__(self, args: Args, obs_dim: int, action_dim: int) -> None:
        super().__init__()
        self.action_dim, self.diffusion_steps = action_dim, args.diffusion_steps
        self.clip = torch.tanh if args.clip == "tanh" else partial(torch.clamp, min=-1, max=1)
        # Variance preserving, from b_min = 0.1 to b_max = 10: abar_t = alpha_1 alpha_2 .. alpha_t for t = 0..T.
        fractions = [t / self.diffusion_steps for t in range(self.diffusion_steps + 1)]
        self.alphas_bar = [math.exp(-0.1 * u - 0.5 * (10 - 0.1) * u**2) for u in fractions]
        angles = torch.arange(1, self.diffusion_steps + 1)[:, None] / 10_000 ** torch.arange(0, 1, 2 / TIME_DIM)
        self.register_buffer("sinusoids", torch.cat([angles.sin(), angles.cos()], dim=1), persistent=False)
        self.time_mlp = nn.Sequential(nn.Linear(TIME_DIM, 32), nn.ReLU(), nn.Linear(32, TIME_DIM))
        self.fc1 = nn.Linear(obs_dim + action_dim + TIME_DIM, args.hidden_size)
        self.fc2 = nn.Linear(args.hidden_size, args.hidden_size)
        self.fc3 = nn.Linear(args.hidden_size, action_dim)

    def sample_latents(self, num_samples: int, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw all the noise of (num_samples, batch_size) actions, x_T first: (T, M, B, action_dim)."""
        shape = (self.diffusion_steps, num_samples, batch_size, self.action_dim)
        return torch.randn(shape, device=self.fc1.weight.device, generator=generator)

    def forward(self, obs: Tensor, latents: Tensor) -> Tensor:
        """Map obs (B, obs_dim) and latents (T, M, B, action_dim) to actions (M, B, action_dim) in [-1, 1]."""
        # An MLP of the concatenation [s, x_t, e_t], e_t the embedding of t. Its first layer is a sum over the three:
        # the shares of s, the same at every step, and of e_t, the same for every state, are computed once.
        w_obs, w_x, w_time = self.fc1.weight.split([obs.shape[-1], self.action_dim, TIME_DIM], dim=1)
        obs_share = F.linear(obs, w_obs, self.fc1.bias)  # (B, hidden_size)
        time_shares = F.linear(self.time_mlp(self.sinusoids), w_time).unbind()  # T of (hidden_size,)
        x = latents[0]  # x_T
        for t in range(self.diffusion_steps, 0, -1):
            abar, abar_prev = self.alphas_bar[t], self.alphas_bar[t - 1]
            alpha_t, beta_t = abar / abar_prev, 1 - abar / abar_prev  # DDPM's, not the temperature and --beta
            hidden = F.relu_(F.linear(x, w_x).add_(obs_share + time_shares[t - 1])).flatten(0, 1)
            epsilon = self.fc3(F.relu_(self.fc2(hidden))).unflatten(0, x.shape[:2])  # (M, B, action_dim)
            # Posterior of x_{t-1} given x_t and the estimate of x_0: its mean, plus noise if t > 1. At t = 1 it is x_0.
            x_0 = self.clip((x - math.sqrt(1 - abar) * epsilon) / math.sqrt(abar))
            x = math.sqrt(abar_prev) * beta_t / (1 - abar) * x_0 + math.sqrt(alpha_t) * (1 - abar_prev) / (1 - abar) * x
            if t > 1:
                x = x + math.sqrt(beta_t * (1 - abar_prev) / (1 - abar)) * latents[self.diffusion_steps - t + 1]
        return x


@torch.no_grad()
def act(actor: Callable, obs: np.ndarray, latents: Tensor) -> np.ndarray:
    """Map observations (N, obs_dim) and latents of one action each (M = 1) to actions (N, action_dim)."""
    obs = torch.as_tensor(obs, dtype=torch.float32, device=latents.device)
    return actor(obs, latents)[0].cpu().numpy()


class HeldLatents:
    """The noise of one policy in N environments, redrawn with probability 1 / hold_steps at every step.

    An actor is not yet a policy. Fresh noise at every step, as published, averages out: the next step undoes what this
    one began. Noise that is held follows one of the actor's ways for a while. See pink noise (Eberhard et al. 2023).
    """

    def __init__(self, actor: Actor, hold_steps: float | list[float], generator: torch.Generator | None = None) -> None:
        """Keep the noise for so many steps on average, the same for all N or one number each; 1: fresh every step."""
        self.actor, self.generator, self.latents = actor, generator, None
        self.hold_steps = torch.tensor(hold_steps, device=actor.fc1.weight.device)

    def __call__(self, starts: np.ndarray) -> Tensor:
        """The next actions' noise, shaped as by sample_latents(1, N); redrawn where starts (N,) is true, at least."""
        fresh = self.actor.sample_latents(1, len(starts), self.generator)
        held = fresh if self.latents is None or starts.all() else self.latents  # N may change where all start
        expired = torch.rand(len(starts), device=fresh.device, generator=self.generator) < 1 / self.hold_steps
        redrawn = expired | torch.as_tensor(starts, device=fresh.device)
        self.latents = torch.where(redrawn[:, None], fresh, held)  # (N, 1) to (..., N, .): all of an action's noise
        return self.latents


class TwinQ(nn.Module):
    """Two independent Q networks, MLPs of [s, a], stacked: a layer of both is one batched matrix product."""

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
        (w1, w2, w3), (b1, b2, b3) = self.weights, self.biases
        x = F.relu_(torch.baddbmm(b1, x, w1))
        x = F.relu_(torch.baddbmm(b2, x, w2))
        return torch.baddbmm(b3, x, w3).squeeze(-1)


Batch = namedtuple("Batch", ["obs", "actions", "next_obs", "rewards", "discounts"])  # over n steps: see `gather`


class ReplayBuffer:
    """A ring of transitions on the training device. A row holds one step of all N environments."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device) -> None:
        self.n_steps, self.gamma = args.n_steps, args.gamma
        self.widths = [obs_dim, action_dim, obs_dim, 1, 1, 1]  # of what `add` takes, in its order
        capacity = max(args.n_steps, math.ceil(min(args.buffer_size, args.total_timesteps) / args.num_envs))
        self.rows = torch.empty(capacity, args.num_envs, sum(self.widths), device=device)
        self.position = self.size = 0  # the row that comes next, and how many are filled

    def add(self, *columns: np.ndarray) -> None:
        """Store obs, actions, next_obs (N, .), rewards, terminations and ends (N,) of a step over the oldest row.

        An episode `ends` by its termination or its time limit; only the former stops the bootstrap. Its last next_obs
        is its own, never the next episode's first.
        """
        row = np.concatenate([column.reshape(len(column), -1) for column in columns], axis=1, dtype=np.float32)
        self.rows[self.position] = torch.from_numpy(row).view(self.rows.shape[1:])  # fails unless it has N entries
        self.position = (self.position + 1) % len(self.rows)
        self.size = min(self.size + 1, len(self.rows))

    def draw(self, batch_size: int) -> Tensor:
        """Draw windows of n steps, uniformly among the whole ones in the ring: first rows and environments (2, B)."""
        # Not in `gather`: a CUDA graph of that would freeze position and size. Age 0: the newest window.
        ages = torch.randint(self.size - self.n_steps + 1, (batch_size,), device=self.rows.device)
        first_rows = (self.position - self.n_steps - ages) % len(self.rows)
        return torch.stack([first_rows, torch.randint_like(ages, self.rows.shape[1])])

    def gather(self, windows: Tensor) -> Batch:
        """Cut windows (2, B) out: obs, next_obs (B, obs_dim), actions (B, action_dim), rewards and discounts (B,).

        Only the first m steps of a window, up to an episode's end, count: rewards = sum_{k<m} gamma^k r_{t+k},
        next_obs = s_{t+m}, and discounts = gamma^m (1 - terminated) weigh what is bootstrapped there.
        """
        steps = torch.arange(self.n_steps, device=windows.device)
        first_rows, environments = windows[..., None]  # (B, 1) each
        rows = self.rows[(first_rows + steps) % len(self.rows), environments]  # (B, n, columns)
        obs, actions, next_obs, *columns = rows.split(self.widths, dim=-1)
        rewards, terminations, ends = (column.squeeze(-1) for column in columns)  # (B, n)
        mask = F.pad(1 - ends[:, :-1], (1, 0), value=1).cumprod(dim=1)  # (B, n): 0 after an episode's end
        rewards = (mask * self.gamma**steps * rewards).sum(dim=1)
        m = mask.sum(dim=1).long()
        last = torch.arange(len(m), device=m.device), m - 1
        return Batch(obs[:, 0], actions[:, 0], next_obs[last], rewards, self.gamma**m * (1 - terminations[last]))

    def sample(self, batch_size: int) -> Batch:
        """Draw and cut out a batch, for loops of your own; `train` takes the two steps apart, for CUDA graphs."""
        return self.gather(self.draw(batch_size))


def pairwise_diversity(actions: Tensor, pairing: str = "all", mean: str = "geometric") -> Tensor:
    """Estimate D(s) = E[log |x - y|], x and y independent actions of the policy at s; "arithmetic": E|x - y|, no log.

    Maps actions (M, B, action_dim) to (B,), averaging over all M(M-1)/2 pairs (a U-statistic), or over M//2 disjoint
    ones. Logs punish pairs that nearly coincide; an arithmetic mean is content with tight clusters that lie far apart.
    """
    if pairing == "all":
        differences = torch.cat([actions[i + 1 :] - actions[i] for i in range(len(actions) - 1)])
    else:
        half = len(actions) // 2  # of the paper's 17 actions, the last is in no pair and serves Q alone
        differences = actions[:half] - actions[half : 2 * half]
    squared_distances = differences.square().sum(dim=-1) + 1e-10  # (pairs, B); finite logs where actions coincide
    return 0.5 * squared_distances.log().mean(dim=0) if mean == "geometric" else squared_distances.sqrt().mean(dim=0)


class DrAC(nn.Module):
    """Actor, critics and temperature, and the update that trains them."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device) -> None:
        super().__init__()
        self.args = args
        self.diversity = partial(pairwise_diversity, pairing=args.pairing, mean=args.diversity_mean)
        self.actor = Actor(args, obs_dim, action_dim)
        self.qf = TwinQ(obs_dim, action_dim, args.hidden_size)
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.raw_alpha = nn.Parameter(torch.zeros(()))
        self.to(device)
        adam = partial(torch.optim.Adam, fused=True, capturable=True)  # capturable: it may be part of a CUDA graph
        self.actor_optimizer = adam(self.actor.parameters(), lr=args.actor_lr)
        self.qf_optimizer = adam(self.qf.parameters(), lr=args.critic_lr)
        self.alpha_optimizer = adam([self.raw_alpha], lr=args.alpha_lr)
        target_distance = args.beta * math.sqrt(action_dim)
        self.target_diversity = math.log(target_distance) if args.diversity_mean == "geometric" else target_distance

    def alpha(self) -> Tensor:
        """The temperature, 1 at first: exp(raw_alpha) below 0, as in SAC, 1 + raw_alpha above, to grow linearly."""
        return 1 + F.elu(self.raw_alpha)

    def critic_loss(self, batch: Batch, latents: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L = sum_i mean (Q_i(s, a) - y)^2. The target sums the m <= n steps up to an episode's end (the paper: n = 1):

        y = sum_{k<m} gamma^k r_{t+k} + gamma^m (1 - terminated) [min_i Q'_i(s', a') + alpha D(s')],  s' = s_{t+m}.
        Left out: gamma^k alpha D(s_{t+k}) for 0 < k < m, so that success comes sooner; and any off-policy correction.
        """
        with torch.no_grad():
            next_actions = self.actor(batch.next_obs, latents)
            next_values = self.qf_target(batch.next_obs, next_actions[-1]).amin(dim=0)  # any one of the M serves Q
            targets = batch.rewards + batch.discounts * (next_values + self.alpha() * self.diversity(next_actions))
        values = self.qf(batch.obs, batch.actions)  # (2, B)
        loss = (values - targets).square().mean(dim=1).sum()
        return loss, {"qf_loss": loss.detach(), "qf_values": values.detach().mean()}

    def actor_loss(self, obs: Tensor, actions: Tensor, mean_diversity: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L = -mean [min_i Q_i(s, f(s, z)) + alpha D(s)]: Q's gradient flows through one action, D's through pairs."""
        loss = -(self.qf(obs, actions[-1]).amin(dim=0).mean() + self.alpha().detach() * mean_diversity)
        return loss, {"actor_loss": loss.detach()}

    def alpha_loss(self, mean_diversity: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L = alpha (mean D - target): alpha grows while the diversity is below its target."""
        loss = self.alpha() * (mean_diversity.detach() - self.target_diversity)
        return loss, {"alpha": self.alpha().detach(), "diversity": mean_diversity.detach()}

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Take one gradient step on each loss. Returns what to log, as tensors: it never waits for the device."""
        num_samples, batch_size = self.args.num_action_samples, len(batch.rewards)
        qf_loss, qf_info = self.critic_loss(batch, self.actor.sample_latents(num_samples, batch_size))
        self.qf_optimizer.zero_grad()
        qf_loss.backward()
        self.qf_optimizer.step()
        with torch.no_grad():
            for target, source in zip(self.qf_target.parameters(), self.qf.parameters(), strict=True):
                target.lerp_(source, self.args.tau)

        actions = self.actor(batch.obs, self.actor.sample_latents(num_samples, batch_size))
        mean_diversity = self.diversity(actions).mean()  # of D(s) over the batch: a scalar
        actor_loss, actor_info = self.actor_loss(batch.obs, actions, mean_diversity)
        self.actor_optimizer.zero_grad()
        actor_loss.backward(inputs=list(self.actor.parameters()))  # Q is a constant here: no gradients for its weights
        self.actor_optimizer.step()

        alpha_loss, alpha_info = self.alpha_loss(mean_diversity)
        self.alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.alpha_optimizer.step()
        return {**qf_info, **actor_info, **alpha_info}


# Here the method ends. What is left lets it act: environments, the training loop, the command line. `drac_runner.py`
# beside this file adds evaluations, checkpoints and exact resume; without it, this file alone trains.


def check_finite(global_step: int, **quantities: Tensor | np.ndarray) -> None:
    """Raise FloatingPointError, naming the step and the first quantity with a NaN or an infinity in it."""
    for name, value in quantities.items():
        if not torch.as_tensor(value).isfinite().all():
            raise FloatingPointError(f"{name} is not finite at step {global_step}")


def make_env(env_id: str, /, **kwargs: object) -> gym.Env:
    """Make an environment, its actions rescaled to [-1, 1]^d. Raises ValueError if DrAC cannot train on it."""
    try:
        with warnings.catch_warnings():  # the paper's MuJoCo environments are v4
            warnings.filterwarnings("ignore", message=".*is out of date", category=DeprecationWarning)
            env = gym.make(env_id, **kwargs)
    except Exception as error:  # a constructor may raise anything
        raise ValueError(f"{env_id} with {kwargs} cannot be made: {error!r}") from error
    obs, actions = env.observation_space, env.action_space
    if not isinstance(obs, gym.spaces.Box) or len(obs.shape) != 1:
        raise ValueError(f"the observations of {env_id} are {obs}: DrAC needs a one-dimensional Box")
    flat = isinstance(actions, gym.spaces.Box) and len(actions.shape) == 1 and actions.dtype.kind == "f"
    if not (flat and actions.is_bounded() and (actions.low < actions.high).all()):
        raise ValueError(f"the actions of {env_id} are {actions}: DrAC needs a bounded, one-dimensional Box of floats")
    if env.spec.max_episode_steps is None:
        raise ValueError(f"{env_id} has no time limit: --env-kwargs '{{\"max_episode_steps\": 1000}}' sets one")
    low, high = actions.low, actions.high
    center, half, box = low / 2 + high / 2, high / 2 - low / 2, gym.spaces.Box(-1.0, 1.0, actions.shape, np.float32)
    # Clipped: rounding can carry the rescaled 1 over the bound.
    return gym.wrappers.TransformAction(env, lambda a: np.clip(center + a * half, low, high), box)


def make(args: Args, **kwargs: object) -> gym.Env:
    """Make the environment that the flags name, `kwargs` added."""
    return make_env(args.env_id, **(json.loads(args.env_kwargs) | kwargs))


class Collector:
    """N environments, the episodes that run in them and their noise, for one chapter of a run (see `train`)."""

    def __init__(self, args: Args, actor: Actor, iteration: int) -> None:
        """Seed all from (seed, iteration), begin N episodes; each 4th has fresh noise, or acting with it fails more."""
        num_envs = args.num_envs
        seeds = np.random.SeedSequence([args.seed, 0, iteration]).generate_state(1 + num_envs).tolist()
        for seed_all in (torch.manual_seed, np.random.seed, random.seed):  # NumPy's and Python's: for old environments
            seed_all(seeds[0])
        self.envs = [make(args) for _ in range(num_envs)]
        first_obs = [env.reset(seed=seed)[0] for env, seed in zip(self.envs, seeds[1:], strict=True)]
        self.obs = np.stack(first_obs, dtype=np.float32)  # as the buffer stores it
        self.noise = HeldLatents(actor, [1.0 if i % 4 == 3 else args.hold_steps for i in range(num_envs)])
        self.starts, self.returns, self.lengths = np.ones(num_envs, bool), np.zeros(num_envs), np.zeros(num_envs)

    def step(self, policy: Callable, buffer: ReplayBuffer, global_step: int, cut: bool) -> dict[str, float]:
        """Act and store it, `cut` as by a time limit. Returns mean return and length of episodes that ended uncut."""
        actions = act(policy, self.obs, self.noise(self.starts))
        check_finite(global_step, observation=self.obs, action=actions)
        steps = [env.step(action)[:4] for env, action in zip(self.envs, actions, strict=True)]
        next_obs, *others = (np.stack(column, dtype=np.float32) for column in zip(*steps, strict=True))
        rewards, terminations, truncations = (column.ravel() for column in others)  # some return arrays of one entry
        check_finite(global_step, observation=next_obs, reward=rewards)
        ends = np.logical_or(terminations, truncations)
        buffer.add(self.obs, actions, next_obs, rewards, terminations, ends | cut)
        self.obs, self.starts, self.returns, self.lengths = next_obs, ends, self.returns + rewards, self.lengths + 1
        if not ends.any():
            return {}
        episodes = {"episodic_return": self.returns[ends].mean(), "episodic_length": self.lengths[ends].mean()}
        self.returns[ends] = self.lengths[ends] = 0
        for i in np.flatnonzero(ends):
            self.obs[i], _ = self.envs[i].reset()  # in next_obs, of which the buffer has a copy
        return episodes


def make_policy(agent: DrAC, hold_steps: float = 1.0) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """What evaluations play, of obs (N, obs_dim) and starts (N,) to actions. Its noise has a seed of its own."""
    generator = torch.Generator(agent.raw_alpha.device).manual_seed(2**32 - 1 - agent.args.seed)  # never args.seed
    noise = HeldLatents(agent.actor, hold_steps, generator)
    return lambda obs, starts: act(agent.actor, obs, noise(starts))


def train(
    agent: DrAC, buffer: ReplayBuffer, iteration: int = 0, wrap: Callable = lambda function: function
) -> Iterator[tuple[int, dict[str, float], dict[str, Tensor]]]:
    """Train from `iteration` on, each a step of all N environments; yield its number, ended episodes and losses.

    A run is a sequence of chapters. Where one begins, every checkpoint_interval, episodes are cut as by a time limit,
    environments are made anew, and all that is random is seeded from (seed, iteration). So what was learned and stored
    is all that it takes to repeat the rest bit for bit, on a CPU. `wrap` may make CUDA graphs of acting and updates.
    """
    args, losses, iterations = agent.args, {}, math.ceil(agent.args.total_timesteps / agent.args.num_envs)
    policy, update = wrap(agent.actor), wrap(lambda windows: agent.update(buffer.gather(windows)))
    while iteration < iterations:
        collector = Collector(args, agent.actor, iteration)
        chapter_end = min(iterations, (iteration // args.checkpoint_interval + 1) * args.checkpoint_interval)
        try:
            while iteration < chapter_end:
                iteration += 1
                global_step = iteration * args.num_envs
                episodes = collector.step(policy, buffer, global_step, cut=iteration == chapter_end)
                if global_step > args.learning_starts and buffer.size >= args.n_steps:
                    for _ in range(args.updates_per_step):
                        losses = update(buffer.draw(args.batch_size))
                yield iteration, episodes, losses
        finally:
            for env in collector.envs:
                env.close()


def main(argv: list[str] | None = None) -> Path:
    """Make a run with drac_runner.py, or without it only train. Returns the run's folder."""
    if find_spec("drac_runner"):
        from drac_runner import launch

        return launch(sys.modules[__name__], argv)
    flags, _ = tyro.cli(Args, args=argv, add_help=False, return_unknown_args=True)  # once for what sets defaults
    args = tyro.cli(Args, args=argv, default=default_args(flags.env_id, flags.paper))
    if (args.evaluate, args.resume) != (None, None) or (args.cuda and not torch.cuda.is_available()):
        sys.exit("error: --evaluate and --resume need drac_runner.py beside this file, --cuda a CUDA GPU")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision(args.matmul_precision.replace("auto", "highest"))
    try:
        with make(args) as env:
            sizes = *env.observation_space.shape, *env.action_space.shape, torch.device("cuda" if args.cuda else "cpu")
    except (TypeError, ValueError) as error:
        sys.exit(f"error: {error} (--env-kwargs takes a JSON object; mazes and levels need envs.py beside this file)")
    agent, buffer = DrAC(args, *sizes), ReplayBuffer(args, *sizes)
    path = Path(args.run_dir, f"{args.env_id}__{args.seed}__{time.time_ns()}".replace(":", "_"))  # Windows takes no :
    returns, iteration, iterations = deque(maxlen=100), 0, math.ceil(args.total_timesteps / args.num_envs)
    print(f"training, without drac_runner.py: no evaluations, checkpoints or CUDA graphs; files in {path}")
    state = {"config": vars(args), "weights": agent.state_dict()}  # no copies: current whenever they are saved
    with SummaryWriter(str(path)) as writer, suppress(KeyboardInterrupt):
        for iteration, episodes, losses in tqdm(train(agent, buffer), total=iterations, disable=None):
            if episodes:
                returns.append(episodes["episodic_return"])
                for group, values in {"charts": episodes, "losses": losses}.items():
                    for name, value in values.items():
                        writer.add_scalar(f"{group}/{name}", value, iteration * args.num_envs)
            if iteration % args.checkpoint_interval == 0:
                torch.save(state, path / f"weights_{iteration * args.num_envs}.pt")
    torch.save(state, path / "weights.pt")
    print(f"step {iteration * args.num_envs:,}: mean return of the last episodes {np.mean(returns or [np.nan]):.1f}")
    return path if iteration == iterations else sys.exit("interrupted")


if __name__ == "__main__":
    main()
