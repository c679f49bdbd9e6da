from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.engine.frames import Cancel, FrameConnection, FrameTooLarge, StatsRequest, Submit, ToWorker
from headrace.types import GenerateRequest, Sampling


class Pipe(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self, unread: int = 0) -> None:
        super().__init__()
        self.written = b""
        self.unread = unread
        self.closed = self.aborted = False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def get_write_buffer_size(self) -> int:
        return self.unread

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True


def connection(**more: Any) -> tuple[FrameConnection[ToWorker], Pipe, list[ToWorker]]:
    heard: list[ToWorker] = []
    made = FrameConnection[ToWorker](ToWorker, heard.append, lambda: None, **more)
    pipe = Pipe()
    made.connection_made(pipe)
    return made, pipe, heard


MESSAGES = [
    Submit(1, GenerateRequest(id="a", prompt=[1, 2, 3], sampling=Sampling(max_tokens=4, stop=("x",), logit_bias={5: -1.0}), tenant=2**62)),
    Cancel(1),
    StatsRequest(),
]


@given(st.lists(st.sampled_from(MESSAGES), max_size=8), st.randoms(use_true_random=False))
def test_messages_come_out_as_they_went_in_however_they_are_cut(messages: list[ToWorker], random: Any) -> None:
    sender, pipe, _ = connection()
    for message in messages:
        sender.send(message)
    receiver, _, heard = connection()
    rest = pipe.written
    while rest:
        cut = random.randint(1, min(len(rest), random.choice([1, 5, 1000])))
        receiver.data_received(rest[:cut])
        rest = rest[cut:]
    assert heard == messages


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x01\xc1",
        b"\x00\x00\x00\x03" + msgspec.msgpack.encode([99]) + b"x",
        b"\x00\x00\x00\x02" + msgspec.msgpack.encode([2]),
        b"\x00\x00\x00\x00",
    ],
)
def test_a_malformed_frame_ends_the_connection(data: bytes) -> None:
    receiver, pipe, heard = connection()
    receiver.data_received(data + b"\x00" * 8)
    assert pipe.aborted
    assert heard == []


@given(st.binary(max_size=64))
def test_no_bytes_raise(data: bytes) -> None:
    receiver, _, _ = connection(max_frame=1000)
    receiver.data_received(data)


def test_a_frame_too_large_is_not_sent() -> None:
    sender, pipe, _ = connection(max_frame=50)
    with pytest.raises(FrameTooLarge):
        sender.send(Submit(1, GenerateRequest(id="a" * 100, prompt=[], sampling=Sampling(max_tokens=1))))
    assert pipe.written == b""
    sender.send(Cancel(7))
    assert pipe.written


def test_a_peer_that_reads_nothing_is_given_up() -> None:
    sender, pipe, _ = connection(max_unread=1000)
    pipe.unread = 1001
    sender.send(Cancel(1))
    assert pipe.aborted
    assert pipe.written == b""


def test_nothing_is_sent_after_the_end() -> None:
    sender, pipe, _ = connection()
    sender.connection_lost(None)
    sender.send(Cancel(1))
    assert pipe.written == b""
    assert not sender.open
