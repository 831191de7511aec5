"""CUDA graphs: their bookkeeping on any machine, and the rest where there is a GPU."""

import contextlib

import numpy as np
import pytest
import torch
from conftest import SMALL
from test_cli import FAST, load_weights, read_csv
from test_drac import learn_two_peaks
from torch.utils._python_dispatch import TorchDispatchMode

import drac_runner as runner

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class NothingWaits(TorchDispatchMode):
    """Fail where a value would have to travel from the device to Python."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_to_copy")
        name = func.overloadpacket.__name__
        if name in waits and (name != "_to_copy" or (kwargs or {}).get("device") is not None):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def filled_buffer(script, steps=25, device="cpu"):
    """Windows of 3 steps of 4 environments. Every reward is another number, and so is every window's return."""
    args = script.Args(num_envs=4, n_steps=3, gamma=0.5, buffer_size=400)
    buffer = script.ReplayBuffer(args, 5, 3, torch.device(device))
    add_steps(buffer, range(steps))
    return buffer


def add_steps(buffer, steps):
    no = np.zeros(4, bool)
    for step in steps:
        rewards = 4 * step + np.arange(4)
        buffer.add(np.full((4, 5), step / 100), np.full((4, 3), 0.5), np.full((4, 5), step / 100), rewards, no, no)


def returns_of(steps):
    """The discounted rewards of all windows within the first `steps`."""
    return {r + 0.5 * (r + 4) + 0.25 * (r + 8) for r in range(4 * (steps - 2))}


def test_nothing_in_replay_and_update_waits_for_the_device(script, make_agent):
    agent, buffer = make_agent(), filled_buffer(script)
    noise = script.HeldLatents(agent.actor, 4 * [5.0])
    with NothingWaits():
        for _ in range(3):
            agent.update(buffer.gather(buffer.draw(16)))
            agent.update(buffer.sample(16))
        agent.actor(torch.zeros(4, 5), noise(np.zeros(4, bool)))
    for waiting in (lambda: torch.ones(()).item(), lambda: bool(torch.ones(())), lambda: range(torch.tensor(3))):
        with NothingWaits(), pytest.raises(AssertionError, match="waits"):
            waiting()


@pytest.fixture
def recorder(monkeypatch):
    """In place of CUDA: a graph that runs nothing at capture but the Python code, and at replay only its `kernel`."""
    events = []

    class Graph:
        kernel = None

        def replay(self):
            events.append("replay")
            self.kernel()

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    current = [Stream("main")]

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    @contextlib.contextmanager
    def graph(graph, stream):
        events.append("capture begins")
        with on(stream):
            yield
        events.append("capture ends")

    for name, fake in {"CUDAGraph": Graph, "Stream": Stream, "graph": graph, "stream": on}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    return events


def test_a_graph_warms_up_is_captured_once_and_then_replays(recorder):
    memory, calls = torch.zeros(2), []

    def function(x):
        calls.append(x)
        recorder.append(f"function on {torch.cuda.current_stream().name}")
        if len(calls) < 4:
            return 2 * x
        return memory

    graphed = runner.CudaGraph(function)
    graphed.graph.kernel = lambda: memory.copy_(2 * graphed.inputs[0])
    for call in range(1, 8):
        x = torch.full((2,), float(call))
        assert graphed(x).tolist() == [2 * call, 2 * call]
        assert (calls[-1] is x) == (call < 4), "warming up on the input itself, later on a static copy"
    warm_up = ["side waits for main", "function on side", "main waits for side"]
    capture = ["capture begins", "function on side", "capture ends"]
    assert recorder == warm_up * 3 + capture + ["replay"] * 4
    assert len(calls) == 4 and calls[-1] is graphed.inputs[0]


def test_updates_and_acting_of_a_run_go_through_graphs(script, run, monkeypatch):
    calls = []

    class CudaGraph:
        def __init__(self, function):
            self.function = function

        def __call__(self, *inputs):
            calls.append(tuple(x.shape for x in inputs))
            return self.function(*inputs)

    monkeypatch.setattr(runner, "CudaGraph", CudaGraph)
    train = runner.train

    def pretend(script, agent, *rest):
        agent.args.cuda = True
        return train(script, agent, *rest)

    argv = [*FAST, "--total-timesteps", "60", "--learning-starts", "50", "--evaluation-interval", "0"]
    argv += ["--num-envs", "3", "--n-steps", "2"]
    plain = run(*argv)
    monkeypatch.setattr(runner, "train", pretend)
    run(*argv, "--no-cudagraphs")
    assert calls == []
    graphed = run(*argv)
    obs, windows = (3, 2), (2, 32)
    acting = [shapes for shapes in calls if shapes[0] == obs]
    assert len(acting) == 20 and all(len(shapes) == 2 and shapes[1][-3:-1] == (1, 3) for shapes in acting)
    assert [shapes for shapes in calls if shapes[0] != obs] == 4 * [(windows,)], "one update per step from the 51st on"
    assert all(torch.equal(load_weights(graphed)[name], weight) for name, weight in load_weights(plain).items())


