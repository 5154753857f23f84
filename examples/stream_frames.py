"""Use frames while the rest of the video is still being decoded: `python examples/stream_frames.py "a red circle moving left"`.

On several ranks: `torchrun --nproc-per-node 2 examples/stream_frames.py "a red circle moving left"`.
"""

from __future__ import annotations

import sys
import time

from wan_mlperf import Pipeline, load_recipe


def main(pipeline: Pipeline, prompt: str) -> int:
    """Print when each chunk of frames arrives; return how many frames came. Every rank calls this; only the first gets them."""
    started, frames = time.perf_counter(), 0
    for chunk in pipeline.stream(prompt):  # uint8 [n, height, width, 3]
        frames += len(chunk)
        print(f"{time.perf_counter() - started:6.3f} s: {len(chunk):2d} frames, {frames} of {pipeline.workload.frames}")
    return frames


if __name__ == "__main__":
    engine = Pipeline.load(load_recipe("tiny"))
    engine.warm_up(1)  # otherwise the first video also pays for one-time set-up
    main(engine, sys.argv[1] if len(sys.argv) > 1 else "a red circle moving left on a blue background")
    engine.mesh.close()
