"""Frames kept on a device, and batches on their way there: equal to those from RAM, whatever happens to the replay."""

import contextlib
import functools

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

import config as configuration
import dreamer
import feed as module
import storage
from dreamer import Trainer
from errors import UserError
from feed import Feed, Pipe
from replay import Replay
from storage import DeviceRows, HostRows, ReplayMemoryError

SPACES = {"image": Box(0, 255, (4, 6, 3), np.uint8), "code": Box(-np.inf, np.inf, (3,), np.float32)}
LATENT = {"deter": 6, "stoch": 4, "classes": 5}
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def on(device: str):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return functools.partial(DeviceRows, device=device)


def make(directory=None, **changes) -> Replay:
    options = {"latent": LATENT, "capacity": 400, "length": 8, "streams": 3, "seed": 0, "piece": 32} | changes
    return Replay(directory, SPACES, 2, **options)


def collect(replays: list[Replay], steps: int, begin: int = 0) -> None:
    """The same random steps of all environments, in episodes of different lengths, into each replay."""
    rng = np.random.default_rng(begin)
    lengths, count = np.array([7, 40, 95]), 3
    for t in range(begin, begin + steps):
        obs = {
            "image": rng.integers(0, 256, (count, 4, 6, 3), dtype=np.uint8),
            "code": rng.normal(size=(count, 3)).astype(np.float32),
            "present/image": rng.random(count) < 0.9,
            "reward": rng.normal(size=count).astype(np.float32),
            "is_first": (t == begin) | (t % lengths == 0),
            "is_last": t % lengths == lengths - 1,
            "is_terminal": np.zeros(count, bool),
            "action": rng.normal(size=(count, 2)).astype(np.float32),
        }
        latents = rng.uniform(-1, 1, (count, 6)), rng.integers(0, 5, (count, 4))
        for replay in replays:
            replay.add_all(obs, latents)
        for value in obs.values():  # an environment may use its arrays again
            value.fill(0)


def arrays(batch: dict) -> dict:
    """Every array of a batch, by name."""
    context = batch["context"] if "context" in batch else batch.context
    parts = {key: value for key, value in batch.items() if key != "context"}
    return parts | {f"context/{key}": value for key, value in context.items()}


def assert_same(one: dict, two: dict) -> None:
    one, two = arrays(one), arrays(two)
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert np.array_equal(torch.as_tensor(value).cpu(), torch.as_tensor(two[key]).cpu()), key


# Frames on a device


@pytest.mark.parametrize("device", DEVICES)
def test_frames_on_a_device_are_those_in_memory(device, tmp_path):
    """Across slots, eviction, rows that are used again, restarts; pieces on disk are the same, too."""
    frames, folders = (HostRows, on(device)), (tmp_path / "host", tmp_path / "device")
    for session in range(3):
        replays = [make(folder, frames=kind) for folder, kind in zip(folders, frames, strict=True)]
        if session:
            for replay, state in zip(replays, states, strict=True):  # noqa: F821
                replay.load_state(state)
        for part in range(4):
            collect(replays, 90, begin=1000 * session + 100 * part)
            for _ in range(20):
                host, device_batch = (replay.sample(5) for replay in replays)
                assert torch.is_tensor(device_batch["image"]) and device_batch["image"].device.type == device
                assert_same(host, device_batch)
        assert len(replays[0]) < 1080 and replays[0]._memory.touched <= replays[0]._memory.slots
        for replay in replays:
            replay.flush()
        states = [replay.state() for replay in replays]
        assert states[0] == states[1]
    files = [sorted(folder.glob("*.npz")) for folder in folders]
    assert [path.name for path in files[0]] == [path.name for path in files[1]] and len(files[0]) > 50
    for one, two in zip(*files, strict=True):
        assert one.read_bytes()[-2000:] == two.read_bytes()[-2000:] and one.stat().st_size == two.stat().st_size
        with np.load(one) as first, np.load(two) as second:
            assert all(np.array_equal(first[key], second[key]) for key in first.files)


