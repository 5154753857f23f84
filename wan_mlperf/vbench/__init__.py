"""MLPerf's accuracy: VBench's six dimensions over a run's videos: `python -m wan_mlperf.vbench`."""
