"""Cut a strip of frames (PNG) or an animation (GIF) from the film that `--mode eval` writes.

    python dreamer.py --mode eval --checkpoint logdir/walker/latest.pt --episodes 10
    python docs/results/film.py logdir/walker/eval-100000.mp4 --out walker.png
    python docs/results/film.py logdir/walker/eval-100000.mp4 --out walker.gif --frames 75 --every 2

--from, --frames and --every count the film's frames, which are agent steps. Several films are stacked in a strip.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("films", nargs="+", type=Path, metavar="FILM")
    parser.add_argument("--out", type=Path, default=Path("film.png"), help="a .png or a .gif")
    parser.add_argument("--from", dest="start", type=int, default=0, help="first frame")
    parser.add_argument("--frames", type=int, default=8, help="frames to show")
    parser.add_argument("--every", type=int, default=8, help="show every so many frames")
    parser.add_argument("--height", type=int, default=160, help="of a frame, in pixels")
    parser.add_argument("--fps", type=float, default=20.0, help="of a GIF")
    args = parser.parse_args()
    wanted = range(args.start, args.start + args.frames * args.every, args.every)
    films = [resized(pick(path, wanted), args.height) for path in args.films]
    if args.out.suffix == ".gif":
        if len(films) > 1:
            parser.error("a GIF shows one film")
        first, *rest = (Image.fromarray(frame).quantize(64) for frame in films[0])
        first.save(args.out, save_all=True, append_images=rest, duration=1000 / args.fps, loop=0, optimize=True)
    else:
        Image.fromarray(np.concatenate([np.concatenate(list(film), 1) for film in films])).save(args.out, optimize=True)
    print(args.out)


def pick(path: Path, wanted: range) -> np.ndarray:
    """RGB frames [n, height, width, 3] of a film; SystemExit if it has not that many."""
    film, frames = cv2.VideoCapture(str(path)), []
    while len(frames) <= wanted[-1]:
        found, frame = film.read()
        if not found:
            raise SystemExit(f"{path} has {len(frames)} frames; --from, --frames and --every ask for {wanted[-1] + 1}.")
        frames.append(frame[..., ::-1])
    return np.stack([frames[index] for index in wanted])


def resized(frames: np.ndarray, height: int) -> np.ndarray:
    """Frames [n, height, width, 3]; small ones keep hard edges."""
    method = Image.Resampling.NEAREST if height > frames.shape[1] else Image.Resampling.LANCZOS
    size = round(frames.shape[2] * height / frames.shape[1]), height
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, method)) for frame in frames])


if __name__ == "__main__":
    main()
