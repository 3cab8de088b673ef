"""A robot with microphones looks for what sounds in a room: `sound_rectangle`, `sound_l`, `sound_pillar`.

Sound is simulated by pyroomacoustics (image sources: direct sound and reflections at walls, floor and ceiling) from
every source to every microphone, at the robot's pose of this step, and is continuous in time. The task of the published
turtlebot experiments on finding a source of sound, as a gymnasium-style environment.

    python -m envs.sound --task sound_rectangle --policy oracle --episodes 20       # what is there to reach

Observations (`sound.observe`): `audio`, a waveform [mics, samples] or (`sound.audio: features`) log-spectrogram bands
of each microphone and the phase differences to the first; `pose` (x, y, cos and sin of the heading, metres); `map`,
what is solid around the robot; `image`, from above or (`sound.view: first`) from the robot's eyes, with every source in
sight.

Reward: metres of shortest way that came off the distance to the nearest source, `ARRIVAL` for reaching one, minus
`CONTACT` for touching a wall and `TIME` each step. The episode ends when all sources are found; distractors are not.
"""

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from gymnasium import spaces

from errors import UserError

from .wrappers import Env, TaskError, transition

RATE = 16_000  # samples per second
SPEED, TURN = 0.5, math.pi / 2  # metres and radians per second, at most
RADIUS, REACH = 0.15, 0.4  # metres: of the robot, and from which a source counts as found
MIC_HEIGHT, SOURCE_HEIGHT, CEILING = 0.3, 0.6, 2.7
ARRIVAL, CONTACT, TIME = 2.0, 0.05, 0.01
CELL = 0.1  # metres of the grid that distances are measured on
BANDS = 16  # of features
OBSERVABLE = ("audio", "pose", "map", "image")
# Corners of the floor, counter-clockwise, and of what stands on it.
LAYOUTS = {
    "rectangle": ([(0, 0), (5, 0), (5, 4), (0, 4)], []),
    "l": ([(0, 0), (6, 0), (6, 2.5), (3, 2.5), (3, 5), (0, 5)], []),
    "pillar": ([(0, 0), (5, 0), (5, 4), (0, 4)], [[(2.1, 1.6), (2.9, 1.6), (2.9, 2.4), (2.1, 2.4)]]),
}


def load(config, mode: str, name: str, seed: int) -> Env:
    """config: image_size and the section `sound`."""
    if name not in LAYOUTS:
        raise TaskError(f"sound_{name}: unknown layout; expected {', '.join(f'sound_{key}' for key in LAYOUTS)}.")
    return SoundRoom(name, seed=seed, image_size=config.image_size, **config.sound)


