"""Speed, measured side by side in one run: `python tests/benchmark.py` (some minutes; leave the machine alone), or one
of its tables: `python tests/benchmark.py programs`, `gpu`, `checkpoints`, `updates`, `steps`, `scaling`.

The rows of a table are measured in turns, so that a slow moment hits all of them, and show medians (but `checkpoints`).
Install stable-baselines3 (and sbx-rl) beside the requirements to get the comparison of whole programs.

`python tests/benchmark.py MODEL` looks instead at a trained policy, in states that it visits: of drac_amort.py's
model.pt it measures how noisy the estimators of the diversity are there, of drac_diffus.py's how often the bounds on
x_0's estimates saturate.
"""

import contextlib
import functools
import importlib
import io
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import drac_amort  # noqa: E402
import drac_diffus  # noqa: E402
import drac_runner as runner  # noqa: E402
import envs  # noqa: E402

ENV_ID, OBS_DIM, ACTION_DIM, BATCH_SIZE = "Walker2d-v4", 17, 6, 256
UPDATES_PER_ROUND, PROGRAM_ROUNDS, PROGRAM_STEPS, BURN_IN = 12, 3, 1500, 500
ESTIMATORS = {
    "DrAmort, as shipped (M = 4)": {},
    "DrAmort, M = 8": {"num_action_samples": 8},
    "DrAmort, M = 17, disjoint pairs": {"num_action_samples": 17, "pairing": "disjoint"},
}
CHAINS = {f"DrDiffus, T = {steps} (M = 4)": {"diffusion_steps": steps} for steps in (5, 10, 20)}


def mlp(*sizes, last=None):
    layers = [layer for i, o in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1], *([last] if last else []))


class PaperUpdate:
    """The paper's update of the amortized actor as one would first write it: 17 samples, 8 disjoint pairs."""

    num_samples, num_pairs = 17, 8

    def __init__(self):
        self.make_actor()
        self.q1, self.q2, self.target_q1, self.target_q2 = (mlp(OBS_DIM + ACTION_DIM, 256, 256, 1) for _ in range(4))
        self.raw_alpha = torch.zeros((), requires_grad=True)
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), lr=3e-4)
        self.q_adam = torch.optim.Adam([*self.q1.parameters(), *self.q2.parameters()], lr=3e-4)
        self.alpha_adam = torch.optim.Adam([self.raw_alpha], lr=5e-3)

    def make_actor(self):
        self.actor = mlp(OBS_DIM + 16, 256, 256, ACTION_DIM, last=nn.Tanh())

    def act(self, obs):  # (B, 17, obs_dim) to (B, 17, action_dim)
        return self.actor(torch.cat([obs, torch.rand(*obs.shape[:2], 16)], dim=-1))

    def sample(self, obs):
        actions = self.act(obs.unsqueeze(1).expand(-1, self.num_samples, -1))
        x, y = actions[:, : self.num_pairs], actions[:, self.num_pairs : 2 * self.num_pairs]
        return actions[:, -1], torch.log(torch.norm(x - y, dim=-1) + 1e-5).mean(dim=1)

    def update(self, batch):
        obs, actions, next_obs, rewards, discounts = batch
        alpha = torch.where(self.raw_alpha < 0, self.raw_alpha.exp(), 1 + self.raw_alpha)
        with torch.no_grad():
            next_actions, next_diversity = self.sample(next_obs)
            x = torch.cat([next_obs, next_actions], dim=1)
            next_q = torch.min(self.target_q1(x), self.target_q2(x)).squeeze(1) + alpha * next_diversity
            target = rewards + discounts * next_q
        x = torch.cat([obs, actions], dim=1)
        q_loss = sum(nn.functional.mse_loss(q(x).squeeze(1), target) for q in (self.q1, self.q2))
        self.q_adam.zero_grad()
        q_loss.backward()
        self.q_adam.step()
        for q, target_q in ((self.q1, self.target_q1), (self.q2, self.target_q2)):
            for source, destination in zip(q.parameters(), target_q.parameters(), strict=True):
                destination.data.copy_(0.005 * source.data + 0.995 * destination.data)
        new_actions, diversity = self.sample(obs)
        x = torch.cat([obs, new_actions], dim=1)
        actor_loss = -(torch.min(self.q1(x), self.q2(x)).squeeze(1) + alpha.detach() * diversity).mean()
        self.actor_adam.zero_grad()
        actor_loss.backward()
        self.actor_adam.step()
        alpha_loss = alpha * (diversity.mean().detach() - np.log(0.5 * np.sqrt(ACTION_DIM)))
        self.alpha_adam.zero_grad()
        alpha_loss.backward()
        self.alpha_adam.step()


