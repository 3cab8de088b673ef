"""What a run tells: scalars, pictures and videos (TensorBoard, metrics.jsonl, W&B), log lines, a live progress line.

`tools.py` hands these names on; import them from there. A `step` is a frame count.
"""

import contextlib
import html
import io
import json
import logging
import math
import os
import re
import secrets
import sys
import threading
import time
import wave
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import rich.console
import rich.progress
import rich.table
import torch
from PIL import Image

from errors import UserError
from files import atomic_write, disk_errors

log = logging.getLogger(__name__)


class Console(rich.console.Console):
    """stdout, looked up at each use. A run outlives it: when nobody reads it any more (`| head`, a closed terminal),
    the run says so in its log file and goes on.
    """

    @property
    def file(self):
        return Lenient(super().file, self.lost)

    @file.setter
    def file(self, new):
        rich.console.Console.file.fset(self, new)

    def lost(self, error: Exception) -> None:
        if self.quiet:
            return
        self.quiet = True
        with contextlib.suppress(OSError, ValueError, AttributeError):  # so that flushing it at the end is no error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        log.warning("stdout is gone (%s): the run goes on, and writes its log to its folder alone.", error)


class Lenient:
    """A stream whose errors are told to `lost` instead of being raised."""

    def __init__(self, stream, lost: Callable[[Exception], None]):
        self._stream, self._lost = stream, lost

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:
            self._lost(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lost(error)


# Log lines and the progress line share this console: that is how rich puts the lines above the bar.
CONSOLE = Console()

UNFINISHED = ".tmp-"  # how the names of films begin that are being encoded

# Scalars of the line `Step N: {...}`; if a write has none of these, it shows all it has.
CONSOLE_SCALARS = r"(episode|eval)/(return|length|score)|.*_loss|intrinsic/empowerment|meta/.*|time/fps|replay/steps"


# Log lines


class ConsoleHandler(logging.Handler):
    """Each record as one unwrapped, unstyled line on stdout, above the progress line where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            CONSOLE.print(self.format(record), markup=False, highlight=False, emoji=False, soft_wrap=True)
        except Exception:
            self.handleError(record)


class LogFile(logging.FileHandler):
    """Appends to a file; if that fails (a full disk), says so once instead of once a line."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failed:
            self.failed = True
            print(f"WARNING - Could not write {self.baseFilename}: {sys.exc_info()[1]}", file=sys.stderr)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a line that could not be written before
            super().close()


def setup_logging(level: str = "info", logdir: str | Path | None = None) -> None:
    """Sends every logger's records to stdout as `INFO - text`, and to `logdir`/log.txt with the time and the source.

    level: debug, info, warning or error, of the console. The file has info and above even where the console has less.
    Calling it again replaces the earlier set-up.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that knows only ASCII shows `?` for what it cannot
            stream.reconfigure(errors="replace")
    number = logging.getLevelNamesMapping()[level.upper()]
    root = logging.getLogger()
    for handler in root.handlers[:]:
        # dm_control's absl and logging.basicConfig install handlers that would show every line twice.
        ours = isinstance(handler, ConsoleHandler | LogFile)
        if ours or type(handler) is logging.StreamHandler or type(handler).__module__.startswith("absl"):
            root.removeHandler(handler)
            if ours:
                handler.close()
    console = ConsoleHandler(number)
    console.setFormatter(logging.Formatter("%(levelname)s - %(message)s"))
    root.addHandler(console)
    root.setLevel(min(number, logging.INFO) if logdir else number)
    for name in ("absl", "PIL", "OpenGL", "matplotlib", "asyncio", "urllib3", "wandb"):
        logging.getLogger(name).setLevel(max(number, logging.WARNING))
    if logdir:
        path = Path(logdir) / "log.txt"
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = LogFile(path, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s - %(message)s"))
        root.addHandler(file)


# Pictures and videos


def as_frames(name: str, frames) -> np.ndarray:
    """uint8 `[T, H, W, 3]` from `[T, H, W, C]` or `[B, T, H, W, C]` (side by side), C 1 or 3; numpy or torch."""
    frames = frames.detach().cpu().numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim not in (4, 5) or frames.shape[-1] not in (1, 3) or not frames.size:
        raise ValueError(
            f"Video {name}: found {frames.dtype} {list(frames.shape)}, expected uint8 [T, H, W, 3] or [B, T, H, W, 3]."
        )
    if frames.ndim == 5:
        frames = np.concatenate(list(frames), axis=2)
    return np.repeat(frames, 3 // frames.shape[-1], axis=-1)


def encode_gif(frames: np.ndarray, fps: float) -> bytes:
    """An endless GIF of uint8 `[T, H, W, 3]`, each frame with its own 256 colours, at most 50 fps."""
    first, *rest = [Image.fromarray(frame) for frame in frames]
    file = io.BytesIO()
    # Pillow counts in ms; equal frames in a row become one that lasts as long.
    first.save(file, "GIF", save_all=True, append_images=rest, duration=max(20, round(1000 / fps)), loop=0)
    return file.getvalue()


class Film:
    """H.264 that any player shows, encoded frame by frame: its length costs no memory.

        with Film(path, fps=20) as film:
            film.add(frame)         # uint8 [H, W, 1 or 3], all of one size
            film.keep()             # now it is at `path`; without this, nothing is left

    Small frames are enlarged by a whole factor to at least 256 pixels, odd sizes padded to even by repeating the edge.
    What comes after `most` frames is left out. `preview` holds the first `previewed` frames, at most 128 pixels wide
    and high, for a GIF.
    Raises UserError where it cannot be written.
    """

    def __init__(self, path: str | Path, fps: float, most: int = 5_000, previewed: int = 500):
        self.path, self.fps, self.most, self.previewed = Path(path), fps, most, previewed
        self._temporary = self.path.with_name(f"{UNFINISHED}{self.path.name}")  # the ending chooses the format
        self._writer, self._count, self._cut = None, 0, False
        self.preview: list[np.ndarray] = []

    def __len__(self) -> int:
        return self._count

    def add(self, frame: np.ndarray) -> None:
        if self._count == self.most:
            if not self._cut:
                log.info("%s ends after %d frames", self.path.name, self.most)
            self._cut = True
            return
        frame = as_frames(self.path.name, frame[None])[0]
        if len(self.preview) < self.previewed:
            step = math.ceil(max(frame.shape[:2]) / 128)
            self.preview.append(np.array(frame[::step, ::step]))
        factor = max(1, math.ceil(256 / max(frame.shape[:2])))
        frame = frame.repeat(factor, axis=0).repeat(factor, axis=1)
        height, width = frame.shape[:2]
        frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        with disk_errors(self.path):
            if self._writer is None:
                self._writer = self._open()
            self._writer.append_data(frame)
        self._count += 1

    def _open(self):
        import imageio.v2 as imageio  # only films need it

        self.path.parent.mkdir(parents=True, exist_ok=True)
        options = dict(format="FFMPEG", mode="I", fps=self.fps, codec="libx264", quality=8, macro_block_size=1)
        return imageio.get_writer(self._temporary, ffmpeg_log_level="error", **options)

    def keep(self) -> Path:
        """Puts the film where it belongs; returns the path."""
        import imageio_ffmpeg

        with disk_errors(self.path):
            self._end()
            written = 0
            # The encoder's own failure at its last write (a full disk) raises nothing above.
            with contextlib.suppress(RuntimeError):
                written = imageio_ffmpeg.count_frames_and_secs(str(self._temporary))[0]
            if written != self._count:
                raise OSError("the encoder stopped early")
            os.replace(self._temporary, self.path)
        return self.path

    def discard(self) -> None:
        """Leaves nothing, unless it was kept."""
        self._count = 0
        with contextlib.suppress(OSError):
            self._end()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    def _end(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.discard()


def save_mp4(path: str | Path, frames, fps: float) -> Path:
    """Writes uint8 `[T, H, W, 3]` or `[B, T, H, W, 3]` (side by side) as a `Film`; returns the path."""
    frames = as_frames(Path(path).name, frames)
    with Film(path, fps, most=len(frames), previewed=0) as film:
        for frame in frames:
            film.add(frame)
        return film.keep()


# Scalars


def save_wav(path: str | Path, samples: np.ndarray, rate: int) -> Path:
    """Writes a waveform in ±1 as 16-bit PCM."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file, wave.open(file, "wb") as out:
            out.setnchannels(1), out.setsampwidth(2), out.setframerate(rate)
            out.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return path


def read_numbers(values: list) -> list[float]:
    """Python floats of numbers, numpy scalars and one-element tensors, with one transfer per device."""
    numbers, on_device = [math.nan] * len(values), defaultdict(list)
    for i, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            on_device[value.device].append(i)
        else:
            numbers[i] = float(np.asarray(value).reshape(()))
    for places in on_device.values():
        read = torch.stack([values[i].reshape(()).double() for i in places]).tolist()
        for i, number in zip(places, read, strict=True):
            numbers[i] = number
    return numbers


def rounded(value: float) -> float | int:
    """For people: whole numbers as they are, four digits of others."""
    if not math.isfinite(value):
        return value
    if value == int(value):
        return int(value)
    return float(f"{value:.4g}") if abs(value) < 1000 else round(value, 1)


# The logger


def _parse_line(line: bytes) -> dict | None:
    """The object on a line of metrics.jsonl, or None where the line is damaged."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int | float) else None


def _plain(value):
    """What JSON cannot hold by itself: any mapping as a dictionary, anything else as text."""
    return dict(value) if isinstance(value, Mapping) else str(value)


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread that could not write hands its error to the next `flush`, which tells it in one line."""
    if type(failure.thread).__name__ != "_AsyncWriterThread" or not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


class Logger:
    """Collects values between two calls of `write`, which sends them to every output.

    logdir gets TensorBoard event files, `metrics.jsonl` and, beside each video, `videos/<name>-<step>.mp4`.
    step: where the run starts (frames); TensorBoard hides what an earlier process logged after it.
    wandb: arguments of `wandb.init` (project, name, ...), or None. The run's id is kept in `logdir`/wandb_id.txt, so
        that a resumed run continues the same W&B run.
    config: shown in TensorBoard and W&B. fps: of videos.

    A scalar given several times before a `write` is averaged. metrics.jsonl has one JSON object a line, `step` first;
    what is not finite is `null` there (JSON has no NaN). A line that a crash tore is cut at the next start.
    """

    def __init__(
        self,
        logdir: str | Path,
        step: int = 0,
        *,
        tensorboard: bool = True,
        wandb: dict | None = None,
        config: Mapping | None = None,
        fps: float = 20,
        mp4: bool = True,
    ):
        self.logdir = Path(logdir)
        self.metrics_path = self.logdir / "metrics.jsonl"
        self.fps = fps
        self.mp4 = mp4
        self._config = json.loads(json.dumps(config or {}, default=_plain))
        self._scalars: dict[str, list] = defaultdict(list)
        self._media: list[tuple[str, str, object]] = []  # kind, name, value
        self._start = step
        self._measured = (time.monotonic(), step)
        with disk_errors(self.metrics_path):
            self.logdir.mkdir(parents=True, exist_ok=True)
            for film in (self.logdir / "videos").glob(f"{UNFINISHED}*"):
                film.unlink()  # of a run that was killed
        self._cut_torn_end()
        self._metrics = self._open_metrics()
        self._use_tensorboard = tensorboard
        self._tensorboard = None
        self._wandb = None if wandb is None else self._start_wandb(wandb)

    def scalar(self, name: str, value) -> None:
        """A number, or a numpy or torch value of one element; on a device it is read only at `write`."""
        if isinstance(value, torch.Tensor):
            size, value = value.numel(), value.detach().clone()  # the original may be overwritten before the write
        else:
            size = np.size(value)
        if size != 1:
            raise ValueError(f"Scalar {name}: found {size} elements, expected one; average it, or use histogram.")
        self._scalars[name].append(value)

    def scalars(self, values: Mapping[str, object]) -> None:
        """Several scalars at once."""
        for name, value in values.items():
            self.scalar(name, value)

    def image(self, name: str, image) -> None:
        """uint8 `[H, W, 3]` or `[H, W, 1]`."""
        self._media.append(("image", name, as_frames(name, image[None])[0]))

    def video(self, name: str, frames) -> None:
        """uint8 `[T, H, W, 3]`, or `[B, T, H, W, 3]`: B videos side by side."""
        self._media.append(("video", name, as_frames(name, frames)))

    def new_film(self, name: str, step: int) -> Film:
        """A film to be filled, and then given to `film`."""
        return Film(self._media_path("videos", name, step, "mp4"), self.fps)

    def film(self, name: str, film: Film) -> None:
        """What `new_film` gave, with its frames."""
        if not len(film):
            return
        if self.mp4:
            self._keep(film.keep)
        self._media.append(("preview", name, np.stack(film.preview)))

    def histogram(self, name: str, values) -> None:
        """Any number of values of any shape; those that are not finite are left out."""
        values = values.detach().float().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
        self._media.append(("histogram", name, values[np.isfinite(values)]))

    def audio(self, name: str, sound: tuple[np.ndarray, int]) -> None:
        """A waveform `[samples]` (played at its own loudest) and its samples per second."""
        samples, rate = np.nan_to_num(np.asarray(sound[0], np.float32)), int(sound[1])
        loudest = float(np.abs(samples).max(initial=0.0))
        self._media.append(("audio", name, (samples / loudest if loudest else samples, rate)))

    def text(self, name: str, text: str) -> None:
        """Markdown."""
        self._media.append(("text", name, str(text)))

    def write(self, step: int, fps: bool = False) -> dict[str, float]:
        """Sends all that was given since the last write to the outputs under `step` (frames); returns the scalars.

        fps: also log `time/fps`, frames per second since the last write that did. Raises UserError on a full disk.
        """
        pairs = [(name, value) for name, values in self._scalars.items() for value in values]
        numbers = defaultdict(list)
        for (name, _), number in zip(pairs, read_numbers([value for _, value in pairs]), strict=True):
            numbers[name].append(number)
        scalars = {name: sum(given) / len(given) for name, given in numbers.items()}
        if fps:
            now, (last_time, last_step) = time.monotonic(), self._measured
            scalars["time/fps"] = (step - last_step) / max(now - last_time, 1e-9)
            self._measured = (now, step)
        media, self._media, self._scalars = self._media, [], defaultdict(list)
        if scalars:
            self._write_console(step, scalars)
            self._write_metrics(step, scalars)
        if self._use_tensorboard and (scalars or media):
            with disk_errors(self.logdir):
                self._write_tensorboard(step, scalars, media)
        if self._wandb and (scalars or media):
            self._write_wandb(step, scalars, media)
        for kind, name, value in media:
            if kind == "video" and self.mp4:
                self._write_mp4(step, name, value)
        return scalars

    def drop_after(self, step: int) -> int:
        """Forgets what an earlier process logged after `step`, for a resumed run that will log it again.

        Removes the lines from metrics.jsonl (atomically), hides the events in TensorBoard, returns the lines removed.
        """
        self._metrics.close()
        entries = self._read_metrics()
        kept = [line for line, entry in entries if entry and entry["step"] <= step]
        self._replace_metrics(kept)
        self._metrics = self._open_metrics()
        self._start = step
        self._measured = (time.monotonic(), step)
        if self._tensorboard:
            self._tensorboard.close()
            self._tensorboard = None
        return len(entries) - len(kept)

    def flush(self) -> None:
        """Everything written so far is on the disk afterwards."""
        with disk_errors(self.metrics_path):
            os.fsync(self._metrics.fileno())
            if self._tensorboard:
                self._tensorboard.flush()

    def close(self) -> None:
        """Flushes and ends every output."""
        if not self._metrics.closed:
            self.flush()
            self._metrics.close()
        if self._tensorboard:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    # metrics.jsonl

    def _open_metrics(self):
        with disk_errors(self.metrics_path):
            return open(self.metrics_path, "ab", buffering=0)  # a line reaches the system in one piece

    def _read_metrics(self) -> list[tuple[bytes, dict | None]]:
        data = self.metrics_path.read_bytes() if self.metrics_path.exists() else b""
        return [(line.rstrip(b"\n") + b"\n", _parse_line(line)) for line in data.split(b"\n") if line]

    def _replace_metrics(self, lines: list[bytes]) -> None:
        with atomic_write(self.metrics_path) as file:
            file.writelines(lines)

    def _cut_torn_end(self) -> None:
        entries = self._read_metrics()
        whole = len(entries)
        while whole and entries[whole - 1][1] is None:
            whole -= 1
        if whole < len(entries):
            log.warning("%s: cut %d torn line(s) at the end.", self.metrics_path, len(entries) - whole)
        kept = [line for line, _ in entries[:whole]]
        if self.metrics_path.exists() and self.metrics_path.stat().st_size != sum(map(len, kept)):
            self._replace_metrics(kept)

    def _write_metrics(self, step: int, scalars: dict[str, float]) -> None:
        entry = {"step": int(step)} | {name: v if math.isfinite(v) else None for name, v in scalars.items()}
        rest = json.dumps(entry, allow_nan=False).encode() + b"\n"
        with disk_errors(self.metrics_path):
            while rest:  # an unbuffered write may take only a part; the next then says why
                rest = rest[self._metrics.write(rest) :]

    # The other outputs

    def _write_console(self, step: int, scalars: dict[str, float]) -> None:
        chosen = {name: value for name, value in scalars.items() if re.fullmatch(CONSOLE_SCALARS, name)} or scalars
        log.info("Step %d: %s", step, {name: rounded(value) for name, value in chosen.items()})

    def _write_tensorboard(self, step: int, scalars: dict[str, float], media: list) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter  # starts slowly

            threading.excepthook = _thread_failed
            # Events after the start were logged by a process that died: TensorBoard hides them.
            self._tensorboard = SummaryWriter(str(self.logdir), purge_step=self._start + 1)
            if self._config:
                shown = json.dumps(self._config, indent=2)
                self._tensorboard.add_text("config", f"```\n{shown}\n```", self._start)
        writer = self._tensorboard
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        for kind, name, value in media:
            if kind == "image":
                writer.add_image(name, value, step, dataformats="HWC")
            elif kind == "histogram" and value.size:
                writer.add_histogram(name, value, step)
            elif kind == "text":
                writer.add_text(name, value, step)
            elif kind == "audio":
                writer.add_audio(name, torch.from_numpy(value[0])[None], step, sample_rate=value[1])
            elif kind in ("video", "preview"):  # add_video needs an older moviepy; an animated GIF plays as an image
                height, width = value.shape[1:3]
                gif = Summary.Image(
                    height=height, width=width, colorspace=3, encoded_image_string=encode_gif(value, self.fps)
                )
                writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=gif)]), step)
        writer.flush()

    def _write_mp4(self, step: int, name: str, frames: np.ndarray) -> None:
        self._keep(save_mp4, self._media_path("videos", name, step, "mp4"), frames, self.fps)

    @staticmethod
    def _keep(write: Callable, *args) -> None:
        try:
            write(*args)
        except UserError as error:  # the run matters more than its videos
            log.warning("%s", error)

    def _media_path(self, folder: str, name: str, step: int, suffix: str) -> Path:
        file_name = re.sub(r"[^\w.-]+", "_", name)
        return self.logdir / folder / f"{file_name}-{step:09d}.{suffix}"

    def _start_wandb(self, options: dict):
        try:
            import wandb
        except ImportError:
            raise UserError(
                "--wandb true needs the package wandb, which is not installed: pip install -r requirements/wandb.txt"
            ) from None
        id_file = self.logdir / "wandb_id.txt"
        if not id_file.exists():
            with atomic_write(id_file) as file:
                file.write(secrets.token_hex(4).encode())
        try:
            run = wandb.init(
                **{
                    "dir": str(self.logdir),
                    "id": id_file.read_text().strip(),
                    "resume": "allow",
                    "config": self._config,
                    **options,
                }
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--wandb true: {reason} (`wandb login` once, or set WANDB_MODE=offline)") from error
        # W&B's own counter only goes up, while a resumed run may start before the last step logged: plot over ours.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _write_wandb(self, step: int, scalars: dict[str, float], media: list) -> None:
        import wandb

        data = {"step": int(step), **scalars}
        for kind, name, value in media:
            if kind == "image":
                data[name] = wandb.Image(value)
            elif kind == "histogram" and value.size:
                data[name] = wandb.Histogram(value)
            elif kind == "text":
                data[name] = wandb.Html(f"<pre>{html.escape(value)}</pre>")
            elif kind == "audio":
                data[name] = wandb.Audio(str(save_wav(self._media_path("audio", name, step, "wav"), *value)))
            elif kind in ("video", "preview"):
                data[name] = wandb.Video(io.BytesIO(encode_gif(value, self.fps)), format="gif")
        self._wandb.log(data)


# The progress line


def human(n: float) -> str:
    """Three digits and a letter: 950, 12.3k, 4M, 1.2B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= 0.9995 * size:
            return f"{n / size:.3g}{letter}"
    return f"{n:.3g}"


def format_duration(seconds: float) -> str:
    """The two largest units: 45s, 3m 20s, 1h 12m, 2d 3h; `?` where it is not known."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{n}{unit}" for n, unit in ((days, "d"), (hours, "h"), (minutes, "m"), (seconds, "s"))]
    first = next((i for i, part in enumerate(parts) if part[0] != "0"), 3)
    return " ".join(part for part in parts[first : first + 2] if part[0] != "0") or "0s"