def test_only_images_are_on_the_device():
    replay = make(frames=on("cpu"))
    assert {key for key, rows in replay._memory.keys.items() if isinstance(rows, DeviceRows)} == {"image"}
    assert "image" not in replay.empty(2) and "code" in replay.empty(2)


def test_staged_rows_are_sent_together_and_the_latest_counts(monkeypatch):
    rows = DeviceRows(600, (2,), np.dtype(np.uint8), "cpu")
    sent = []
    monkeypatch.setattr(rows, "_send", lambda send=rows._send: (sent.append(len(rows._staged)), send()))
    for value in range(8):
        rows.write(np.array([3, value]), np.full((2, 2), value))
    assert sent == [] and rows.read(np.array([3, 0, 7])).tolist() == [[7, 7], [0, 0], [7, 7]] and sent == [8]
    rows.write(slice(0, 600), np.arange(1200).reshape(600, 2) % 256)
    assert sent[-1] == 600, "what waits in RAM is bounded"
    rows.grow(900)
    assert len(rows.data) == 900 and rows.read(np.array([599])).tolist() == [[1198 % 256, 1199 % 256]]


def test_too_little_memory_names_bytes_and_keys(monkeypatch):
    with pytest.raises(ReplayMemoryError) as caught:
        make(capacity=10**15, frames=on("cpu"))
    text = str(caught.value)
    assert "\n" not in text and "lower dataset_size" in text and ("replay_device: cpu" in text or "RAM" in text)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 11.44 GiB.")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(ReplayMemoryError) as caught:
        DeviceRows(10**6, (64, 64, 3), np.dtype(np.uint8), "cpu")
    text = str(caught.value)
    assert "12,288,000,000 bytes (12.3 GB)" in text and "dataset_size" in text and "replay_device: cpu" in text

    def refused(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(storage.mmap, "mmap", refused)
    with pytest.raises(ReplayMemoryError, match=r"4,000 bytes .* of RAM .*lower dataset_size"):
        HostRows(1000, (), np.dtype(np.float32))


# Batches on their way


def test_on_a_cpu_nothing_is_copied():
    replay = make()
    collect([replay], 60)
    given = []
    sample = replay.sample
    replay.sample = lambda *args: given.append(sample(*args)) or given[-1]
    tensors, where = Feed.to(torch.device("cpu"), replay, 4).next()
    assert where is given[0].where and tensors.keys() == {*given[0], "context"}
    for name, value in arrays(given[0]).items():
        assert arrays(tensors)[name].data_ptr() == value.ctypes.data, name


class Lazy:
    """A pipe that copies as late as it may: when it is waited for, or when the batch is looked at."""

    def __init__(self):
        self.made, self.log = [], []

    def pinned(self, shape, dtype):
        self.made.append(np.empty(shape, dtype))
        return self.made[-1]

    def copy(self, batch):
        moved = module._map(torch.empty_like, batch)
        number = len(self.log)
        self.log.append("queued")

        def finish():
            if self.log[number] == "queued":
                self.log[number] = "copied"
                for (_, target), (_, source) in zip(arrays(moved).items(), arrays(batch).items(), strict=True):
                    target.copy_(source)

        return moved, finish


@pytest.mark.parametrize("frames", [HostRows, functools.partial(DeviceRows, device="cpu")])
def test_a_set_is_not_overwritten_before_its_copy_is_done(frames):
    twins = make(), make(frames=frames)
    collect(twins, 80)
    pipe = Lazy()
    feed = Feed(twins[1], 4, pipe)
    expected, got = [], []
    for _ in range(7):
        expected.append(twins[0].sample(4))
        batch, where = feed.next()
        got.append(batch)
        assert np.array_equal(where.starts, expected[-1].where.starts)
    assert pipe.log == ["copied"] * 5 + ["queued"] * 2  # two sets
    allocated = len(pipe.made)
    for _ in range(2):
        feed.next()
    assert len(pipe.made) == allocated, "sets are made once"
    for one, two in zip(expected, got, strict=True):
        assert_same(one, two)


class Stream:
    """Stands in for CUDA's streams: writes down what is asked of it."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_event(self, event):
        assert event.recorded == "side", "recorded before it is waited for"
        self.log.append(f"{self.name} waits")


def test_pipe_rehearsed_without_cuda(monkeypatch):
    """The calls and their order: copy and event on the side stream, then the main stream waits for it."""
    log, current = [], []
    main, side = Stream("main", log), Stream("side", log)

    class Event:
        recorded = None

        def record(self, stream):
            self.recorded = stream.name
            log.append(f"recorded on {stream.name}")

        def synchronize(self):
            log.append("host waits")

    @contextlib.contextmanager
    def stream(which):
        current.append(which.name)
        yield
        current.pop()

    empty, to = torch.empty, torch.Tensor.to

    def moved(tensor, device, non_blocking):
        assert current == ["side"] and non_blocking
        return to(tensor, "cpu", copy=True)

    for name, value in {"Stream": lambda device: side, "Event": Event, "stream": stream}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
    monkeypatch.setattr(torch.Tensor, "to", moved)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, which: log.append(f"kept for {which.name}"))
    twins = make(), make()
    collect(twins, 60)
    feed = Feed.to(torch.device("cuda"), twins[1], 4)
    for turn in range(4):
        batch, _ = feed.next()
        assert_same(twins[0].sample(4), batch)
        expected = ["host waits"] * (turn > 1) + ["kept for main"] * len(arrays(batch))
        assert log == [*expected, "recorded on side", "main waits"]
        log.clear()


@cuda
@pytest.mark.gpu
@pytest.mark.parametrize("frames", ["host", "device"])
def test_feed_on_cuda(frames):
    device = torch.device("cuda")
    twins = make(), make(frames=HostRows if frames == "host" else on("cuda"))
    collect(twins, 80)
    feed = Feed(twins[1], 4, Pipe(device))
    assert torch.from_numpy(Pipe(device).pinned((3,), np.dtype(np.float16))).is_pinned()
    busy = torch.randn(4096, 4096, device=device)
    for _ in range(50):
        expected, (batch, _) = twins[0].sample(4), feed.next()
        results = {key: value.clone() for key, value in arrays(batch).items()}  # queued behind the copy
        busy = busy @ busy.T / 4096
        assert all(value.is_cuda for value in results.values())
        for key, value in arrays(expected).items():
            assert np.array_equal(torch.as_tensor(value), results[key].cpu()), key


# The run


@pytest.fixture
def episodes(tmp_path):
    replay = make(tmp_path / "episodes", capacity=10_000, latent=None)
    collect([replay], 200)
    replay.flush()
    return tmp_path / "episodes"


def train(folder, episodes, *flags) -> Trainer:
    keys = f"--configs debug --task none --device cpu --steps 60 --train_ratio 32 --offline_traindir {episodes}"
    keys += f" --logdir {folder} --eval_every 0 --tensorboard false --encoder.mults [2] --decoder.mults [2]"
    torch.manual_seed(0)
    trainer = Trainer(configuration.load([*keys.split(), *flags]))
    with contextlib.closing(trainer):
        trainer.run()
    return trainer


def test_a_run_is_the_same_wherever_frames_and_batches_lie(tmp_path, episodes, monkeypatch):
    whole = train(tmp_path / "host", episodes)
    monkeypatch.setattr(Trainer, "_frames", lambda self: on("cpu"))
    monkeypatch.setattr(dreamer.Feed, "to", lambda device, replay, size: Feed(replay, size, Eager()))
    other = train(tmp_path / "device", episodes)
    assert whole.updates == other.updates == 60 and isinstance(other.replay._memory.keys["image"], DeviceRows)
    one, two = (trainer.agent.world_model.state_dict() for trainer in (whole, other))
    assert all(torch.equal(one[key], two[key]) for key in one)


class Eager(Lazy):
    def copy(self, batch):
        moved, finish = super().copy(batch)
        finish()
        return moved, finish


def test_frames_on_cuda_need_a_run_on_cuda(tmp_path, episodes):
    with pytest.raises(UserError, match="replay_device is cuda, but the run is on cpu: use --replay_device cpu"):
        train(tmp_path / "run", episodes, "--replay_device", "cuda")
