"""Another build of torch for the tests: put this folder on PYTHONPATH, and "cuda=13.0" or "hip=7.1" into WAN_MLPERF_TEST_BUILD.

It only changes what torch says of itself. What a real CUDA build does without a GPU is seen where `make test` runs with one: the
ordinary wheel for Linux is one.
"""

import os

if build := os.environ.get("WAN_MLPERF_TEST_BUILD"):
    import torch

    named, _, number = build.partition("=")
    for name in ("cuda", "hip"):
        setattr(torch.version, name, number if name == named else None)
