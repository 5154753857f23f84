"""The schedule with the least error for a given time, or the least time for a given error: `python -m wan_mlperf.search`."""
