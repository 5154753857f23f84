"""A video, or a list of them, from prompts: `python -m wan_mlperf.generate`."""
