"""Makes a small looping GIF of a recorded episode.

Example:
    python sac_continuous.py --evaluate RUN_DIR --capture-video
    python benchmark/gif.py RUN_DIR/videos/evaluate-0-episode-0.mp4 --out docs/halfcheetah.gif
"""

from pathlib import Path

from errors import Parser, UserError, run_main
from moviepy import VideoFileClip
from PIL import Image


def main() -> None:
    parser = Parser("Make a small looping GIF of a recorded episode.")
    parser.add_argument("video", type=Path, help="mp4 of a run folder's videos/")
    parser.add_argument("--out", type=Path, required=True, help="GIF")
    parser.add_argument("--start", type=float, default=2, help="seconds into the video")
    parser.add_argument("--seconds", type=float, default=3, help="length")
    parser.add_argument("--width", type=int, default=300, help="pixels")
    parser.add_argument("--fps", type=int, default=20, help="frames a second")
    args = parser.parse_args()
    try:
        with VideoFileClip(str(args.video)) as video:
            times = [args.start + i / args.fps for i in range(int(args.seconds * args.fps))]
            frames = [Image.fromarray(video.get_frame(t)) for t in times if t < video.duration]
    except OSError as error:
        raise UserError(f"{args.video}: cannot be read as a video ({' '.join(str(error).split())[:100]})") from None
    if not frames:
        raise UserError(f"--start {args.start}: {args.video} is shorter than that")
    height = round(args.width * frames[0].height / frames[0].width)
    images = [frame.resize((args.width, height)).quantize(64, dither=Image.Dither.NONE) for frame in frames]
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        images[0].save(
            args.out, save_all=True, append_images=images[1:], duration=1000 // args.fps, loop=0, optimize=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"--out {args.out}: cannot be written ({error})") from None
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run_main(main)
