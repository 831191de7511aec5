"""The environments of DrAC's diversity-critical experiments, their metrics and their pictures.

`import envs` registers them with Gymnasium, for these scripts or for anybody else's:

    MultiGoalPointMaze-Simple-v0    150 steps, 4 goals
    MultiGoalPointMaze-Medium-v0    300 steps, 4 goals
    MultiGoalPointMaze-Hard-v0      600 steps, 8 goals

A force-actuated ball starts at rest in a walled map with several goals. No goal is in the observation and all of them
pay the same, so the optimal policy is multimodal: a policy that always runs to one goal earns a full return, but has
learned one way out of many.

Source: Wang, Liu, Pan, "Learning Intractable Multimodal Policies with Reparameterization and Diversity Regularization",
NeurIPS 2025, https://arxiv.org/abs/2511.01374.
"""

import functools
import importlib.util
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import comb
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# 1 wall, 0 free, r start, g goal, 2 latent obstacle (free, but solid with obstacles=True), o outside. Cells are 1 x 1,
# the map is centred on the origin, the first row is at the top (largest y); goals are numbered in reading order.
MAPS = {
    "simple": """
        11111111111
        1g0000000g1
        10000000001
        10020002001
        10000000001
        10000r00001
        10000000001
        10020002001
        10000000001
        1g0000000g1
        11111111111""",
    "medium": """
        1111111111111
        1g001000100g1
        1000100010001
        1000200020001
        1000000000001
        100111r111001
        1000000000001
        1000200020001
        1000100010001
        1g001000100g1
        1111111111111""",
    "hard": """
        ooo1111o1111ooo
        ooo10g111g01ooo
        oo11001010011oo
        111002101200111
        100000000000001
        1g02000000020g1
        111100101001111
        o100000r000001o
        111100101001111
        1g02000000020g1
        100000000000001
        111002101200111
        oo11001010011oo
        ooo10g111g01ooo
        ooo1111o1111ooo""",
}
HORIZONS = {"simple": 150, "medium": 300, "hard": 600}

BALL_RADIUS = 0.1
GOAL_HALF_WIDTH = 0.5
GOAL_REWARD = 100.0
DENSE_REWARD_SCALE = 10.0
MAX_SPEED = 5.0  # per component, enforced after the observation is read
OBSERVED_SPEED = 5.5  # one step of full thrust from MAX_SPEED reaches 5.48
FRAME_SKIP = 2


def parse_map(maze_map: str | Sequence[str], obstacles: bool = False) -> tuple[str, ...]:
    """Look up or check a maze map and return its rows.

    Raises ValueError, in one sentence, for an unknown name, unequal rows, an unknown character, no or several starts,
    no goal, a map that is not closed by walls, or a goal that cannot be reached from the start (with `obstacles`: past
    the latent obstacles).
    """
    if isinstance(maze_map, str):
        if maze_map not in MAPS:
            raise ValueError(f"unknown maze map {maze_map!r}: choose from {', '.join(MAPS)}, or pass a list of rows")
        maze_map = MAPS[maze_map].split()
    rows = tuple(maze_map)
    if not rows or not all(isinstance(row, str) and row for row in rows):
        raise ValueError(f"a maze map is a name or a list of non-empty strings, got {maze_map!r}")
    cells = {(i, j): cell for i, row in enumerate(rows) for j, cell in enumerate(row)}
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"the rows of a maze map must be equally long, got lengths {[len(row) for row in rows]}")
    if unknown := {position: cell for position, cell in cells.items() if cell not in "01rg2o"}:
        (i, j), cell = next(iter(unknown.items()))
        raise ValueError(f"unknown character {cell!r} in row {i}, column {j} of the maze map: use 0, 1, r, g, 2 and o")
    starts = [position for position, cell in cells.items() if cell == "r"]
    if len(starts) != 1:
        raise ValueError(f"a maze map needs exactly one start 'r', got {len(starts)}")
    goals = [position for position, cell in cells.items() if cell == "g"]
    if not goals:
        raise ValueError("a maze map needs at least one goal 'g', got none")
    reached, frontier = set(starts), deque(starts)
    while frontier:
        i, j = frontier.popleft()
        for neighbour in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
            cell = cells.get(neighbour, "o")
            if cell == "o":
                raise ValueError(f"the maze map is not closed: row {i}, column {j} can be left to the outside")
            if neighbour not in reached and cell not in ("12" if obstacles else "1"):
                reached.add(neighbour)
                frontier.append(neighbour)
    if cut_off := [goal for goal in goals if goal not in reached]:
        raise ValueError(f"the goal in row {cut_off[0][0]}, column {cut_off[0][1]} cannot be reached from the start")
    return rows


