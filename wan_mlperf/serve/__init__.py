"""A server that keeps the model loaded: `python -m wan_mlperf.serve`."""
