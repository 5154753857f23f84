"""The model against published runs: the bars it must pass, the exceptions it must name, and files that are not measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wan_mlperf.errors import BadInput
from wan_mlperf.predict import fit, fit_command, rates, rows
from wan_mlperf.predict.fit import Checked
from wan_mlperf.predict.rows import Row, Skipped


@pytest.fixture(scope="module")
def measured() -> tuple[list[rows.Row | rows.Decode], list[Skipped]]:
    return rows.read()


@pytest.fixture(scope="module")
def checked(measured: tuple[list[rows.Row | rows.Decode], list[Skipped]]) -> list[Checked]:
    found, _ = measured
    return fit.check(found, fit.fit(found))


def test_the_model_holds_published_runs(checked: list[Checked]) -> None:
    figures = fit.summary(checked)
    assert figures["rows"] >= 95 and figures["fitted"] <= figures["rows"] / 4
    assert figures["mean_not_fitted"] <= 0.08
    assert figures["mean_mlperf_not_fitted"] <= 0.07
    assert figures["mean_unseen_submitter"] <= 0.08
    assert figures["within_15_percent"] >= 0.85


def test_every_exception_has_its_reason(checked: list[Checked], measured: tuple[list[Any], list[Skipped]]) -> None:
    off = [one.row.id for one in checked if abs(one.error) > fit.FITS_WELL and len(one.row.exception) < 15]
    assert off == []
    assert [one.id for one in measured[1] if len(one.reason) < 15] == []


def test_the_constants_that_ship_are_those_of_the_fit(measured: tuple[list[rows.Row | rows.Decode], list[Skipped]]) -> None:
    found, _ = measured
    fitted = fit.fit(found)
    assert fitted == pytest.approx(rates.constants(), rel=2e-3)
    whole, kernel = fit.residuals(fit.check(found, fitted), fitted)
    assert (whole, kernel) == pytest.approx(rates.residuals(), rel=0.05)
    assert set(fitted) == set(fit.PRIORS)


def test_no_figure_of_mlperf_stands_twice() -> None:
    entries = json.loads(rows.FILE.read_text())["end_to_end"]
    assert all(("seconds" in one) != ("published" in one) for one in entries)
    assert len({one["id"] for one in entries}) == len(entries)


def test_a_row_knows_what_a_cross_validation_has_not_seen(checked: list[Checked]) -> None:
    by_id = {one.row.id: one for one in checked}
    assert by_id["v60-B200-Off"].unseen is None  # only NVIDIA has run that kernel on that card
    oracle = by_id["v61-MI355X-Oracle-SS"]
    assert oracle.unseen == oracle.predicted  # nothing of Oracle's is fitted
    assert by_id["v61-MI355X-SS"].unseen != by_id["v61-MI355X-SS"].predicted


def row(**changes: Any) -> dict[str, Any]:
    values = {
        "id": "mine",
        "hardware": "H100",
        "gpus": 8,
        "attention": "fa3_bf16",
        "gemm": "bf16",
        "mesh": "ulysses8",
        "steps": 40,
        "size": "480p81",
        "seconds": 51.5,
    }
    return {**values, **changes}


def test_words_of_publications_are_understood() -> None:
    one = rows.row_of(row(attention="aiter_mxfp4 x32 calls, aiter_fp8 x8 calls", hardware="MI355X", mesh="cfg2ul4"), {})
    assert one.attention == {"AITER_ASM_MXFP4": 0.8, "AITER_FP8_V3": 0.2}
    assert (one.prices.shape.cfg, one.prices.shape.ulysses) == (2, 4)
    official = rows.row_of(row(framework="Wan official"), {"Wan official": {"compile": False, "decode_ranks": 1}})
    assert not official.prices.ways.compiled and official.prices.ways.decode_ranks == 1
    rack = rows.row_of(row(hardware="GB200", attention="fa4_bf16", gpus=72, mesh="cfg2ul4attn2d3x3"), {})
    assert rack.prices.ways.attn2d == (3, 3) and rack.prices.ranks == 36


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hardware": "?"}, "is not known"),
        ({"attention": "flash_9"}, "is not a kernel with a rate"),
        ({"attention": "fa4_bf16"}, "nobody has published its rate on H100"),
        ({"gemm": "bf16/fp8"}, "is not one format"),
        ({"mesh": "cfg2ul2"}, "needs 4 GPUs"),
        ({"mesh": "cfg8"}, "CFG 8 is not allowed; allowed: 1 or 2"),
        ({"mesh": "ulysses7", "gpus": 7}, "40 heads are not divisible by the Ulysses degree 7; allowed: 1, 2, 4, 5"),
        ({"mesh": "?", "gpus": 7}, "40 heads are not divisible by the Ulysses degree 7"),
        ({"mesh": "ulysses4tp2ring2"}, "is not known"),
        ({"mesh": "ulysses2ul8"}, "is not known; allowed: such as 1, dp, ulysses8, cfg2ul4, cfg2ring4, each part once"),
        ({"mesh": "ulysses" + "9" * 300}, "is not known"),
        ({"attention": "fa3_bf16 x0 calls"}, "is not understood"),
        ({"attention": f"fa3_bf16 x{'1' * 400} calls"}, "is not a kernel with a rate"),
        ({"attention": "fa3_bf16 x8 calls, sage2"}, "is not understood"),
        ({"gemm": "nvfp4"}, "has no published rate on H100"),
        ({"published": {"scenario": "ofline"}}, "did you mean 'offline'?"),
        ({"size": "large"}, "is not known"),
        ({"size": "0x0x81"}, "height: 0 is not allowed"),
    ],
)
def test_a_row_that_cannot_be_priced_says_why(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    file = tmp_path / "mine.json"
    entry = row(**changes)
    if "published" in changes:
        del entry["seconds"]
    file.write_text(json.dumps({"end_to_end": [entry, row(id="good")]}))
    found, skipped = rows.read(file)
    assert [one.id for one in found] == ["good"]
    assert [one.id for one in skipped] == ["mine"] and reason in skipped[0].reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read"),
        ("[1]", "not a file of measurements"),
        ('{"end_to_end": 3}', "end_to_end is not a list of rows"),
        ('{"end_to_end": [{"id": "a"}]}', "a: lacks hardware, gpus"),
        ("\x00\x01", "cannot be read"),
        ("", "cannot be read"),
        ("null", "not a file of measurements"),
        ('{"end_to_end": [[]]}', "end_to_end is not a list of rows"),
        ('{"end_to_end": [], "decode": "x"}', "decode is not a list of rows"),
        ('{"end_to_end": [], "frameworks": []}', "frameworks is not a mapping"),
        ('{"end_to_end": [], "decode": [{"id": "a"}]}', "decode a: lacks hardware, ranks, seconds"),
        ("[" * 5000, "cannot be read"),
        (json.dumps({"end_to_end": [{"id": "a"}]}).replace("{", '{"id": "b", '), "key 'id' is given twice"),
        (
            '{"end_to_end": [], "frameworks": {"me": {"decode_ranks": "two"}}}',
            "framework 'me': decode_ranks: 'two' is not allowed",
        ),
        ('{"end_to_end": [], "frameworks": {"me": {"decode_ranks": [1]}}}', "decode_ranks"),
        ('{"end_to_end": [], "frameworks": {"me": {"decode_ranks": -3}}}', "decode_ranks: '-3' is not allowed"),
        ('{"end_to_end": [], "frameworks": {"me": {"compile": "no"}}}', "compile: 'no' is not allowed; allowed: true or false"),
    ],
)
def test_another_file_is_one_line(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(BadInput, match=reason) as caught:
        rows.read(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="cannot be read"):
        rows.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        *[("seconds", value, "a number, 0.001 to 1000000") for value in (0, -1, 1e-9, 10**400, float("inf"), True, None, [1])],
        *[("gpus", value, "a whole number, 1 to 4096") for value in (0, -8, 8.5, "eight", True)],
        *[("steps", value, "a whole number, 1 to 1000") for value in (0, -4, None)],
        *[
            ("attention", value, "a mapping of names to shares")
            for value in ({}, ["FLASH_3"], {"FLASH_3": -1}, {"SAGE": 10**400})
        ],
        ("fit", "yes", "true or false"),
        ("hardware", ["H100"], "text"),
        ("decode_ranks", 0, "a whole number"),
        ("published", "v6.0", "a mapping"),
        ("only", "denoice", "denoise"),
        ("only", [], "denoise"),
        ("mesh", "ulysses" + "9" * 5000, "one line of at most 500 characters"),
        ("exception", "a\nb", "one line"),
    ],
)
def test_a_figure_that_no_run_has_is_one_line(tmp_path: Path, key: str, value: Any, allowed: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"end_to_end": [row(**{key: value})]}))
    with pytest.raises(BadInput) as caught:
        rows.read(file)
    assert f"mine: {key}: " in str(caught.value) and allowed in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"hardware": "?"}, "is not known"), ({"size": "large"}, "is not known"), ({"size": "9" * 400 + "x16x81"}, "width")],
)
def test_a_decode_that_cannot_be_priced_says_why(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    decode = {"id": "mine", "hardware": "H20", "ranks": 1, "seconds": 26.0, "source": "here", "submitter": "me", **changes}
    file = tmp_path / "mine.json"
    file.write_text(
        json.dumps({"end_to_end": [], "decode": [decode, {**decode, "hardware": "H20", "size": "720p81", "id": "good"}]})
    )
    found, skipped = rows.read(file)
    assert [one.id for one in found] == ["good"]
    assert [one.id for one in skipped] == ["mine"] and reason in skipped[0].reason
    file.write_text(json.dumps({"end_to_end": [], "decode": [{**decode, "seconds": 10**400}]}))
    with pytest.raises(BadInput, match="decode mine: seconds: "):
        rows.read(file)


def test_a_file_without_end_is_refused() -> None:
    for read in (rows.read, rates.read_constants):
        with pytest.raises(BadInput, match=r"'/dev/zero': cannot be read \(more than 64 MiB\)"):
            read(Path("/dev/zero"))


def test_two_names_of_a_kernel_are_added_up() -> None:
    assert rows.attention_of("fa4_bf16 x8 calls, dense_bf16 x32 calls") == {"FLASH_4": 1.0}
    assert rows.attention_of({"fa3_bf16": 3, "FLASH_3": 1, "SAGE": 4}) == {"FLASH_3": 0.5, "SAGE": 0.5}


@pytest.mark.parametrize("value", [float("nan"), -1.0, 0, 1e300, 10**400, True, "1.5", None])
def test_constants_that_are_none_are_one_line(tmp_path: Path, value: Any) -> None:
    file = tmp_path / "constants.json"
    file.write_text(json.dumps({"values": {**rates.constants(), "power": value}}))
    with pytest.raises(BadInput, match="not a file of constants") as caught:
        rates.read_constants(file)
    assert "\n" not in str(caught.value)


def test_constants_of_an_older_version_are_called_so(tmp_path: Path) -> None:
    file = tmp_path / "constants.json"
    file.write_text(json.dumps({"values": {name: value for name, value in rates.constants().items() if name != "power"}}))
    with pytest.raises(BadInput, match="lacks power, as of an older version; allowed: one that"):
        rates.read_constants(file)


def test_a_users_row_has_the_habits_of_its_framework(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"end_to_end": [row(framework="Wan official", note="any other key is a note")]}))
    ((one,), _) = rows.read(file)
    assert isinstance(one, Row) and not one.prices.ways.compiled and one.prices.ways.decode_ranks == 1


def test_a_users_rows_are_fitted_if_they_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, constants, table = tmp_path / "mine.json", tmp_path / "constants.json", tmp_path / "table.json"
    slower = [row(id=f"mine-{gpus}", gpus=gpus, mesh=f"ulysses{gpus}", seconds=480 / gpus, fit=True) for gpus in (1, 2, 4)]
    mine.write_text(json.dumps({"end_to_end": slower}))
    arguments = ["--measurements", str(mine), "--write", str(constants), "--json", str(table)]
    assert fit_command.main(arguments) == 0
    assert "mine-4 *" in capsys.readouterr().out
    fitted = rates.read_constants(constants)
    assert fitted["flash3_sm90"] < 0.95 * rates.constants()["flash3_sm90"] or fitted["gemm_bf16"] < rates.constants()["gemm_bf16"]
    written = json.loads(table.read_text())
    assert written["summary"]["rows"] == len(written["rows"]) and written["not_predicted"]
    with pytest.raises(BadInput, match="not a file of constants"):
        rates.read_constants(table)


def test_a_kernel_known_alone_gives_a_wider_band() -> None:
    whole, kernel = rates.residuals()
    assert 0.04 < whole < 0.15 < kernel
    seen = rows.row_of(row(), {})
    alone = rows.row_of(row(attention="sage2"), {})
    assert isinstance(seen, Row) and isinstance(alone, Row)

    def width(one: Row) -> float:
        total = one.predict(rates.constants())
        low, high = one.prices.predict(total, one.attention, [one.gemm]).band
        return high / low

    assert width(alone) > 1.05 * width(seen)
