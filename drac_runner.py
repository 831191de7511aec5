"""What makes a run of a script's training loop: flags, evaluations, files, checkpoints and exact resume, CUDA graphs.

Of the method there is nothing in here but a warning about beta. `drac_amort.py` and `drac_diffus.py` train without this
file, too; with it
  - the policy is evaluated as it learns, and its losses are logged;
  - `--resume` goes on with a run (on a CPU bit for bit), `--evaluate` plays a model; on a GPU CUDA graphs train;
  - bad input gets one sentence before any work starts, and no fault (a full disk, a killed process, a loss that
    diverges) costs the last checkpoint or the last good model.
In here `script` is the module of either of the two. Begin at the end, with `launch` and `train`.
"""

import contextlib
import csv
import ctypes
import gc
import io
import itertools
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Annotated, BinaryIO, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import tyro
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:
    from envs import MAPS, animate_episode, evaluate_policy, final_trials, parse_map
except ImportError as error:  # no envs.py here: all other environments, of which returns are evaluated
    if error.name != "envs":  # but a package that envs.py needs is missing
        raise
    final_trials = MAPS = None

    def evaluate_policy(policy: Callable, make: Callable, num_episodes: int, seed: int, *unused: object) -> dict:
        env, returns = make(), np.zeros(num_episodes)
        for episode in range(num_episodes):
            obs, starts, done = env.reset(seed=seed + episode)[0], np.ones(1, bool), False
            while not done:
                obs, reward, terminated, truncated, _ = env.step(policy(np.asarray(obs)[None], starts)[0])
                returns[episode] += np.asarray(reward).item()
                starts, done = np.zeros(1, bool), terminated or truncated
        env.close()
        return {"episodic_return_mean": float(np.mean(returns)), "episodic_return_std": float(np.std(returns))}


if TYPE_CHECKING:
    from drac_amort import Args, DrAC, ReplayBuffer

FORMAT = 2  # of model.pt and checkpoint.pt
# The flags that --resume and --evaluate may change; all others are the run's.
BOTH = {"cuda", "evaluation_episodes", "final_trials"}
RESUMABLE = {"resume", "total_timesteps", "evaluation_interval", "cudagraphs", *BOTH}
PLAYABLE = {"evaluate", "env_kwargs", "seed", "matmul_precision", "run_dir", "hold_steps", *BOTH}
RESULTS = {"model.pt", "best_model.pt", "checkpoint.pt", "evaluations.csv"}  # a run that cannot write one has failed
LOG_INTERVAL = 500  # iterations between two looks at the losses, each of which waits for a GPU
HELD_STEPS = 20.0  # hold_steps of the final trials with held noise, unless --evaluate names another


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a run as Ctrl-C does, and keep TensorBoard's thread quiet."""
    handlers, hook = {}, threading.excepthook
    if threading.current_thread() is threading.main_thread():
        for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            if signal.getsignal(number) == signal.SIG_DFL:  # else it is to be ignored: nohup
                handlers[number] = signal.signal(number, signal.default_int_handler)
    # What stops that thread, a full disk, is raised again by the next call.
    threading.excepthook = lambda args: isinstance(args.exc_value, OSError) or hook(args)
    try:
        yield
    finally:
        threading.excepthook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)


def is_lack_of_memory(error: BaseException | None) -> bool:
    """Whether Python, NumPy or PyTorch found too little of it, on a CPU or a GPU."""
    words = "allocate memory", "out of memory", "bad_alloc", "ALLOC_FAILED"
    told = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return told or isinstance(error, MemoryError)


