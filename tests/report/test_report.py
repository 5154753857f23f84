"""report.html: what it shows, what it leaves out, and that it needs no other file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sut.prompts import benchmark_prompts
from tests.run_folders import RECIPE, audit_outcome, result, rewrite, videos, write_summary
from wan_mlperf.errors import BadInput
from wan_mlperf.pages.charts import MOST_DOTS, over_run
from wan_mlperf.published import published
from wan_mlperf.report import __main__ as report
from wan_mlperf.report import run_folder
from wan_mlperf.vbench.score import FLOOR


def write(folder: Path, scenario: str = "singlestream", mode: str = "performance", **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "result.json").write_text(json.dumps(result(scenario, mode, **changes)))
    return folder


def page(folder: Path) -> str:
    """Write the report and return its text, white space collapsed."""
    run_folder.write(folder)
    return " ".join((folder / "report.html").read_text().split())


def assert_alone(text: str) -> None:
    """Assert that a browser would fetch nothing: all addresses are data URLs."""
    addresses = re.findall(r"""(?:src|href|action|srcset|poster)\s*=\s*["']?([^"'\s>]+)""", text)
    assert [one[:60] for one in addresses if not one.startswith("data:")] == []
    assert "@import" not in text and "url(" not in text and "<script" not in text and "//" not in re.sub(r"data:[^\"]*", "", text)


def test_a_performance_run(tmp_path: Path) -> None:
    text = page(write(tmp_path / "20260102-030405-singlestream-performance"))
    assert_alone(text)
    assert "SingleStream, performance" in text and ">VALID<" in text and "02 January 2026, 03:04" in text
    assert "<b>3.00 s</b>" in text and "<b>2.90 s</b>" in text  # the score and the percentile
    assert text.count('class="dot s0"') == 64 and text.count('<rect class="s0"') >= 8
    assert text.count('<tr><td class="number">') >= 20  # the step plan
    assert "Not the benchmark's workload: 17 frames of 64 \N{MULTIPLICATION SIGN} 64 in 20 steps" in text
    assert "published" not in text  # nothing to put beside it
    assert "2.13.0" in text and "c0ffee" in text and "high_noise: 40 mxfp4 linear layers" in text


def test_the_benchmarks_workload_is_put_beside_the_published_results(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"workload_is_mlperf": True, "latency_early_stopping_s": 13.69, "latency_mean_s": 8.99}
    text = page(write(tmp_path / "a", **changes))
    assert "Not the benchmark's workload" not in text
    assert re.search(r"AMD, 8x MI355X \(open\).{0,400}?2\.00 times as fast", text)  # 27.38 s
    assert re.search(r"AMD, 8x MI355X<.{0,100}?v6\.1.{0,300}?1\.18 times as fast", text)  # 16.12 s
    assert re.search(r"NVIDIA, 8x B300 \*.{0,400}?2\.00 times as fast", text)  # a mean, 17.98 s, beside our mean
    text = page(write(tmp_path / "b", scenario="offline", workload_is_mlperf=True, samples_per_second=0.0928))
    assert re.search(r"NVIDIA, 8x B200.{0,400}?2\.00 times as fast", text)
    assert re.search(r"NVIDIA, 72x GB300 \*.{0,400}?0\.14 times as fast", text)
    assert "<b>0.0928</b>" in text


def test_the_published_results_are_whole() -> None:
    rows = published()
    assert {row.round for row in rows} == {"v6.0", "v6.1"} and rows[0].round == "v6.1"
    assert len({(row.round, row.system) for row in rows}) == len(rows)
    for row in rows:
        assert row.source and row.harness in ("loadgen", "endpoints") and row.division in ("closed", "open")
        if row.p90_s and row.harness == "loadgen":  # the estimate is never below the percentile, nor far from it
            assert row.p90_s <= row.score_s <= 1.02 * row.p90_s
        # Every valid entry reaches the floor of accuracy.
        assert all(score >= FLOOR for score in (row.vbench_singlestream, row.vbench_offline) if score is not None)


@pytest.mark.parametrize(
    ("changes", "word", "reason"),
    [
        ({"valid": False, "invalid_reason": "Need to process more queries"}, "INVALID", "Need to process more queries"),
        ({"compliance": audit_outcome("20260101")}, "TEST PASS", "one sample again and again"),
        (
            {"compliance": audit_outcome("20260101", "TEST FAIL: 40.0% faster")},
            "TEST FAIL",
            "40.0% faster",
        ),
    ],
)
def test_the_verdict(tmp_path: Path, changes: dict[str, Any], word: str, reason: str) -> None:
    text = page(write(tmp_path / "run", **changes))
    assert f">{word}</span>" in text and reason in text


def test_an_accuracy_run_shows_a_few_videos_and_prompts_cannot_become_markup(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", mode="accuracy")
    prompts = ["<script>alert(1)</script> & 'a' \"b\"", *benchmark_prompts()[:9]]
    videos(folder, prompts)
    (folder / "videos" / "3.mp4").unlink()
    write_summary(folder, 70.1234)
    text = page(folder)
    assert_alone(text.replace("&lt;script", ""))
    assert text.count("data:image/png;base64,") == 16
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<b>70.12</b>" in text


def test_a_page_that_cannot_be_made_costs_the_run_nothing(tmp_path: Path, capsys: Any) -> None:
    folder = write(tmp_path / "run", mode="accuracy")  # no prompts.json, no videos
    run_folder.write(folder)
    assert "no report.html: " in capsys.readouterr().err
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        (
            "videos/0.mp4",
            b"not a video",
            "0.mp4.: cannot be decoded as a video .*; allowed: the videos of a finished accuracy run",
        ),
        ("videos/0.mp4", b"", "0.mp4.: cannot be decoded as a video"),
        ("prompts.json", b"[{", "prompts.json.: not a list of videos .*; allowed: an accuracy run's"),
        ("prompts.json", b'[{"prompt": "a cat"}]', "prompts.json.: not a list of videos"),
        ("prompts.json", b'{"0.mp4": "a cat"}', "prompts.json.: not a list of videos"),
    ],
)
def test_a_damaged_accuracy_run_is_one_line(tmp_path: Path, capsys: Any, file: str, content: bytes, says: str) -> None:
    folder = write(tmp_path / "run", mode="accuracy")
    videos(folder, benchmark_prompts()[:4])
    (folder / file).write_bytes(content)
    with pytest.raises(BadInput, match=says):
        report.main([str(folder)])
    run_folder.write(folder)
    assert "no report.html: " in capsys.readouterr().err and not (folder / "report.html").exists()