class PaperDiffusionUpdate(PaperUpdate):
    """The same with the diffusion actor: state, x_t and time embedding are concatenated at each of 20 steps."""

    diffusion_steps = 20

    def make_actor(self):
        self.time_mlp = mlp(16, 32, 16)
        self.network = mlp(OBS_DIM + ACTION_DIM + 16, 256, 256, ACTION_DIM)
        self.actor = nn.ModuleList([self.time_mlp, self.network])
        t = torch.arange(self.diffusion_steps + 1)
        self.betas = 1 - torch.exp(-0.1 / self.diffusion_steps - 4.95 * (2 * t - 1) / self.diffusion_steps**2)
        self.betas[0] = 0
        self.abars = torch.cumprod(1 - self.betas, dim=0)

    def act(self, obs):
        x = torch.randn(*obs.shape[:2], ACTION_DIM)
        for t in range(self.diffusion_steps, 0, -1):
            beta, abar, abar_prev = self.betas[t], self.abars[t], self.abars[t - 1]
            angles = torch.full((*obs.shape[:2], 1), t) / 10_000 ** (torch.arange(8) / 8)
            embedding = self.time_mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))
            noise = self.network(torch.cat([obs, x, embedding], dim=-1))
            x_0 = torch.clamp((x - (1 - abar).sqrt() * noise) / abar.sqrt(), -1, 1)
            x = abar_prev.sqrt() * beta / (1 - abar) * x_0 + (1 - beta).sqrt() * (1 - abar_prev) / (1 - abar) * x
            if t > 1:
                x = x + (beta * (1 - abar_prev) / (1 - abar)).sqrt() * torch.randn_like(x)
        return x


def medians(contenders, rounds=12, repeats=UPDATES_PER_ROUND):
    """Median seconds per call of each function, called in turns."""
    times = {name: [] for name in contenders}
    for round_index in range(rounds + 1):
        for name, function in contenders.items():
            for _ in range(repeats):
                start = time.perf_counter()
                function()
                if round_index > 0:  # the first round is burn-in
                    times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in times.items()}


def at_precision(precision, function):
    torch.set_float32_matmul_precision(precision)
    return function()


def count_flops(function):
    counter = FlopCounterMode(display=False)
    with counter:
        function()
    return counter.get_total_flops()


def full_buffer(script, args, obs_dim=OBS_DIM, action_dim=ACTION_DIM):
    """A replay buffer full of random transitions, in episodes of some ten steps."""
    buffer = script.ReplayBuffer(args, obs_dim, action_dim, torch.device("cpu"))
    buffer.rows.uniform_(-1, 1)
    buffer.rows[..., -2] = 0
    buffer.rows[..., -1] = (buffer.rows[..., -1] > 0.8).float()
    buffer.size = len(buffer.rows)
    return buffer


def drac_program(script, num_envs=1, *more):
    """Steps per second of the script as shipped, without evaluations: the median of its own log after burn-in."""
    flags = ["--env-id", ENV_ID, "--total-timesteps", str(PROGRAM_STEPS * num_envs), "--evaluation-interval", "0"]
    flags += ["--num-envs", str(num_envs), *more]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        events = EventAccumulator(str(script.main([*flags, "--run-dir", folder])))
        events.Reload()
        speeds = [event.value for event in events.Scalars("charts/steps_per_second") if event.step > BURN_IN * num_envs]
    return float(np.median(speeds))


def in_its_own_process(package, precision, device="cpu"):
    """`sac_program`, away from what DrAC's program sets (its way to keep memory)."""
    command = [sys.executable, __file__, "sac", package, precision, device]
    return float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.split()[-1])


