"""`make test-gpu`: the seven parts of tables.py at full size. Each prints its table, whether or not another one failed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.gpu.tables import PARTS, Sizes
from wan_mlperf.kernels.device import gpu_count, probe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpu_count() == 0, reason="this host has no GPU")]


@pytest.mark.parametrize("part", PARTS)
def test_part(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = (tmp_path,) if part == "whole" else ()
    with torch.inference_mode(part != "experts"):
        rows = PARTS[part](probe(), Sizes(), *extra)
    with capsys.disabled():
        Console(width=150).print(rows.table)
    torch.cuda.empty_cache()
    assert rows.wrong == []
