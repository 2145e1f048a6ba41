"""hypothesis strategies that damage a valid text, structure or file in one to three places."""

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

# Values that a key may have by mistake.
ODD_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 7, 0.5, 1e-300, 1e308, math.inf, -math.inf, math.nan, 10**30, -(10**30)),
    *("", " ", "null", "nan", "1e-3", "true", "[", "{a", "a: b", "\0", "\t", "x" * 300, "é" * 200, "😀", "../..", "/"),
    *("${x}", "${oc.env:HOME}", "${model}", "???", "/dev/null/x", "${", "%s %d", "\u2028", "-", "#", "'", '"'),
    *([], {}, [None], [[[]]], ["a", 1], {"a": {"b": None}}, {"": 1}),
]
ODD_TEXTS = ["\t", "\0", "\n", ":", "-", "{", "}", "[", "]", ",", '"', "'", "#", "&a", "*a", "!!python/none", "\ufeff"]
ODD_TEXTS += ["null", "NaN", "Infinity", "${x}", "\\", "\r", "é", "\x85", "1e999", "- ", "? ", "|", "<<: *a", "---\n"]
LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12345\n"
)

edits = st.integers(1, 3)


@st.composite
def structures(draw, valid: Any) -> Any:
    """`valid`, made of dicts and lists, with damaged places."""
    value = copy.deepcopy(valid)
    for _ in range(draw(edits)):
        value = _damaged(draw, value)
    return value


def _damaged(draw, value: Any) -> Any:
    """Walk down to a random place, and damage it."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 9)) == 0:
        return _odd(draw)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw(st.sampled_from(keys))
    kind = draw(st.sampled_from(["down", "down", "down", "delete", "odd", "list", "unknown"]))
    if kind == "down":
        value[key] = _damaged(draw, value[key])
    elif kind == "delete":
        del value[key]
    elif kind == "odd":
        value[key] = _odd(draw)
    elif kind == "list":
        value[key] = [value[key]]
    elif isinstance(value, dict):
        value[draw(st.text(max_size=8))] = _odd(draw)
    else:
        value.append(_odd(draw))
    return value


def _odd(draw) -> Any:
    return copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))  # a later edit may change it


@st.composite
def texts(draw, valid: str) -> str:
    """`valid` with a part that is cut, doubled, or replaced by an odd text."""
    text = valid
    for _ in range(draw(edits)):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.sampled_from([0, 1, 1, 3, 20, 200])))
        others = st.one_of(st.sampled_from(ODD_TEXTS), st.sampled_from(ODD_TEXTS), st.text(max_size=5))
        part = draw(st.one_of(others, others, st.just(2 * text[start:end])))
        text = text[:start] if draw(st.integers(0, 5)) == 0 else text[:start] + part + text[end:]
    return text


@st.composite
def contents(draw, valid: bytes) -> bytes:
    """The bytes of a file, cut, changed, or replaced."""
    data = bytearray(valid)
    for _ in range(draw(edits)):
        kind = draw(st.sampled_from(["flip", "flip", "cut", "zeros", "insert", "append", "empty", "pointer", "head"]))
        place = draw(st.integers(0, max(0, len(data) - 1)))
        if kind == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[place:]
        elif kind == "zeros":
            data[place : place + 512] = bytes(len(data[place : place + 512]))
        elif kind == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "append":
            data += draw(st.binary(min_size=1, max_size=9))
        elif kind == "head" and data:  # lengths and magic numbers stand at the beginning
            data[draw(st.integers(0, min(63, len(data) - 1)))] = draw(st.integers(0, 255))
        else:
            data = bytearray(LFS_POINTER if kind == "pointer" else b"")
    return bytes(data)


def jsons(valid: Any, lines: bool = False) -> st.SearchStrategy[bytes]:
    """A damaged file of JSON: its text, its bytes, or what it says. lines: one value a line"""

    def dumped(value: Any) -> str:
        many = lines and isinstance(value, list)
        return "".join(json.dumps(row) + "\n" for row in value) if many else json.dumps(value, indent=1)

    return st.one_of(
        structures(valid).map(lambda value: dumped(value).encode()),
        texts(dumped(valid)).map(lambda text: text.encode("utf-8", "surrogatepass")),
        contents(dumped(valid).encode()),
        st.integers(10, 10**5).map(lambda n: b"[" * n),
    )


def each(strategy: st.SearchStrategy, n: int, seed: int, case: Callable[[Any], None]) -> None:
    """Call `case` with n values of the strategy, the same ones for the same seed."""

    @hypothesis.seed(seed)
    @settings(max_examples=n, database=None, phases=[Phase.generate], deadline=None, suppress_health_check=HealthCheck)
    @hypothesis.given(strategy)
    def of_all(value: Any) -> None:
        case(value)

    of_all()