class SoundRoom(Env):
    """The room, the robot, and what sounds.

    Args:
        layout: of `LAYOUTS`; `scale` multiplies its sides.
        observe: some of `OBSERVABLE`.
        audio: waveform or features. view: top or first.
        actions: continuous (forward and turning speed), or headings (a step to the east, north, west or south).
        mics: microphones, on a circle of 0.1 m around the robot.
        step: seconds per step. steps: of an episode.
        order: reflections that are simulated. absorption: of walls, floor and ceiling.
        sources, distractors: how many. signal, distractor_signal: noise, tones, or a folder of wav files.
        speed: of sources, metres per second.
        deaf: audio is replaced by zeros, to tell what hearing is worth.
    """

    def __init__(
        self,
        layout: str = "rectangle",
        *,
        seed: int = 0,
        image_size: Sequence[int] = (64, 64),
        scale: float = 1.0,
        observe: Sequence[str] = ("audio", "pose"),
        audio: str = "waveform",
        view: str = "top",
        actions: str = "continuous",
        mics: int = 4,
        step: float = 0.1,
        steps: int = 200,
        order: int = 3,
        absorption: float = 0.4,
        sources: int = 1,
        distractors: int = 0,
        signal: str = "noise",
        distractor_signal: str = "tones",
        speed: float = 0.0,
        deaf: bool = False,
    ):
        unknown = set(observe) - set(OBSERVABLE)
        if unknown or not observe:
            raise TaskError(f"sound.observe is {list(observe)}, expected some of {', '.join(OBSERVABLE)}.")
        for key, value, known in (("audio", audio, ("waveform", "features")), ("view", view, ("top", "first"))):
            if value not in known:
                raise TaskError(f"sound.{key} is '{value}', expected {' or '.join(known)}.")
        if actions not in ("continuous", "headings"):
            raise TaskError(f"sound.actions is '{actions}', expected continuous or headings.")
        self._rng = np.random.default_rng(seed)
        self._floor = Floor(*LAYOUTS[layout], scale)
        self._samples, self._seconds, self.time_limit = round(RATE * step), step, steps
        self._count, self._distractors, self._speed, self._deaf = sources, distractors, speed, deaf
        angles = 2 * np.pi * np.arange(mics) / mics
        self._array = 0.1 * np.stack([np.cos(angles), np.sin(angles)])
        self._acoustics = Acoustics(self._floor, mics, order, absorption) if "audio" in observe and not deaf else None
        self._target, self._other = make_signal(signal), make_signal(distractor_signal)
        self._features = Features(self._samples, mics) if audio == "features" else None
        self._observed, self._headings, self._view = tuple(observe), actions == "headings", view
        self._size = tuple(image_size)
        shape = self._features.shape if self._features else (mics, self._samples)
        every = {
            "audio": spaces.Box(-np.inf, np.inf, shape, np.float32),
            "pose": spaces.Box(-np.inf, np.inf, (4,), np.float32),
            "map": spaces.Box(0, 1, (16, 16), np.float32),
            "image": spaces.Box(0, 255, (*self._size, 3), np.uint8),
        }
        self.obs_space = {key: every[key] for key in self._observed}
        self.act_space = spaces.Discrete(4) if self._headings else spaces.Box(-1, 1, (2,), np.float32)

    def reset(self):
        floor, rng = self._floor, self._rng
        self._place, self._heading = floor.sample(rng), rng.uniform(-np.pi, np.pi)
        self._sources = [Source(self._target(rng), True) for _ in range(self._count)]
        self._sources += [Source(self._other(rng), False) for _ in range(self._distractors)]
        for source in self._sources:
            for _ in range(100):
                source.place = floor.sample(rng)
                if math.dist(source.place, self._place) > 3 * REACH:
                    break
            source.goal = source.place
        self._distance = None
        self._distance = self._measure()
        self._time = self._contacts = 0
        zeros = {"log_contacts": np.float32(0), "log_success": np.float32(0)}
        return transition({**self._observe(), **zeros}, first=True)

    def step(self, action):
        touched = self._move(action)
        for source in self._sources:
            self._walk(source)
        before, self._distance = self._distance, self._measure()
        reward = before - self._distance - CONTACT * touched - TIME
        for source in self._sources:
            if source.wanted and not source.found and math.dist(source.place, self._place) < REACH:
                source.found = True
                reward += ARRIVAL
        done = all(source.found for source in self._sources if source.wanted)
        if not done and any(source.found for source in self._sources):
            self._distance = self._measure()  # to the next one
        self._time += 1
        self._contacts += touched
        logs = {"log_contacts": np.float32(self._contacts), "log_success": np.float32(done)}
        return transition({**self._observe(), **logs}, reward, last=done, terminal=done)

    def render(self):
        return self._picture((256, 256), "top")

    # Moving

    def _move(self, action) -> bool:
        """Moves the robot; True where a wall stopped it."""
        if self._headings:
            self._heading = np.pi / 2 * int(action)
            length = SPEED * self._seconds
        else:
            forward, turn = np.clip(np.asarray(action, np.float64).reshape(-1), -1, 1)
            self._heading = math.remainder(self._heading + turn * TURN * self._seconds, 2 * np.pi)
            length = forward * SPEED * self._seconds
        place = self._place + length * np.array([np.cos(self._heading), np.sin(self._heading)])
        if self._floor.free(place, RADIUS):
            self._place = place
            return False
        return True

    def _walk(self, source: "Source") -> None:
        """Sources that move go to random places, one after the other, and only where they see the way."""
        if not self._speed:
            return
        if math.dist(source.goal, source.place) < CELL:
            goal = self._floor.sample(self._rng)
            source.goal = goal if self._floor.sees(source.place, goal) else source.place
            return
        way = source.goal - source.place
        source.place = source.place + way * min(1.0, self._speed * self._seconds / np.linalg.norm(way))

    def _measure(self) -> float:
        """Metres of the shortest way to the nearest source that is wanted and not found; 0 if all are."""
        wanted = [source for source in self._sources if source.wanted and not source.found]
        return min((self._floor.distance(self._place, source.place) for source in wanted), default=0.0)

    def oracle(self):
        """The action of one who knows where the nearest source is, and the way there."""
        wanted = [source for source in self._sources if source.wanted and not source.found]
        nearest = min(wanted, key=lambda source: self._floor.distance(self._place, source.place))
        way = self._floor.way(self._place, nearest.place)
        turn = math.remainder(math.atan2(way[1], way[0]) - self._heading, 2 * np.pi)
        if self._headings:
            options = [np.array([math.cos(a), math.sin(a)]) for a in np.pi / 2 * np.arange(4)]
            free = [
                n for n, d in enumerate(options) if self._floor.free(self._place + SPEED * self._seconds * d, RADIUS)
            ]
            return max(free or range(4), key=lambda n: float(options[n] @ way))
        forward = 1.0 if abs(turn) < np.pi / 8 else 0.0
        return np.array([forward, np.clip(turn / (TURN * self._seconds), -1, 1)], np.float32)

    # Observing

    def _observe(self) -> dict:
        return {key: getattr(self, f"_{key}")() for key in self._observed}

    def _audio(self):
        wave_ = np.zeros((self._array.shape[1], self._samples))
        if self._acoustics is not None:
            turn = np.array(
                [[np.cos(self._heading), -np.sin(self._heading)], [np.sin(self._heading), np.cos(self._heading)]]
            )
            mics = self._place[:, None] + turn @ self._array
            sounding = [source for source in self._sources if not source.found]
            wave_ = self._acoustics.hear(sounding, mics, self._samples)
        wave_ = wave_.astype(np.float32)
        return self._features(wave_) if self._features else wave_

    def _pose(self):
        return np.array([*self._place, np.cos(self._heading), np.sin(self._heading)], np.float32)

    def _map(self):
        """16 x 16 cells of 0.25 m around the robot, turned with it: 1 where something solid is."""
        offsets = (np.arange(16) - 7.5) * 0.25
        forward = np.array([np.cos(self._heading), np.sin(self._heading)])
        left = np.array([-forward[1], forward[0]])
        points = self._place + offsets[::-1, None, None] * forward + offsets[None, ::-1, None] * left
        return (~self._floor.inside(points.reshape(-1, 2))).reshape(16, 16).astype(np.float32)

    def _image(self):
        return self._picture(self._size, self._view)

    def _picture(self, size, view) -> np.ndarray:
        seen = [s for s in self._sources if not s.found and self._floor.sees(self._place, s.place)]
        draw = self._floor.from_above if view == "top" else self._floor.from_inside
        return draw(size, self._place, self._heading, seen)


