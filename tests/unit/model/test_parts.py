from ipaddress import IPv4Network, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmnet.model import names, parts
from vmnet.model.addresses import transit

NETWORKS = st.one_of(
    st.builds(
        lambda number, length: IPv4Network((number >> (32 - length) << (32 - length), length)),
        st.integers(0, 2**32 - 1),
        st.integers(1, 32),
    ),
    st.builds(
        lambda number, length: IPv6Network((number >> (128 - length) << (128 - length), length)),
        st.integers(0, 2**128 - 1),
        st.integers(1, 128),
    ),
)


@given(st.dictionaries(st.text(), st.lists(NETWORKS).map(tuple)))
def test_parts_are_read_as_they_were_written(found: dict[str, parts.Parts]) -> None:
    assert parts.parts_of({names.NODE_SUBNETS_ANNOTATION: parts.encode_parts(found)}) == found


@pytest.mark.parametrize("text", ["{", "[]", '{"n": "10.0.0.0/24"}', '{"n": ["10.0.0.1/24"]}', '{"n": [null]}'])
def test_what_cannot_be_read_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parts.parts_of({names.NODE_SUBNETS_ANNOTATION: text})
    assert parts.parts_of({}) == {}


@given(st.integers(-10, 70000))
def test_a_number_is_one_that_has_transit_addresses(number: int) -> None:
    found = parts.number_of({names.NODE_NUMBER_ANNOTATION: str(number)})
    if found is None:
        with pytest.raises(ValueError, match="node number"):
            transit(number)
    else:
        assert found == number
        assert len(transit(found)) == 2


@pytest.mark.parametrize("text", ["", "one", "1.5", "٣"])
def test_other_numbers_are_none(text: str) -> None:
    assert parts.number_of({names.NODE_NUMBER_ANNOTATION: text}) is None