def sac_program(package, precision, device):
    """Steps per second of Stable-Baselines3's or SBX's SAC with its own defaults, timed in the same way."""
    from stable_baselines3.common.callbacks import BaseCallback

    class Clock(BaseCallback):
        def _init_callback(self):
            self.times = []

        def _on_step(self):
            if self.num_timesteps % 500 == 0:
                self.times.append(time.perf_counter())
            return True

    torch.set_float32_matmul_precision(precision)
    clock = Clock()
    sac = importlib.import_module(package).SAC(
        "MlpPolicy", drac_amort.make_env(ENV_ID), learning_starts=256, device=device
    )
    sac.learn(PROGRAM_STEPS, clock)
    return float(np.median(500 / np.diff(clock.times)))


def checkpoints():
    """Seconds and bytes of one checkpoint with a full buffer of a million transitions, and what it stalls."""
    print("One checkpoint with a million transitions")
    for env_id in (ENV_ID, "Humanoid-v4"):
        env = drac_amort.make_env(env_id)
        args = drac_amort.default_args(env_id)
        sizes = (env.observation_space.shape[0], env.action_space.shape[0])
        agent = drac_amort.DrAC(args, *sizes, torch.device("cpu"))
        agent.fingerprint = ""
        buffer = full_buffer(drac_amort, args, *sizes)
        update = medians({"": lambda agent=agent, buffer=buffer: agent.update(buffer.sample(BATCH_SIZE))}, 2)[""]
        with tempfile.TemporaryDirectory() as path:
            args.run_dir, seconds = path, []
            with runner.Run(drac_amort, agent, {}) as run:
                for _ in range(3):
                    start = time.perf_counter()
                    run.save_checkpoint(0, buffer, 0.0)
                    seconds.append(time.perf_counter() - start)
                size = (run.path / "checkpoint.pt").stat().st_size
        stall = np.median(seconds) / (args.checkpoint_interval * update)  # updates are nearly all of a step's time
        print(f"  {env_id:34}{np.median(seconds):8.2f} s {size / 1e6:8,.0f} MB", end="")
        print(f", {stall:.2%} of {args.checkpoint_interval:,} updates of {update * 1e3:.1f} ms")
    print()


def load_policy(script, config, weights, flags):
    args = script.Args(**{**config, **flags})
    env = drac_amort.make(args)
    agent = script.DrAC(args, env.observation_space.shape[0], env.action_space.shape[0], torch.device("cpu"))
    agent.load_state_dict(weights, strict=False)  # the actor's may be all
    return agent