def keep_memory() -> None:
    """Let Linux' malloc keep what an update frees: fetching it anew takes up to a fifth of an update."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # a C library other than glibc
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: smaller blocks come from the heap; this is glibc's limit
            mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD: the heap is trimmed only when this much is free at its top


mujocos_warnings = deque(maxlen=100)


def keep_mujocos_warnings() -> None:
    """Let MuJoCo collect its warnings, which else it writes to MUJOCO_LOG.TXT in the working directory, too.

    By a function in C: an exception in one in Python, even of a signal, would abort the process.
    """
    if find_spec("mujoco"):
        import mujoco

        mujoco.set_mju_user_warning(mujocos_warnings.append)


def set_matmul_precision(args: "Args") -> None:
    """Set PyTorch's precision of matrix products; auto: medium on CPUs where a probe finds it exact, as on AMD's."""
    torch.set_float32_matmul_precision(args.matmul_precision.replace("auto", "medium"))
    probe = torch.full((256, 256), 1 + 2**-12)  # bfloat16: rounded to 1
    if args.matmul_precision == "auto" and (args.cuda or not torch.equal(probe @ torch.eye(len(probe)), probe)):
        torch.set_float32_matmul_precision("highest")


# The command line


def check_flags(args: "Args") -> "Args":
    """Return the flags. Raises ValueError, in one sentence, if one has another type than in Args, or another range."""
    for name, kind in get_type_hints(type(args), include_extras=True).items():
        value, accepted = getattr(args, name), getattr(kind, "__name__", str(kind))
        if get_origin(kind) is Annotated:
            kind, accepted = get_args(kind)  # int or float, and an interval such as "[0, 1)"
            low, high = map(float, accepted[1:-1].split(","))
            fits = type(value) is kind and low <= value <= high
            fits = fits and (value > low or accepted[0] == "[") and (value < high or accepted[-1] == "]")
            accepted = f"in {accepted}"
        else:
            fits = value in get_args(kind) if get_origin(kind) is Literal else isinstance(value, kind)
        if not fits:
            raise ValueError(f"--{name.replace('_', '-')} must be {accepted}, got {value!r}")
    kwargs = None
    with contextlib.suppress(ValueError, RecursionError):
        kwargs = json.loads(args.env_kwargs)
    if not isinstance(kwargs, dict):
        raise ValueError(f"--env-kwargs must be a JSON object, got {args.env_kwargs}")
    if args.total_timesteps <= args.learning_starts:
        raise ValueError(f"--total-timesteps must exceed --learning-starts {args.learning_starts}")
    if min(args.buffer_size, args.total_timesteps) < args.n_steps * args.num_envs:
        raise ValueError("--buffer-size and --total-timesteps must not be less than --n-steps times --num-envs")
    return args


def keep_maze(args: "Args") -> "Args":
    """The flags with the rows of a maze instead of its file, which may be edited or lost in the course of the run."""
    kwargs = json.loads(args.env_kwargs)
    maze_map = kwargs.get("maze_map")
    if MAPS and "MultiGoalPointMaze-" in args.env_id and isinstance(maze_map, str) and maze_map not in MAPS:
        with contextlib.suppress(ValueError):  # make_env will say what is wrong with it
            return replace(args, env_kwargs=json.dumps(kwargs | {"maze_map": parse_map(maze_map)}))
    return args


def read_flags(argv: list[str] | None, defaults: "Args", **options: object) -> "Args | tuple[Args, list[str]]":
    """Let tyro read the command line. Raises ValueError with the first sentence of what it has to say."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            return tyro.cli(type(defaults), args=argv, default=defaults, **options)
        except SystemExit as error:
            if not error.code:  # --help
                raise
            lines = [line.strip("│ ") for line in stderr.getvalue().splitlines()]  # in a box: title, sentence, help
            lines = [line for line in lines if line.strip("╭╮╰╯─-")][1:]
            raise ValueError(" ".join(itertools.takewhile(lambda line: "helptext" not in line, lines))) from error


