"""What the native API decides without a connection: ranges, representations, their heads."""

import io
import re
from typing import get_args

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given
from hypothesis import strategies as st

from cache.entry import DType, TensorSpec
from cache.errors import BadRequest, RangeNotSatisfiable
from serving.api.native import _FRAMINGS, _framing, byte_range
from serving.api.timing import server_timing
from tests.conformance.tier import EYE

DTYPES: tuple[DType, ...] = get_args(DType)
RAW, NPY, SAFETENSORS = (framing.media_type for framing in _FRAMINGS)

shapes = st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple)
ends = st.one_of(st.just(""), st.integers(0, 12).map(str))


# ------------------------------------------------------------------ ranges


@given(first=ends, last=ends, total=st.integers(0, 10))
@example(first="", last="0", total=5)
@example(first="0", last="0", total=0)
@example(first="9", last="3", total=5)
def test_a_range_is_what_the_standard_says(first: str, last: str, total: int) -> None:
    """The bytes of a range are those that counting one by one finds; none at all is unsatisfiable (RFC 9110 §14.1)."""
    header = f"bytes={first}-{last}"
    if (not first and not last) or (first and last and int(last) < int(first)):
        assert byte_range(header, total) is None
        return
    if first:
        wanted = [at for at in range(total) if at >= int(first) and (not last or at <= int(last))]
    else:
        wanted = [at for at in range(total) if at >= total - int(last)]
    if wanted:
        assert byte_range(header, total) == (wanted[0], wanted[-1] + 1)
    else:
        with pytest.raises(RangeNotSatisfiable) as refusal:
            byte_range(header, total)
        assert refusal.value.nbytes == total


@pytest.mark.parametrize(
    "header",
    [
        *(None, "", "bytes", "bytes=", "bytes=-", "bytes=1", "bytes=a-b", "items=0-1", "bytes=0-1,4-5"),
        *("bytes=-1-2", "bytes=+1-2", "bytes=٠-٣", "bytes=0-" + "9" * 5000, "bytes=" + "9" * 5000 + "-"),
    ],
    ids=lambda header: str(header)[:20],
)
def test_a_range_that_is_none_is_ignored(header: str | None) -> None:
    """Other units, several ranges and nonsense get the whole tensor, as the standard allows."""
    assert byte_range(header, 100) is None


# ------------------------------------------------------------------ representations


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("*/*", RAW),
        ("", RAW),
        ("application/*", RAW),
        ("text/html,application/xhtml+xml,*/*;q=0.8", RAW),
        (NPY, NPY),
        (SAFETENSORS.upper(), SAFETENSORS),
        (f"{NPY}, */*", NPY),
        (f"*/*, {SAFETENSORS}", SAFETENSORS),
        (f"{NPY};q=0.5, {SAFETENSORS};q=0.9", SAFETENSORS),
        (f"{NPY};q=0.5, */*;q=0.9", RAW),
        (f"{NPY};version=1;q=0.9, {RAW};q=0.1", NPY),
        (f"{RAW};q=0, */*", NPY),
        (f"application/*;q=0, {RAW}", RAW),
        (f"{RAW}, {NPY}", RAW),
    ],
)
def test_the_representation_asked_for(accept: str, media_type: str) -> None:
    """The most specific range decides on each type, then the weight; what is named beats what is merely allowed."""
    assert _framing(accept).media_type == media_type


@pytest.mark.parametrize("accept", ["text/html", "*/*;q=0", f"{RAW};q=0.000", "image/*, text/*;q=0.5"])
def test_nothing_that_is_asked_for(accept: str) -> None:
    """A client that takes none of ours is told what there is."""
    with pytest.raises(BadRequest, match=re.escape(NPY)):
        _framing(accept)


def spec_of(dtype: DType, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(dtype, shape, "zyx", (2.5, 0.5, 0.5), EYE, "HU")


@pytest.mark.parametrize("dtype", DTYPES)
@given(shape=shapes)
def test_the_npy_head_is_numpys(dtype: DType, shape: tuple[int, ...]) -> None:
    """Head and payload are, byte for byte, the file that NumPy writes."""
    array = np.zeros(shape, dtype)
    expected = io.BytesIO()
    np.lib.format.write_array(expected, array, version=(1, 0))
    head = _framing(NPY).head(spec_of(dtype, shape))
    assert head + array.tobytes() == expected.getvalue()


@pytest.mark.parametrize("dtype", DTYPES)
@given(shape=shapes)
def test_safetensors_loads(dtype: DType, shape: tuple[int, ...]) -> None:
    """The public library reads head and payload as one tensor, whose bytes begin at a multiple of eight."""
    spec = spec_of(dtype, shape)
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    head = _framing(SAFETENSORS).head(spec)
    assert len(head) % 8 == 0
    found = safetensors.numpy.load(head + array.tobytes())
    assert found.keys() == {"tensor"}
    assert found["tensor"].dtype == dtype
    np.testing.assert_array_equal(found["tensor"], array)


def test_raw_bytes_have_no_head() -> None:
    """The default representation is the payload alone."""
    assert _framing("*/*").head(spec_of("int16", (1, 2, 3))) == b""


def test_stages_are_told_in_milliseconds() -> None:
    """One entry a stage, in the order they ended; nothing for a hit."""
    assert server_timing({"list": 0.0123456, "fetch": 1.5}) == "list;dur=12.346, fetch;dur=1500.000"
    assert server_timing({}) == ""
