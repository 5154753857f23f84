"""MLCommons Inference v6.0, wan-2.2-t2v-a14b: what was published, from the results' own logs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Published:
    """One system. SingleStream's score is `estimate_s`, the early-stopping estimate; `vbench` is SingleStream / Offline."""

    system: str
    p90_s: float
    estimate_s: float
    samples_per_second: float | None
    vbench: str


V6_0 = (
    Published(system="AMD, 8x MI355X (open)", p90_s=27.30, estimate_s=27.38, samples_per_second=None, vbench="69.98"),
    Published(system="NVIDIA, 8x B200", p90_s=25.21, estimate_s=25.46, samples_per_second=0.0464, vbench="69.89 / 69.81"),
    Published(system="NVIDIA, 8x B300", p90_s=23.53, estimate_s=23.78, samples_per_second=0.0585, vbench="70.80 / 70.35"),
    Published(system="GigaComputing, 8x B300", p90_s=20.58, estimate_s=20.90, samples_per_second=0.0583, vbench="70.20 / 70.27"),
    Published(system="Cisco, 8x B300", p90_s=21.12, estimate_s=21.43, samples_per_second=0.0573, vbench="70.30 / 70.16"),
    Published(system="NVIDIA, 4x GB300", p90_s=30.64, estimate_s=30.91, samples_per_second=0.0366, vbench="70.25 / 70.09"),
    Published(system="NVIDIA, 4x GB200", p90_s=39.89, estimate_s=40.24, samples_per_second=0.0270, vbench="70.65 / 69.89"),
    Published(system="Krai, 8x H200", p90_s=57.17, estimate_s=57.40, samples_per_second=0.0181, vbench="69.89"),
    Published(system="Krai, 8x H200 (open)", p90_s=43.66, estimate_s=43.94, samples_per_second=0.0241, vbench="69.79"),
)