def parse_args(script: ModuleType, argv: list[str] | None) -> "tuple[Args, dict]":
    """Read the flags, and the file that --evaluate or --resume names. Raises ValueError on bad input."""
    args, _ = read_flags(argv, script.Args(), add_help=False, return_unknown_args=True)
    if "" in (args.evaluate, args.resume):
        raise ValueError("--evaluate and --resume take a path")
    if args.evaluate and args.resume:
        raise ValueError("--evaluate and --resume exclude each other")
    defaults, state, free = script.default_args(args.env_id, args.paper), {}, set(vars(args))
    if args.resume:
        state, free = load(script, Path(args.resume, "checkpoint.pt")), RESUMABLE
        defaults = state["config"]
    elif args.evaluate:
        state, free = load(script, Path(args.evaluate)), PLAYABLE
        defaults = replace(state["config"], cuda=False, run_dir=script.Args.run_dir, hold_steps=1.0)
    # Read again: what the flags default to depends on environment, --paper and file.
    defaults, description = replace(defaults, evaluate=None, resume=None), script.__doc__.split("\n\n")[0]
    args = check_flags(read_flags(argv, defaults, description=description))
    if args.evaluate and args.env_kwargs != defaults.env_kwargs:  # what is not named stays the run's
        args.env_kwargs = json.dumps(json.loads(defaults.env_kwargs) | json.loads(args.env_kwargs))
    args = keep_maze(args)
    for name in vars(args):
        if name not in free and getattr(args, name) != getattr(defaults, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} {getattr(args, name)} contradicts the run's {getattr(defaults, name)}")
    if args.resume and args.total_timesteps < defaults.total_timesteps:
        raise ValueError(f"--total-timesteps {args.total_timesteps} is less than the run's {defaults.total_timesteps}")
    if args.cuda and not torch.cuda.is_available():
        raise ValueError("--cuda is on, but PyTorch finds no CUDA GPU here (on the CPU: --no-cuda)")
    return args, state


# Files