def cell_centers(rows: Sequence[str], kind: str) -> np.ndarray:
    """The centres of all cells of one kind, in reading order: (N, 2)."""
    height, width = len(rows), len(rows[0])
    positions = [(i, j) for i in range(height) for j in range(width) if rows[i][j] == kind]
    return np.array([(j + 0.5 - width / 2, height / 2 - i - 0.5) for i, j in positions]).reshape(-1, 2)


@functools.cache
def _build_model(rows: tuple[str, ...], obstacles: bool) -> mujoco.MjModel:
    """Compile a maze in memory. MuJoCo never writes to a model, so all environments of one map share it."""
    # Found without importing the package, whose import prints a notice.
    package = Path(importlib.util.find_spec("gymnasium_robotics").origin).parent
    spec = mujoco.MjSpec.from_file(str(package / "envs/assets/point/point.xml"))
    spec.memory = 2**20  # a ball touches a few walls at most: 1 MiB per environment instead of 13
    for kind in "12" if obstacles else "1":
        for x, y in cell_centers(rows, kind):
            spec.worldbody.add_geom(
                type=mujoco.mjtGeom.mjGEOM_BOX,
                pos=[x, y, 0],
                size=[0.5, 0.5, 1],
                contype=1,
                conaffinity=1,
                rgba=[0.7, 0.5, 0.3, 1] if kind == "1" else [0.9, 0.4, 0.3, 1],
            )
    for x, y in cell_centers(rows, "g"):
        spec.worldbody.add_site(
            type=mujoco.mjtGeom.mjGEOM_BOX, pos=[x, y, 0], size=[0.5, 0.5, 0.01], rgba=[0.2, 0.7, 0.3, 0.6]
        )
    spec.visual.global_.offwidth = spec.visual.global_.offheight = 480
    return spec.compile()