class Progress:
    """Frames, frames/s, updates, return and time left, live on one line that log lines are printed above.

    Where stdout is not a terminal: a log line at most every `interval` seconds. Speed and time left come from the
    last `window` seconds. `update` may be called at every step: most calls only look at the clock.

        with Progress(1_000_000) as progress:
            progress.update(step, updates, ret)
    """

    def __init__(self, total_steps: int, interval: float = 10.0, window: float = 60.0):
        self.total = total_steps
        self.live = bool(sys.stdout and sys.stdout.isatty()) and not CONSOLE.is_dumb_terminal
        self.interval = 0.2 if self.live else interval
        self.window = max(window, 2 * self.interval)
        self._history: deque[tuple[float, int]] = deque()  # (time, frames)
        self._next = 0.0
        self._last, self._shown = None, None
        self._bar = None

    def update(self, step: int, updates: int = 0, ret: float | None = None) -> None:
        """step: frames so far. updates: optimizer steps so far. ret: return of the latest episode, if any."""
        self._last = (step, updates, ret)
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self.interval
            self._show(now)

    def describe(self) -> str:
        """The line, from what was known when it was last shown."""
        step, updates, ret = self._shown
        (start, first), (end, last) = self._history[0], self._history[-1]
        rate = (last - first) / (end - start) if end > start else math.nan
        left = max(0, self.total - step) / rate if rate > 0 else math.nan
        return " | ".join(
            [
                f"{step:,}/{human(self.total)} frames",
                "- frames/s" if math.isnan(rate) else f"{human(rate)} frames/s",
                f"{human(updates)} updates",
                "return -" if ret is None else f"return {rounded(float(ret))}",
                f"{format_duration(left)} left",
            ]
        )

    def close(self) -> None:
        """Shows the last values and leaves the line where it is."""
        if self._last != self._shown:
            self._show(time.monotonic())
        if self._bar:
            self._bar.stop()
            self._bar = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _show(self, now: float) -> None:
        self._shown = self._last
        self._history.append((now, self._shown[0]))
        while self._history[0][0] < now - self.window and len(self._history) > 2:
            self._history.popleft()
        if not self.live:
            log.info("Progress: %s", self.describe())
            return
        if self._bar is None:
            # Refreshed only here: no thread beside the training loop.
            text = rich.progress.TextColumn(
                "{task.description}", markup=False, table_column=rich.table.Column(no_wrap=True, overflow="ellipsis")
            )
            columns = [rich.progress.BarColumn(16), text] if CONSOLE.width >= 100 else [text]  # 80 hold the numbers
            self._bar = rich.progress.Progress(*columns, console=CONSOLE, auto_refresh=False)
            self._task = self._bar.add_task("", total=self.total)
            self._bar.start()
        self._bar.update(self._task, completed=self._shown[0], description=self.describe(), refresh=True)