class Source:
    """Something that sounds: `wanted`, or a distractor."""

    def __init__(self, signal: Callable[[int], np.ndarray], wanted: bool):
        self.signal, self.wanted, self.found = signal, wanted, False
        self.place = self.goal = np.zeros(2)
        self.past = np.zeros(0)  # samples that still sound in the room


class Floor:
    """Where one can go, in the plane: an outline, and blocks that stand inside."""

    def __init__(self, outline: Sequence, blocks: Sequence, scale: float):
        self.outline = scale * np.array(outline, np.float64)
        self.blocks = [scale * np.array(block, np.float64) for block in blocks]
        rings = [self.outline, *self.blocks]
        self.walls = np.concatenate([np.stack([ring, np.roll(ring, -1, 0)], 1) for ring in rings])  # [walls, ends, 2]
        self.size = self.outline.max(0)
        grid = np.ceil(self.size / CELL).astype(int)
        centres = (np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1) + 0.5) * CELL
        centres = centres.reshape(-1, 2)  # farther from walls than the robot must be, so that it gets around corners
        self._open = self._largest((self.inside(centres) & self.clear(centres, RADIUS + CELL)).reshape(grid))
        self._cells = np.argwhere(self._open)
        self._fields: dict[tuple, np.ndarray] = {}

    @staticmethod
    def _largest(free: np.ndarray) -> np.ndarray:
        """The largest part of the cells that one can walk all over."""
        from scipy.ndimage import label

        parts, count = label(free, np.ones((3, 3)))
        if not count:
            raise TaskError("sound.scale leaves the robot no place to stand: make it larger.")
        return parts == 1 + np.bincount(parts[parts > 0] - 1).argmax()

    def inside(self, points: np.ndarray) -> np.ndarray:
        """[n, 2] -> [n] bool: in the outline and in no block (a ray to the east crosses the walls an odd number of
        times).
        """
        (x, y), (start, end) = points.T[:, :, None], self.walls.transpose(1, 2, 0)
        spans = (start[1] > y) != (end[1] > y)
        with np.errstate(divide="ignore", invalid="ignore"):
            crossing = start[0] + (y - start[1]) / (end[1] - start[1]) * (end[0] - start[0])
        return (spans & (x < crossing)).sum(1) % 2 == 1

    def clear(self, points: np.ndarray, radius: float) -> np.ndarray:
        """[n, 2] -> [n] bool: no wall is nearer than that."""
        start, along = self.walls[:, 0], self.walls[:, 1] - self.walls[:, 0]
        rest = points[:, None] - start
        share = ((rest * along).sum(-1) / (along**2).sum(-1)).clip(0, 1)
        return (np.linalg.norm(rest - share[..., None] * along, axis=-1) >= radius).all(1)

    def free(self, place: np.ndarray, radius: float) -> bool:
        return bool(self.inside(place[None])[0] and self.clear(place[None], radius)[0])

    def sample(self, rng: np.random.Generator) -> np.ndarray:
        return (self._cells[rng.integers(len(self._cells))] + rng.uniform(0.3, 0.7, 2)) * CELL

    def sees(self, one: np.ndarray, two: np.ndarray) -> bool:
        """No wall crosses the straight line."""
        return not np.isfinite(self.ahead(one, (two - one)[None], 1.0)).any()

    def ahead(self, place: np.ndarray, ways: np.ndarray, limit: float = np.inf) -> np.ndarray:
        """How many times a way [n, 2] one can go until a wall; inf if farther than `limit`."""
        start, along = self.walls[:, 0] - place, self.walls[:, 1] - self.walls[:, 0]
        cross = ways[:, None, 0] * along[:, 1] - ways[:, None, 1] * along[:, 0]
        with np.errstate(divide="ignore", invalid="ignore"):
            times = (start[:, 0] * along[:, 1] - start[:, 1] * along[:, 0]) / cross
            share = (start[:, 0] * ways[:, None, 1] - start[:, 1] * ways[:, None, 0]) / cross
        hits = (times > 1e-9) & (times <= limit) & (share >= 0) & (share <= 1)
        return np.where(hits, times, np.inf).min(1)

    def distance(self, place: np.ndarray, goal: np.ndarray) -> float:
        """Metres of the shortest way: straight where it can be seen, else along the grid."""
        if self.sees(place, goal):
            return math.dist(place, goal)
        cell, field = self._field(place, goal)
        return float(field[cell])

    def way(self, place: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """A step [2] along the shortest way."""
        straight = goal - place
        side = (RADIUS + CELL / 2) * np.array([-straight[1], straight[0]]) / max(np.linalg.norm(straight), 1e-9)
        if all(self.sees(place + x, goal + x) for x in (side, -side)):
            return straight
        (row, column), field = self._field(place, goal)
        around = [(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        around = [cell for cell in around if 0 <= cell[0] < field.shape[0] and 0 <= cell[1] < field.shape[1]]
        best = min(around, key=lambda cell: field[cell])
        return (np.array(best) + 0.5) * CELL - place

    def _field(self, place: np.ndarray, goal: np.ndarray) -> tuple[tuple[int, int], np.ndarray]:
        """The nearest open cell of a place, and every cell's distance to a goal along open cells, eight ways."""
        cell, target = self._nearest(place), self._nearest(goal)
        if target not in self._fields:
            if len(self._fields) > 256:
                self._fields.clear()
            self._fields[target] = self._spread(target)
        return cell, self._fields[target]

    def _nearest(self, place: np.ndarray) -> tuple[int, int]:
        distances = np.abs((self._cells + 0.5) * CELL - place).sum(1)
        return tuple(map(int, self._cells[distances.argmin()]))

    def _spread(self, target: tuple[int, int]) -> np.ndarray:
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import dijkstra

        rows, columns = self._open.shape
        number = np.arange(rows * columns).reshape(rows, columns)
        edges = []
        for i, j in ((1, 0), (0, 1), (1, 1), (1, -1)):
            one = (slice(0, rows - i), slice(max(0, -j), columns - max(0, j)))
            two = (slice(i, rows), slice(max(0, j), columns + min(0, j)))
            both = self._open[one] & self._open[two]
            edges.append((number[one][both], number[two][both], np.full(both.sum(), CELL * math.hypot(i, j))))
        start, end, length = (np.concatenate(part) for part in zip(*edges, strict=True))
        graph = coo_matrix((length, (start, end)), (number.size, number.size)).tocsr()
        return dijkstra(graph, directed=False, indices=number[target]).reshape(rows, columns)

    # Drawing

    def from_above(self, size, place, heading, seen: Sequence[Source]) -> np.ndarray:
        import cv2

        image = np.full((*size, 3), 60, np.uint8)
        unit = (min(size) - 2) / self.size.max()

        def pixel(point):
            return int(1 + point[0] * unit), int(size[0] - 2 - point[1] * unit)

        cv2.fillPoly(image, [np.array([pixel(corner) for corner in self.outline])], (225, 225, 225))
        for block in self.blocks:
            cv2.fillPoly(image, [np.array([pixel(corner) for corner in block])], (60, 60, 60))
        for source in seen:
            cv2.circle(image, pixel(source.place), max(2, int(0.15 * unit)), COLOURS[source.wanted], -1)
        cv2.circle(image, pixel(place), max(2, int(RADIUS * unit)), (50, 90, 220), -1)
        tip = place + 2 * RADIUS * np.array([np.cos(heading), np.sin(heading)])
        cv2.line(image, pixel(place), pixel(tip), (20, 40, 120), max(1, int(0.06 * unit)))
        return image

    def from_inside(self, size, place, heading, seen: Sequence[Source]) -> np.ndarray:
        """Ninety degrees ahead: walls as high as they are near, sources as coloured columns."""
        height, width = size
        angles = heading + np.arctan(np.linspace(1, -1, width))
        depth = self.ahead(place, np.stack([np.cos(angles), np.sin(angles)], -1)) * np.cos(angles - heading)
        rows = np.arange(height)[:, None] - (height - 1) / 2
        half = height * 0.5 / np.maximum(depth, 0.3)
        image = np.where(rows[..., None] < 0, (150, 180, 210), (110, 100, 90)).repeat(width, 1)
        shade = (230 / (1 + 0.25 * depth))[None, :, None].repeat(3, -1)
        image = np.where((np.abs(rows) <= half)[..., None], shade, image)
        for source in sorted(seen, key=lambda source: -math.dist(source.place, place)):
            away = source.place - place
            angle = math.remainder(math.atan2(away[1], away[0]) - heading, 2 * np.pi)
            far = max(np.linalg.norm(away) * math.cos(angle), 0.1)
            if abs(angle) < np.pi / 4:
                centre, reach = (1 - math.tan(angle)) / 2 * (width - 1), max(1.0, 0.1 * width / far)
                columns = np.abs(np.arange(width) - centre) <= reach
                image[np.ix_(np.abs(rows[:, 0]) <= height * 0.25 / far, columns)] = COLOURS[source.wanted]
        return image.clip(0, 255).astype(np.uint8)


COLOURS = {True: (220, 60, 40), False: (150, 150, 40)}  # of sources that are wanted, and of distractors


# Sound


class Acoustics:
    """Impulse responses by the image source method, from sources to microphones that move within one room."""

    def __init__(self, floor: Floor, mics: int, order: int, absorption: float):
        try:
            import pyroomacoustics as pra
            from pyroomacoustics.simulation.ism import compute_ism_rir
        except ModuleNotFoundError as error:
            raise TaskError("pyroomacoustics is not installed: pip install -r requirements/sound.txt") from error
        material = pra.Material(absorption)
        if len(floor.outline) == 4 and not floor.blocks:
            self._room = pra.ShoeBox([*floor.size, CEILING], fs=RATE, materials=material, max_order=order)
            self._engine = (self._room.shoebox_dim, np.full((1, 6), absorption), np.zeros((1, 6)))
        else:
            outline = pra.Room.from_corners(floor.outline.T, fs=RATE, materials=material, max_order=order)
            outline.extrude(CEILING, materials=material)
            walls = outline.walls
            for block in floor.blocks:
                for one, two in zip(block, np.roll(block, -1, 0), strict=True):
                    corners = np.array([[*one, 0], [*one, CEILING], [*two, CEILING], [*two, 0]]).T
                    walls.append(pra.wall_factory(corners, [absorption], [0.0]))
            self._room = pra.Room(walls, fs=RATE, max_order=order) if floor.blocks else outline
            self._engine = (walls, self._room.room_engine.obstructing_walls)
        # Robot and sources never leave the room; the package's own test is slow, and errs where something stands in it.
        self._room.is_inside = lambda place: True
        pra.constants.set("rir_hpf_enable", False)  # it removes what nobody hears, and takes longer than the rest
        self._pra, self._ism, self._mics = pra, compute_ism_rir, mics
        diagonal = float(np.linalg.norm([*floor.size, CEILING]))  # each reflection adds one at most
        self._tail = math.ceil((order + 1) * diagonal / self._room.c * RATE) + 2 * pra.constants.get(
            "frac_delay_length"
        )

    def hear(self, sources: Sequence[Source], mics: np.ndarray, samples: int) -> np.ndarray:
        """What microphones at [2, mics] record during the next samples, [mics, samples]."""
        out = np.zeros((self._mics, samples))
        if not sources:
            return out
        for source, responses in zip(sources, self.responses(sources, mics), strict=True):
            longest = max(map(len, responses))
            # What was emitted before still sounds: samples from as far back as the response is long.
            source.past = np.concatenate([source.past, source.signal(samples)])[-(samples + self._tail) :]
            emitted = source.past[-(samples + longest - 1) :]
            emitted = np.pad(emitted, (samples + longest - 1 - len(emitted), 0))
            size = 2 ** math.ceil(math.log2(len(emitted) + longest))
            spectrum = np.fft.rfft(emitted, size)
            for mic, response in enumerate(responses):
                sound = np.fft.irfft(spectrum * np.fft.rfft(response, size), size)
                out[mic] += sound[longest - 1 : longest - 1 + samples]
        return out

    def responses(self, sources: Sequence[Source], mics: np.ndarray) -> list[list[np.ndarray]]:
        """[sources][mics] impulse responses."""
        room = self._room
        heights = np.full((1, self._mics), MIC_HEIGHT)
        # The engine keeps every microphone that it was ever given; a fresh one for the same walls costs microseconds.
        room._init_room_engine(*self._engine)
        room.mic_array, room.sources = None, []
        room.add_microphone_array(np.concatenate([mics, heights]))
        for source in sources:
            room.add_source([*source.place, SOURCE_HEIGHT])
        room.image_source_model()

        def response(number: int, mic: int) -> np.ndarray:
            visible = room.visibility[number][mic].astype(bool)
            if not visible.any():  # no path leads there
                return np.zeros(1)
            source = room.sources[number]
            place, directivity = room.mic_array.R[:, mic], room.mic_array.directivity[mic]
            taps = self._pra.constants.get("frac_delay_length")
            more = (source.directions[mic], visible, taps, room.c, RATE, room.octave_bands)
            return self._ism(source, place, directivity, *more)

        return [[response(number, mic) for mic in range(self._mics)] for number in range(len(sources))]


def make_signal(name: str) -> Callable[[np.random.Generator], Callable[[int], np.ndarray]]:
    """noise, tones or a folder of wav files -> (rng -> (samples -> the next so many samples))."""
    if name == "noise":
        return lambda rng: lambda samples: rng.normal(0, 0.3, samples)
    if name == "tones":
        return Tones
    files = [path for path in sorted(Path(name).glob("*")) if path.suffix.lower() == ".wav"]
    if not files:
        raise TaskError(f"sound.signal is '{name}', expected noise, tones, or a folder with wav files.")
    recordings = [read_wav(path) for path in files]
    return lambda rng: Recording(recordings[rng.integers(len(recordings))], rng)


class Tones:
    """A chord of three tones that beats twice a second."""

    def __init__(self, rng: np.random.Generator):
        self._pitches, self._at = rng.choice([300, 500, 700, 900, 1100, 1300], 3, replace=False), 0

    def __call__(self, samples: int) -> np.ndarray:
        time = (self._at + np.arange(samples)) / RATE
        self._at += samples
        chord = sum(np.sin(2 * np.pi * pitch * time) for pitch in self._pitches)
        return 0.2 * chord * (time * 2 % 1 < 0.7)


class Recording:
    """A recording, over and over, from anywhere."""

    def __init__(self, samples: np.ndarray, rng: np.random.Generator):
        self._samples, self._at = samples, int(rng.integers(len(samples)))

    def __call__(self, samples: int) -> np.ndarray:
        places = (self._at + np.arange(samples)) % len(self._samples)
        self._at += samples
        return self._samples[places]


def read_wav(path: Path) -> np.ndarray:
    """The first channel of a wav file (PCM or floats, any rate), in ±1, at RATE. TaskError for what cannot be read."""
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks that are not sound
            rate, samples = wavfile.read(path)
        if not len(samples) or rate <= 0:
            raise ValueError(f"{len(samples)} samples at {rate} Hz")
        samples = samples.reshape(len(samples), -1)[:, 0]
        if samples.dtype.kind != "f":
            span = np.iinfo(samples.dtype)
            samples = (samples.astype(np.float64) - (span.max + span.min + 1) / 2) / ((span.max - span.min + 1) / 2)
        if not np.isfinite(samples).all():
            raise ValueError("it holds NaN or infinity")
    except Exception as error:  # a damaged file can raise nearly anything
        raise TaskError(f"{path} cannot be read as a wav file: {' '.join(str(error).split())}") from error
    shared = math.gcd(RATE, rate)
    return resample_poly(samples.astype(np.float64), RATE // shared, rate // shared)


class Features:
    """Bands of the log-spectrogram of each microphone, then cosine and sine of the phase difference of every other one
    to the first, in the same bands; the mean over the step.
    """

    def __init__(self, samples: int, mics: int):
        self.shape = ((mics + 2 * (mics - 1)) * BANDS,)
        window = min(samples, 512)
        self._window, self._hann = window, np.hanning(window)
        self._starts = np.arange(0, samples - window + 1, window // 2)
        edges = np.geomspace(2, window // 2, BANDS + 1)
        bins = np.arange(window // 2 + 1)
        self._bands = np.stack(
            [(bins >= low) & (bins < max(high, low + 1)) for low, high in zip(edges, edges[1:], strict=False)]
        )
        self._bands = self._bands / np.maximum(self._bands.sum(1, keepdims=True), 1)

    def __call__(self, waves: np.ndarray) -> np.ndarray:
        frames = waves[:, self._starts[:, None] + np.arange(self._window)] * self._hann
        spectrum = np.fft.rfft(frames)  # [mics, frames, bins]
        power = (np.abs(spectrum) ** 2).mean(1) @ self._bands.T
        cross = (spectrum[1:] * spectrum[:1].conj()).mean(1) @ self._bands.T
        phase = cross / np.maximum(np.abs(cross), 1e-12)
        parts = [np.log1p(power), phase.real * (power[1:] > 1e-9), phase.imag * (power[1:] > 1e-9)]
        return np.concatenate([part.ravel() for part in parts]).astype(np.float32)


# What there is to reach


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Returns and speed of a fixed policy.", allow_abbrev=False)
    parser.add_argument("--task", default="sound_rectangle")
    parser.add_argument("--policy", choices=("oracle", "random"), default="oracle")
    parser.add_argument("--episodes", type=int, default=20)
    args, keys = parser.parse_known_args(argv)
    if args.episodes < 1 or not args.task.startswith("sound_"):
        parser.error("expected --episodes of at least 1, and a --task such as sound_rectangle")
    import config as configuration
    from envs import make_env

    try:
        config = configuration.load(["--configs", "sound", "--task", args.task, *keys])
        env = make_env(config)
    except UserError as error:
        parser.error(str(error))
    room = env
    while hasattr(room, "env"):
        room = room.env
    rng, returns, found, steps, start = np.random.default_rng(0), [], [], 0, time.perf_counter()
    for _ in range(args.episodes):
        step, total = env.reset(), 0.0
        while not step["is_last"]:
            if args.policy == "oracle":
                action = room.oracle()
            else:
                action = int(rng.integers(4)) if room._headings else rng.uniform(-1, 1, 2)
            step = env.step(action)
            total, steps = total + float(step["reward"]), steps + 1
        returns.append(total)
        found.append(float(step.get("log_success", step["is_terminal"])))
    rate = steps / (time.perf_counter() - start)
    print(
        f"{args.task}, {args.policy}: return {np.mean(returns):.2f} ± {np.std(returns):.2f}, found {np.mean(found):.0%}"
    )
    print(f"{steps} steps, {rate:.0f} per second")
    return 0


if __name__ == "__main__":
    sys.exit(main())