class MultiGoalPointMaze(gym.Env, gym.utils.EzPickle):
    """A ball in a walled map with several equally good goals.

    Observation: float32 (x, y, vx, vy), in cells and cells per second. Action: Box(-1, 1, (2,)), the forces along x and
    y as fractions of 100 N, clipped; one step is 0.02 s. A goal is reached when the ball is inside its cell: reward 100
    and `terminated`. `info["goal"]` is the index of the goal just reached, or -1; `info["position"]` is (x, y).

    Args:
        maze_map: "simple", "medium", "hard", or the rows of a map (see MAPS for the characters).
        reward_type: "sparse": nothing before a goal; "dense": 10 x the decrease of the distance to the nearest goal.
        obstacles: make the latent obstacles solid, and end the episode without reward when one is touched.
        render_mode: "rgb_array" for pictures from above through MuJoCo's renderer, or None.

    Raises ValueError for a wrong map (one sentence says what is wrong), reward type or render mode.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}

    def __init__(
        self,
        maze_map: str | Sequence[str] = "simple",
        reward_type: str = "sparse",
        obstacles: bool = False,
        render_mode: str | None = None,
    ) -> None:
        gym.utils.EzPickle.__init__(self, maze_map, reward_type, obstacles, render_mode)
        if reward_type not in ("sparse", "dense"):
            raise ValueError(f"reward_type must be 'sparse' or 'dense', got {reward_type!r}")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode must be None or 'rgb_array', got {render_mode!r}")
        self.maze_map = parse_map(maze_map, obstacles)
        self.reward_type, self.obstacles, self.render_mode = reward_type, obstacles, render_mode
        self.start = cell_centers(self.maze_map, "r")[0]
        self.goals = cell_centers(self.maze_map, "g")
        self._goals = self.goals.tolist()  # plain floats: over a handful of goals, several times as fast as NumPy
        self.obstacle_centers = cell_centers(self.maze_map, "2")
        high = np.array([len(self.maze_map[0]) / 2, len(self.maze_map) / 2, OBSERVED_SPEED, OBSERVED_SPEED], np.float32)
        self.observation_space = gym.spaces.Box(-high, high, dtype=np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.model = _build_model(self.maze_map, obstacles)
        self.data = mujoco.MjData(self.model)
        self._renderer = None

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Put the ball at rest on the start cell."""
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = self.start
        self._goal_distance = self._nearest_goal_distance(self.start)
        return self._observation(), {"goal": -1, "position": self.start.copy()}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Advance by 0.02 s. The time limit comes from Gymnasium's TimeLimit wrapper, added by `gymnasium.make`."""
        self.data.ctrl[:] = action  # MuJoCo clips it to the motors' range, [-1, 1]
        mujoco.mj_step(self.model, self.data, FRAME_SKIP)
        observation, position = self._observation(), self.data.qpos.copy()
        speed = max(map(abs, self.data.qvel.tolist()))
        if speed > MAX_SPEED:
            self.data.qvel *= MAX_SPEED / speed

        x, y = position.tolist()
        goal = next(
            (k for k, (gx, gy) in enumerate(self._goals) if max(abs(x - gx), abs(y - gy)) <= GOAL_HALF_WIDTH), -1
        )
        reward = 0.0
        if self.reward_type == "dense":
            distance = self._nearest_goal_distance(position)
            reward = DENSE_REWARD_SCALE * (self._goal_distance - distance)
            self._goal_distance = distance
        if goal >= 0:
            reward = GOAL_REWARD
        terminated = goal >= 0 or (self.obstacles and self._touches_obstacle(position))
        return observation, reward, terminated, False, {"goal": goal, "position": position}

    def render(self) -> np.ndarray | None:
        """The maze from above: uint8 (480, 480, 3). Raises RuntimeError where MuJoCo finds no OpenGL."""
        if self.render_mode is None:
            gym.logger.warn("render() needs an environment made with render_mode='rgb_array'.")
            return None
        if self._renderer is None:
            try:
                self._renderer = mujoco.Renderer(self.model, 480, 480)
            except Exception as error:  # the exception's type depends on the missing backend
                raise RuntimeError(
                    "MuJoCo found no OpenGL to render with: install one and set MUJOCO_GL to egl (GPU) or osmesa (CPU)"
                ) from error
        mujoco.mj_forward(self.model, self.data)
        camera = mujoco.MjvCamera()
        camera.lookat[:], camera.elevation, camera.azimuth = 0, -90, 90
        camera.distance = 1.3 * max(len(self.maze_map), len(self.maze_map[0]))
        self._renderer.update_scene(self.data, camera)
        return self._renderer.render()

    def close(self) -> None:
        """Free the renderer, if there is one."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _observation(self) -> np.ndarray:
        return np.concatenate([self.data.qpos, self.data.qvel], dtype=np.float32)

    def _nearest_goal_distance(self, position: np.ndarray) -> float:
        return float(np.linalg.norm(self.goals - position, axis=1).min())

    def _touches_obstacle(self, position: np.ndarray) -> bool:
        gaps = np.maximum(np.abs(self.obstacle_centers - position) - 0.5, 0.0)
        return bool((np.sqrt((gaps**2).sum(axis=1)) < BALL_RADIUS).any())


for _name, _horizon in HORIZONS.items():
    gym.register(
        id=f"MultiGoalPointMaze-{_name.capitalize()}-v0",
        entry_point=f"{__name__}:MultiGoalPointMaze",
        max_episode_steps=_horizon,
        kwargs={"maze_map": _name},
    )


def make_env(env_id: str, **kwargs: object) -> gym.Env:
    """Make any environment that DrAC can train on, with its actions rescaled to [-1, 1]^d.

    Raises ValueError unless observations and actions are one-dimensional Boxes and the actions bounded, and whatever
    `gymnasium.make` raises.
    """
    with warnings.catch_warnings():  # the paper's MuJoCo environments are v4
        warnings.filterwarnings("ignore", message=".*is out of date", category=DeprecationWarning)
        env = gym.make(env_id, **kwargs)
    obs, actions = env.observation_space, env.action_space
    if not (
        isinstance(actions, gym.spaces.Box)
        and len(actions.shape) == 1
        and np.issubdtype(actions.dtype, np.floating)
        and actions.is_bounded()
        and (actions.low < actions.high).all()
    ):
        raise ValueError(f"the actions of {env_id} are {actions}: DrAC needs a bounded, one-dimensional Box of floats")
    if not isinstance(obs, gym.spaces.Box) or len(obs.shape) != 1:
        raise ValueError(f"the observations of {env_id} are {obs}: DrAC needs a one-dimensional Box")
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


@dataclass
class Episode:
    """One episode; on mazes also the goal that it reached (-1: none) and its positions, (length + 1, 2)."""

    episodic_return: float = 0.0
    length: int = 0
    goal: int = -1
    positions: list[np.ndarray] = field(default_factory=list)


Policy = Callable[[np.ndarray], np.ndarray]


def play_episodes(policy: Policy, envs: Sequence[gym.Env], num_episodes: int, seed: int) -> list[Episode]:
    """Play episodes in all environments side by side, so that they share the policy's forward passes.

    Every environment plays its share of the episodes to the end: taking the first to finish of a larger crowd would
    favour short ones.

    Args:
        policy: maps observations (N, obs_dim) to actions (N, action_dim), for any N.
        seed: environment i starts from seed + i.
    """
    episodes = []
    for first in range(0, num_episodes, len(envs)):
        observations, running = {}, {}
        for i, env in enumerate(envs[: num_episodes - first]):
            observations[i], info = env.reset(seed=seed + i if first == 0 else None)
            running[i] = Episode(positions=[info["position"]] if "position" in info else [])
        episodes += running.values()
        while running:
            actions = policy(np.stack([observations[i] for i in running]))
            for (i, episode), action in zip(list(running.items()), actions, strict=True):
                observations[i], reward, terminated, truncated, info = envs[i].step(action)
                episode.episodic_return += float(reward)
                episode.length += 1
                if "position" in info:
                    episode.goal = info.get("goal", -1)
                    episode.positions.append(info["position"])
                if terminated or truncated:
                    del running[i]
    return episodes


MAX_PARALLEL_ENVS = 100


def evaluate_policy(
    policy: Policy, env_id: str, num_episodes: int, seed: int, picture: str | Path | None = None
) -> dict[str, float | int]:
    """Evaluate a policy on fresh environments: mean and standard deviation of the undiscounted return, mean length.

    On mazes also `maze_metrics`, and `picture` names a file for `plot_trajectories`.
    """
    envs = [make_env(env_id) for _ in range(min(num_episodes, MAX_PARALLEL_ENVS))]
    episodes = play_episodes(policy, envs, num_episodes, seed)
    returns = [episode.episodic_return for episode in episodes]
    metrics = {
        "episodic_return_mean": float(np.mean(returns)),
        "episodic_return_std": float(np.std(returns)),
        "episodic_length_mean": float(np.mean([episode.length for episode in episodes])),
    }
    maze = envs[0].unwrapped
    if isinstance(maze, MultiGoalPointMaze):
        goals = [episode.goal for episode in episodes]
        metrics |= maze_metrics(goals, len(maze.goals))
        if picture:
            title = "{:.0%} of {} episodes reach a goal, {} of {} goals are reached".format(
                metrics["success_rate"], num_episodes, metrics["reachable_modes"], len(maze.goals)
            )
            plot_trajectories(maze.maze_map, [episode.positions for episode in episodes], goals, title, picture)
    for env in envs:
        env.close()
    return metrics


def final_trials(policy: Policy, env_id: str, num_trials: int, seed: int) -> dict[str, float | int]:
    """The paper's tests of a multimodal policy on a maze, from `num_trials` groups of 5 episodes each; {} elsewhere.

    `removal_sr5` is `removal_success_rate` on the maze as trained on, `obstacle_sr5` is `group_success_rate` with the
    latent obstacles made solid. Nothing is retrained or adapted. The metrics of the removal episodes come along under
    the names of `maze_metrics` with "final_" before them.
    """
    env = make_env(env_id)
    env.close()
    if not num_trials or not isinstance(maze := env.unwrapped, MultiGoalPointMaze):
        return {}
    goals = {}
    for obstacles in (False, True):
        try:
            envs = [make_env(env_id, obstacles=obstacles) for _ in range(min(5 * num_trials, MAX_PARALLEL_ENVS))]
        except ValueError:  # on a map of one's own, the obstacles may cut off a goal
            goals[obstacles] = [-1] * 5 * num_trials
            continue
        goals[obstacles] = [episode.goal for episode in play_episodes(policy, envs, 5 * num_trials, seed)]
        for env in envs:
            env.close()
    return {
        **{f"final_{key}": value for key, value in maze_metrics(goals[False], len(maze.goals)).items()},
        "removal_sr5": removal_success_rate(goals[False], len(maze.goals)),
        "obstacle_sr5": group_success_rate(goals[True]),
    }


# Metrics: pure functions of `goals`, the index of the goal that each episode reached, or -1 for none.


def goal_counts(goals: Sequence[int], num_goals: int) -> np.ndarray:
    """How many episodes reached each goal: int (num_goals,)."""
    goals = np.asarray(goals, dtype=int)
    return np.bincount(goals[goals >= 0], minlength=num_goals)


def multi_goal_score(goals: Sequence[int], num_goals: int) -> float:
    """Sum over goals of min(share of the episodes, 1 / num_goals), in [0, 1]; 1 means every goal equally often."""
    return float(np.minimum(goal_counts(goals, num_goals) / len(goals), 1 / num_goals).sum())


def maze_metrics(goals: Sequence[int], num_goals: int) -> dict[str, float | int]:
    """Success rate, number of distinct goals, multi-goal score and the episodes per goal, under their logged names."""
    counts = goal_counts(goals, num_goals)
    return {
        "success_rate": float(counts.sum() / len(goals)),
        "reachable_modes": int((counts > 0).sum()),
        "multi_goal_score": multi_goal_score(goals, num_goals),
        **{f"goal_{index}": int(count) for index, count in enumerate(counts)},
    }


def group_success_rate(goals: Sequence[int], group_size: int = 5) -> float:
    """The share of consecutive groups of episodes in which at least one reached a goal; SR5 for groups of 5.

    Raises ValueError unless the episodes fill at least one group and leave none over.
    """
    return float((_groups(goals, group_size) >= 0).any(axis=1).mean())


def removal_success_rate(goals: Sequence[int], num_goals: int, group_size: int = 5) -> float:
    """Goal-removal SR5: how likely has a group of trials reached a goal that survives the removal of half of them?

    For a group that reached R distinct goals of K, with k = K // 2 removed uniformly at random, it is exactly
    1 - C(K - R, k - R) / C(K, k): all R lie among the removed ones in C(K - R, k - R) of the C(K, k) removals, which is
    none for R > k and all of them for R = 0. Returns the mean over the groups.

    Raises ValueError unless the episodes fill at least one group and leave none over.
    """
    removed = num_goals // 2
    probabilities = []
    for group in _groups(goals, group_size):
        distinct = len(set(group[group >= 0]))
        lost = comb(num_goals - distinct, removed - distinct) if distinct <= removed else 0
        probabilities.append(1 - lost / comb(num_goals, removed))
    return float(np.mean(probabilities))


def _groups(goals: Sequence[int], group_size: int) -> np.ndarray:
    if len(goals) == 0 or len(goals) % group_size:
        raise ValueError(f"{len(goals)} episodes cannot be split into groups of {group_size}")
    return np.asarray(goals, dtype=int).reshape(-1, group_size)


def plot_trajectories(
    rows: Sequence[str], trajectories: Sequence[np.ndarray], goals: Sequence[int], title: str, file: str | Path
) -> None:
    """Draw a maze from above with one line per episode, coloured by the goal it reached (black: none).

    Args:
        rows: the map, as `MultiGoalPointMaze.maze_map`.
        trajectories: one (steps + 1, 2) array of positions per episode.
        goals: the goal that each episode reached, or -1.
        file: the picture to write; its ending chooses the format.
    """
    height, width = len(rows), len(rows[0])
    counts = goal_counts(goals, len(cell_centers(rows, "g")))
    # Okabe and Ito's colours, told apart by the colour-blind too; the cycle repeats beyond eight goals.
    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A4E9F", "#8C8C00")
    figure = Figure(figsize=(5, 5 * height / width + 0.3), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlim=(-width / 2, width / 2), ylim=(-height / 2, height / 2), aspect="equal")
    axes.set_axis_off()
    axes.set_title(title, fontsize=9)

    def draw_cell(center: np.ndarray, **style: str | float) -> None:
        axes.add_patch(Rectangle(center - 0.5, 1, 1, **style))

    for center in cell_centers(rows, "1"):
        draw_cell(center, facecolor="#3A3F47", edgecolor="#3A3F47", linewidth=0.3)
    for center in cell_centers(rows, "2"):
        draw_cell(center, facecolor="#EDEDED", edgecolor="#BBBBBB", linestyle=":", linewidth=0.8)
    for index, center in enumerate(cell_centers(rows, "g")):
        color = palette[index % len(palette)]
        draw_cell(center, facecolor=color, alpha=0.25, edgecolor="none")
        draw_cell(center, facecolor="none", edgecolor=color, linewidth=1.2)
    for trajectory, goal in zip(trajectories, goals, strict=True):
        color = palette[goal % len(palette)] if goal >= 0 else "black"
        axes.plot(*np.asarray(trajectory).T, color=color, linewidth=0.7, alpha=0.6, solid_joinstyle="round")
    for index, center in enumerate(cell_centers(rows, "g")):
        label = axes.text(
            *center, str(counts[index]), ha="center", va="center", fontsize=9, fontweight="bold", zorder=5
        )
        label.set_bbox({"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8})
    axes.plot(*cell_centers(rows, "r")[0], marker="o", markersize=5, color="white", markeredgecolor="black", zorder=5)
    figure.savefig(file)
