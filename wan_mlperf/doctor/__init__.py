"""Is this host set up for the run? `python -m wan_mlperf.doctor`."""
