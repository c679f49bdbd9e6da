from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.engine.stops import StopStrings

letters = st.text("ab", max_size=40)
stops = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


def watch(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    watcher, shown = StopStrings(stops), ""
    for piece in pieces:
        text, matched = watcher.push(piece)
        shown += text
        if matched is not None:
            return shown, matched
    return shown + watcher.flush(), None


def plainly(text: str, stops: list[str]) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        matched = [stop for stop in stops if text[:end].endswith(stop)]
        if matched:
            longest = max(matched, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(deadline=None)
@given(st.lists(letters, max_size=12), stops)
def test_stops_where_a_plain_search_does_however_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    assert watch(pieces, stops) == plainly("".join(pieces), stops)


@settings(deadline=None)
@given(letters, stops)
def test_holds_back_only_what_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    watcher, shown = StopStrings(stops), ""
    for end, letter in enumerate(text, 1):
        more, matched = watcher.push(letter)
        if matched is not None:
            return
        shown += more
        held = text[len(shown) : end]
        begun = [stop[:length] for stop in stops for length in range(len(stop)) if text[:end].endswith(stop[:length])]
        assert held == max(begun, key=len, default="")


def test_a_long_stop_string_costs_no_more_than_its_text() -> None:
    watcher = StopStrings(["a" * 100_000 + "b"])
    for _ in range(1000):
        assert watcher.push("a" * 50) == ("", None)
    assert watcher.push("c") == ("a" * 50_000 + "c", None)


def test_empty_stop_strings_never_match() -> None:
    assert watch(["abc"], ["", "x"]) == ("abc", None)