class Run(contextlib.AbstractContextManager):
    """A run's folder and what is written to it. What cannot be written costs a warning, once, and never the run.

    As a context it says in one sentence why a run has ended before its time.
    """

    def __init__(self, script: ModuleType, agent: "DrAC", state: dict, argv: Sequence[str] = ()) -> None:
        """Make a new folder, or go on in the one that --resume names: what was logged after `state` is dropped.

        Raises ValueError or OSError if that is not possible.
        """
        args, now = agent.args, f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6}"
        self.script, self.agent, self.argv = script, agent, argv
        self.warned, self.failed, self.best_return = set(), {}, -math.inf
        self.evaluations = {}  # rows of evaluations.csv, by their global_step
        name = f"{args.env_id}__{Path(script.__file__).stem}__{args.seed}__{now}".replace("/", "_").replace(":", "_")
        self.path = Path(args.resume) if args.resume else Path(args.run_dir, name)
        self.saved_step = state["global_step"] if args.resume else -1  # of checkpoint.pt
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.path / ".lock", blocking=False)
        try:
            with self.lock:  # let go of if `begin` fails
                self.begin()
                self.lock.acquire()  # once more: held until the run's end
        except Timeout as error:
            raise ValueError(f"another process is at work in {self.path}: it holds the lock on .lock") from error

    def begin(self) -> None:
        """Read what the folder has up to the checkpoint, and open the log."""
        args, global_step = self.agent.args, self.saved_step
        if (file := self.path / "evaluations.csv").exists():
            try:
                for row in csv.DictReader(file.read_text().splitlines()):
                    row["global_step"] = int(row["global_step"])
                    row["episodic_return_mean"] = float(row["episodic_return_mean"])
                    if row["global_step"] <= global_step:
                        self.evaluations[row["global_step"]] = row
            except (LookupError, TypeError, ValueError, csv.Error) as error:
                raise ValueError(f"{file} is damaged") from error
        with contextlib.suppress(ValueError, LookupError):  # one that is missing or damaged makes way for the next
            self.best_return = load(self.script, self.path / "best_model.pt")["best_return"]
        (self.path / "summary.json").unlink(missing_ok=True)  # of a former end
        if not args.resume:
            versions = {name: version(name) for name in filter(find_spec, ("gymnasium", "mujoco", "numpy"))}
            versions["torch"] = torch.__version__  # with its build, such as +cu130
            resolved = {"matmul_precision": torch.get_float32_matmul_precision(), "versions": versions}
            config = json.dumps({**asdict(args), **resolved}, indent=2)
            (self.path / "config.json").write_text(config + "\n")
        self.writer = SummaryWriter(str(self.path), purge_step=global_step + 1)

    @contextlib.contextmanager
    def tolerate(self, name: str) -> Iterator[None]:
        """Around the writing of `name`."""
        try:
            yield
            self.failed.pop(name, None)
        except (OSError, RuntimeError, UnicodeError) as error:
            hidden = error.__context__ if isinstance(error, RuntimeError) and not error.__cause__ else None
            if isinstance(hidden, KeyboardInterrupt):  # torch.save tells neither of Ctrl-C nor of a full disk
                raise hidden from None
            cause = hidden if isinstance(hidden, OSError) else error
            self.failed[name] = str(cause)
            if name not in self.warned:
                self.warned.add(name)
                self.say(f"warning: {name} of {self.path} cannot be written: {cause}", "stderr")

    def say(self, text: str, stream: str = "stdout") -> None:
        """Print a line, above the progress bar."""
        with self.tolerate(stream), tqdm.external_write_mode():
            print(text, file=getattr(sys, stream), flush=True)

    def tell_mujocos_warnings(self) -> None:
        """Print what MuJoCo has warned of, each kind once."""
        while mujocos_warnings:
            text = mujocos_warnings.popleft().strip().partition(" at DOF")[0]
            if text not in self.warned and "'settotalmass' is deprecated" not in text:  # in HalfCheetah's own file
                self.warned.add(text)
                self.say(f"warning: MuJoCo: {text}", "stderr")

    def log(self, group: str, scalars: dict[str, float], global_step: int) -> None:
        """Show scalars in TensorBoard."""
        with self.tolerate("TensorBoard's log"):
            for name, value in scalars.items():
                self.writer.add_scalar(f"{group}/{name}", value, global_step)

    def write(self, name: str, content: Callable[[BinaryIO], object]) -> None:
        """Replace a file by a whole one, which `content` writes to a stream. If that fails, the old one stands."""
        with self.tolerate("TensorBoard's log"):  # first: --resume logs nothing again of what a file has
            self.writer.flush()
        temporary = self.path / f"{name}.tmp"
        with self.tolerate(name):
            try:
                with temporary.open("wb") as stream:
                    content(stream)
                    stream.flush()
                    os.fsync(stream.fileno())
                temporary.replace(self.path / name)
            finally:
                temporary.unlink(missing_ok=True)

    def add_evaluation(self, metrics: dict[str, float]) -> None:
        """Log an evaluation, then add its row to evaluations.csv: --resume takes what has one for done."""
        row = {name: value for name, value in metrics.items() if not name.startswith("final_")}
        self.log("evaluation", {name: metrics[name] for name in metrics if name != "global_step"}, row["global_step"])
        self.evaluations[row["global_step"]] = row
        table = [list(row), *([other.get(name, "") for name in row] for other in self.evaluations.values())]
        lines = [",".join(map(str, line)) for line in table]
        self.write("evaluations.csv", lambda stream: stream.write("\n".join([*lines, ""]).encode()))

    def save(self, name: str, global_step: int, **state: object) -> None:
        """Write weights, flags and `state` to a file. Raises FloatingPointError rather than save a NaN or infinity."""
        self.script.check_finite(global_step, **(weights := self.agent.state_dict()))
        state |= {"script": Path(self.script.__file__).stem, "format": FORMAT, "config": asdict(self.agent.args)}
        state |= {"fingerprint": self.agent.fingerprint, "global_step": global_step, "weights": weights}
        self.write(name, lambda stream: torch.save(state, stream))

    def save_checkpoint(self, global_step: int, buffer: "ReplayBuffer", seconds: float) -> None:
        """Write checkpoint.pt, all that --resume needs: the model, the optimizers, the replay and the time taken."""
        rows = torch.from_numpy(buffer.rows[: buffer.size].cpu().numpy())  # a view would be saved with all it views
        optimizers = [optimizer.state_dict()["state"] for optimizer in optimizers_of(self.agent)]
        self.save("checkpoint.pt", global_step, optimizers=optimizers, rows=rows, seconds=seconds)
        if "checkpoint.pt" not in self.failed:
            self.saved_step = global_step

    def finish(self, summary: dict[str, float]) -> None:
        """Write summary.json, and print it."""
        if "model.pt" in self.failed:  # the disk may have room for one, if not for two
            with self.tolerate("the last model.pt"):
                file = self.path / "model.pt"
                old = file.read_bytes() if file.exists() else b""
                try:
                    file.unlink(missing_ok=True)
                    self.save("model.pt", summary["global_step"])
                finally:
                    if old and not file.exists():
                        file.write_bytes(old)
        self.write("summary.json", lambda stream: stream.write(json.dumps(summary, indent=2).encode() + b"\n"))
        for name, value in summary.items():
            self.say(f"{name:32}{value:12,.3f}" if isinstance(value, float) else f"{name:32}{value:12,}")
        self.say(f"files in {self.path}")

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.tell_mujocos_warnings()
        with self.tolerate("TensorBoard's log"):
            self.writer.close()
        self.lock.release()
        if isinstance(error, FloatingPointError) or is_lack_of_memory(error):
            cause = " ".join(str(error).split()) or "out of memory"
            sys.exit(f"error: {cause}; what the run has left is in {self.path}")
        if isinstance(error, KeyboardInterrupt):
            file = Path(self.script.__file__)
            file = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
            flags = self.argv if self.agent.args.resume else ["--resume", self.path.as_posix()]
            command = shlex.join(["python", file.as_posix(), *flags])  # Windows takes slashes, too
            text = f"stopped; to go on from the checkpoint of step {self.saved_step:,}: {command}"
            sys.exit(text if self.saved_step >= 0 else "interrupted")
        if error is None and (lost := sorted(RESULTS & set(self.failed))):
            sys.exit(f"error: {', '.join(lost)} of {self.path} could not be written: {self.failed[lost[0]]}")