def test_a_model_trained_with_cudagraphs_is_evaluated_on_a_cpu(script, run):
    argv = ["--total-timesteps", "60", "--learning-starts", "50", "--evaluation-interval", "0"]
    file = run(*FAST, *argv) / "model.pt"
    model = torch.load(file, weights_only=True)
    model["config"] |= {"cuda": True, "cudagraphs": True}
    torch.save(model, file)
    assert len(read_csv(run("--evaluate", str(file), env_id=None))) == 1


def test_what_cannot_be_captured_says_how_to_go_on(recorder):
    def function(x):
        if graphed.calls > 3:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x

    graphed = runner.CudaGraph(function)
    for _ in range(3):
        graphed(torch.zeros(1))
    with pytest.raises(RuntimeError, match="capturing") as raised:
        graphed(torch.zeros(1))
    assert "--no-cudagraphs" in raised.value.__notes__[0]


@needs_gpu
def test_a_graphed_update_equals_the_eager_one(script, make_agent):
    agents = [script.DrAC(make_agent().args, 5, 3, torch.device("cuda")) for _ in range(2)]
    agents[1].load_state_dict(agents[0].state_dict())
    latents, buffer = agents[0].actor.sample_latents(4, 16), filled_buffer(script, device="cuda")
    for agent in agents:
        agent.actor.sample_latents = lambda *args: latents
    graphed = runner.CudaGraph(lambda windows: agents[1].update(buffer.gather(windows)))
    for update in range(8):
        windows = buffer.draw(16)
        eager_losses, losses = agents[0].update(buffer.gather(windows)), graphed(windows)
        assert (graphed.calls > 3) == (update >= 3)
        for name, value in eager_losses.items():
            torch.testing.assert_close(losses[name], value, rtol=1e-3, atol=1e-5, msg=f"{name}, update {update}")
    for name, weight in agents[0].state_dict().items():  # one step of Adam moves a weight by up to 3e-4
        torch.testing.assert_close(agents[1].state_dict()[name], weight, rtol=1e-3, atol=1e-4, msg=name)


@needs_gpu
def test_graphed_acting_equals_the_eager_one(script, make_agent):
    actor = script.DrAC(make_agent().args, 5, 3, torch.device("cuda")).actor
    graphed, noise, rng = runner.CudaGraph(actor), script.HeldLatents(actor, 2.0), np.random.default_rng(0)
    for _ in range(8):
        obs, latents = rng.normal(size=(4, 5)), noise(np.zeros(4, bool))
        np.testing.assert_allclose(
            script.act(graphed, obs, latents), script.act(actor, obs, latents), rtol=1e-3, atol=1e-5
        )


@needs_gpu
def test_replays_cut_fresh_windows_of_a_growing_buffer_and_draw_fresh_noise(script, make_agent):
    agent, buffer = script.DrAC(make_agent().args, 5, 3, torch.device("cuda")), filled_buffer(script, 25, "cuda")

    def function(windows):
        return {"returns": buffer.gather(windows).rewards, "z": agent.actor.sample_latents(4, 16)}

    graphed = runner.CudaGraph(function)
    draws = [{name: value.clone() for name, value in graphed(buffer.draw(16)).items()} for _ in range(1000)]
    for name in ("returns", "z"):
        assert len({tuple(draw[name].flatten().tolist()) for draw in draws}) == 1000, name
    drawn = torch.cat([draw["returns"] for draw in draws])
    assert set(drawn.cpu().numpy().round(2).tolist()) == returns_of(25)  # CUDA's powers may be off by one bit
    add_steps(buffer, range(25, 50))  # what is stored after the capture is drawn too
    drawn = torch.cat([graphed(buffer.draw(16))["returns"].clone() for _ in range(1000)])
    assert set(drawn.cpu().numpy().round(2).tolist()) == returns_of(50)


@needs_gpu
def test_graphs_learn_both_peaks_of_the_bandit(script, make_agent):
    shares = learn_two_peaks(script, make_agent, beta=0.36, device="cuda", wrap=runner.CudaGraph)
    assert shares.min() > 0.2 and shares.sum() > 0.67, shares


@needs_gpu
@pytest.mark.parametrize("flags", [["--cuda"], ["--cuda", "--no-cudagraphs"]], ids=" ".join)
def test_a_run_on_cuda_and_its_continuation(script, run, flags):
    own = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL[script].items()]
    intervals = ["--evaluation-interval", "300", "--checkpoint-interval", "75", "--evaluation-episodes", "2"]
    argv = ["--total-timesteps", "600", "--num-envs", "4", "--n-steps", "3", "--final-trials", "0", *intervals, *FAST]
    folder = run(*argv, *own, *flags, env_id="MultiGoalPointMaze-Simple-v0")
    before, checkpoint = load_weights(folder), torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["global_step"] == 600 and all(checkpoint["optimizers"])
    script.main(["--resume", str(folder), "--total-timesteps", "900"])
    after = load_weights(folder)
    assert all(weight.isfinite().all() for weight in after.values())
    assert any(not torch.equal(before[name], weight) for name, weight in after.items())
    assert [row["global_step"] for row in read_csv(folder)] == [0, 300, 600, 900]
    assert len(read_csv(run("--evaluate", str(folder / "model.pt"), "--cuda", env_id=None))) == 1
