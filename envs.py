"""The environments of DrAC's diversity-critical experiments, their metrics and their pictures.

`import envs` registers them with Gymnasium, for these scripts or for anybody else's:

    MultiGoalPointMaze-Simple-v0    150 steps, 4 goals
    MultiGoalPointMaze-Medium-v0    300 steps, 4 goals
    MultiGoalPointMaze-Hard-v0      600 steps, 8 goals
    LevelGeneration-MultiFacet-v0   50 segments, rewarded for moderate novelty
    LevelGeneration-Puzzle-v0       50 segments, rewarded for as much novelty as stays in bounds

In the mazes a force-actuated ball starts at rest among several goals. No goal is in the observation and all of them
pay the same: a policy that always runs to one goal earns a full return, but has learned one of many ways. In level
generation each action is a latent vector of a frozen GAN, which turns it into the next segment of a platform level: the
reward asks for good levels, and a multimodal policy makes many of them.

Source: Wang, Liu, Pan, "Learning Intractable Multimodal Policies with Reparameterization and Diversity Regularization",
NeurIPS 2025, https://arxiv.org/abs/2511.01374.
"""

import contextlib
import copy
import functools
import hashlib
import importlib.util
import io
import itertools
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, comb, log, log2
from pathlib import Path
from typing import BinaryIO

import gymnasium as gym
import matplotlib.style
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageColor, ImageDraw
from torch import Tensor, nn

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

BALL_RADIUS = 0.1
GOAL_HALF_WIDTH = 0.5
GOAL_REWARD = 100.0
DENSE_REWARD_SCALE = 10.0
MAX_SPEED = 5.0  # per component, enforced after the observation is read
OBSERVED_SPEED = 7.8  # full thrust reaches 5.48 along each axis; a corner may turn both, 7.75, into one axis
FRAME_SKIP = 2
WHITE, GREY = (255, 255, 255), (200, 200, 200)
CELL_COLORS = {"0": WHITE, "r": WHITE, "1": (58, 63, 71), "g": (0, 158, 115), "2": (240, 200, 190), "o": GREY}


