"""What people could mean, and the ways in which they write it, for hypothesis: each strategy gives a text and what is meant."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

REFUSED = object()  # in the place of a meaning: this must be refused
LINE_ENDS = ("\n", "\r\n")
# Characters at which something else than our reader would split, cut or turn a text.
TRAPS = "\u2028\u2029\x0b\x0c\x1c\x85\u00a0\u3000\ufeff\u200b #:[]{}&*!|>'\"%@`-?,~=\\/.$()<>;^0123é圆🎬\U0001d49c"

characters = st.sampled_from(TRAPS) | st.characters(codec="utf-8", exclude_characters="\0\r\n")
texts = st.one_of(
    st.text(characters, max_size=30),
    st.sampled_from(
        ["a red circle", "low quality # watermark", "blurry: bad hands", "no", "null", "~", "2000", "1e3", "[a]", "- a"]
    ),
)
names = st.text(
    st.sampled_from(TRAPS.replace("/", "").replace("\x85", "")) | st.characters(codec="utf-8", exclude_characters="\0/")
)
names = names.filter(lambda one: one not in ("", ".", "..") and len(one.encode()) < 200)


def examples(number: int) -> Callable[[Any], Any]:
    """Settings: the same examples each time."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    phases = [Phase.explicit, Phase.generate]  # to make a failing command line shorter would take longer than to find it
    return settings(
        max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=checks, phases=phases
    )


def numbers(
    least: int, most: int, *, step: int = 1, first: int = 0, yaml_too: bool = False
) -> st.SearchStrategy[tuple[str, Any]]:
    """A whole number as text, and its value, or REFUSED out of its range or in a form that is no number to everyone."""

    @st.composite
    def drawn(draw: st.DrawFn) -> tuple[str, Any]:
        value = draw(st.one_of(st.integers(least, most).map(lambda one: one - (one - first) % step), st.integers(-3, most + 3)))
        ok = least <= value <= most and (value - first) % step == 0
        meant = value if ok else REFUSED
        form = draw(st.sampled_from(["plain"] * 6 + ["plus", "zeros", "under", "float", "exponent", "other digits", "words"]))
        forms: Mapping[str, tuple[str, Any]] = {
            "plain": (str(value), meant),
            "plus": (f"+{value}", meant if value >= 0 else REFUSED),
            "zeros": (f"00{value}", REFUSED),
            "under": (f"1_{abs(value)}", REFUSED),
            "float": (f"{value}.0", REFUSED),
            "exponent": (f"{value}e0", REFUSED),
            "other digits": ("".join(chr(0x660 + int(one)) for one in str(abs(value))), REFUSED),
            "words": (draw(st.sampled_from(["", "auto ", "five", "nan", "0b1", "1:30", "4 # four", "--", "1,0"])), REFUSED),
        }
        return forms[form]

    return drawn()


booleans = st.sampled_from(
    [
        *((one, True) for one in ("true", "True", "TRUE", "yes", "on", "On")),
        *((one, False) for one in ("false", "False", "no", "off", "NO")),
        *((one, REFUSED) for one in ("1", "0", "y", "", "true ish", "null")),
    ]
)


@st.composite
def reals(draw: st.DrawFn, least: float, most: float) -> tuple[str, Any]:
    """A number as text, and its value."""
    value = draw(st.floats(least, most, allow_subnormal=False) | st.floats(allow_nan=True, allow_infinity=True))
    ok = least <= value <= most
    return draw(st.sampled_from([repr(value), f"{value:.3e}"])), ("close", value) if ok else REFUSED


@dataclass(frozen=True)
class Key:
    """A key of a recipe: what people write on a command line, with its meaning; and a plain value for YAML."""

    written: st.SearchStrategy[tuple[str, Any]]
    values: st.SearchStrategy[Any]


def one_of(*words: str) -> Key:
    written = st.sampled_from([*((one, one) for one in words), *((one.upper(), REFUSED) for one in words), ("", REFUSED)])
    return Key(written, st.sampled_from(words))


text_key = Key(texts.map(lambda one: (one, one)), texts)
flag_key = Key(booleans, st.booleans())
KEYS: Mapping[str, Key] = {
    "name": text_key,
    "model.dtype": one_of("checkpoint", "bfloat16", "float32"),
    "model.fixed_latent": Key(texts.map(lambda one: (one, None if one == "null" else one)), texts | st.none()),
    "mesh.ulysses": Key(
        st.sampled_from([("auto", "auto"), ("2", 2), ("0", REFUSED), ("Auto", REFUSED)]), st.just("auto") | st.integers(1, 8)
    ),
    "attention.early_fraction": Key(reals(0.0, 1.0), st.floats(0, 1)),
    "attention.cross": one_of("sdpa", "native"),
    "attention.smooth_k": flag_key,
    "trim_text": flag_key,
    "compile.experts": flag_key,
    "vae.chunk": Key(numbers(1, 4096), st.integers(1, 4096)),
    "vae.tf32": flag_key,
    "offline.batch": Key(numbers(1, 64), st.integers(1, 64)),
    "faults.start_s": Key(reals(1.0, 86400.0), st.floats(1, 86400)),
    "warmup_queries": Key(numbers(0, 100), st.integers(0, 100)),
    "gemm.fp8_scales": one_of("row", "tensor"),
}


def means(found: Any, meant: Any) -> bool:
    """Is this what was meant?"""
    if isinstance(meant, tuple) and meant[:1] == ("close",):
        return isinstance(found, float) and abs(found - meant[1]) <= 1e-3 * abs(meant[1])
    return type(found) is type(meant) and found == meant


@st.composite
def encoded(draw: st.DrawFn, lines: Sequence[str]) -> bytes:
    """Lines as an editor saves them."""
    end = draw(st.sampled_from(LINE_ENDS))
    text = end.join(lines) + draw(st.sampled_from(["", end, end * 2]))
    mark, encoding = draw(
        st.sampled_from(
            [
                (b"", "utf-8"),
                (codecs.BOM_UTF8, "utf-8"),
                (codecs.BOM_UTF16_LE, "utf-16-le"),
                (codecs.BOM_UTF16_BE, "utf-16-be"),
                (codecs.BOM_UTF32_LE, "utf-32-le"),
                (codecs.BOM_UTF32_BE, "utf-32-be"),
            ]
        )
    )
    return mark + text.encode(encoding)


@st.composite
def recipes(draw: st.DrawFn) -> tuple[list[str], dict[str, Any]]:
    """The lines of a recipe in YAML in some style, and key -> what is meant."""
    chosen = draw(st.lists(st.sampled_from(sorted(KEYS)), unique=True, min_size=1, max_size=6))
    meant = {key: draw(KEYS[key].values) for key in chosen}
    nested: dict[str, Any] = {}
    for key, value in meant.items():
        place = nested
        *parts, last = key.split(".")
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = value
    if draw(st.booleans()):
        text = json.dumps(nested, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
        return text.split("\n"), meant  # every JSON document is YAML
    text = yaml.safe_dump(
        nested,
        allow_unicode=draw(st.booleans()),
        default_flow_style=draw(st.sampled_from([None, False, True])),
        default_style=None,
        width=draw(st.sampled_from([20, 1000])),
        explicit_start=draw(st.booleans()),
    )
    return text.split("\n"), meant


def few(quick: int, all_of_them: int) -> Any:
    return pytest.mark.parametrize("number", [quick, pytest.param(all_of_them, marks=pytest.mark.slow)])