def test_older_results_have_no_times_per_sample(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    values = json.loads((folder / "result.json").read_text())
    for key in ("sample_seconds", "plan", "system", "latency_percentiles_s"):
        del values[key]
    (folder / "result.json").write_text(json.dumps(values))
    text = page(folder)
    assert "Time per sample" not in text and "Step plan" not in text and "Where the time goes" in text


def test_a_long_run_does_not_draw_every_dot() -> None:
    drawn = over_run([[1.0 + index % 7 for index in range(100_000)]]).svg.count('class="dot')
    assert MOST_DOTS // 2 < drawn <= MOST_DOTS


def test_two_runs_compare(tmp_path: Path, capsys: Any) -> None:
    first = write(tmp_path / "a")
    second = write(tmp_path / "b", latency_early_stopping_s=2.4, sample_seconds=[1.0] * 70, versions={"torch": "2.14.0"})
    (second / "recipe.yaml").write_text(RECIPE.replace("steps: 20", "steps: 12"))
    assert report.main([str(first), str(second)]) == 0
    target = second / "compare.html"
    assert capsys.readouterr().out.strip() == str(target)
    text = " ".join(target.read_text().split())
    assert_alone(text)
    assert "early-stopping estimate" in text and "-20.0 %" in text
    assert "workload.steps" in text and "2.14.0" in text and "mesh.ranks" not in text
    assert text.count('class="dot s0"') == 64 and text.count('class="dot s1"') == 70
    same = tmp_path / "same.html"
    assert report.main([str(first), str(first), "-o", str(same)]) == 0
    assert same.read_text().count("The same in both.") == 2


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot be read .* allowed: a finished run"):
        report.main([str(tmp_path / "none")])
    folder = write(tmp_path / "run")
    rewrite(folder / "result.json")
    with pytest.raises(BadInput, match="cannot be written"):
        report.main([str(folder), "-o", str(tmp_path / "no" / "such" / "page.html")])
    (folder / "result.json").write_text("[]")
    with pytest.raises(BadInput, match="has no version"):
        report.main([str(folder)])


def test_a_run_that_was_stopped(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "valid": False,
        "invalid_reason": "sample 3 failed 2 times",
        "latency_p90_s": None,
        "latency_mean_s": None,
    }
    changes |= {"latency_early_stopping_s": None, "latency_percentiles_s": {}}
    text = page(write(tmp_path / "run", **changes))
    assert ">INVALID<" in text and "sample 3 failed 2 times" in text and "mean time per video" in text
    assert 'class="mark"' not in text and text.count('class="dot s0"') == 64