def optimizers_of(agent: "DrAC") -> list[torch.optim.Adam]:
    """In the order of checkpoint.pt."""
    return [agent.actor_optimizer, agent.qf_optimizer, agent.alpha_optimizer]


def load(script: ModuleType, file: Path) -> dict:
    """Read model.pt or checkpoint.pt; "config" becomes Args. Raises ValueError unless it is a whole one of ours."""
    state, name = {}, Path(script.__file__).stem
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()  # torch.load compares no checksums
        state = dict(torch.load(file, map_location="cpu", weights_only=True))
        config = {"matmul_precision": "highest"} | state["config"]  # files from before this flag
        known = (state["script"], state["format"]) == (name, FORMAT) and set(config) == set(vars(script.Args()))
        if damaged or not known:
            raise ValueError
        state["config"] = keep_maze(check_flags(script.Args(**config)))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except Exception as error:  # torch.load raises anything on a file that is not its own
        maker = str(state.get("script", name))
        what = f"of {maker}.py and" if maker != name else "damaged, of another version, or"
        raise ValueError(f"{file} is {what} no model.pt or checkpoint.pt of {name}.py") from error
    return state


def restore(state: dict, agent: "DrAC", buffer: "ReplayBuffer | None") -> None:
    """Put weights, and from a checkpoint optimizers and replay, back in place. Raises ValueError if they don't fit.

    Without a buffer nothing is trained: the actor's weights are enough.
    """
    args = agent.args
    try:
        missing, unexpected = agent.load_state_dict(state["weights"], strict=False)
        if unexpected or any(buffer is not None or name.startswith("actor.") for name in missing):
            raise ValueError(f"{[*missing, *unexpected]} are missing or unknown")
        if buffer is not None:
            for optimizer, values in zip(optimizers_of(agent), state["optimizers"], strict=True):
                optimizer.load_state_dict({**optimizer.state_dict(), "state": values})
            rows = state.pop("rows")  # pop: two copies may not fit into memory
            buffer.rows[: len(rows)] = rows
            iteration, capacity = state["global_step"] // args.num_envs, len(buffer.rows)
            buffer.position, buffer.size = iteration % capacity, min(iteration, capacity)
    except (LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"the saved state does not fit: {error}") from error
    if state["fingerprint"] != agent.fingerprint and state["config"].env_kwargs == args.env_kwargs:
        raise ValueError("the maze or the level generator is another one than in training")


