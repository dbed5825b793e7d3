import pytest

from envs.arguments import ArgumentError, built_with, is_integer, is_number, require_flag, require_integer


class Made:
    """Takes what it says, and counts how often it was made and closed."""

    open = 0

    def __init__(self, size=3, colour="red", length=None):
        if size > 9:
            raise AssertionError
        if colour not in ("red", "green"):
            raise KeyError(colour)
        if length is not None and length < size:
            raise ValueError("too\nshort")
        self.size = size
        Made.open += 1

    def close(self):
        Made.open -= 1


@pytest.fixture(autouse=True)
def nothing_is_left_open():
    Made.open = 0
    yield
    assert Made.open == 0


def test_what_can_be_built_is_built_once():
    calls = []
    made = built_with(lambda **arguments: calls.append(arguments) or Made(**arguments), {"size": 4}, "Made")
    assert (made.size, calls) == (4, [{"size": 4}])
    made.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"colour": "red", "size": "4x"},
            "size: found '4x'; allowed what Made takes (TypeError: '>' not supported between instances of 'str' and 'int'); "
            "leave it out for the default",
        ),
        ({"size": 10}, "size: found 10; allowed what Made takes (AssertionError); leave it out for the default"),
        ({"colour": "blue"}, "colour: found 'blue'; allowed what Made takes (KeyError: 'blue'); "),
        # of two that are wrong the first; of two that do not go together the second
        ({"colour": None, "size": None}, "colour: found None; allowed what Made takes (KeyError: None); "),
        ({"size": 5, "length": 4}, "length: found 4; allowed what Made takes (ValueError: too short); "),
    ],
)
def test_the_argument_that_cannot_be_taken_is_named_in_one_line(arguments, message):
    with pytest.raises(ArgumentError) as error:
        built_with(Made, arguments, "Made")
    assert str(error.value).startswith(message)
    assert error.value.__cause__ is not None


def test_what_fails_without_arguments_tells_so_itself():
    def broken(size=3):
        raise LookupError("something else")

    for arguments in ({}, {"size": 4}):
        with pytest.raises(LookupError, match="something else"):
            built_with(broken, arguments, "broken")


def test_an_argument_that_was_refused_by_name_stays_that_one():
    def picky(size=3, colour="red"):
        require_integer("size", size, 1)
        require_flag("colour", colour)

    with pytest.raises(ArgumentError, match=r"^size: found 0; allowed an integer of at least 1; leave it out"):
        built_with(picky, {"colour": True, "size": 0}, "picky")


def test_numbers_are_neither_words_nor_truths():
    assert is_integer(3, 3) and is_integer(3, 0, 3) and is_number(0.5, 0, 1) and is_number(1, 0, 1)
    for value in (True, "3", None, 2.0, 2, 5):
        assert not is_integer(value, 3, 4)
    for value in (True, "1", None, -0.1, 1.1, float("nan")):
        assert not is_number(value, 0.0, 1.0)
