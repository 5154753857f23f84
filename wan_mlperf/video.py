"""Frames -> MP4 and contact sheet. Never inside a timed path."""

from __future__ import annotations

import functools
import queue
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from wan_mlperf.errors import BadInput
from wan_mlperf.files import atomic_file, in_memory

# How much H.264 may throw away, from 0 (nothing) to 51. MLCommons' reference writes with the default quality of diffusers'
# `export_to_video`, which is CRF 25; AMD uses 23. At 16 the file is close to what the model made; it stays where it is because a
# decoded video is what VBench scores, and scores must remain comparable. In VBench's flicker the default quality scores 0.04 of
# 100 points more (docs/results/compression-2026-11-26.md).
CRF = 16
# What is in the file, for players that would otherwise guess by its size (BT.709 from 720 lines on): swscale turns RGB into the
# Y'CbCr of BT.601 in the limited range; the RGB itself is sRGB, as of any picture that a model was trained on.
COLOURS = {"colorspace": "smpte170m", "color_range": "tv", "color_primaries": "bt709", "color_trc": "iec61966-2-1"}
ENCODER = "libx264"
# x264's output depends on the number of its threads. With more than one, decoded pixels would differ from 192 x 320 on, and
# VBench scores would not be comparable with earlier ones (docs/results/serving-2026-11-26.md).
THREADS = 1


@functools.cache
def encoder_options() -> dict[str, str]:
    """Return libx264's options. On a CPU with AVX-512 it is told to use AVX2.

    Its AVX-512 code reads memory that nobody has written, so that the same frames gave different files: of 480 x 832, each time
    another one (docs/results/compression-2026-11-26.md). With AVX2 they always give the same.
    """
    try:
        has_avx512 = "avx512" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        has_avx512 = False
    return {"crf": str(CRF), **COLOURS, **({"x264-params": "asm=AVX2"} if has_avx512 else {})}


def check_encoder() -> None:
    """Raise BadInput if this build of PyAV cannot write H.264, before a video is made."""
    try:
        av.codec.Codec(ENCODER, "w")
    except ValueError:
        raise BadInput(
            f"PyAV {av.__version__} has no {ENCODER} here; allowed: the wheel from PyPI (pip install --force-reinstall av)"
        ) from None


def write_mp4(path: Path, chunks: Iterable[np.ndarray], fps: int) -> None:
    """Write uint8 frames, in chunks [n, height, width, 3] with even sides, as H.264. The same frames give the same file.

    The index is at the front, so the video plays while it loads. The file gets its name only when it is whole.
    """
    with atomic_file(path) as temporary:
        _encode(temporary, chunks, fps)


def _encode(path: Path, chunks: Iterable[np.ndarray], fps: int) -> None:
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = None
        for chunk in chunks:
            for frame in chunk:
                if stream is None:
                    stream = container.add_stream(ENCODER, rate=Fraction(fps), options=encoder_options())
                    stream.height, stream.width = frame.shape[:2]
                    stream.pix_fmt = "yuv420p"
                    stream.thread_count = THREADS
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        if stream is not None:
            container.mux(stream.encode())


def write_mp4_in_background(path: Path, chunks: Iterable[np.ndarray], fps: int) -> None:
    """Like `write_mp4`, in a separate thread, so that one chunk is encoded while the next one is made."""
    waiting: queue.Queue[np.ndarray | None] = queue.Queue(maxsize=2)

    def arrived() -> Iterator[np.ndarray]:
        while (chunk := waiting.get()) is not None:
            yield chunk
        if failed:
            raise failed[0]  # so that no file is left under its final name

    failed: list[BaseException] = []
    with ThreadPoolExecutor(1) as encoder:
        written = encoder.submit(write_mp4, path, arrived(), fps)
        try:
            for chunk in chunks:
                while not written.done():  # a full disk ends the encoder early
                    try:
                        waiting.put(chunk, timeout=0.1)
                        break
                    except queue.Full:
                        continue
        except BaseException as error:
            failed.append(error)
            raise
        finally:
            if not written.done():
                waiting.put(None)
        written.result()


def to_mp4(frames: np.ndarray, fps: int) -> bytes:
    """Return the file that `write_mp4` would write."""
    return chunks_to_mp4([frames], fps)


def chunks_to_mp4(chunks: Iterable[np.ndarray], fps: int) -> bytes:
    """Like `to_mp4`, for frames in chunks [n, height, width, 3]."""
    with in_memory(b"") as path:
        _encode(path, chunks, fps)
        return path.read_bytes()


def read_mp4(path: Path) -> np.ndarray:
    """Return an MP4's frames, uint8 [n, height, width, 3]. Raises OSError, or ValueError for a file that is not a video."""
    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return np.stack(frames)
    except OSError:
        raise
    except (av.FFmpegError, IndexError, ValueError) as error:  # no video stream; none of its frames can be decoded
        raise ValueError(f"{str(path)!r}: cannot be decoded as a video ({error})") from None


def contact_sheet(videos: Sequence[np.ndarray], *, per_video: int = 5, gap: int = 4) -> np.ndarray:
    """Return one picture with a row per video [n, height, width, 3]: `per_video` frames spread evenly over it."""
    rows = []
    for video in videos:
        chosen = video[np.linspace(0, len(video) - 1, per_video).round().astype(int)]
        rows.append(
            np.concatenate([np.pad(frame, ((0, gap), (0, gap), (0, 0)), constant_values=255) for frame in chosen], axis=1)
        )
    return np.concatenate(rows, axis=0)
