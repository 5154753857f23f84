"""The colours of an MP4: tags that say what is in it, in every reader, and the pixels that it had without them."""

from __future__ import annotations

import json
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from wan_mlperf import video
from wan_mlperf.videos.preview import fragments

CARDS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
SIZES = ((64, 64), (480, 832), (720, 1280))
TAGS = {"color_range": "tv", "color_space": "smpte170m", "color_transfer": "iec61966-2-1", "color_primaries": "bt709"}
# The same as numbers of ITU-T H.273 (libav's AVColorSpace and so on), which PyAV gives.
NUMBERS = {"color_range": 1, "colorspace": 6, "color_trc": 13, "color_primaries": 1}
KR_KB = {"bt709": (0.2126, 0.0722), "smpte170m": (0.299, 0.114)}


def card(colour: str, size: tuple[int, int]) -> np.ndarray:
    """Two frames of one colour; the half of each is darker, so that there is something to encode."""
    frames = np.empty((2, *size, 3), np.uint8)
    frames[:] = CARDS[colour]
    frames[:, :, size[1] // 2 :] //= 2
    return frames


def without_tags(frames: np.ndarray, path: Path) -> None:
    """What `write_mp4` would write had it no tags."""
    with av.open(str(path), "w", format="mp4") as container:
        options = {name: value for name, value in video.encoder_options().items() if name not in video.COLOURS}
        stream = container.add_stream("libx264", rate=Fraction(16), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def planes(path: Path) -> list[list[bytes]]:
    """Y', Cb and Cr of every frame, as they were decoded."""
    with av.open(str(path)) as container:
        return [[bytes(plane) for plane in frame.planes] for frame in container.decode(video=0)]


def rgb_by_tags(path: Path, matrix: str) -> np.ndarray:
    """What a player shows that follows a matrix: frames in 0 to 255, by the formulas of ITU-R BT.601 and BT.709."""
    kr, kb = KR_KB[matrix]
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray().astype(float) for frame in container.decode(video=0)]
        height, width = container.streams.video[0].height, container.streams.video[0].width
    shown = []
    for frame in frames:
        luma = (frame[:height] - 16) / 219
        blue, red = ((one.reshape(height // 2, width // 2) - 128) / 224 for one in np.split(frame[height:], 2))
        blue, red = (one.repeat(2, 0).repeat(2, 1) for one in (blue, red))
        r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
        shown.append(np.stack([r, (luma - kr * r - kb * b) / (1 - kr - kb), b], axis=-1))
    return np.stack(shown).clip(0, 1) * 255


def order_of_boxes(content: bytes) -> list[str]:
    """The names of an MP4's outermost boxes."""
    names, place = [], 0
    while place < len(content):
        names.append(content[place + 4 : place + 8].decode())
        place += int.from_bytes(content[place : place + 4], "big")
    return names


def probed(path: Path) -> dict[str, Any]:
    words = ["ffprobe", "-v", "error", "-count_frames", "-show_streams", "-of", "json", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    (stream,) = json.loads(done.stdout)["streams"]
    return stream


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("colour", CARDS)
def test_a_card_is_the_same_colour_in_every_reader(colour: str, size: tuple[int, int], tmp_path: Path) -> None:
    frames, path = card(colour, size), tmp_path / "card.mp4"
    video.write_mp4(path, [frames], 16)
    boxes = order_of_boxes(path.read_bytes())
    assert boxes.index("moov") < boxes.index("mdat")
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert {name: getattr(context, name) for name in NUMBERS} == NUMBERS
    if shutil.which("ffprobe"):
        stream = probed(path)
        assert {name: stream.get(name) for name in TAGS} == TAGS
        assert (stream["width"], stream["height"], stream["nb_read_frames"], stream["pix_fmt"]) == (*size[::-1], "2", "yuv420p")
    without_tags(frames, tmp_path / "plain.mp4")
    assert planes(path) == planes(tmp_path / "plain.mp4")
    away = np.s_[:, :, [*range(size[1] // 2 - 16), *range(size[1] // 2 + 16, size[1])]]  # from the edge, which 4:2:0 blurs
    errors = {matrix: abs(rgb_by_tags(path, matrix)[away] - frames[away]).max() for matrix in KR_KB}
    assert errors["smpte170m"] < 2 < 10 < errors["bt709"], errors  # BT.709, a player's guess for 720 lines, is off
    assert abs(video.read_mp4(path)[away].astype(int) - frames[away]).max() < 4


def test_the_preview_has_the_same_tags(tmp_path: Path) -> None:
    (tmp_path / "preview.mp4").write_bytes(b"".join(fragments([card("red", (64, 64))], 16)))
    with av.open(str(tmp_path / "preview.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert {name: getattr(context, name) for name in NUMBERS} == NUMBERS
    assert abs(rgb_by_tags(tmp_path / "preview.mp4", "smpte170m")[:, :, :16] - card("red", (64, 64))[:, :, :16]).max() < 4
