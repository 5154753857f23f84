"""The grammar of the embedded model's clips, how they are drawn, and the detector that scores videos of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.filters import gaussian

from wan_mlperf.shapes import clips
from wan_mlperf.shapes.detect import detect, score, steadiness

ATTRIBUTES = ("foreground", "background", "direction", "shape")


@pytest.fixture(scope="module")
def sample() -> tuple[list[clips.Scene], list[NDArray[np.uint8]]]:
    """Every sixth scene, which covers all words, drawn at a random place."""
    rng = np.random.default_rng(3)
    chosen = list(clips.scenes()[::6])
    return chosen, [clips.draw(scene, clips.place(scene, rng)) for scene in chosen]


def test_grammar_has_882_scenes_and_holds_out_126() -> None:
    everything, known = set(clips.scenes()), set(clips.training_scenes())
    held_out = {scene for _, scene in clips.held_out_prompts()}
    assert len(everything) == len(clips.scenes()) == 882
    assert len(held_out) == len(clips.held_out_prompts()) == 126
    assert not held_out & known and held_out | known == everything


def test_held_out_scenes_use_every_word_about_equally() -> None:
    held_out = [scene for _, scene in clips.held_out_prompts()]
    for name, words in (("shape", clips.SHAPES), ("foreground", clips.FOREGROUNDS), ("motion", clips.MOTIONS)):
        counts = [sum(getattr(scene, name) == word for scene in held_out) for word in words]
        assert min(counts) >= 0.7 * len(held_out) / len(words)


def test_held_out_captions_are_no_training_captions() -> None:
    learned = {clips.caption(scene, p) for scene in clips.training_scenes() for p in range(clips.PHRASINGS)}
    assert not learned & {prompt for prompt, _ in clips.held_out_prompts()}


def test_every_scene_and_phrasing_has_its_own_caption() -> None:
    texts = [clips.caption(scene, p) for scene in clips.scenes() for p in range(clips.PHRASINGS)]
    assert len(set(texts)) == len(texts)
    assert texts[0] == "a red circle moving left on a green background"


@pytest.mark.parametrize(
    "words",
    [
        {"shape": "star", "foreground": "red", "background": "blue", "motion": "left"},
        {"shape": "circle", "foreground": "red", "background": "red", "motion": "left"},
        {"shape": "circle", "foreground": "black", "background": "red", "motion": "left"},
    ],
)
def test_scene_rejects_what_the_grammar_lacks(words: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"not one of|cannot be seen"):
        clips.Scene(**words)


def test_caption_rejects_an_unknown_phrasing() -> None:
    with pytest.raises(ValueError, match="phrasing=99"):
        clips.caption(clips.scenes()[0], 99)


def test_drawing_keeps_the_shape_inside_and_antialiased(sample: tuple[list[clips.Scene], list[NDArray[np.uint8]]]) -> None:
    for scene, video in zip(*sample, strict=True):
        assert video.shape == (17, 64, 64, 3) and video.dtype == np.uint8
        border = np.concatenate([video[:, 0], video[:, -1], video[:, :, 0], video[:, :, -1]])
        assert (border == clips.COLOURS[scene.background]).all(), scene
    circle = clips.coverage("circle", 32, 32, 10)
    assert ((circle > 0.05) & (circle < 0.95)).any()
    assert circle.sum() == pytest.approx(np.pi * 100, rel=0.01)


def test_detector_is_right_on_drawn_clips(sample: tuple[list[clips.Scene], list[NDArray[np.uint8]]]) -> None:
    result = score(sample[1], sample[0])
    assert set(result) == set(ATTRIBUTES)
    assert min(result.values()) >= 0.98, result


def test_detector_bears_soft_outlines_and_noise(sample: tuple[list[clips.Scene], list[NDArray[np.uint8]]]) -> None:
    rng = np.random.default_rng(4)
    soft = [gaussian(video.astype(float), (0.5, 1.5, 1.5, 0)) + rng.normal(0, 8, video.shape) for video in sample[1]]
    result = score([np.clip(video, 0, 255).astype(np.uint8) for video in soft], sample[0])
    assert min(result.values()) >= 0.95, result


def test_shuffled_scenes_score_at_chance(sample: tuple[list[clips.Scene], list[NDArray[np.uint8]]]) -> None:
    chosen, videos = sample
    shuffled = [chosen[i] for i in np.random.default_rng(5).permutation(len(chosen))]
    result = score(videos, shuffled)
    chance = {"foreground": 1 / 6, "background": 1 / 8, "direction": 1 / 7, "shape": 1 / 3}
    for name, expected in chance.items():
        assert abs(result[name] - expected) < 0.12, (name, result[name])


def test_outlines_of_drawn_clips_are_steady_and_shaken_ones_are_not() -> None:
    square = clips.Scene(shape="square", foreground="red", background="white", motion="left")
    circle = replace(square, shape="circle")
    steady, other = (clips.draw(scene, clips.place(scene, np.random.default_rng(3))) for scene in (square, circle))
    shaken = steady.copy()
    shaken[::2] = other[::2]  # the form changes from frame to frame
    assert steadiness(steady) > 0.95
    assert steadiness(shaken) < steadiness(steady) - 0.03


def test_detector_names_something_for_an_empty_video() -> None:
    empty = np.full((17, 64, 64, 3), 128, np.uint8)
    assert detect(empty).motion == "still"
    assert 0 <= steadiness(empty) <= 1


def test_detector_and_score_reject_what_they_cannot_read() -> None:
    with pytest.raises(ValueError, match="uint8"):
        detect(np.zeros((17, 64, 64, 3), np.float32))
    with pytest.raises(ValueError, match="0 videos for 1 scenes"):
        score([], [clips.scenes()[0]])
