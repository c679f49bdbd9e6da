"""A server-sent events parser that follows the standard to the letter, and refuses what a server should never send."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass
class Parsed:
    events: list[tuple[str, str]] = field(default_factory=list)
    """(event name, data)"""
    comments: list[str] = field(default_factory=list)


def parse(stream: bytes) -> Parsed:
    """HTML standard, 9.2.6. Asserts that the stream ends with a dispatched event."""
    parsed = Parsed()
    name, data = "", []
    lines = re.split("\r\n|\n|\r", stream.decode("utf-8"))
    assert lines[-1] == "", "the last line is not ended"
    for line in lines[:-1]:
        if line == "":
            if data:
                parsed.events.append((name or "message", "\n".join(data)))
            name, data = "", []
            continue
        key, colon, value = line.partition(":")
        value = value.removeprefix(" ")
        if key == "":
            parsed.comments.append(value)
        elif key == "data":
            data.append(value)
        elif key == "event":
            name = value
        else:
            raise AssertionError(f"a line that means nothing: {line!r}")
        assert colon
    assert not data, "the last event is not ended"
    return parsed
