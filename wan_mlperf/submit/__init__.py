"""From a campaign of runs to the folder that MLCommons accepts: `python -m wan_mlperf.submit`."""
