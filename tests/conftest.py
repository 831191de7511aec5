"""What all tests share: the scripts under test, and a small environment that misbehaves on request."""

import multiprocessing.forkserver
import os
import signal
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: small networks gain nothing from more

import gymnasium as gym
import numpy as np
import pytest
import torch

import drac_amort
import drac_diffus
import envs

os.fsync = lambda descriptor: None  # no test cuts the power; a disk at work takes 4 to 40 ms for each of 1,500
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests are a background job
SCRIPTS = [drac_amort, drac_diffus]
SMALL = {drac_amort: {}, drac_diffus: {"diffusion_steps": 3}}  # flags that make a script's actor fast


# Where no actor is involved, one script is enough: test_actors.py compares all the rest of their sources.
one_script = pytest.mark.parametrize("script", [drac_amort], ids=["drac_amort"])


@pytest.fixture(scope="session", autouse=True)
def forking_process(request):
    """The process that `forked` forks imports everything while the first tests run."""
    if {item.path.name for item in request.session.items} & {"test_levels.py", "test_resume.py"}:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # from which it imports
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # where there is a GPU, Adam asks for its stream: not in a fork
            multiprocessing.set_forkserver_preload(["torch._dynamo", "test_resume"])  # the former: what Adam imports
            multiprocessing.forkserver.ensure_running()


def forked(tmp_path, function, *args):
    """Call a function in a fork of a process that has imported everything. Its stderr goes to a file."""
    processes = multiprocessing.get_context("forkserver")
    process = processes.Process(target=with_stderr_in, args=(tmp_path / "stderr", function, *args))
    process.start()
    return process


def with_stderr_in(file, function, *args):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    envs.animate_trajectories = envs.plot_trajectories = lambda *args: None  # they take most of a short run
    function(*args)


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.__name__)
def script(request):
    return request.param


@pytest.fixture(autouse=True)
def precision():
    """Whatever a run has set, the next test multiplies in float32."""
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def float64():
    """All new tensors are float64, so that comparisons with references can be tight."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def make_agent(script):
    """Build an agent with small networks; flags by keyword."""

    def make(obs_dim=5, action_dim=3, **flags):
        torch.manual_seed(0)
        args = script.Args(**{"hidden_size": 32, "batch_size": 16, "beta": 0.5, **SMALL[script], **flags})
        return script.DrAC(args, obs_dim, action_dim, torch.device("cpu"))

    return make


@pytest.fixture
def run(script, tmp_path):
    """Run the script's main; returns the folder of the run."""

    def start(*argv, env_id="Test/Corridor-v0"):
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL[script].items()]
        new_run = ["--env-id", env_id, *flags] if env_id else []
        return script.main([*new_run, "--run-dir", str(tmp_path / f"run {len(os.listdir(tmp_path))}"), *argv])

    return start


def random_batch(script, batch_size=16, obs_dim=5, action_dim=3, seed=0):
    rng = np.random.default_rng(seed)

    def tensor(array):
        return torch.as_tensor(array, dtype=torch.get_default_dtype())

    return script.Batch(
        obs=tensor(rng.normal(size=(batch_size, obs_dim))),
        actions=tensor(rng.uniform(-1, 1, (batch_size, action_dim))),
        rewards=tensor(rng.normal(size=batch_size)),
        next_obs=tensor(rng.normal(size=(batch_size, obs_dim))),
        discounts=tensor(0.9 ** rng.integers(1, 4, batch_size) * (rng.random(batch_size) > 0.3)),
    )


class Corridor(gym.Env):
    """Walk along a line for 7 steps, with actions in [-2, 4]; from `fault_step` on, show the `fault`."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(np.float32(-2), np.float32(4), (1,))

    def __init__(self, fault=None, fault_step=150):
        self.fault, self.fault_step, self.total_steps, self.actions = fault, fault_step, 0, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = float(self.np_random.normal())
        return self._observation(), {}

    def step(self, action):
        self.total_steps += 1
        self.actions.append(np.array(action))
        self.position += float(action[0])
        reward = -abs(self.position)
        if self.total_steps >= self.fault_step:
            if self.fault == "interrupt" and self.total_steps == self.fault_step:
                os.kill(os.getpid(), signal.SIGINT)
            if self.fault == "crash" and self.total_steps == self.fault_step:
                raise RuntimeError("the simulator crashed")
            if self.fault == "nan reward":
                reward = float("nan")
            if self.fault == "nan observation":  # the last of an episode
                return np.full(2, np.nan, np.float32), reward, True, False, {}
            if self.fault == "huge reward":
                reward = 1e30
        return self._observation(), reward, self.position > 5, False, {"path": np.zeros(int(10 * abs(self.position)))}

    def _observation(self):
        return np.array([self.position, 1.0], np.float32)


class Odd(Corridor):
    """What Gymnasium does not mind, or only warns of: lists, arrays of one entry, our names, huge bounds."""

    metadata = {"render_modes": None}
    action_space = gym.spaces.Box(np.finfo(np.float32).min, np.finfo(np.float32).max, (1,))
    fingerprint = np.zeros(3)

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0].tolist(), {"episode": 1}

    def step(self, action):
        assert np.isfinite(action).all()
        obs, reward, terminated, truncated, _ = super().step(np.sign(action))
        return obs.tolist(), *(np.array([x]) for x in (reward, terminated, truncated)), {"episode": 2}


class Spaces(gym.Env):
    """An environment with any spaces, never to be stepped."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space


BOX = gym.spaces.Box(-1, 1, (2,))
for _fault in (None, "interrupt", "crash", "nan reward", "nan observation", "huge reward"):
    _name = f"Test/Corridor{(_fault or '').title().replace(' ', '')}-v0"
    gym.register(_name, lambda fault=_fault: Corridor(fault), max_episode_steps=7)
gym.register("Test/Odd-v0", Odd, max_episode_steps=7)
for _name, _obs, _actions in (
    ("Discrete", BOX, gym.spaces.Discrete(3)),
    ("Unbounded", BOX, gym.spaces.Box(-np.inf, np.inf, (2,))),
    ("HalfBounded", BOX, gym.spaces.Box(-np.inf, 1, (2,))),
    ("Integers", BOX, gym.spaces.Box(0, 4, (2,), np.int64)),
    ("Fixed", BOX, gym.spaces.Box(1, 1, (2,))),
    ("Dict", gym.spaces.Dict({"position": BOX}), BOX),
    ("Image", gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), BOX),
):
    gym.register(f"Test/{_name}-v0", lambda obs=_obs, actions=_actions: Spaces(obs, actions))
