import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmnet.controller.identifiers import NetworkIds, Numbers
from vmnet.model import names


def test_numbers_rise_from_one_and_stay() -> None:
    ids = NetworkIds()
    assert [ids.allocate(name) for name in ("a", "b", "a")] == [1, 2, 1]


def test_a_number_that_is_written_down_is_taken_over() -> None:
    ids = NetworkIds()
    assert ids.adopt("a", 7) is None
    assert ids.adopt("a", 7) is None
    assert ids.adopt("b", 7) == "a"
    assert [ids.allocate(name) for name in ("a", "b")] == [7, 8]


def test_the_number_on_the_network_itself_counts() -> None:
    ids = NetworkIds()
    ids.adopt("a", 3)
    ids.adopt("a", 5)
    assert ids.allocate("a") == 5
    assert ids.adopt("b", 3) is None


def test_a_number_rests_until_all_have_had_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "MAX_NETWORK_ID", 3)
    ids = NetworkIds()
    ids.allocate("a")
    ids.release("a")
    assert [ids.allocate(name) for name in ("b", "c", "d")] == [2, 3, 1]
    with pytest.raises(ValueError, match="all network numbers"):
        ids.allocate("e")
    ids.release("c")
    assert ids.allocate("e") == 3


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from([None, "release", 1, 2, 3, 4]))))
def test_no_number_has_two_owners(steps: list[tuple[str, object]]) -> None:
    numbers = Numbers(6, "node")
    for owner, what in steps:
        if what is None:
            given_number = numbers.allocate(owner)
            assert numbers.get(owner) == given_number
        elif what == "release":
            numbers.release(owner)
            assert numbers.get(owner) is None
        elif isinstance(what, int):
            holder = numbers.adopt(owner, what)
            assert (numbers.get(owner) == what) is (holder is None)
        held = [number for number in map(numbers.get, "abcdef") if number is not None]
        assert len(set(held)) == len(held)
        assert all(1 <= number <= 6 for number in held)
