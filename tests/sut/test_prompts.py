"""The benchmark's prompts, and prompts from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from sut.prompts import SHA256, benchmark_prompts, digest, prompt_set
from wan_mlperf.errors import BadInput


def test_the_benchmarks_prompts() -> None:
    prompts = benchmark_prompts()
    assert len(prompts) == 248
    assert digest(prompts) == SHA256 == "f45433f7d3f6ac055613bb36ea21f38120e3cb5873d91f7e621477761b7284e8"


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\n  a blue square  \n")
    assert prompt_set(file) == ["a red circle", "a blue square"]


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe\x00"])
def test_bad_files_are_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadInput, match=r"prompts '.*prompts.txt': .*allowed: a text file, one prompt a line"):
        prompt_set(file)
