"""Each tool against something real: files read back, processes killed and signalled, a terminal."""

import concurrent.futures
import contextlib
import errno
import io
import json
import logging
import math
import os
import pty
import re
import resource
import runpy
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import tools
from errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def restore_logging():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def python(code: str, *args, **options) -> subprocess.Popen:
    """A Python process in the repository's root; its output is text."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | options.pop("env", {})
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)], cwd=ROOT, text=True, env=environment, **options
    )


def read_events(logdir) -> EventAccumulator:
    return EventAccumulator(str(logdir), size_guidance={"images": 0, "scalars": 0, "tensors": 0}).Reload()


def lines_of(logdir) -> list[dict]:
    return [json.loads(line) for line in (Path(logdir) / "metrics.jsonl").read_text().splitlines()]


def moving_square(count=12, size=32) -> np.ndarray:
    frames = np.full((count, size, size, 3), 30, np.uint8)
    for t in range(count):
        frames[t, 4:12, 2 * t : 2 * t + 8] = (250, 40, 10 * t)
    return frames


# Log lines


def test_console_lines_are_exact_and_the_file_has_times(tmp_path, capsys):
    tools.setup_logging("info", tmp_path)
    tools.setup_logging("info", tmp_path)  # again: no double lines
    text = "Step 1000: {'a': [red]1.5, 'long': '" + "x" * 300 + "'} :smile:"
    logging.info(text)
    logging.debug("not shown")
    assert capsys.readouterr().out == f"INFO - {text}\n"
    written = (tmp_path / "log.txt").read_text()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO root - " + re.escape(text) + "\n", written)


def test_the_log_file_has_what_a_quiet_console_leaves_out(tmp_path, capsys):
    tools.setup_logging("error", tmp_path)
    logging.info("detail")
    logging.error("problem")
    assert capsys.readouterr().out == "ERROR - problem\n"
    assert "detail" in (tmp_path / "log.txt").read_text()


def test_a_full_disk_under_the_log_file_is_said_once(tmp_path, capsys):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    tools.setup_logging("info", tmp_path)
    logging.info("one")
    logging.info("two")
    captured = capsys.readouterr()
    assert captured.out == "INFO - one\nINFO - two\n"
    assert captured.err.count("No space left") == 1 and "Traceback" not in captured.err


# Logger


def test_scalars_reach_every_output(tmp_path, capsys):
    tools.setup_logging("info")
    with tools.Logger(tmp_path) as logger:
        logger.scalar("episode/return", 150.5)
        logger.scalar("episode/length", np.int64(200))
        logger.scalars({"world/recon_loss": torch.tensor(0.123456), "opt/norm": np.float32(2), "replay/x": 3})
        returned = logger.write(1000)
    assert returned["world/recon_loss"] == pytest.approx(0.123456)
    assert capsys.readouterr().out == (
        "INFO - Step 1000: {'episode/return': 150.5, 'episode/length': 200, 'world/recon_loss': 0.1235}\n"
    )
    [entry] = lines_of(tmp_path)
    assert list(entry)[0] == "step" and entry == {"step": 1000} | returned
    events = read_events(tmp_path)
    assert sorted(events.Tags()["scalars"]) == sorted(returned)
    [event] = events.Scalars("world/recon_loss")
    assert event.step == 1000 and event.value == pytest.approx(0.123456)


def test_scalars_are_averaged_between_writes_and_then_gone(tmp_path):
    with tools.Logger(tmp_path, tensorboard=False) as logger:
        value = torch.tensor(1.0)
        logger.scalar("a", value)
        value += 10  # as a graph that overwrites its outputs does
        logger.scalar("a", 3)
        assert logger.write(10) == {"a": 2}
        assert logger.write(20) == {}
    assert lines_of(tmp_path) == [{"step": 10, "a": 2}]
    assert not list(tmp_path.glob("events*"))


def test_what_is_not_finite_is_null_in_valid_json(tmp_path):
    with tools.Logger(tmp_path) as logger:
        logger.scalars({"a": math.nan, "b": torch.tensor(math.inf), "c": np.float32(-np.inf), "d": 1})
        logger.write(5)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert lines_of(tmp_path) == [{"step": 5, "a": None, "b": None, "c": None, "d": 1}]
    assert math.isinf(read_events(tmp_path).Scalars("b")[0].value)


def test_more_than_one_number_is_an_error(tmp_path):
    with tools.Logger(tmp_path) as logger, pytest.raises(ValueError, match="Scalar loss: found 4 elements"):
        logger.scalar("loss", torch.zeros(4))


def test_frames_per_second(tmp_path):
    with tools.Logger(tmp_path, step=100, tensorboard=False) as logger:
        time.sleep(0.05)
        rate = logger.write(200, fps=True)["time/fps"]
    assert 10 < rate <= 2000


@pytest.mark.parametrize("torn", [b'{"step": 30, "a"', b'{"step": 30}garbage\n{"st', b"\0\0\0\0\0\n\0\0"])
def test_a_torn_line_is_cut_at_the_next_start(tmp_path, torn, caplog):
    with tools.Logger(tmp_path, tensorboard=False) as logger:
        logger.scalar("a", 1)
        logger.write(10)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole + torn)
    with tools.Logger(tmp_path, 10, tensorboard=False) as logger:
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole
        assert "cut" in caplog.text and "metrics.jsonl" in caplog.text
        logger.scalar("a", 2)
        logger.write(20)
    assert [entry["step"] for entry in lines_of(tmp_path)] == [10, 20]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    tools.Logger(tmp_path, tensorboard=False).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_drop_after_forgets_newer_lines_and_events(tmp_path):
    def run(steps, start=0, drop=None):
        with tools.Logger(tmp_path, start) as logger:
            dropped = logger.drop_after(drop) if drop is not None else 0
            for step in steps:
                logger.scalar("loss", step)
                logger.write(step)
        return dropped

    run([10, 20, 30, 40])
    straight = (tmp_path / "metrics.jsonl").read_bytes()
    assert run([30, 40], start=20, drop=20) == 2
    assert (tmp_path / "metrics.jsonl").read_bytes() == straight
    assert [event.step for event in read_events(tmp_path).Scalars("loss")] == [10, 20, 30, 40]
    assert not list(tmp_path.glob(".*tmp"))


def test_drop_after_within_a_process(tmp_path):
    with tools.Logger(tmp_path) as logger:
        for step in (10, 20, 30):
            logger.scalar("loss", 1)
            logger.write(step)
        assert logger.drop_after(10) == 2
        logger.scalar("loss", 2)
        logger.write(20)
    assert [(entry["step"], entry["loss"]) for entry in lines_of(tmp_path)] == [(10, 1), (20, 2)]
    assert [event.value for event in read_events(tmp_path).Scalars("loss")] == [1, 2]


def test_a_full_disk_under_the_metrics_is_a_clear_error(tmp_path):
    logger = tools.Logger(tmp_path, tensorboard=False)
    logger._metrics.close()
    logger._metrics = open("/dev/full", "wb", buffering=0)
    logger.scalar("a", 1)
    with pytest.raises(UserError, match=r"metrics.jsonl: No space left on device \(.* MiB free\).*Free some space"):
        logger.write(1)


def test_a_video_is_an_animated_gif_in_the_event_file(tmp_path):
    frames = moving_square()
    with tools.Logger(tmp_path, fps=10) as logger:
        logger.video("eval/video", frames)
        logger.write(7)
    [event] = read_events(tmp_path).Images("eval/video")
    assert (event.step, event.width, event.height) == (7, 32, 32)
    gif = Image.open(io.BytesIO(event.encoded_image_string))
    assert gif.format == "GIF" and gif.info["loop"] == 0
    shown = [(frame.convert("RGB"), frame.info["duration"]) for frame in ImageSequence.Iterator(gif)]
    assert len(shown) == len(frames) and all(duration == 100 for _, duration in shown)
    for frame, (image, _) in zip(frames, shown, strict=True):
        assert np.abs(np.asarray(image, int) - frame).mean() < 2
    [mp4] = (tmp_path / "videos").iterdir()
    assert mp4.name == "eval_video-000000007.mp4"


def test_several_videos_stand_side_by_side(tmp_path):
    red, blue = np.zeros((2, 5, 16, 16, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    with tools.Logger(tmp_path, mp4=False) as logger:
        logger.video("open_loop", torch.from_numpy(np.stack([red, blue])))
        logger.write(1)
    [event] = read_events(tmp_path).Images("open_loop")
    assert (event.height, event.width) == (16, 32)
    picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))
    assert (picture[:, :16, 0] > 200).all() and (picture[:, 16:, 2] > 200).all()
    assert not (tmp_path / "videos").exists()


def test_image_histogram_text_and_config(tmp_path):
    picture = moving_square(1)[0]
    with tools.Logger(tmp_path, config={"dyn": types.MappingProxyType({"deter": 512}), "path": Path("a")}) as logger:
        logger.image("picture", picture)
        logger.histogram("weights", torch.tensor([1.0, 2.0, math.nan, 4.0]))
        logger.histogram("nothing", np.array([np.nan]))
        logger.text("note", "hello")
        logger.write(3)
    events = read_events(tmp_path)
    [image] = events.Images("picture")
    assert (np.asarray(Image.open(io.BytesIO(image.encoded_image_string))) == picture).all()
    [histogram] = events.Histograms("weights")
    assert histogram.histogram_value.num == 3 and histogram.histogram_value.max == 4
    assert "nothing" not in events.Tags()["histograms"]
    assert events.Tensors("note/text_summary")[0].tensor_proto.string_val[0] == b"hello"
    assert b'"deter": 512' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_wrong_frames_say_what_was_found(tmp_path):
    with tools.Logger(tmp_path) as logger:
        with pytest.raises(ValueError, match=r"Video v: found float64 \[3, 8, 8, 3\], expected uint8"):
            logger.video("v", np.zeros((3, 8, 8, 3)))
        with pytest.raises(ValueError, match=r"found uint8 \[0, 8, 8, 3\]"):
            logger.video("v", np.zeros((0, 8, 8, 3), np.uint8))


@pytest.mark.parametrize("shape", [(9, 64, 64, 3), (9, 33, 51, 3), (9, 300, 301, 1), (2, 9, 15, 20, 3)])
def test_mp4_reads_back(tmp_path, shape):
    video = np.broadcast_to(np.linspace(0, 250, 9).astype(np.uint8)[:, None, None, None], shape)
    path = tools.save_mp4(tmp_path / "sub" / "video.mp4", video, fps=15)
    with imageio.get_reader(path) as reader:
        frames = np.stack([frame for frame in reader])  # list() asks for a length, which is inf
        assert reader.get_meta_data()["fps"] == 15
    assert len(frames) == 9
    height, width = frames.shape[1:3]
    columns = shape[-2] * (shape[0] if len(shape) == 5 else 1)
    assert height % 2 == width % 2 == 0 and max(height, width) >= 256
    assert height // shape[-3] == width // columns  # enlarged by one whole factor
    assert np.abs(frames.mean((1, 2, 3)) - np.linspace(0, 250, 9)).max() < 6
    assert [file.name for file in path.parent.iterdir()] == ["video.mp4"]


def test_mp4_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "videos").write_text("in the way")
    with pytest.raises(UserError, match="Could not write .*v.mp4"):
        tools.save_mp4(tmp_path / "videos" / "v.mp4", moving_square(), 10)
    with tools.Logger(tmp_path) as logger:  # and no reason to end a run
        logger.video("v", moving_square())
        logger.write(1)


def test_what_a_killed_run_left_of_its_films_goes_at_the_next_start(tmp_path):
    code = """
        import os, sys, numpy as np, tools
        film = tools.Logger(sys.argv[1]).new_film("eval/episode", 7)
        film.add(np.zeros((16, 16, 3), np.uint8))
        os.kill(os.getpid(), 9)
    """
    python(code, tmp_path).wait()
    assert [path.name[:5] for path in (tmp_path / "videos").iterdir()] == [".tmp-"]
    tools.Logger(tmp_path).close()
    assert not list((tmp_path / "videos").iterdir())


def test_a_film_is_cut_at_its_length(tmp_path):
    with tools.Film(tmp_path / "v.mp4", fps=20, most=30, previewed=10) as film:
        for frame in np.random.default_rng(0).integers(0, 255, (50, 300, 200, 3), np.uint8):
            film.add(frame)
        assert len(film) == 30 and len(film.preview) == 10
        assert film.preview[0].shape == (100, 67, 3)  # every third pixel
        film.keep()
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]
    assert imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "v.mp4"))[0] == 30


def test_a_film_that_is_not_kept_leaves_nothing(tmp_path):
    with tools.Film(tmp_path / "videos" / "v.mp4", fps=20) as film:
        film.add(np.zeros((16, 16, 3), np.uint8))
    assert not list((tmp_path / "videos").iterdir())


def test_a_long_film_takes_no_more_memory_than_a_short_one(tmp_path):
    code = """
        import sys, numpy as np, psutil, tools
        memory = psutil.Process().memory_info
        with tools.Film(sys.argv[1], fps=20) as film:
            for n in range(1500):
                film.add(np.full((64, 64, 3), n % 256, np.uint8))
                if n == 300:
                    before = memory().rss
        print(memory().rss - before)
    """
    process = python(code, tmp_path / "v.mp4", stdout=subprocess.PIPE)
    assert int(process.communicate(timeout=100)[0]) < 20 * 2**20


def test_mp4_that_the_disk_cuts_short_is_not_kept(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (10, 128, 128, 3), np.uint8)
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, earlier[1]))  # also of the encoder, a process of its own
    try:
        with pytest.raises(UserError, match="Could not write .*v.mp4: "):
            tools.save_mp4(tmp_path / "v.mp4", noise, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)
    assert not list(tmp_path.iterdir())


# Weights & Biases


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed (pip install -r requirements/wandb.txt)")
    code = """
        import sys, numpy as np, tools
        for step in (100, 50):   # a resumed run starts before the last step logged
            with tools.Logger(sys.argv[1], step, wandb={"project": "test"}, config={"seed": 1}, mp4=False) as logger:
                logger.scalar("episode/return", step)
                logger.video("video", np.zeros((4, 16, 16, 3), np.uint8))
                logger.image("image", np.zeros((16, 16, 3), np.uint8))
                logger.histogram("histogram", np.arange(9.0))
                logger.text("text", "<hello>")
                logger.audio("sound", (np.sin(np.arange(800) / 3), 8000))
                logger.write(step)
    """
    process = python(
        code,
        tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)},
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    identity = (tmp_path / "wandb_id.txt").read_text()
    runs = list((tmp_path / "wandb").glob(f"offline-run-*-{identity}"))
    assert runs and all((run / f"run-{identity}.wandb").stat().st_size > 500 for run in runs)
    for media in ("*.gif", "*.png", "*.wav", "*.html"):
        assert list((tmp_path / "wandb").rglob(media)), media


def test_wandb_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install -r requirements/wandb.txt"):
        tools.Logger(tmp_path, wandb={})


# Counters


def test_every_fires_once_per_crossing():
    every = tools.Every(100)
    fired = [step for step in range(0, 1010, 16) if every(step)]
    assert len(fired) == 10 and all(step % 100 < 16 for step in fired)
    assert every(5000) and not every(5001)  # several multiples at once: one time
    resumed = tools.Every(100, start=fired[3])
    assert [step for step in range(fired[3], 1010, 16) if resumed(step)] == fired[4:]
    assert not any(tools.Every(0)(step) for step in range(1000))
    with pytest.raises(ValueError, match="-5"):
        tools.Every(-5)


# Averages


def test_metrics_average_what_was_given():
    metrics = tools.Metrics()
    metrics.add({"a": torch.tensor(1.0), "b": torch.tensor(2, dtype=torch.int64)})
    metrics.add({"a": torch.tensor(2.0, dtype=torch.bfloat16)})
    metrics.add({"a": torch.tensor(math.nan), "c": torch.tensor(math.inf), "b": True})
    assert metrics.result() == pytest.approx(
        {"a": 1.5, "a_nonfinite": 1, "b": 1.5, "c": math.nan, "c_nonfinite": 1}, nan_ok=True
    )
    assert metrics.result() == {}


def test_metrics_keep_no_graph_and_no_view():
    metrics, value = tools.Metrics(), torch.ones((), requires_grad=True)
    metrics.add({"a": value * 2})
    output = torch.tensor(4.0)
    metrics.add({"a": output})
    output.fill_(100)
    assert all(not sums.requires_grad for sums in metrics._groups.values())
    assert metrics.result() == {"a": 3}
    with pytest.raises(ValueError, match=r"Metric a: found shape \[2\]"):
        metrics.add({"a": torch.zeros(2)})


def test_metrics_do_not_lose_digits():
    metrics = tools.Metrics()
    for _ in range(3000):
        metrics.add({"a": torch.tensor(16777.217)})
    assert metrics.result()["a"] == pytest.approx(float(torch.tensor(16777.217)), rel=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_metrics_do_not_synchronise():
    metrics = tools.Metrics()
    values = {"a": torch.tensor(1.0, device="cuda"), "b": torch.tensor(2.0, device="cuda")}
    metrics.add(values)
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics.add(values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics.result() == {"a": 1, "b": 2}


# Progress


def test_progress_on_a_terminal_keeps_log_lines_whole():
    code = """
        import logging, time, tools
        tools.setup_logging('info')
        with tools.Progress(1_000_000) as progress:
            for step in range(0, 60000, 100):
                progress.update(step, step // 10, 150.5 if step > 1000 else None)
                if step % 10000 == 0:
                    logging.info("Step %d: %s", step, {"a": "x" * 100})
                    print("plain print")
                time.sleep(0.001)
    """
    main, side = pty.openpty()
    process = python(code, stdout=side, stderr=side, env={"TERM": "xterm", "COLUMNS": "80"})
    os.close(side)
    data = b""
    with contextlib.suppress(OSError):  # how Linux says that the other side is closed
        while part := os.read(main, 65536):
            data += part
    os.close(main)
    process.wait(timeout=20)
    assert process.returncode == 0, data
    # What stays when every erased line is gone: rich moves to the column 0 and erases before it prints anew.
    screen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", re.sub(r"[^\n]*\r\x1b\[2K", "", data.decode())).replace("\r", "")
    lines = [line for line in screen.split("\n") if line.strip()]
    for step in range(0, 60000, 10000):
        assert f"INFO - Step {step}: {{'a': '{'x' * 100}'}}" in lines
    assert lines.count("plain print") == 6
    bars = [line for line in lines if "frames/s" in line]
    assert len(bars) == 1 and bars[0] == lines[-1], bars
    assert re.search(r"59,900/1M frames \| [\d.]+k frames/s \| 5.99k updates \| return 150.5 \| .* left", bars[0])


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys):
    tools.setup_logging("info")
    with tools.Progress(10_000, interval=0.2) as progress:
        begin = time.monotonic()
        while time.monotonic() - begin < 0.7:
            step = int(1000 * (time.monotonic() - begin))
            progress.update(step, 3, None)
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 6 and all(line.startswith("INFO - Progress: ") for line in lines)
    assert "0/10k frames | - frames/s | 3 updates | return - | ? left" in lines[0]
    rate = re.search(r"\| (.*) frames/s", lines[-1]).group(1)
    assert rate == "1k" or 900 < float(rate) < 1000
    assert lines[-1].endswith("9s left") or lines[-1].endswith("10s left")


def test_progress_speed_is_recent_and_starts_at_the_resumed_step(monkeypatch, capsys):
    tools.setup_logging("info")
    clock = [0.0]
    monkeypatch.setattr("logger.time.monotonic", lambda: clock[0])
    progress = tools.Progress(1_000_000, interval=10, window=60)
    step = 500_000
    for i in range(40):
        progress.update(step)
        clock[0], step = clock[0] + 10, step + (100 if i < 25 else 5000)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert "| 10 frames/s |" in lines[5] and "13h" in lines[5]
    assert "| 500 frames/s |" in lines[-1]


def test_progress_is_cheap():
    logging.disable(logging.INFO)
    try:
        progress = tools.Progress(10**6, interval=1000)
        begin = time.perf_counter()
        for step in range(20000):
            progress.update(step, step, 1.0)
        assert time.perf_counter() - begin < 0.2
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    "number, text",
    [
        (0, "0"),
        (950, "950"),
        (999.7, "1k"),
        (12345, "12.3k"),
        (999_600, "1M"),
        (4_000_000, "4M"),
        (1.25e9, "1.25B"),
        (0.5, "0.5"),
    ],
)
def test_human(number, text):
    assert tools.human(number) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0s"),
        (45.4, "45s"),
        (200, "3m 20s"),
        (4320, "1h 12m"),
        (3600, "1h"),
        (183600, "2d 3h"),
        (86405, "1d"),
        (math.inf, "?"),
        (math.nan, "?"),
    ],
)
def test_format_duration(seconds, text):
    assert tools.format_duration(seconds) == text


# Checkpoints


def example(value=0) -> dict:
    return {
        "version": 1,
        "step": value,
        "weights": {"w": torch.full((3, 4), float(value)), "b": torch.zeros(2)},
        "rng": ["{}", torch.Generator().get_state()],
        "nothing": None,
        "ratio": 0.5,
        "pair": (1, "a"),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }


def test_checkpoint_reads_back(tmp_path):
    path = tmp_path / "new" / "latest.pt"
    tools.save_checkpoint(path, example(1))
    tools.save_checkpoint(path, example(2))
    content = tools.load_checkpoint(path)
    assert content["step"] == 2 and content["pair"] == (1, "a") and (content["weights"]["w"] == 2).all()
    assert [file.name for file in path.parent.iterdir()] == ["latest.pt"]


@pytest.mark.parametrize(
    "value, name", [(np.float64(1), "float64"), (np.zeros(2), "ndarray"), (Path("a"), "Path"), ({1, 2}, "set")]
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, value, name):
    with pytest.raises(TypeError, match=f"entry opt/0/x is a .*{name}"):
        tools.save_checkpoint(tmp_path / "latest.pt", {"opt": [{"x": value}]})
    assert not list(tmp_path.iterdir())


def test_kill_9_during_saves_leaves_a_whole_file(tmp_path):
    path = tmp_path / "latest.pt"
    code = """
        import os, sys, torch, tools
        while sys.stdin.readline():
            child = os.fork()
            step = 0
            while not child:
                step += 1
                tools.save_checkpoint(sys.argv[1], {"step": step, "w": torch.full((300_000,), float(step))})
                print(os.getpid(), step, flush=True)
            os.waitpid(child, 0)
            print("killed", flush=True)
    """
    process = python(code, path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    rng, steps = np.random.default_rng(0), []
    for _ in range(8):
        process.stdin.write("go\n")
        process.stdin.flush()
        child, reported = map(int, process.stdout.readline().split())
        time.sleep(rng.uniform(0.01, 0.1))
        os.kill(child, signal.SIGKILL)
        while (line := process.stdout.readline()) != "killed\n":
            reported = int(line.split()[1])
        content = tools.load_checkpoint(path)
        assert content["step"] in (reported, reported + 1)  # what was reported is there
        assert (content["w"] == content["step"]).all()
        assert len(list(tmp_path.iterdir())) <= 2  # at most one leftover, which the next save overwrites
        steps.append(content["step"])
    process.communicate()
    assert max(steps) > 3
    tools.save_checkpoint(path, example())
    assert [file.name for file in tmp_path.iterdir()] == ["latest.pt"]


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path):
    path = tmp_path / "latest.pt"
    tools.save_checkpoint(path, example(1))
    (tmp_path / ".latest.pt.tmp").symlink_to("/dev/full")  # the real error of a full disk
    with pytest.raises(
        UserError,
        match=r"latest.pt: No space left on device \(7.6 MiB needed, .* MiB free\). "
        r"The earlier file is intact. Free some space",
    ):
        tools.save_checkpoint(path, {"w": torch.zeros(2_000_000), "again": torch.zeros(2)})
    assert tools.load_checkpoint(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["latest.pt"]


def test_a_disk_that_fills_at_the_sync_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "latest.pt"
    tools.save_checkpoint(path, example(1))

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="The earlier file is intact"):
        tools.save_checkpoint(path, example(2))
    assert tools.load_checkpoint(path)["step"] == 1 and len(list(tmp_path.iterdir())) == 1


def test_damaged_checkpoints_are_one_line(tmp_path):
    path = tmp_path / "latest.pt"
    tools.save_checkpoint(path, example(1))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(np.ones((3, 4), np.float32).tobytes())] ^= 1  # one bit of a weight
    for damaged in (b"", b"hello", whole[: len(whole) // 2], whole[:-30], bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="latest.pt: damaged, truncated or not a checkpoint") as found:
            tools.load_checkpoint(path)
        assert "\n" not in str(found.value) and "--checkpoint" in str(found.value)
    with pytest.raises(UserError, match="found no such checkpoint.*Beside it: latest.pt"):
        tools.load_checkpoint(tmp_path / "other.pt")


def test_a_checkpoint_with_code_is_refused(tmp_path):
    path = tmp_path / "latest.pt"
    torch.save({"x": subprocess.Popen}, path)
    with pytest.raises(UserError, match="could run code"):
        tools.load_checkpoint(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(UserError, match="holds a Tensor, expected a dictionary"):
        tools.load_checkpoint(path)


def test_describe_checkpoint_from_the_command_line(tmp_path, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["tools.py", *map(str, words)])
        runpy.run_path(str(ROOT / "tools.py"), run_name="__main__")

    tools.save_checkpoint(tmp_path / "latest.pt", example(3))
    run(tmp_path / "latest.pt")
    lines = capsys.readouterr().out.splitlines()
    assert "  weights  (2 entries, 14 numbers)" in lines
    assert any(re.fullmatch(r"    w +float32 \[3, 4\]", line) for line in lines)
    assert any(re.fullmatch(r"  step +3", line) for line in lines)
    with pytest.raises(SystemExit, match="absent.pt: found no such checkpoint"):
        run("absent.pt")
    with pytest.raises(SystemExit, match="usage: python tools.py CHECKPOINT"):
        run()


# Randomness


def test_seed_everything():
    import random

    def draw():
        tools.seed_everything(2**40 + 3)
        return random.random(), np.random.rand(), torch.rand(()).item(), nn.Linear(2, 2).weight.sum().item()

    assert draw() == draw()


def test_enable_deterministic_run(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for flag in ("benchmark", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, flag, flag == "benchmark")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="after CUDA had started"):
        tools.enable_deterministic_run()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    try:
        tools.enable_deterministic_run()
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)


def test_set_threads():
    earlier = torch.get_num_threads()
    try:
        tools.set_threads(2)
        tools.set_threads(0)  # leaves it
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(earlier)


# Signals


def test_signals_ask_for_a_clean_end_and_a_second_ctrl_c_stops_at_once():
    code = """
        import signal, time, tools
        earlier = signal.getsignal(signal.SIGTERM)
        for patient in (False, False, True):   # the last loop does not look at `requested`
            try:
                with tools.Shutdown() as shutdown:
                    print("ready", flush=True)
                    end = time.monotonic() + 20
                    while time.monotonic() < end and (patient or not shutdown.requested):
                        time.sleep(0.01)
                print("saved", shutdown.requested, signal.getsignal(signal.SIGTERM) is earlier, flush=True)
            except KeyboardInterrupt:
                print("stopped", signal.getsignal(signal.SIGTERM) is earlier)
    """
    process = python(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for numbers in ([signal.SIGINT], [signal.SIGTERM], [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]):
        assert process.stdout.readline() == "ready\n"
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.1)
        if len(numbers) == 1:
            assert process.stdout.readline() == "saved True True\n"
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "stopped True\n")
    assert err == 3 * "\nsaving, press Ctrl-C again to stop at once\n"


@pytest.mark.parametrize(("ignored", "status"), [(False, "saved"), (True, "went on")])
def test_a_closed_terminal_asks_for_a_clean_end_unless_it_is_ignored(ignored, status):
    code = f"""
        import signal, time, tools
        if {ignored}:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
        with tools.Shutdown() as shutdown:
            print("ready", flush=True)
            end = time.monotonic() + {1 if ignored else 20}
            while time.monotonic() < end and not shutdown.requested:
                time.sleep(0.01)
        print("saved" if shutdown.requested else "went on")
    """
    process = python(code, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=20)[0].strip() == status


@pytest.mark.parametrize("lost", ["pipe", "closed", "ascii"])
def test_the_log_goes_on_without_stdout(tmp_path, lost):
    code = f"""
        import logging, sys, time, tools
        tools.setup_logging("info", {str(tmp_path)!r})
        log = logging.getLogger("run")
        with tools.Progress(100, interval=0) as progress:
            for n in range(200):
                log.info("line %d: 3 ± 1", n)
                progress.update(n)
                time.sleep(0.001)
        log.info("the end")
    """
    closing = {"preexec_fn": lambda: os.close(1)} if lost == "closed" else {"stdout": subprocess.PIPE}
    env = os.environ | ({"PYTHONIOENCODING": "ascii"} if lost == "ascii" else {})
    process = python(code, stderr=subprocess.PIPE, env=env, **closing)
    if lost == "pipe":
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        process.wait()
    else:
        out, err = process.communicate(timeout=20)
        assert err == "" and (lost == "closed" or "line 199: 3 ? 1" in out)
    written = (tmp_path / "log.txt").read_text()
    assert process.returncode == 0 and "line 199: 3 ± 1" in written and written.rstrip().endswith("the end")
    assert written.count("stdout is gone") == (lost == "pipe")


def test_a_stop_breaks_off_only_what_it_may():
    earlier = signal.getsignal(signal.SIGALRM), signal.setitimer(signal.ITIMER_REAL, 100)
    called = []
    with tools.Shutdown(grace=0.2, stuck=lambda: called.append(1)) as shutdown:
        with shutdown.breakable():
            time.sleep(0.3)  # nothing is asked for
            os.kill(os.getpid(), signal.SIGTERM)
            with shutdown.breakable(False):
                time.sleep(0.6)
            begun = time.monotonic()
            with pytest.raises(tools.Overdue):
                time.sleep(5)
            assert time.monotonic() - begun < 1
            time.sleep(0.3)  # once: what it passes through on its way out may take some time
        assert shutdown.requested and called == []
    assert signal.getsignal(signal.SIGALRM) is earlier[0] and 0 < signal.setitimer(signal.ITIMER_REAL, 0)[0] <= 100
    signal.setitimer(signal.ITIMER_REAL, *earlier[1])


def test_shutdown_outside_the_main_thread_does_nothing():
    earlier = signal.getsignal(signal.SIGINT)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert not pool.submit(lambda: tools.Shutdown().__enter__().requested).result()
    assert signal.getsignal(signal.SIGINT) is earlier


# Devices and sizes


def test_pick_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tools.pick_device("auto") == tools.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cuda: torch .* (without CUDA|sees no device).*--device cpu"):
        tools.pick_device("cuda")
    for wrong in ("gpu", "cuda:x", "cuda:", ""):
        with pytest.raises(UserError, match="expected auto, cpu, cuda"):
            tools.pick_device(wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert tools.pick_device("auto") == tools.pick_device("cuda") == torch.device("cuda:0")
    assert tools.pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match=r"cuda:2: torch sees 2 device\(s\)"):
        tools.pick_device("cuda:2")


def test_out_of_memory_help():
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB")
    text = tools.out_of_memory_help(cuda)
    assert text.startswith("CUDA out of memory. Tried to allocate 2.00 GiB. Make") and "\n" not in text
    assert all(key in text for key in ("batch_size", "batch_length", "imag_horizon", "envs", "size12m", "bfloat16"))
    assert "--replay_device cpu" in text and "--checkpointing true" in text
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60, dtype=torch.uint8)
    assert "dataset_size" in (text := tools.out_of_memory_help(real.value)) and "replay_device" not in text
    assert tools.out_of_memory_help(MemoryError()).startswith("Out of memory. Make")
    assert tools.out_of_memory_help(RuntimeError("shape mismatch")) is None


def test_parameter_table():
    shared = nn.Linear(1000, 1000, bias=False)
    table = tools.parameter_table({"world model": nn.Sequential(shared, nn.Linear(10, 10)), "slow": shared})
    assert [line.split() for line in table.splitlines()] == [
        ["world", "model", "1.000", "M"],
        ["slow", "1.000", "M"],
        ["total", "1.000", "M"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_names_handed_on():
    import episodes
    import logger
    import replay

    assert tools.Logger is logger.Logger and tools.Replay is replay.Replay
    assert tools.sample_episodes is episodes.sample_episodes
    assert all(hasattr(tools, name) for name in tools.__all__)


def test_metrics_continue_after_a_checkpoint(tmp_path):
    whole, first = tools.Metrics(), tools.Metrics()
    values = [{"a": torch.tensor(1.0), "b": 2.0}, {"a": torch.tensor(4.0)}, {"a": torch.tensor(7.0), "b": 8.0}]
    for row in values:
        whole.add(row)
    first.add(values[0])
    first.add(values[1])
    tools.save_checkpoint(tmp_path / "m.pt", {"metrics": first.state()})
    resumed = tools.Metrics()
    resumed.load_state(tools.load_checkpoint(tmp_path / "m.pt")["metrics"], "cpu")
    resumed.add(values[2])
    assert resumed.result() == whole.result() == {"a": 4.0, "b": 5.0}
