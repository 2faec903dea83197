"""Videos whose pictures carry their number, in every container and codec that PyAV writes, and
whether a reader gives their pictures in order and at their times.

`python tests/data_pipeline/codec/frame_matrix.py` prints the table for our reader and, where it
is installed, for decord.

The bar code: a picture is divided into 4 columns and 2 rows, and block b (row-major, 0 to 7) is
light where bit b of the number is set. So no other decoder is needed to know what is right.
"""

import importlib.util
import itertools
import tempfile
import zlib
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

SIDE = 64
RATE = 25
COUNT = 50  # more than the reader decodes before it may leave pictures undecoded
LIGHT = 200
DARK = 40
LEVELS = 25  # of 255 that compression may move a block
EARLY = -5  # number of the first stamp of a video that begins before zero
# Threads and look-ahead of x265 are a race: on a busy machine it now and then gives other pictures,
# with blocks dark that should be light: 12 of 360 files, and with all of this none of 350.
X265_ALONE = "log-level=none:pools=none:frame-threads=1:cutree=0:aq-mode=0:b-adapt=0:rc-lookahead=5"
KINDS = ("right", "wrong", "refused")
STEPS = (1, 1, 2, 1, 3)  # distances of pictures at a variable rate, in turns

# name: encoder, its options, whether it makes B-frames (or hidden pictures)
CODECS = {
    "h264": ("libx264", {"preset": "veryfast"}, True),
    "hevc": ("libx265", {"preset": "superfast"}, True),
    "vp8": ("libvpx", {"deadline": "good", "cpu-used": "5"}, True),
    "vp9": ("libvpx-vp9", {"deadline": "good", "cpu-used": "5"}, True),
    "av1": ("libsvtav1", {"preset": "10", "crf": "20", "svtav1-params": "lp=1"}, False),
    "mpeg1": ("mpeg1video", {}, True),
    "mpeg2": ("mpeg2video", {}, True),
    "mpeg4": ("mpeg4", {}, True),
    "mjpeg": ("mjpeg", {}, False),
    "wmv1": ("wmv1", {}, False),
    "wmv2": ("wmv2", {}, False),
    "msmpeg4": ("msmpeg4", {}, False),
    "flv1": ("flv", {}, False),
}
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
# name: suffix, muxer options, codecs
CONTAINERS = {
    "mp4": ("mp4", {}, "h264 hevc vp9 av1 mpeg1 mpeg2 mpeg4 mjpeg"),
    "mov": ("mov", {}, "h264 hevc mpeg2 mpeg4 mjpeg"),
    "fragmented mp4": ("mp4", FRAGMENTED, "h264 hevc vp9 av1 mpeg4"),
    "mkv": ("mkv", {}, "h264 hevc vp8 vp9 av1 mpeg1 mpeg2 mpeg4 mjpeg"),
    "webm": ("webm", {}, "vp8 vp9 av1"),
    "avi": ("avi", {}, "h264 vp8 vp9 mpeg1 mpeg2 mpeg4 mjpeg wmv1 wmv2 msmpeg4"),
    "ts": ("ts", {}, "h264 hevc mpeg1 mpeg2 mpeg4"),
    "mpg": ("mpg", {}, "mpeg1 mpeg2 h264"),
    "vob": ("vob", {}, "mpeg2"),
    "flv": ("flv", {}, "h264 hevc vp9 av1 flv1"),
    "wmv": ("wmv", {}, "wmv1 wmv2 msmpeg4 h264"),
}
PAIRS = [(name, codec) for name, row in CONTAINERS.items() for codec in row[2].split()]


