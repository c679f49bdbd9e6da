from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from strict_sse import parse

from headrace.http.sse import TextEvents, json_text, named_event

anything = st.text(st.characters(codec="utf-8"), max_size=12)
awkward = st.text(st.sampled_from("\r\n :\ufeff\u2028\x85\x0bé漢data"), max_size=8)


@given(st.lists(anything | awkward, max_size=12))
def test_text_survives_however_it_is_cut(pieces: list[str]) -> None:
    events = TextEvents()
    stream = b"".join(events.event(piece) for piece in pieces)
    expected = "".join(pieces).replace("\r\n", "\n").replace("\r", "\n")
    assert "".join(data for _, data in parse(stream + named_event(b"done", b"{}")).events[:-1]) == expected


def test_a_return_is_not_held_back_and_a_cut_pair_is_one_newline() -> None:
    events = TextEvents()
    assert events.event("a\r") == b"data: a\ndata: \n\n"
    assert events.event("") == b""
    assert events.event("\n") == b""
    assert events.event("\n") == b"data: \ndata: \n\n"


@given(anything | awkward)
def test_json_text_is_one_line_even_for_careless_clients(text: str) -> None:
    encoded = json_text(text)
    assert len(encoded.decode().splitlines()) == 1
    assert msgspec.json.decode(encoded) == text
