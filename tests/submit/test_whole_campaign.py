"""The whole way, as a user would go: a checkout, `submit run --dry-run` stopped and started again, `submit pack`, the tree."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import run_folders
from tests.conftest import ROOT, SMALL
from tests.submit import tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This project's files as one commit, because the work tree that the tests run in may have changes."""
    folder = tmp_path_factory.mktemp("checkout")
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    conf = folder / "configs" / "mlperf" / "tiny.conf"
    # More queries than the audit's, so that the reference's estimate leaves out its slowest few, which a busy machine makes.
    conf.write_text(conf.read_text() + "*.SingleStream.min_query_count = 120\n")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    return folder


def command(checkout: Path, words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    return [sys.executable, "-m", "wan_mlperf.submit", *words], {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
    }


def submit(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    line, variables = command(checkout, words)
    return subprocess.run(line, cwd=checkout, env=variables, capture_output=True, text=True, timeout=1800, check=False)


def finished(campaign: Path) -> list[str]:
    """The valid runs; one that was stopped has no result.json, or one that says so."""
    files = [file for file in campaign.glob("2*/result.json") if json.loads(file.read_text())["valid"]]
    return sorted(file.parent.name for file in files)


def test_from_nothing_to_the_tree(checkout: Path, model: Path, tmp_path: Path) -> None:
    campaign = tmp_path / "campaign"
    words = [
        "run",
        "--campaign",
        str(campaign),
        "--recipe",
        "tiny",
        "--dry-run",
        "--model",
        str(model),
        "--set=mesh.ranks=1",
        *SMALL,
    ]

    line, variables = command(checkout, words)
    with subprocess.Popen(line, cwd=checkout, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not list(campaign.glob("*-singlestream-accuracy/videos/*.mp4")):
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGINT
    first = finished(campaign)
    assert [name.split("-", 2)[2] for name in first] == ["singlestream-performance"]

    # On a busy machine TEST04 may fail for a hiccup of the performance run; what a user does then is to measure again.
    again: list[str] = []
    for _attempt in range(5):
        done = submit(checkout, *words, *again)
        assert first[0] in finished(campaign) or again
        if done.returncode == 0:
            break
        assert done.returncode == 1 and "TEST FAIL" in done.stdout and "looks like" in done.stdout, done.stdout + done.stderr
        failed = [one for one in ("singlestream", "offline") if f"{one} test04" in done.stdout.splitlines()[-1]]
        again = [word for scenario in failed for word in ("--again", f"{scenario}-performance")]
    assert "everything is done" in done.stdout
    kinds = [name.split("-", 2)[2] for name in finished(campaign)]
    for scenario in ("singlestream", "offline"):
        assert kinds.count(f"{scenario}-performance") == kinds.count(f"{scenario}-accuracy") == 1
    before = finished(campaign)
    assert submit(checkout, *words).returncode == 0 and finished(campaign) == before
    for run in campaign.glob("2*-accuracy"):
        if run.name not in before:
            shutil.rmtree(run)  # the one that was stopped: tree.check looks for the other

    system = tmp_path / "laptop.json"
    assert submit(checkout, "system", str(campaign), "-o", str(system)).returncode == 0
    assert json.loads(system.read_text())["accelerators_per_node"]
    pack = ["pack", str(campaign), "--submitter", "ORG", "--division", "open", "--system", str(system)]
    refused = submit(checkout, *pack, "-o", str(tmp_path / "refused"))
    assert refused.returncode == 2 and "it is a dry run's" in refused.stderr
    packed = submit(checkout, *pack, "-o", str(tmp_path / "tree"), "--dry-run")
    assert packed.returncode == 0, packed.stderr
    root = tmp_path / "tree" / "open" / "ORG"
    tree.check(root, campaign, system="laptop", scored=False)
    code = root / "src" / "wan-2.2-t2v-a14b" / "wan_mlperf"
    assert (code / "wan_mlperf" / "run.py").read_bytes() == (checkout / "wan_mlperf" / "run.py").read_bytes()
    assert not (code / ".git").exists()
    assert all((campaign / name / "report.html").is_file() for name in before)

    # Closed, as with --full-length and a score: a stand-in for VBench's, and logs that say 600 s, as no test can take an hour.
    for name in before:
        run_folders.lengthen(campaign / name)
        if name.endswith("-accuracy"):
            run_folders.score(campaign / name, 70.1, ["the videos are of another workload than the benchmark's"])
    person = {field: value or "1" for field, value in json.loads(system.read_text()).items()}
    system.write_text(json.dumps({**person, "status": "rdi", "system_type": "datacenter"}))
    closed = [word if word != "open" else "closed" for word in pack]
    packed = submit(checkout, *closed, "-o", str(tmp_path / "closed"), "--dry-run")
    assert packed.returncode == 0, packed.stderr
    assert "MLCommons' checker will refuse" not in packed.stdout
    asked = [line for line in packed.stdout.splitlines() if "the rules ask for more: " in line]
    for what in ("its workload is not the benchmark's", "embedded is not the benchmark's model", "fixed_latent.pt", "ECC"):
        assert any(what in line for line in asked), packed.stdout
    tree.check(tmp_path / "closed" / "closed" / "ORG", campaign, system="laptop", scored=True)
