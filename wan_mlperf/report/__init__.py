"""One HTML page per run, or the comparison of two: `python -m wan_mlperf.report`."""
