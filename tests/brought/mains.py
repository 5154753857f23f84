"""Every command's main function by the name of its room."""

from __future__ import annotations

from typing import Any

from wan_mlperf import run
from wan_mlperf.bench import __main__ as bench
from wan_mlperf.doctor import __main__ as doctor
from wan_mlperf.generate import __main__ as generate
from wan_mlperf.predict import __main__ as predict
from wan_mlperf.report import __main__ as report
from wan_mlperf.search import __main__ as search
from wan_mlperf.serve import __main__ as serve
from wan_mlperf.submit import __main__ as submit
from wan_mlperf.vbench import __main__ as vbench

MAINS: dict[str, Any] = {
    "run": run.main,
    "generate": generate.main,
    "report": report.main,
    "vbench": vbench.main,
    "submit": submit.main,
    "doctor": doctor.main,
    "predict": predict.main,
    "search": search.main,
    "bench": bench.main,
    "serve": serve.main,
}
