"""Offers to go on in another protocol are ignored, as a server may (RFC 9110, section 7.8), and the request is answered as any other.

Java's own client sends `Upgrade: h2c` with the first request of a connection, body and all. The parser takes every offer for accepted: what
follows the head is no longer HTTP to it, so the body would be left out, or be read as a request of its own if it comes later.
"""

from __future__ import annotations

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class IgnoresOffers(HttpToolsProtocol):
    """uvicorn's connection. What makes an offer is parsed again, from its head without the offer."""

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            told = "Invalid HTTP request received."
            self.logger.warning(told)
            self.send_400_response(told)

    def _parse(self, data: bytes) -> None:
        left: bytes | memoryview = data
        while True:
            try:
                self.parser.feed_data(left)
                return
            except httptools.HttpParserUpgrade as offer:
                if not self._offers():
                    return
                left = memoryview(left)[offer.args[0] :]
            head = self._head_without_offer()
            # The one before reads nothing more where the connection is to close.
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn sets it
            self.parser.feed_data(head)

    def on_headers_complete(self) -> None:
        if not self._offers():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self._offers():
            super().on_message_complete()

    def _offers(self) -> bool:
        # CONNECT counts as an offer that can't be ignored; nothing here answers it.
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _head_without_offer(self) -> bytes:
        first = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        fields = [b"%b: %b" % field for field in self.headers if field[0] != b"upgrade"]
        return b"\r\n".join([first, *fields, b"", b""])