@dataclass(frozen=True)
class Case:
    """One video: its stamps begin at picture `start`, at a constant or a variable rate."""

    container: str
    codec: str
    has_b_frames: bool = False
    gop: int = 12
    is_varying: bool = False
    start: int = 0

    @property
    def times(self) -> list[int]:
        """Stamps of the pictures in frames, from zero on."""
        steps = (STEPS[i % len(STEPS)] if self.is_varying else 1 for i in range(COUNT - 1))
        return list(itertools.accumulate(steps, initial=0))

    @property
    def shown(self) -> list[int]:
        """Numbers of the pictures that a player shows: an edit list leaves out what is before
        zero; other containers are moved to zero as a whole."""
        is_cut = self.start < 0 and self.container in ("mp4", "mov")
        return list(range(-self.start if is_cut else 0, COUNT))

    @property
    def holds_times(self) -> bool:
        """Whether the file says when each picture is shown. Program streams time packets of many
        pictures; AVI has slots, and its muxer fills a late start after the first picture; slots of
        B-frames are those of decoding."""
        if self.container in ("mpg", "vob"):
            return not self.is_varying
        if self.container == "avi":
            return self.start <= 0 and not self.is_varying
        return self.container != "wmv" or not (self.has_b_frames and self.is_varying)

    @property
    def precision(self) -> float:
        """Seconds by which a time may be off: Matroska and FLV count milliseconds, and in program
        streams the stamp of a packet may be read as that of the picture beside its own."""
        return 1 / RATE + 0.0011 if self.container in ("mpg", "vob") else 0.0011

    @property
    def holds_start(self) -> bool:
        """Whether the file says when its first picture is shown; other muxers shift it."""
        return self.start >= 0 and self.container in ("mp4", "mov", "mkv", "webm")

    @property
    def may_be_refused(self) -> bool:
        """libavformat follows the edit list of MPEG-1 in MP4 a packet too late."""
        return self.container == "mp4" and self.codec == "mpeg1" and self.start < 0

    def write(self, path: Path) -> None:
        """Encode the video."""
        suffix, muxer, _ = CONTAINERS[self.container]
        encoder, options, _ = CODECS[self.codec]
        write_numbered(
            path,
            encoder=encoder,
            times=[self.start + time for time in self.times],
            options=options | self._structure(),
            muxer=muxer,
            gop=self.gop,
            b_frames=2 if self.has_b_frames and self.codec.startswith("mpeg") else 0,
        )

    def _structure(self) -> dict[str, str]:
        """Options for the encoders that have their own words for GOP and B-frames."""
        b_frames = 3 if self.has_b_frames else 0
        gop = f"keyint={self.gop}:min-keyint={min(self.gop, 12)}:bframes={b_frames}"
        if self.codec == "h264":
            return {"x264-params": gop}
        if self.codec == "hevc":
            return {"x265-params": gop}
        if self.codec.startswith("vp") and self.has_b_frames:  # hidden pictures from the future
            return {"auto-alt-ref": "1", "lag-in-frames": "16"}
        return {}


def cases_of(container: str, codec: str) -> list[Case]:
    """All cases of a container and codec: GOPs at both rates, then late and early starts."""
    found = []
    for has_b_frames in (False, True) if CODECS[codec][2] else (False,):
        base = Case(container, codec, has_b_frames)
        for gop in (12,) if codec == "mjpeg" else (1, 12, 25, 250):
            if gop > 1 or not has_b_frames:
                found += [
                    Case(container, codec, has_b_frames, gop, is_varying)
                    for is_varying in (False, True)
                ]
        late = [20 * RATE] if container == "avi" else [20 * RATE, 3600 * RATE]
        found += [
            Case(container, codec, has_b_frames, base.gop, start=start) for start in (*late, EARLY)
        ]
    return found


