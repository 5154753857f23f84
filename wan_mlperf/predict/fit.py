"""Fits the model's constants to measured runs, and checks how well it predicts runs that it has not seen.

Few rows are fitted (`fit` in the measurements file). Each constant also has a prior, what its kernel reaches alone or what is
usual, which a constant that no row decides keeps. Cross-validation predicts each row with constants whose fit has not seen the
row's submitter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from wan_mlperf.predict import rates
from wan_mlperf.predict.rates import Constants
from wan_mlperf.predict.rows import Decode, Row

ROW_SIGMA = 0.04  # how far two submitters' runs of the same thing differ: logarithm of their ratio
FITS_WELL = 0.15  # relative error; a row beyond it is an exception and must have a reason
COVERED = 0.8  # share of the rows within the band
# Constant -> (prior, its uncertainty as a logarithm). Sources: rates.json for kernels; GPU.md's figures for the fabric.
PRIORS: dict[str, tuple[float, float]] = {
    "gemm_bf16": (0.68, 0.10),
    "gemm_fp8": (0.55, 0.10),
    "gemm_fp4": (0.45, 0.10),
    "gemm_rtx": (0.85, 0.10),
    "flash3_sm90": (570.0, 0.20),
    "flash4_sm100": (1450.0, 0.20),
    "flash4_sm103": (1450.0, 0.15),
    "sdpa_sm100": (1200.0, 0.30),
    "nvte_fp8_sm100": (1600.0, 0.30),
    "nvte_fp8_sm103": (2000.0, 0.30),
    "trtllm_sage_sm100": (1600.0, 0.30),
    "aiter_asm": (1.0, 0.15),
    "power": (0.8, 0.15),
    "passes_compiled": (80.0, 0.25),
    "passes_eager": (225.0, 0.25),
    "switch_share": (0.40, 0.25),
    "mesh_share": (0.50, 0.25),
    "pcie_share": (0.20, 0.50),
    "collective_us": (60.0, 0.50),
    "vae_nvidia_tb": (22.0, 0.20),
    "vae_amd_tb": (35.0, 0.20),
    "vae_own_tb": (13.0, 0.20),
    "vae_own_wide": (1.25, 0.20),
    "decode_share": (0.30, 0.30),
    "host_s": (0.35, 0.30),
    "serve_s": (1.33, 0.30),
}
Measured = Row | Decode


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A row and its predicted seconds. `unseen`: by constants that never saw its submitter; None if those cannot price it."""

    row: Measured
    predicted: float
    unseen: float | None

    @property
    def error(self) -> float:
        """Relative error: predicted / measured - 1."""
        return self.predicted / self.row.seconds - 1

    @property
    def unseen_error(self) -> float | None:
        """The same for the cross-validated prediction."""
        return None if self.unseen is None else self.unseen / self.row.seconds - 1


def fit(rows: Iterable[Measured], priors: Mapping[str, tuple[float, float]] = PRIORS) -> Constants:
    """Return the constants that lie nearest to the fitted rows among `rows` and to the priors, in logarithms."""
    used = [row for row in rows if row.fitted]
    names = list(priors)
    centre = np.log([priors[name][0] for name in names])
    width = np.array([priors[name][1] for name in names])

    def residuals(offsets: Any) -> Any:
        values = dict(zip(names, np.exp(centre + offsets * width).tolist(), strict=True))
        errors = [math.log(row.total(values) / row.seconds) / ROW_SIGMA for row in used]
        return np.concatenate([errors, offsets])

    # A row far off must not drag the others along: beyond two sigma its pull stops growing.
    found = least_squares(residuals, np.zeros(len(names)), loss="soft_l1", f_scale=2.0)
    return {name: float(f"{value:.4g}") for name, value in zip(names, np.exp(centre + found.x * width), strict=True)}


def check(rows: Sequence[Measured], constants: Constants) -> list[Checked]:
    """Return every row with its prediction, also by constants that were fitted without its submitter."""
    without: dict[str, Constants] = {}
    submitters = {row.submitter for row in rows if row.fitted}
    for one in submitters:
        without[one] = fit(row for row in rows if row.submitter != one)
    checked = []
    for row in rows:
        unseen = None if undecided(row, rows) else row.total(without.get(row.submitter, constants))
        checked.append(Checked(row=row, predicted=row.total(constants), unseen=unseen))
    return checked


def undecided(row: Measured, rows: Sequence[Measured]) -> bool:
    """True if the row has a kernel whose rate only its submitter's rows give: nobody has published it alone."""
    others = [one for one in rows if one.fitted and one.submitter != row.submitter and isinstance(one, Row)]
    if not isinstance(row, Row):
        return False
    known = {kernel for one in others for kernel in one.attention if one.prices.gpu.arch == row.prices.gpu.arch}
    return any(kernel not in known and not rates.has_own_rate(kernel, row.prices.gpu) for kernel in row.attention)


def summary(checked: Sequence[Checked]) -> dict[str, float]:
    """Counts of rows; mean or median error of those not fitted, of MLPerf's, of unseen submitters; the share within FITS_WELL."""
    apart = [abs(one.error) for one in checked if not one.row.fitted and not one.row.exception]
    mlperf = [abs(one.error) for one in checked if one.row.is_mlperf and not one.row.fitted and not one.row.exception]
    every, strict = [abs(one.error) for one in checked], [abs(one.error) for one in checked if not one.row.fitted]
    unseen = [abs(one.unseen_error) for one in checked if one.unseen_error is not None and not one.row.exception]
    figures = {
        "rows": len(checked),
        "fitted": sum(one.row.fitted for one in checked),
        "exceptions": sum(bool(one.row.exception) for one in checked),
        "mean_not_fitted": float(np.mean(apart)) if apart else math.nan,
        "median_not_fitted": float(np.median(apart)) if apart else math.nan,
        "mean_mlperf_not_fitted": float(np.mean(mlperf)) if mlperf else math.nan,
        "mean_with_exceptions": float(np.mean(strict)) if strict else math.nan,
        "mean_unseen_submitter": float(np.mean(unseen)) if unseen else math.nan,
        "within_15_percent": float(np.mean([error <= FITS_WELL for error in every])) if every else math.nan,
    }
    return figures


def residuals(checked: Sequence[Checked], constants: Constants) -> tuple[float, float]:
    """(band of whole runs, band of a kernel measured only alone): relative errors that COVERED of the cases stay within."""
    errors = [abs(math.log1p(one.unseen_error)) for one in checked if one.unseen_error is not None and not one.row.exception]
    kernels = [abs(math.log(fitted / alone)) for fitted, alone in rates.fitted_and_alone(constants)]
    whole, kernel = (float(np.quantile(values, COVERED)) if values else math.nan for values in (errors, kernels))
    return round(math.expm1(whole), 3), round(math.expm1(kernel), 3)