def inspect_policy(file, num_states=256, num_draws=100):
    """The noise of DrAmort's estimates of D(s), over the noise of its actions; the saturation of DrDiffus's bounds."""
    model = torch.load(file, map_location="cpu", weights_only=True)
    script = {"drac_amort": drac_amort, "drac_diffus": drac_diffus}[model["script"]]
    agent, seen = load_policy(script, model["config"], model["weights"], {}), []

    def policy(obs, starts):
        seen.append(obs)
        return drac_amort.act(agent.actor, obs, agent.actor.sample_latents(1, len(obs)))

    torch.manual_seed(0)
    episodes = envs.play_episodes(policy, [drac_amort.make(agent.args) for _ in range(20)], 20, seed=0)
    lengths = np.array([len(episode.infos) - 1 for episode in episodes])
    visited = np.concatenate([obs[lengths > step] for step, obs in enumerate(seen)])  # by episodes that go on
    states = torch.as_tensor(np.random.default_rng(0).choice(visited, num_states), dtype=torch.float32)
    if script is drac_diffus:
        clip, passed = agent.actor.clip, []

        def spy(estimate):
            with torch.enable_grad():
                estimate.requires_grad_()
                passed.append(torch.autograd.grad(clip(estimate).sum(), estimate)[0])
            return clip(estimate)

        agent.actor.clip = spy
        with torch.no_grad():
            actions = agent.actor(states, agent.actor.sample_latents(num_draws, num_states))
        border = (actions.abs() > 0.99).float().mean()
        first, second = actions.split(num_draws // 2)
        coincide = (first == second).all(dim=-1).float().mean()
        print(f"  --clip {agent.args.clip}, step {model['global_step']:,}, {num_states} states:")
        print(
            f"  {border:.1%} of the actions' coordinates within 0.01 of the border, {coincide:.2%} of pairs identical"
        )
        for t, slopes in zip(range(len(passed), 0, -1), passed, strict=True):
            print(f"  t = {t:2}: slope of the bound below 0.01 in {(slopes < 0.01).float().mean():.1%}", end="")
            print(f", on average {slopes.mean():.3f}")
        return

    def draw(flags):
        """num_draws independent estimates (num_draws, states), what the critics' targets bootstrap with them (the
        same), and gradients of the estimates' means (num_draws, parameters)."""
        agent = load_policy(script, model["config"], model["weights"], {"num_action_samples": 4, **flags})
        estimates, values, gradients = [], [], []
        for _ in range(num_draws):
            actions = agent.actor(states, agent.actor.sample_latents(agent.args.num_action_samples, num_states))
            estimates.append(agent.diversity(actions))
            with torch.no_grad():
                q = agent.qf_target(states, actions[-1]).amin(dim=0)
                values.append(q + agent.alpha() * estimates[-1])
            gradient = torch.autograd.grad(estimates[-1].mean(), list(agent.actor.parameters()))
            gradients.append(torch.cat([part.flatten() for part in gradient]))
        return torch.stack(estimates).detach(), torch.stack(values), torch.stack(gradients)

    def deviation(draws):
        return draws.var(dim=0).mean().sqrt()

    # Rare pairs that nearly coincide have huge gradients: medians say what a typical update sees, variances would not.
    torch.manual_seed(0)
    truth = draw({"num_action_samples": 32, "pairing": "all"})[2].median(dim=0).values
    for name, flags in {"one pair (M = 2)": {"num_action_samples": 2}, **ESTIMATORS}.items():
        estimates, values, gradients = draw({"pairing": "all", **flags})
        error = (gradients - truth).norm(dim=1).median() / truth.norm()
        print(
            f"  {name:34} mean {estimates.mean():.3f}, standard deviation {deviation(estimates):.3f}",
            end="",
        )
        print(f"; median relative error of the gradient {error:.2f}", end="")
        critics = "qf_target.weights.0" in model["weights"]  # a published policy is an actor alone
        print(f"; standard deviation of min Q' + alpha D {deviation(values):.3f}" if critics else "")


def in_turns(programs):
    """Median steps per second of each program."""
    speeds = {name: [] for name in programs}
    for _ in range(PROGRAM_ROUNDS):
        for name, program in programs.items():
            speeds[name].append(program())
    return {name: float(np.median(values)) for name, values in speeds.items()}


def gpu():
    """Steps per second on a CUDA GPU, beside the CPU's and Stable-Baselines3's SAC on the same GPU."""
    if not torch.cuda.is_available():
        return print("(no CUDA GPU is here)\n")
    print(f"Whole programs, {torch.cuda.get_device_name()}", flush=True)
    programs = {"DrAmort on the CPU": lambda: drac_program(drac_amort)}
    for name, script in (("DrAmort", drac_amort), ("DrDiffus", drac_diffus)):
        for flags, num_envs in (("--cuda", 1), ("--cuda", 16), ("--cuda --no-cudagraphs", 1)):
            program = functools.partial(drac_program, script, num_envs, *flags.split())
            programs[f"{name} {flags}, N = {num_envs}"] = program
    if find_spec("stable_baselines3"):
        sac = functools.partial(in_its_own_process, "stable_baselines3", "highest", "cuda")
        programs["Stable-Baselines3's SAC there"] = sac
    for name, speed in in_turns(programs).items():
        print(f"  {name:36}{speed:9.1f} steps/s")
    print()


def whole_programs():
    """Steps per second of the script as shipped, of Stable-Baselines3's SAC, and of the environments alone."""
    print("Whole programs", flush=True)
    programs = {
        "DrAmort, 16 environments": lambda: drac_program(drac_amort, 16),
        "DrAmort, as shipped": lambda: drac_program(drac_amort),
        "DrAmort, precision highest": lambda: drac_program(drac_amort, 1, "--matmul-precision", "highest"),
    }
    drac_program(drac_amort)
    peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    for name, package, module in (
        ("SBX", "sbx-rl", "sbx"),
        ("Stable-Baselines3", "stable-baselines3", "stable_baselines3"),
    ):
        if find_spec(module):
            if name != "SBX":
                programs[f"{name}, precision medium"] = functools.partial(in_its_own_process, module, "medium")
            programs[f"{name} {version(package)} SAC"] = functools.partial(in_its_own_process, module, "highest")
        else:
            print(f"({package} is not installed: no comparison)")
    speeds = in_turns(programs)
    reference = list(speeds.values())[-1]
    for name, speed in speeds.items():
        comparable = find_spec("stable_baselines3") and "environments" not in name  # that program updates less often
        ratio = f"{speed / reference:8.2f} x" if comparable else ""
        print(f"  {name:34}{speed:9.1f} steps/s{ratio}")
    print(f"  peak memory of this process up to {PROGRAM_STEPS:,} steps of DrAmort: {peak_memory:,.0f} MiB")
    names = [f"MultiGoalPointMaze-{name}-v0" for name in ("Simple", "Medium", "Hard")]
    alone = {name: drac_amort.make_env(name) for name in (*names, "LevelGeneration-MultiFacet-v0")}

    def step(env):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()

    for env in alone.values():
        env.reset(seed=0)
    seconds = medians({name: functools.partial(step, env) for name, env in alone.items()}, repeats=200)
    for name, value in seconds.items():
        print(f"  {name} alone {1 / value:13,.0f} steps/s")
    print()


def updates():
    """Milliseconds per update of both scripts, against the paper's way."""
    buffer = full_buffer(drac_amort, drac_amort.Args(buffer_size=100_000))
    x, weight = torch.randn(1024, 256), torch.randn(256, 256)
    product = f"a matrix product of {tuple(x.shape)} and {tuple(weight.shape)}"
    for script, variants, plain, reference, rounds in (
        (drac_amort, ESTIMATORS, PaperUpdate(), "the paper's way, plainly (M = 17)", 12),
        (drac_diffus, CHAINS, PaperDiffusionUpdate(), "the paper's way, plainly (M = 17, T = 20)", 3),
    ):
        agents = {
            name: script.DrAC(script.Args(beta=0.5, **flags), OBS_DIM, ACTION_DIM, torch.device("cpu"))
            for name, flags in variants.items()
        }
        agents[reference] = plain
        functions = {
            name: lambda agent=agent: agent.update(buffer.sample(BATCH_SIZE)) for name, agent in agents.items()
        }
        functions[product] = lambda: x @ weight
        contenders = {
            (name, precision): functools.partial(at_precision, precision, function)
            for name, function in functions.items()
            for precision in ("highest", "medium")
        }
        seconds = medians(contenders, rounds)
        for precision in ("highest", "medium"):
            peak = 2 * x.numel() * weight.shape[1] / seconds[product, precision]
            print(f"One update, precision {precision}; the machine's matrix products reach {peak / 1e9:.0f} GFLOP/s")
            for name in agents:
                flops, own = count_flops(functions[name]), seconds[name, precision]
                print(
                    f"  {name:42}{own * 1e3:9.2f} ms{seconds[reference, 'highest'] / own:8.2f} x"
                    f"{flops / 1e9:8.2f} GFLOP{flops / own / peak:6.0%} of the products' speed"
                )
        print()


def steps():
    """How the time of one environment step divides up, in the states that a policy visits while it is trained."""
    print(f"One step of training, {ENV_ID}")
    env = drac_amort.make_env(ENV_ID)
    args = drac_amort.default_args(ENV_ID)
    agent = drac_amort.DrAC(args, OBS_DIM, ACTION_DIM, torch.device("cpu"))
    buffer = drac_amort.ReplayBuffer(args, OBS_DIM, ACTION_DIM, torch.device("cpu"))
    noise, starts = drac_amort.HeldLatents(agent.actor, args.hold_steps), np.ones(1, bool)
    parts = {name: [] for name in ("acting", "environment", "storing", "sampling", "update")}
    obs, _ = env.reset(seed=0)
    for step in range(1000):
        times = [time.perf_counter()]
        action = drac_amort.act(agent.actor, obs[None], noise(starts))[0]
        times.append(time.perf_counter())
        next_obs, reward, terminated, truncated, _ = env.step(action)
        next_start = env.reset()[0] if terminated or truncated else next_obs
        times.append(time.perf_counter())
        ends = np.array([terminated or truncated])
        buffer.add(obs[None], action[None], next_obs[None], np.array([reward]), np.array([terminated]), ends)
        times.append(time.perf_counter())
        batch = buffer.sample(BATCH_SIZE)
        times.append(time.perf_counter())
        agent.update(batch)
        times.append(time.perf_counter())
        obs = next_start
        if step > 200:
            for name, seconds in zip(parts, np.diff(times), strict=True):
                parts[name].append(seconds)
    seconds = {name: np.median(values) for name, values in parts.items()}
    for name, value in seconds.items():
        print(f"  {name:34}{value * 1e3:9.3f} ms{value / sum(seconds.values()):8.1%}")
    print(f"  all but the update {1 - seconds['update'] / sum(seconds.values()):23.1%}\n")


def scaling():
    """How the time of an update grows, one size at a time, and what memory a full replay buffer takes."""
    x, weight = torch.randn(1024, 256), torch.randn(256, 256)
    fill = {"transitions stored": [{"buffer_size": 10**exponent} for exponent in (4, 5, 6)]}
    axes = {
        "n": [{"n_steps": n} for n in (1, 5, 20)],
        "M": [{"num_action_samples": m} for m in (2, 4, 8, 16, 32)],
        "batch": [{"batch_size": size} for size in (64, 256, 1024, 4096)],
        "action dimensions": [{"action_dim": d} for d in (2, 6, 17)],
        **fill,
        "T": [{"diffusion_steps": steps} for steps in (1, 2, 5, 10, 20)],
    }
    for axis, settings in axes.items():
        script, contenders = drac_diffus if axis == "T" else drac_amort, {}
        for flags in settings:
            (value,), flags = flags.values(), dict(flags)
            action_dim = flags.pop("action_dim", ACTION_DIM)
            args = script.Args(**{"beta": 0.5, "buffer_size": 100_000, **flags})
            agent = script.DrAC(args, OBS_DIM, action_dim, torch.device("cpu"))
            buffer = full_buffer(script, args, action_dim=action_dim)
            contenders[f"{value:,}"] = lambda agent=agent, buffer=buffer: agent.update(
                buffer.sample(agent.args.batch_size)
            )
        seconds = medians({**contenders, "": lambda: x @ weight}, rounds=5, repeats=6)
        peak = 2 * x.numel() * weight.shape[1] / seconds.pop("")
        print(f"{script.__name__}: one update against {axis}")
        for name, value in seconds.items():
            share = count_flops(contenders[name]) / value / peak
            print(f"  {name:>12}{value * 1e3:10.2f} ms{share:8.0%} of the speed of matrix products")
        print(flush=True)
    print("Peak memory of a process with a full replay buffer of a million transitions, after 10 updates")
    for name, obs_dim, action_dim in (("Walker2d", 17, 6), ("Humanoid", 376, 17), ("none", 0, 0)):
        code = (
            "import torch, drac_amort as d\n"
            f"args, cpu = d.Args(beta=0.5), torch.device('cpu')\n"
            f"if {obs_dim}:\n"
            f"    agent = d.DrAC(args, {obs_dim}, {action_dim}, cpu)\n"
            f"    buffer = d.ReplayBuffer(args, {obs_dim}, {action_dim}, cpu)\n"
            "    buffer.size = len(buffer.rows.uniform_(-1, 1))\n"
            "    [agent.update(buffer.sample(256)) for _ in range(10)]\n"
            "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        root = Path(__file__).parent.parent
        process = subprocess.run([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, check=True)
        mebibytes = int(process.stdout) / 2**10
        rows = 1_000_000 * (2 * obs_dim + action_dim + 3) * 4 / 2**20 if obs_dim else 0
        print(f"  {name:12}{mebibytes:8,.0f} MiB; the buffer's rows are {rows:,.0f}")


TABLES = {
    "programs": whole_programs,
    "gpu": gpu,
    "checkpoints": checkpoints,
    "updates": updates,
    "steps": steps,
    "scaling": scaling,
}


def main():
    if sys.argv[1:2] == ["sac"]:
        return print(sac_program(*sys.argv[2:]))
    runner.keep_memory()
    if len(sys.argv) == 2 and Path(sys.argv[1]).is_file():
        return inspect_policy(sys.argv[1])
    if unknown := set(sys.argv[1:]) - set(TABLES):
        sys.exit(f"error: {', '.join(unknown)}: no model.pt, and no table of {', '.join(TABLES)}")
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {ENV_ID} sizes, batch {BATCH_SIZE}\n")
    for name in sys.argv[1:] or TABLES:
        runner.set_matmul_precision(drac_amort.Args())
        print(f"Where none is named, precision {torch.get_float32_matmul_precision()}")
        TABLES[name]()


if __name__ == "__main__":
    main()