def picture(number: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """The bar code of a number below 256, uint8 [height, width, 3]."""
    blocks = np.array([LIGHT if number >> bit & 1 else DARK for bit in range(8)], np.uint8)
    tall = np.repeat(blocks.reshape(2, 4), height // 2, axis=0)
    return np.repeat(np.repeat(tall, width // 4, axis=1)[..., None], 3, axis=2)


def number_of(pixels: np.ndarray) -> int:
    """The number that a picture [H, W, 3] shows: the middles of its blocks against a threshold."""
    height, width = pixels.shape[:2]
    blocks = pixels[: height // 2 * 2, : width // 4 * 4].reshape(2, height // 2, 4, width // 4, 3)
    middle = blocks[:, height // 8 : -height // 8, :, width // 16 : -width // 16]
    bits = middle.mean(axis=(1, 3, 4)).ravel() > (LIGHT + DARK) / 2
    return int(np.packbits(bits, bitorder="little")[0])


def write_numbered(
    path: Path,
    encoder: str = "libx264",
    times=range(COUNT),
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    gop: int = 12,
    b_frames: int = 0,
    rate: int = RATE,
    first: int = 0,
    container_format: str | None = None,
) -> Path:
    """Write a video whose i-th picture carries the number first + i and is shown at times[i] / rate
    seconds."""
    import av

    options = dict(options or {})
    if encoder == "libx265":
        given = options.get("x265-params")
        options["x265-params"] = ":".join(filter(None, (given, X265_ALONE)))
    with av.open(str(path), "w", format=container_format, options=muxer or {}) as container:
        stream = container.add_stream(encoder, rate=rate, options=options)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture((first + number) % 256), format="rgb24")
            frame.pts = time
            frame.time_base = Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def verdict(case: Case, path: Path) -> str:
    """`right`, `refused`, or what the packer's reader gets wrong of a case."""
    from data_pipeline.codec.decode import decode_video
    from data_pipeline.codec.framing import Framing
    from data_pipeline.errors import RejectedInput

    try:
        video = decode_video(path, Framing(num_frames=1000, size=SIDE, patch_size=16))
    except RejectedInput as rejection:
        return "refused" if case.may_be_refused else f"refused: {rejection}"
    numbers = [number_of(pixels) for pixels in video.frames]
    if numbers != case.shown or video.num_source_frames != len(numbers):
        return f"pictures {numbers} of {video.num_source_frames}"
    ideal = np.stack([picture(number) for number in numbers]).astype(int)
    blurred = np.abs(video.frames - ideal)[:, 4:12, 4:12].mean(axis=(1, 2, 3)).max()
    if blurred > LEVELS:
        return f"a picture's first block is {blurred:.0f} levels off"
    begin = (case.start + case.times[numbers[0]]) / RATE
    if case.holds_start and abs(video.seconds[0] - begin) > 2 / RATE:  # B-frames may shift it
        return f"begins at {video.seconds[0]:.3f} s"
    if case.codec == "h264" and not _is_same_when_others_are_skipped(case, path, video):
        return "other pictures when only some are wanted"
    times = np.array(case.times)[case.shown] / RATE
    apart = np.abs((video.seconds - video.seconds[0]) - (times - times[0])).max()
    if case.holds_times and apart > case.precision:
        return f"times are up to {apart:.3f} s wrong"
    return "right"


def _is_same_when_others_are_skipped(case: Case, path: Path, video) -> bool:
    from data_pipeline.codec.decode import decode_video
    from data_pipeline.codec.framing import Framing

    draw = np.random.default_rng(zlib.crc32(str(case).encode()))
    some = np.sort(draw.choice(len(video.frames), 5, replace=False))
    # the share of its segment at which each of these frames lies
    within = (some + 0.5) * len(some) / (len(video.frames) - 1) - np.arange(len(some))
    framing = Framing(size=SIDE, patch_size=16, within=tuple(within))
    lazy = decode_video(path, framing, thorough=False)
    return np.array_equal(lazy.frames, video.frames[some])


def decord_verdict(case: Case, path: Path) -> str:
    """The same of decord: all frames in a row, and some that are asked for."""
    import decord

    asked = [3, 11, 18, 24]
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        numbers = [number_of(p) for p in reader.get_batch(range(len(reader))).asnumpy()]
        again = decord.VideoReader(str(path), num_threads=1)
        found = [number_of(p) for p in again.get_batch(asked).asnumpy()]
    except (decord.DECORDError, RuntimeError, IndexError):
        return "refused"
    is_right = numbers == case.shown and found == [case.shown[i] for i in asked]
    return "right" if is_right else "wrong"


def main() -> None:
    """Print counts of files by container, codec and verdict."""
    readers = {"ours": verdict}
    if importlib.util.find_spec("decord") is not None:
        readers["decord"] = decord_verdict
    cases = {pair: cases_of(*pair) for pair in PAIRS}
    counts = {name: {pair: Counter() for pair in PAIRS} for name in readers}
    with tempfile.TemporaryDirectory() as folder:
        for listed in cases.values():
            for case in listed:
                case.write(_path_of(case, folder))
        # one reader after the other: decord's old libraries get in the way of PyAV's encoders
        for name, read in readers.items():
            for pair, listed in cases.items():
                for case in listed:
                    kind = read(case, _path_of(case, folder)).split(":")[0]
                    counts[name][pair][kind if kind in ("right", "refused") else "wrong"] += 1
    names = " | ".join(f"{name}: right, wrong, refused" for name in readers)
    print(f"| container | codec | files | {names} |")
    print("| --- " * (3 + len(readers)) + "|")
    for pair, listed in cases.items():
        cells = [", ".join(str(counts[n][pair][kind]) for kind in KINDS) for n in readers]
        print(f"| {pair[0]} | {pair[1]} | {len(listed)} | {' | '.join(cells)} |")
    for name in readers:
        total = sum(counts[name].values(), Counter())
        print(f"{name}: {dict(total)} of {total.total()} files")


def _path_of(case: Case, folder: str) -> Path:
    """Where a case lies among all others."""
    name = "-".join(str(value) for value in vars(case).values())
    return Path(folder, f"{name}.{CONTAINERS[case.container][0]}")


if __name__ == "__main__":
    main()