def parse_map(maze_map: str | Path | Sequence[str]) -> tuple[str, ...]:
    """Look up, read or check a maze map and return its rows. Raises ValueError, in one sentence, if it is none.

    Every goal must be in reach of the start, and not only past another goal, where an episode ends.
    """
    if isinstance(maze_map, str | Path):
        try:
            text = MAPS[maze_map] if maze_map in MAPS else Path(maze_map).read_text("utf-8-sig")
            maze_map = [line.strip() for line in text.splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            known = f"neither one of {', '.join(MAPS)} nor a text file that can be read"
            raise ValueError(f"maze map {maze_map!r} is {known}") from error
        if not maze_map:
            raise ValueError("the maze map's text file is empty")
    rows = tuple(maze_map) if isinstance(maze_map, list | tuple) else ()
    if not rows or not all(isinstance(row, str) and row for row in rows):
        raise ValueError(f"a maze map is a name, a text file or a list of non-empty strings, got {maze_map!r}")
    cells = {(i, j): cell for i, row in enumerate(rows) for j, cell in enumerate(row)}
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(f"row {i} of the maze map has {len(row)} cells, row 0 has {len(rows[0])}")
    for (i, j), cell in cells.items():
        if cell not in "01rg2o":
            raise ValueError(f"unknown character {cell!r} in row {i}, column {j} of the maze map: use 0, 1, r, g, 2, o")
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
            if neighbour not in reached and cell != "1":
                reached.add(neighbour)
                if cell != "g":
                    frontier.append(neighbour)
    for i, j in goals:
        if (i, j) not in reached:
            raise ValueError(f"the goal in row {i}, column {j} cannot be reached from the start")
    return rows


def cell_centers(rows: Sequence[str], kind: str) -> np.ndarray:
    """The centres of all cells of one kind, in reading order: (N, 2)."""
    i, j = np.nonzero(np.array([list(row) for row in rows]) == kind)
    return np.stack([j + 0.5 - len(rows[0]) / 2, len(rows) / 2 - i - 0.5], axis=1)


@functools.cache
def _build_model(rows: tuple[str, ...], obstacles: bool) -> mujoco.MjModel:
    """Compile a maze in memory."""
    # Found without importing the package, whose import prints a notice.
    if (package := importlib.util.find_spec("gymnasium_robotics")) is None:
        raise ImportError("the mazes need the package gymnasium-robotics")
    spec = mujoco.MjSpec.from_file(str(Path(package.origin).parent / "envs/assets/point/point.xml"))
    sky = spec.texture("skybox")
    sky.width = sky.height = 8  # unseen from above, and else 11 of a model's 12 MB
    cells = len(rows) * len(rows[0])
    spec.memory = 2**20 + 2**9 * cells  # a ball touches few walls: about 1 MiB per environment instead of 13
    for kind in "12" if obstacles else "1":
        for x, y in cell_centers(rows, kind):
            spec.worldbody.add_geom(
                type=mujoco.mjtGeom.mjGEOM_BOX,
                pos=[x, y, 0],
                size=[0.5, 0.5, 1],
                contype=1,
                conaffinity=1,
            )
    return spec.compile()


class MultiGoalPointMaze(gym.Env, gym.utils.EzPickle):
    """A ball in a walled map with several equally good goals.

    Observation: float32 (x, y, vx, vy), in cells and cells per second. Action: Box(-1, 1, (2,)), the forces along x and
    y as fractions of 100 N, clipped; one step is 0.02 s. A goal is reached when the ball's centre is in its cell:
    reward 100 and `terminated`. After a step is observed, a velocity with a component above 5 is scaled down to it.
    `info["goal"]` is the index of the goal just reached or -1, `info["position"]` (x, y).

    Args:
        maze_map: "simple", "medium", "hard", a text file, or the rows of a map (see MAPS for the characters).
        reward_type: "sparse": nothing before a goal; "dense": 10 x the decrease of the distance to the nearest goal.
        obstacles: make the latent obstacles solid, and end the episode without reward after a step that ends at one.
        render_mode: "rgb_array" for pictures from above, or None.

    Raises ValueError, in one sentence, for a wrong map or an argument that is none of these.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}

    def __init__(
        self,
        maze_map: str | Path | Sequence[str] = "simple",
        reward_type: str = "sparse",
        obstacles: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if reward_type not in ("sparse", "dense"):
            raise ValueError(f"reward_type must be 'sparse' or 'dense', got {reward_type!r}")
        if not isinstance(obstacles, bool):
            raise ValueError(f"obstacles must be true or false, got {obstacles!r}")
        self.maze_map = parse_map(maze_map)
        gym.utils.EzPickle.__init__(self, self.maze_map, reward_type, obstacles, render_mode)
        self.fingerprint = hashlib.sha256("\n".join(self.maze_map).encode()).hexdigest()
        self.reward_type, self.obstacles, self.render_mode = reward_type, obstacles, render_mode
        self.start = cell_centers(self.maze_map, "r")[0]
        self.goals = cell_centers(self.maze_map, "g")
        self._goals = self.goals.tolist()  # plain floats: over a handful of goals, several times as fast as NumPy
        self.obstacle_centers = cell_centers(self.maze_map, "2")
        high = np.array([len(self.maze_map[0]) / 2, len(self.maze_map) / 2, OBSERVED_SPEED, OBSERVED_SPEED], np.float32)
        self.observation_space = gym.spaces.Box(-high, high, dtype=np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.model = copy.copy(_build_model(self.maze_map, obstacles))
        self.data = mujoco.MjData(self.model)

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
        inside = [k for k, (gx, gy) in enumerate(self._goals) if max(abs(x - gx), abs(y - gy)) <= GOAL_HALF_WIDTH]
        goal = inside[0] if inside else -1
        touched = goal < 0 and self.obstacles and self._touches_obstacle(position)
        reward = GOAL_REWARD if goal >= 0 else 0.0
        if self.reward_type == "dense" and goal < 0 and not touched:
            distance = self._nearest_goal_distance(position)
            reward = DENSE_REWARD_SCALE * (self._goal_distance - distance)
            self._goal_distance = distance
        return observation, reward, goal >= 0 or touched, False, {"goal": goal, "position": position}

    def render(self) -> np.ndarray:
        """The maze from above: uint8 (height, width, 3), its longer side 480 pixels or a little more."""
        height, width = len(self.maze_map), len(self.maze_map[0])
        scale = 2 * ceil(240 / max(height, width))  # pixels per cell; even, as videos need
        cells = np.array([[CELL_COLORS[cell] for cell in row] for row in self.maze_map], np.uint8)
        picture = Image.fromarray(cells.repeat(scale, axis=0).repeat(scale, axis=1))
        x, y = self.data.qpos
        center = scale * (x + width / 2), scale * (height / 2 - y)
        ImageDraw.Draw(picture).circle(center, scale * BALL_RADIUS, fill="black")
        return np.array(picture)

    def _observation(self) -> np.ndarray:
        return np.concatenate([self.data.qpos, self.data.qvel], dtype=np.float32)

    def _nearest_goal_distance(self, position: np.ndarray) -> float:
        return float(np.linalg.norm(self.goals - position, axis=1).min())

    def _touches_obstacle(self, position: np.ndarray) -> bool:
        gaps = np.maximum(np.abs(self.obstacle_centers - position) - 0.5, 0.0)
        return bool((np.linalg.norm(gaps, axis=1) < BALL_RADIUS).any())


for _name, _horizon in {"simple": 150, "medium": 300, "hard": 600}.items():
    gym.register(
        id=f"MultiGoalPointMaze-{_name.capitalize()}-v0",
        entry_point=f"{__name__}:MultiGoalPointMaze",
        max_episode_steps=_horizon,
        kwargs={"maze_map": _name},
    )


# Level generation: tiles, generator and the measures of a level that environment, metrics and GAN training share.
# A level is an int8 array (rows, columns) of indices into TILES, the sky in row 0.

# Background, glyph, and the glyph's 8 rows of 8 pixels; some colours are Okabe and Ito's.
TILE_LOOKS = {
    "empty": ("#DCEBF5", "#DCEBF5", "0000000000000000"),
    "ground": ("#6B4A33", "#4F3624", "0022000088002200"),
    "stone": ("#9A9A9A", "#6E6E6E", "ff818181818181ff"),
    "brick": ("#D55E00", "#8F3F00", "ff101010ff010101"),
    "bonus": ("#E69F00", "#FFFFFF", "003c66060c180018"),
    "coin": ("#DCEBF5", "#C9A400", "003c7e7e7e7e3c00"),
    "enemy": ("#DCEBF5", "#B0307A", "003c7edbff7e2466"),
    "pipe_rim": ("#009E73", "#005F45", "ff8181818181ff00"),
    "pipe_shaft": ("#009E73", "#005F45", "4242424242424242"),
    "cannon": ("#222222", "#777777", "7e42425a5a42427e"),
    "platform": ("#0072B2", "#FFFFFF", "00ff000000000000"),
    "trunk": ("#DCEBF5", "#7FA8C4", "1818181818181818"),
}
TILES = tuple(TILE_LOOKS)
_IS_SOLID = np.isin(TILES, ("ground", "stone", "brick", "bonus", "pipe_rim", "pipe_shaft", "platform", "cannon"))
SEGMENT_SIZE = 16  # tiles
LATENT_DIM = 20
LEVEL_GENERATOR = Path(__file__).parent / "assets/level_gan/level_gan.pt"
NUM_STARTS = 500
MAX_GAP = 6  # columns that the player can jump


class LevelGenerator(nn.Module):
    """The generator of a GAN: latents in [-1, 1]^20 to segments of a level. `train_level_gan.py` in assets trains it.

    Convolutions alone place tiles without knowing what stands elsewhere; the self-attention in the middle lets every
    part of the segment see every other. `starts` are latents (500, 20) of playable segments, from which levels start.
    """

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.fc = nn.Linear(LATENT_DIM, channels * 4 * 4)
        self.norm1 = nn.BatchNorm2d(channels)
        self.up1 = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.query, self.key = (nn.Conv2d(channels, channels // 8, 1) for _ in range(2))
        self.value = nn.Conv2d(channels, channels, 1)
        self.attention_scale = nn.Parameter(torch.zeros(()))  # the attention fades in during training
        self.up2 = nn.ConvTranspose2d(channels, len(TILES), 4, stride=2, padding=1)
        self.register_buffer("starts", torch.zeros(NUM_STARTS, LATENT_DIM))

    def forward(self, latents: Tensor) -> Tensor:
        """Map latents (N, 20) to tile probabilities (N, 12, 16, 16)."""
        x = self.fc(latents).unflatten(1, (-1, 4, 4))
        x = F.relu(self.norm2(self.up1(F.relu(self.norm1(x)))))  # (N, C, 8, 8)
        query, key, value = (f(x).flatten(2) for f in (self.query, self.key, self.value))  # (N, ., 64)
        weights = (query.transpose(1, 2) @ key).softmax(dim=-1)  # (N, 64, 64), each row sums to 1
        x = x + self.attention_scale * (value @ weights.transpose(1, 2)).view_as(x)
        return self.up2(x).softmax(dim=1)

    @torch.inference_mode()
    def decode(self, latents: np.ndarray) -> np.ndarray:
        """The most probable tile everywhere: latents (N, 20) to tile numbers, int8 (N, 16, 16)."""
        if self.training:
            self.eval()  # batch norm by its stored statistics: a segment must not depend on its neighbours in the batch
        num_threads, products = torch.get_num_threads(), torch.backends.mkldnn.matmul
        precision, products.fp32_precision = products.fp32_precision, "ieee"  # the same levels in every program
        torch.set_num_threads(1)  # a forked process, as of AsyncVectorEnv, would wait forever for its parent's threads
        try:
            probabilities = self(torch.from_numpy(np.asarray(latents, np.float32)))
            return probabilities.numpy().argmax(axis=1).astype(np.int8)  # PyTorch's argmax takes 20 us longer
        finally:
            torch.set_num_threads(num_threads)
            products.fp32_precision = precision


def pattern_histogram(tiles: np.ndarray) -> dict[int, float]:
    """The distribution of the 2x2 tile patterns of levels (.., H, W): pattern -> share, the shares sum to 1."""
    n = len(TILES)
    pairs = tiles[..., :-1] * np.int64(n) + tiles[..., 1:]
    patterns = pairs[..., :-1, :] * n**2 + pairs[..., 1:, :]
    # A dictionary: a segment has a few dozen of the 20,736 patterns, fewer than NumPy is fast at.
    return {pattern: count / patterns.size for pattern, count in Counter(patterns.ravel().tolist()).items()}


def js_divergence(p: dict[int, float], q: dict[int, float]) -> float:
    """The Jensen-Shannon divergence of two histograms, in bits: 0 equal, 1 disjoint.

    By definition the sum of p log2(2p / (p + q)) / 2 + q log2(2q / (p + q)) / 2. Both histograms sum to 1, which leaves
    1 - sum((p + q) log2(p + q) - p log2(p) - q log2(q)) / 2, where only the patterns that both have count.
    """
    common = ((share, q[pattern]) for pattern, share in p.items() if pattern in q)
    return 1 - sum((a + b) * log2(a + b) - a * log2(a) - b * log2(b) for a, b in common) / 2


def is_playable(tiles: np.ndarray) -> bool:
    """Can the player cross this level (H, W)? Not if 7 columns in a row have nothing solid in the two bottom rows."""
    solid_columns = _IS_SOLID[tiles[-2:]].any(axis=0)
    return b"\0" * (MAX_GAP + 1) not in solid_columns.tobytes()


PATTERN_GOAL = 0.14  # the divergence from its predecessors that MultiFacet asks of a segment
NOVELTY_BOUNDS = (0.26, 0.94)  # of the mean divergence, in Puzzle
KL_SMOOTHING = 1e-3
UNPLAYABLE_PENALTY = 1.0
HISTORY = 5  # segments


def symmetric_kl(p: dict[int, float], q: dict[int, float]) -> float:
    """The mean of KL(p | q) and KL(q | p), in bits, over the patterns of either, each smoothed by 0.001."""
    total, patterns = 0.0, p.keys() | q.keys()
    for pattern in patterns:
        a, b = p.get(pattern, 0) + KL_SMOOTHING, q.get(pattern, 0) + KL_SMOOTHING
        total += (a - b) * log2(a / b) / 2
    return total / (1 + KL_SMOOTHING * len(patterns))  # what both sum to when smoothed


def multifacet_reward(segment: np.ndarray, history: np.ndarray) -> float:
    """How well a segment (16, 16) differs a little from each of the 5 before it (16, 80), at most 1.

    The sum over these, i = 0 the newest, of min(c_i, 1 - |JS_i - g| / g) with caps c_i = 1 - i / 6, over that of c_i;
    JS_i is the divergence from the i-th, g = PATTERN_GOAL.
    """
    new, *old = _histograms(segment, history, SEGMENT_SIZE, HISTORY)
    caps = [1 - i / (HISTORY + 1) for i in range(HISTORY)]
    closeness = [1 - abs(js_divergence(new, window) - PATTERN_GOAL) / PATTERN_GOAL for window in old]
    return sum(map(min, caps, closeness)) / sum(caps)


def puzzle_reward(segment: np.ndarray, history: np.ndarray) -> float:
    """How much a segment (16, 16) differs from windows 0, 8, .., 56 columns back in its history (16, 80).

    The mean of the 3 smallest symmetric KL divergences, minus 10 p: p is the squared distance of the mean of all 8 from
    the interval NOVELTY_BOUNDS, but 1 + its logarithm where that exceeds 1.
    """
    new, *old = _histograms(segment, history, SEGMENT_SIZE // 2, 8)
    divergences = sorted(symmetric_kl(new, window) for window in old)
    mean, (low, high) = sum(divergences) / len(divergences), NOVELTY_BOUNDS
    penalty = max(low - mean, mean - high, 0) ** 2
    if penalty > 1:
        penalty = 1 + log(penalty)
    return sum(divergences[:3]) / 3 - 10 * penalty


def _histograms(segment: np.ndarray, history: np.ndarray, stride: int, count: int) -> list[dict[int, float]]:
    """Histograms of a segment, of the last 16 columns of a history (16, W), and of those 1, 2, .. strides back."""
    ends = [history.shape[1] - i * stride for i in range(count)]
    windows = [segment, *(history[:, end - SEGMENT_SIZE : end] for end in ends)]
    return [_window_histogram(window.tobytes()) for window in windows]


@functools.lru_cache(maxsize=2**12)  # a window is compared with at every step until it leaves the history
def _window_histogram(tiles: bytes) -> dict[int, float]:
    return pattern_histogram(np.frombuffer(tiles, np.int8).reshape(SEGMENT_SIZE, SEGMENT_SIZE))


@functools.cache
def _load_generator(file: str, modified: float = 0) -> tuple[LevelGenerator, str]:
    """Load a generator, anew if its file was `modified`. Returns it and the SHA-256 of its file."""
    with torch.device("meta"):  # initializes nothing: making an environment leaves the global random state alone
        generator = LevelGenerator()
    try:
        content = Path(file).read_bytes()
        weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        generator.load_state_dict(weights, assign=True)
        segments = generator.decode(generator.starts.numpy())
    except Exception as error:  # torch.load raises anything on a file that is not its own
        kind = type(error).__name__
        raise ValueError(f"{file} is missing, damaged, or not the weights of a level generator ({kind})") from error
    if not (generator.starts.abs() <= 1).all() or not all(map(is_playable, segments)):
        raise ValueError(f"the starts in {file} are not latents in [-1, 1] that it makes playable segments of")
    return generator.requires_grad_(False), hashlib.sha256(content).hexdigest()


class LevelGeneration(gym.Env, gym.utils.EzPickle):
    """Build a platform level segment by segment: each action is a latent vector, a frozen GAN decodes it.

    Observation: the last 5 latents, oldest first, float32 (100,). Action: Box(-1, 1, (20,)), clipped. An episode starts
    from 5 segments drawn from 500 playable ones, and has no end but its time limit, 50 steps. `info["segment"]` is the
    newest segment, int8 (16, 16), and `info["playable"]` whether it can be crossed, joined to the one before it.
    `fingerprint` is the SHA-256 of the generator's file.

    Args:
        reward_style: "multifacet" or "puzzle" (see the reward functions); both less 1 for an unplayable joint.
        decoder_path: the weights of another `LevelGenerator`; None: the one of this project.
        render_mode: "rgb_array" for pictures of the 5 segments of the observation, or None.

    Raises ValueError for another reward style or render mode, and for a file that is no generator.

    Source: the paper. The rewards are those of Wang et al. (FDG 2022) and Shu et al. (CoG 2021), whose generator was
    trained on a commercial game; ours is trained on levels of our own, by assets/level_gan/train_level_gan.py.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(
        self,
        reward_style: str = "multifacet",
        decoder_path: str | Path | None = None,
        render_mode: str | None = None,
    ) -> None:
        rewards = {"multifacet": multifacet_reward, "puzzle": puzzle_reward}
        if reward_style not in list(rewards):
            raise ValueError(f"reward_style must be 'multifacet' or 'puzzle', got {reward_style!r}")
        self.reward, self.render_mode = rewards[reward_style], render_mode
        file = os.path.abspath(str(LEVEL_GENERATOR if decoder_path is None else decoder_path))
        modified = os.path.getmtime(file) if os.path.exists(file) else 0  # _load_generator says what is wrong
        self.generator, self.fingerprint = _load_generator(file, modified)
        gym.utils.EzPickle.__init__(self, reward_style, decoder_path and file, render_mode)
        self.starts = self.generator.starts.numpy()
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (HISTORY * LATENT_DIM,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (LATENT_DIM,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Start a new level from 5 playable segments."""
        super().reset(seed=seed)
        self._latents = self.starts[self.np_random.choice(len(self.starts), HISTORY, replace=False)]
        self._history = np.hstack(self.generator.decode(self._latents))  # (16, 80)
        playable = is_playable(self._history[:, -2 * SEGMENT_SIZE :])
        return self._latents.flatten(), {"segment": self._history[:, -SEGMENT_SIZE:].copy(), "playable": playable}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Append a segment. The time limit comes from Gymnasium's TimeLimit wrapper, added by `gymnasium.make`."""
        latent = np.clip(action, -1, 1, dtype=np.float32)[None]
        segment = self.generator.decode(latent)[0]
        reward = self.reward(segment, self._history)
        level = np.concatenate([self._history, segment], axis=1)
        playable = is_playable(level[:, -2 * SEGMENT_SIZE :])
        if not playable:
            reward -= UNPLAYABLE_PENALTY
        self._latents = np.concatenate([self._latents[1:], latent])
        self._history = level[:, SEGMENT_SIZE:]
        return self._latents.flatten(), reward, False, False, {"segment": segment, "playable": playable}

    def render(self) -> np.ndarray:
        """The last 5 segments: uint8 (128, 640, 3)."""
        return level_image(self._history)


def _sprite(background: str, glyph: str, rows: str) -> np.ndarray:
    """A tile as a picture: uint8 (8, 8, 3)."""
    mask = np.unpackbits(np.frombuffer(bytes.fromhex(rows), np.uint8)).reshape(8, 8)
    return np.array([ImageColor.getrgb(background), ImageColor.getrgb(glyph)], np.uint8)[mask]


TILE_SPRITES = np.stack([_sprite(*look) for look in TILE_LOOKS.values()])  # (12, 8, 8, 3)


def level_image(tiles: np.ndarray) -> np.ndarray:
    """Draw a level (H, W), 8 pixels per tile: uint8 (8 H, 8 W, 3)."""
    height, width = tiles.shape
    return TILE_SPRITES[tiles].transpose(0, 2, 1, 3, 4).reshape(8 * height, 8 * width, 3)


for _style in ("MultiFacet", "Puzzle"):
    gym.register(
        id=f"LevelGeneration-{_style}-v0",
        entry_point=f"{__name__}:LevelGeneration",
        max_episode_steps=50,
        kwargs={"reward_style": _style.lower()},
    )


@dataclass
class Episode:
    """One episode: its undiscounted return, and of every `info`, the one of the reset included, what is KEPT."""

    infos: list[dict]
    episodic_return: float = 0.0


KEPT = ("goal", "position", "segment", "playable")  # what the metrics ask for; other people's infos may hold pictures


def _kept(info: dict) -> dict:
    return {name: info[name] for name in KEPT if name in info}


# Maps the observations (N, obs_dim) of N environments, and which of them begin an episode (N,), to actions (N, d).
# Where an environment's last episode has ended, its observation is an old one, and its action is not used.
Policy = Callable[[np.ndarray, np.ndarray], np.ndarray]
# Makes an environment, with keyword arguments added to those of `gymnasium.make`.
Make = Callable[..., gym.Env]
# Writes a file: its name, and a function that writes its content to a stream.
Write = Callable[[str, Callable[[BinaryIO], object]], None]
# Where a picture goes: a file, or a stream for a PNG or GIF.
File = str | Path | BinaryIO


def play_episodes(policy: Policy, envs: Sequence[gym.Env], num_episodes: int, seed: int) -> list[Episode]:
    """Play episodes in all environments side by side, so that they share the policy's forward passes.

    Every environment plays its share of the episodes to the end: taking the first to finish of a larger crowd would
    favour short ones. Every episode has a seed of its own, drawn from `seed`.
    """
    episodes, seeds = [], np.random.SeedSequence(seed).generate_state(num_episodes).tolist()
    obs = np.zeros((len(envs), *envs[0].observation_space.shape), np.float32)
    for first in range(0, num_episodes, len(envs)):
        running, starts = {}, np.ones(len(envs), bool)
        for i, env in enumerate(envs[: num_episodes - first]):
            obs[i], info = env.reset(seed=seeds[first + i])
            running[i] = Episode(infos=[_kept(info)])
        episodes += running.values()
        while running:
            actions = policy(obs.copy(), starts)  # the policy may keep them
            starts = np.zeros(len(envs), bool)
            for i, episode in list(running.items()):
                obs[i], reward, terminated, truncated, info = envs[i].step(actions[i])
                episode.episodic_return += np.asarray(reward).item()
                episode.infos.append(_kept(info))
                if terminated or truncated:
                    del running[i]
    return episodes


def _play(policy: Policy, make: Make, num_episodes: int, seed: int, **kwargs: object) -> list[Episode]:
    with contextlib.ExitStack() as stack:  # which closes them
        envs = [stack.enter_context(make(**kwargs)) for _ in range(min(num_episodes, MAX_PARALLEL_ENVS))]
        return play_episodes(policy, envs, num_episodes, seed)


def _example(make: Make) -> gym.Env:
    """A closed environment, to see of what kind it is."""
    env = make()
    env.close()
    return env.unwrapped


MAX_PARALLEL_ENVS = 100
GROUP_SIZE = 5  # episodes, in the paper's tests on mazes
NUM_LEVELS_DRAWN = 8


def evaluate_policy(
    policy: Policy, make: Make, num_episodes: int, seed: int, write: Write | None = None, animate: bool = False
) -> dict[str, float | int]:
    """Evaluate a policy on fresh environments: mean and standard deviation of the undiscounted return, mean length.

    On mazes also `maze_metrics`, and in level generation `playable_rate`, the share of playable joints. `write` gets
    pictures: of these episodes trajectories.png and, to `animate` them, episodes.gif; in level generation levels.png,
    further levels from one start.
    """
    episodes = _play(policy, make, num_episodes, seed)
    returns = [episode.episodic_return for episode in episodes]
    metrics = {
        "episodic_return_mean": float(np.mean(returns)),
        "episodic_return_std": float(np.std(returns)),
        "episodic_length_mean": float(np.mean([len(episode.infos) - 1 for episode in episodes])),
    }
    env = _example(make)
    if isinstance(env, MultiGoalPointMaze):
        goals = [episode.infos[-1]["goal"] for episode in episodes]
        metrics |= maze_metrics(goals, len(env.goals))
        if write:
            title = "{} of {} episodes reach a goal, {} of {} goals are reached".format(
                sum(goal >= 0 for goal in goals), num_episodes, metrics["reachable_modes"], len(env.goals)
            )
            positions = [[info["position"] for info in episode.infos] for episode in episodes]
            write("trajectories.png", functools.partial(plot_trajectories, env.maze_map, positions, goals, title))
            if animate:
                write("episodes.gif", functools.partial(animate_trajectories, env.maze_map, positions, goals, title))
    if isinstance(env, LevelGeneration):
        joints = [info["playable"] for episode in episodes for info in episode.infos[1:]]
        metrics["playable_rate"] = float(np.mean(joints))
        if write:
            levels = [generate_levels(policy, make, 1, seed)[0] for _ in range(NUM_LEVELS_DRAWN)]
            title = f"{len(levels)} levels from one start; {metrics['playable_rate']:.1%} of all joints are playable"
            write("levels.png", functools.partial(plot_levels, levels, title))
    return metrics


def final_trials(policy: Policy, make: Make, num_trials: int, seed: int) -> dict[str, float | int]:
    """The paper's tests of how multimodal a policy is: `maze_trials`, `level_trials`, or {} on other environments."""
    env = _example(make)
    if num_trials and isinstance(env, MultiGoalPointMaze):
        return maze_trials(policy, make, num_trials, len(env.goals), seed)
    if num_trials and isinstance(env, LevelGeneration):
        return level_trials(policy, make, num_trials, seed)
    return {}


def maze_trials(policy: Policy, make: Make, num_trials: int, num_goals: int, seed: int) -> dict[str, float | int]:
    """`num_trials` groups of 5 episodes on a maze with so many goals, and as many with its obstacles made solid.

    `removal_sr5` is `removal_success_rate` on the maze as trained on (`removal_sr5_release`: as the authors' release
    scores it), `obstacle_sr5` is `group_success_rate` with solid obstacles. Nothing is retrained or adapted. The
    `maze_metrics` of the removal episodes come along.
    """

    def reached(**kwargs: bool) -> list[int]:
        return [episode.infos[-1]["goal"] for episode in _play(policy, make, GROUP_SIZE * num_trials, seed, **kwargs)]

    goals = reached()
    return {
        **maze_metrics(goals, num_goals),
        "removal_sr5": removal_success_rate(goals, num_goals),
        "removal_sr5_release": removal_success_rate(goals, num_goals, half_is_safe=True),
        "obstacle_sr5": group_success_rate(reached(obstacles=True)),
    }


def level_trials(policy: Policy, make: Make, num_pairs: int, seed: int) -> dict[str, float | int]:
    """Distances, in tiles, between `num_pairs` disjoint pairs of generated levels.

    Pairs of different starts, their mean and their geometric mean, and pairs of the same start: only the latter are
    zero for a deterministic policy.
    """
    # At least 2 levels, so that a single pair has two starts, too.
    first, second = (generate_levels(policy, make, max(num_pairs, 2), seed) for _ in range(2))  # from the same starts
    distances = hamming_distances(first, np.roll(second, 1, axis=0))[:num_pairs]
    return {
        "level_diversity": float(distances.mean()),
        "level_diversity_geometric": float(np.exp(np.log(distances + 1e-3).mean())),
        "level_diversity_same_start": float(hamming_distances(first, second)[:num_pairs].mean()),
    }


def generate_levels(policy: Policy, make: Make, num_levels: int, seed: int) -> np.ndarray:
    """Levels of 20 steps, each after the last segment of its start: int8 (num_levels, 16, 336)."""
    episodes = _play(policy, make, num_levels, seed, max_episode_steps=20)
    return np.stack([np.hstack([info["segment"] for info in episode.infos]) for episode in episodes])


# Metrics: pure functions. `goals` are the indices of the goals that the episodes reached, -1 for none.


def goal_counts(goals: Sequence[int], num_goals: int) -> np.ndarray:
    """How many episodes reached each goal: int (num_goals,)."""
    goals = np.asarray(goals, dtype=int)
    return np.bincount(goals[goals >= 0], minlength=num_goals)


def maze_metrics(goals: Sequence[int], num_goals: int) -> dict[str, float | int]:
    """Success rate, number of distinct goals, multi-goal score and the episodes per goal, under their logged names.

    The score sums min(share of the episodes, 1 / num_goals) over the goals: 1 if all are reached equally often.
    """
    counts = goal_counts(goals, num_goals)
    return {
        "success_rate": float(counts.sum() / len(goals)),
        "reachable_modes": int((counts > 0).sum()),
        "multi_goal_score": float(np.minimum(counts / len(goals), 1 / num_goals).sum()),
        **{f"goal_{index}": int(count) for index, count in enumerate(counts)},
    }


def group_success_rate(goals: Sequence[int]) -> float:
    """SR5: the share of consecutive groups of 5 episodes in which at least one reached a goal."""
    return float((np.reshape(goals, (-1, GROUP_SIZE)) >= 0).any(axis=1).mean())


def removal_success_rate(goals: Sequence[int], num_goals: int, half_is_safe: bool = False) -> float:
    """Goal-removal SR5: how likely has a group of trials reached a goal that survives the removal of half of them?

    For a group that reached R distinct goals of K, with k = K // 2 removed uniformly at random, it is exactly
    1 - C(K - R, k - R) / C(K, k): all R lie among the removed ones in C(K - R, k - R) of the C(K, k) removals, which is
    none for R > k and all of them for R = 0. Returns the mean over the groups.

    `half_is_safe` scores R = k as 1, which the authors' release does by mistake: for comparison with its figures.
    """
    removed = num_goals // 2
    probabilities = []
    for group in np.reshape(goals, (-1, GROUP_SIZE)):
        distinct = len(set(group[group >= 0]))
        safe = distinct > removed or (half_is_safe and distinct == removed > 0)
        lost = 0 if safe else comb(num_goals - distinct, removed - distinct)
        probabilities.append(1 - lost / comb(num_goals, removed))
    return float(np.mean(probabilities))


def hamming_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The number of tiles in which levels differ, pair by pair: (N, H, W) twice to (N,)."""
    return (first != second).sum(axis=(1, 2))


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """The area that points (N, 2), of which more is better in both coordinates, dominate above a reference point (2,).

    For the paper's trade-off between quality and diversity: one point per beta.
    """
    area, best = 0.0, reference[1]
    for x, y in sorted(map(tuple, points), reverse=True):
        if x > reference[0] and y > best:
            area += (x - reference[0]) * (y - best)
            best = y
    return area


# Six of Okabe and Ito's colours, told apart by the colour-blind too, and two more; they repeat beyond eight goals.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A4E9F", "#8C8C00")


# The pictures are the same whatever a user's matplotlibrc says.
_drawing = matplotlib.style.context("default")


def _goal_color(goal: int) -> str:
    return PALETTE[goal % len(PALETTE)] if goal >= 0 else "#000000"


def _draw_maze(rows: Sequence[str], goals: Sequence[int], title: str, dpi: int) -> tuple[Figure, Axes]:
    """A maze from above, with the number of episodes at each goal."""
    height, width = len(rows), len(rows[0])
    figure = Figure(figsize=(5, min(5 * height / width, 10) + 0.3), dpi=dpi, layout="constrained")
    axes = figure.add_subplot(xlim=(-width / 2, width / 2), ylim=(-height / 2, height / 2), aspect="equal")
    axes.set_axis_off()
    axes.set_title(title, fontsize=9)

    def draw_cell(center: np.ndarray, **style: str | float) -> None:
        axes.add_patch(Rectangle(center - 0.5, 1, 1, **style))

    for center in cell_centers(rows, "1"):
        draw_cell(center, facecolor="#3A3F47", edgecolor="#3A3F47", linewidth=0.3)
    for center in cell_centers(rows, "2"):
        draw_cell(center, facecolor="#EDEDED", edgecolor="#BBBBBB", linestyle=":", linewidth=0.8)
    centers = cell_centers(rows, "g")
    for goal, (center, count) in enumerate(zip(centers, goal_counts(goals, len(centers)), strict=True)):
        draw_cell(center, facecolor=_goal_color(goal), alpha=0.25, edgecolor="none")
        draw_cell(center, facecolor="none", edgecolor=_goal_color(goal), linewidth=1.2)
        label = axes.text(*center, str(count), ha="center", va="center", fontsize=9, fontweight="bold", zorder=5)
        label.set_bbox({"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8})
    axes.plot(*cell_centers(rows, "r")[0], marker="o", markersize=5, color="white", markeredgecolor="black", zorder=5)
    return figure, axes


@_drawing
def plot_trajectories(
    rows: Sequence[str], trajectories: Sequence[np.ndarray], goals: Sequence[int], title: str, file: File
) -> None:
    """Draw a maze (`rows`: its `maze_map`) with a line per episode, in the colour of its goal (black: none).

    Of each episode there are the positions, (steps + 1, 2), and the goal that it reached, or -1.
    """
    figure, axes = _draw_maze(rows, goals, title, dpi=150)
    for trajectory, goal in zip(trajectories, goals, strict=True):
        axes.plot(*np.asarray(trajectory).T, color=_goal_color(goal), lw=0.7, alpha=0.6, solid_joinstyle="round")
    figure.savefig(file)


@_drawing
def animate_trajectories(
    rows: Sequence[str], trajectories: Sequence[np.ndarray], goals: Sequence[int], title: str, file: File
) -> None:
    """The same as a GIF of a few seconds: all balls leave the start together."""
    figure, axes = _draw_maze(rows, goals, title, dpi=80)
    figure.savefig(picture := io.BytesIO())
    background, frames = Image.open(picture).convert("RGB"), []
    for step in np.linspace(0, max(map(len, trajectories)) - 1, 90).astype(int):
        frame = background.copy()
        for trajectory, goal in zip(trajectories, goals, strict=True):
            x, y = axes.transData.transform(trajectory[min(step, len(trajectory) - 1)])
            ImageDraw.Draw(frame).circle((x, frame.height - y), 3, fill=_goal_color(goal))
        frames.append(frame.quantize(64, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE))  # keeps rare colours
    frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:], duration=60, loop=0)


def animate_episode(policy: Policy, make: Make, seed: int, file: File) -> None:
    """One episode through the environment's own renderer, as a GIF of at most 25 pictures per second.

    Raises RuntimeError, in one sentence, where it cannot be rendered.
    """
    try:
        # A missing backend's warnings are ignored: it is named below.
        with warnings.catch_warnings(action="ignore"), make(render_mode="rgb_array") as env:
            (obs, _), starts, ends, frames = env.reset(seed=seed), np.ones(1, bool), False, []
            stride = ceil(env.metadata.get("render_fps", 25) / 25)
            for step in itertools.count():
                if step % stride == 0:
                    frames.append(Image.fromarray(env.render()))
                    frames[-1].thumbnail((640, 320))
                if ends:
                    break
                obs, _, terminated, truncated, _ = env.step(policy(np.asarray(obs)[None], starts)[0])
                starts, ends = np.zeros(1, bool), terminated or truncated
    except Exception as error:  # its type depends on the missing backend
        raise RuntimeError(f"no episode can be drawn ({error!r}); without a screen, MUJOCO_GL=egl may help") from error
    milliseconds = round(1000 * stride / env.metadata.get("render_fps", 25))
    frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)


@_drawing
def plot_levels(levels: Sequence[np.ndarray], title: str, file: File) -> None:
    """Draw levels (H, W) below each other, each a row of tiles."""
    height, width = levels[0].shape
    figure = Figure(figsize=(14, 14 * len(levels) * (height + 2) / width + 0.4), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axes, level in zip(figure.subplots(len(levels), squeeze=False)[:, 0], levels, strict=True):
        axes.imshow(level_image(level), interpolation="nearest")
        axes.set_axis_off()
    figure.savefig(file)