# CUDA graphs


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
        if self.calls < 4:  # on the stream of the capture, as PyTorch's notes ask for
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.calls == 4:
            self.inputs = [x.clone() for x in inputs]
            gc.collect()  # a former graph, collected during the capture, would break it
            try:
                with torch.cuda.graph(self.graph, stream=self.stream):
                    self.outputs = self.function(*self.inputs)
            except RuntimeError as error:
                error.add_note("a CUDA graph cannot hold what waits for the GPU, such as .item(): try --no-cudagraphs")
                raise
        for static, x in zip(self.inputs, inputs, strict=True):
            static.copy_(x)
        self.graph.replay()
        return self.outputs


# A run


def evaluate(script: ModuleType, agent: "DrAC", run: Run, global_step: int, hold_steps: float, last: bool) -> dict:
    """Evaluate the stochastic policy; the last time also by the paper's final tests, with fresh noise and with held.

    Environments and noise are seeded on their own: training is the same with evaluation on or off (but for environments
    that draw from global generators).
    """
    args, make = agent.args, partial(script.make, agent.args)
    seed = int(np.random.SeedSequence([args.seed, 1]).generate_state(1)[0] // 2)  # halved: seed + episode fits, too
    policy = script.make_policy(agent, hold_steps)
    metrics = {"global_step": global_step}
    metrics |= evaluate_policy(policy, make, args.evaluation_episodes, seed, run.write, last)
    run.tell_mujocos_warnings()
    run.say(f"step {global_step:,}: mean return {metrics['episodic_return_mean']:.1f}")
    if last and final_trials:
        for prefix, steps in (("final", 1.0), ("final_held", hold_steps if hold_steps > 1 else HELD_STEPS)):
            trials = final_trials(script.make_policy(agent, steps), make, args.final_trials, seed)
            metrics |= {f"{prefix}_{name}": value for name, value in trials.items()}
    return metrics


def train(script: ModuleType, agent: "DrAC", buffer: "ReplayBuffer", run: Run, state: dict) -> dict[str, float]:
    """Train on from the checkpoint `state`, if there is one; evaluate, log and save on the way. Returns a summary."""
    args, num_envs, metrics = agent.args, agent.args.num_envs, {}
    first, begin = state.get("global_step", 0) // num_envs, time.perf_counter() - state.get("seconds", 0.0)
    iterations = math.ceil(args.total_timesteps / num_envs)
    wrap = {"wrap": CudaGraph} if args.cuda and args.cudagraphs else {}

    def look_back(iteration: int) -> None:
        """Save and evaluate after an iteration, where that is due."""
        global_step, last = iteration * num_envs, iteration == iterations
        due = args.evaluation_interval and (last or global_step % args.evaluation_interval < num_envs)
        if due or last:
            run.save("model.pt", global_step)
        if last or (iteration % args.checkpoint_interval == 0 and run.saved_step < global_step):
            run.save_checkpoint(global_step, buffer, time.perf_counter() - begin)  # before what takes time
        if due:
            metrics.update(evaluate(script, agent, run, global_step, 1.0, last))
            if (mean := metrics["episodic_return_mean"]) > run.best_return:
                run.save("best_model.pt", global_step, best_return=mean)
                if "best_model.pt" not in run.failed:
                    run.best_return = mean
            run.add_evaluation(metrics)

    with tqdm(total=iterations * num_envs, initial=first * num_envs, unit=" steps", disable=None) as bar:
        if first == iterations or first * num_envs not in run.evaluations:
            look_back(first)  # else that was done before
        logged, clock = first, time.perf_counter()
        for iteration, episodes, losses in script.train(agent, buffer, first, **wrap):
            global_step = iteration * num_envs
            run.log("charts", episodes, global_step)
            bar.update(num_envs)
            if losses and iteration % LOG_INTERVAL == 0:
                script.check_finite(global_step, **losses)
                scalars = {name: value.item() for name, value in losses.items()}
                scalars["target_diversity"] = agent.target_diversity
                gradients = [parameter.grad for parameter in agent.actor.parameters()]
                scalars["actor_grad_norm"] = torch.nn.utils.get_total_norm(gradients).item()
                run.log("losses", scalars, global_step)
                bar.set_postfix({name: scalars[name] for name in ("alpha", "diversity")})
                speed = (iteration - logged) * num_envs / (time.perf_counter() - clock)
                run.log("charts", {"steps_per_second": speed}, global_step)
                logged, clock = iteration, time.perf_counter()
            pause = time.perf_counter()
            look_back(iteration)
            clock += time.perf_counter() - pause  # it stands still meanwhile
    if run.evaluations:
        returns = [row["episodic_return_mean"] for row in run.evaluations.values()]
        metrics["best_episodic_return_mean"] = max(run.best_return, *returns)
    return {"global_step": iterations * num_envs} | metrics | {"minutes": (time.perf_counter() - begin) / 60}


@heard()
def launch(script: ModuleType, argv: list[str] | None) -> Path:
    """Train, or evaluate a model, as the command line says. Returns the run's folder."""
    sys.stderr = sys.stderr or io.StringIO()  # where it is closed, tqdm fails
    keep_memory()
    keep_mujocos_warnings()
    try:
        args, state = parse_args(script, argv)
        torch.manual_seed(args.seed)
        set_matmul_precision(args)
        env = script.make(args)
        (obs_dim,), (action_dim,) = env.observation_space.shape, env.action_space.shape
        device = torch.device("cuda" if args.cuda else "cpu")
        agent = script.DrAC(args, obs_dim, action_dim, device)
        env.close()
        fingerprint = getattr(env.unwrapped, "fingerprint", "")  # of a maze's map, a level generator's weights
        agent.fingerprint = fingerprint if isinstance(fingerprint, str) else ""
        buffer = None if args.evaluate else script.ReplayBuffer(args, obs_dim, action_dim, device)
        if state:
            restore(state, agent, buffer)
        run = Run(script, agent, state, sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:  # bad input gets one sentence
        lack = "networks and replay buffer do not fit into memory:" if is_lack_of_memory(error) else ""
        if isinstance(error, RuntimeError) and not lack:  # a bug
            raise
        hint = "" if MAPS or "cannot be made" not in str(error) else "(mazes and levels need envs.py beside this file)"
        print("error:", *f"{lack} {error} {hint}".split(), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    with run:
        if args.evaluate:
            summary = evaluate(script, agent, run, state["global_step"], args.hold_steps, last=True)
            run.add_evaluation(summary)
            drawn = (run.path / "episodes.gif").exists()  # a maze's episodes, from above
            if final_trials and not drawn and "rgb_array" in (env.metadata.get("render_modes") or []):
                policy = script.make_policy(agent, args.hold_steps)
                run.write("episodes.gif", partial(animate_episode, policy, partial(script.make, args), args.seed))
        else:
            # Over sqrt(d): the logarithmic capacity of interval and square; for d > 2, E log |x - y| <= log(2 d) / 2.
            ceiling = {1: 0.5, 2: 0.8346}.get(action_dim, math.sqrt(2))
            if args.beta > ceiling and args.diversity_mean == "geometric":
                run.say(f"warning: no policy exceeds {ceiling:.4g}: alpha will grow with --beta {args.beta}", "stderr")
            since = f" from step {state['global_step']:,}" if state else ""
            if args.checkpoint_interval < env.spec.max_episode_steps:
                text = f"--checkpoint-interval {args.checkpoint_interval} cuts episodes of {env.spec.max_episode_steps}"
                run.say(f"warning: {text} steps: no later step is ever trained on", "stderr")
            run.say(f"training{since}: files in {run.path}")
            summary = train(script, agent, buffer, run, state)
        run.finish(summary)
    return run.path
