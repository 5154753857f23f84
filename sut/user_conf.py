"""LoadGen's user.conf as people write it: read strictly, in any encoding, and handed to LoadGen as it understands it.

LoadGen itself silently skips what it cannot read: a byte order mark costs the first setting, a carriage return a value. Lines
for another model are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from wan_mlperf.errors import BadInput, did_you_mean
from wan_mlperf.inputs import text

MODEL = "wan-2.2-t2v-a14b"
SCENARIOS = ("SingleStream", "MultiStream", "Server", "Offline", "*")  # LoadGen's
# Keys that LoadGen reads from a user.conf; it stops the process at one it does not know.
KEYS = (
    "accuracy_sample_count_override",
    "coalesce_queries",
    "max_async_queries",
    "max_duration",
    "max_query_count",
    "min_duration",
    "min_query_count",
    "mode",
    "performance_issue_same",
    "performance_issue_same_index",
    "performance_issue_unique",
    "performance_sample_count_override",
    "print_timestamps",
    "qsl_rng_seed",
    "sample_concatenate_permutation",
    "sample_index_rng_seed",
    "samples_per_query",
    "schedule_rng_seed",
    "target_latency",
    "target_latency_percentile",
    "target_qps",
)
FRACTIONS = ("target_latency", "target_latency_percentile", "target_qps")


@dataclass(frozen=True, kw_only=True)
class UserConf:
    """`values` (by "scenario.key") and `lines` are those for this model; `others`: line number -> the other model it is for."""

    values: Mapping[str, float]
    lines: tuple[str, ...]
    others: Mapping[int, str]
    name: str

    def note(self) -> str | None:
        """Return what to say about lines for other models, or None if there are none."""
        if not self.others:
            return None
        models = sorted(set(self.others.values()))
        near = next((hint for model in models if (hint := did_you_mean(model, [MODEL]))), "")
        where = f"line{'s' * (len(self.others) > 1)} {', '.join(map(str, list(self.others)[:5]))}"
        more = f" and {len(self.others) - 5} more" if len(self.others) > 5 else ""
        names = ", ".join(map(repr, models[:3]))
        return f"user.conf {self.name!r}: {where}{more} for {names}, not for {MODEL}, ignored{near}"


def read(file: Path) -> UserConf:
    """Read a user.conf strictly. Raises BadInput."""
    content = text.read_text(file, what="user.conf", allowed="a LoadGen user.conf")
    values: dict[str, float] = {}
    kept: dict[str, tuple[int, str]] = {}
    others: dict[int, str] = {}
    for number, line in enumerate(text.lines(content), start=1):
        setting = line.split("#", 1)[0].strip()
        if not setting:
            continue
        where = f"user.conf {file.name} line {number}"
        key, equals, value = (part.strip() for part in setting.partition("="))
        parts = key.rsplit(".", 2)
        if not equals or len(parts) != 3 or not all(parts):
            raise BadInput(f"{where}: {setting!r} is not a setting; allowed: model.scenario.key = value")
        model, scenario, name = parts
        if model not in ("*", MODEL):
            others[number] = model
            continue
        if scenario not in SCENARIOS:
            raise BadInput(
                f"{where}: scenario {scenario!r} is not known{did_you_mean(scenario, SCENARIOS)}; allowed: {', '.join(SCENARIOS)}"
            )
        if name not in KEYS:
            raise BadInput(f"{where}: key {name!r} is not known{did_you_mean(name, KEYS)}; allowed: {', '.join(KEYS)}")
        if key in kept:
            raise BadInput(f"user.conf {file.name}: {key!r} is given twice, in line {kept[key][0]} and in line {number}")
        values[f"{scenario}.{name}"] = _number(where, name, value)
        kept[key] = number, f"{key} = {value}"
    return UserConf(values=values, lines=tuple(line for _, line in kept.values()), others=others, name=file.name)


def _number(where: str, name: str, value: str) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]*)?", value):
        raise BadInput(f"{where}: {name} is {value!r}; allowed: a number from 0")
    if float(value) >= 2**63:
        raise BadInput(f"{where}: {name} is {value!r}; allowed: a number below 2^63")
    if name not in FRACTIONS and float(value) != int(float(value)):
        raise BadInput(f"{where}: {name} is {value!r}; allowed: a whole number")
    return float(value)
