"""MLPerf's accuracy: scores a run's videos in six dimensions of VBench. `python -m wan_mlperf.vbench`."""
