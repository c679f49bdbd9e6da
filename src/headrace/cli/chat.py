"""`headrace chat`: talk to a server in the terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from headrace.cli.target import ServerAway, Target, target

if TYPE_CHECKING:
    import httpx

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_HELP = "/quit leaves, /reset begins a new conversation, /help shows this; Ctrl-C stops an answer."


def chat(
    url: str | None = typer.Option(None, "--url", help="The server; default is this machine's, as configured.", show_default=False),
    model: str | None = typer.Option(None, "--model", help="Default is the first that the server lists.", show_default=False),
    system: str | None = typer.Option(None, "--system", help="What the model is told before the conversation.", show_default=False),
    temperature: float = typer.Option(0.7, "--temperature", min=0, max=2, help="0 always takes the likeliest token."),
    max_tokens: int = typer.Option(1024, "--max-tokens", min=1, help="Most tokens of an answer."),
    key: str | None = typer.Option(None, "--key", help="Bearer token.", show_default=False),
    config: Path | None = typer.Option(None, "--config", help="TOML file that says where the server is.", show_default=False),
) -> None:
    """Chat in the terminal, with history and answers as they are written. Also reads lines from a pipe."""
    server = target(url, key, config)
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        with server.client(timeout=600) as client:
            conversation = Conversation(client, server, model or _first_model(client, server), system, temperature, max_tokens)
            _talk(conversation, interactive=sys.stdin.isatty())
    except ServerAway as error:
        typer.echo(f"headrace: {error}", err=True)
        raise typer.Exit(1) from error


class Conversation:
    """The messages so far, and the server that continues them."""

    def __init__(
        self, client: httpx.Client, server: Target, model: str, system: str | None, temperature: float, max_tokens: int = 1024
    ) -> None:
        self._client = client
        self._server = server
        self.model = model
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._opening = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._opening)

    def reset(self) -> None:
        self.messages = list(self._opening)

    def say(self, text: str) -> Iterator[str]:
        """Yield the answer's pieces. What came is kept as the answer, also where the reader stops early; a refused turn is taken back.

        Raises `ServerAway` with the server's own words.
        """
        import httpx

        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            for piece in self._stream():
                pieces.append(piece)
                yield piece
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            self._server.away(error)
        finally:
            if pieces:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.messages.pop()

    def _stream(self) -> Iterator[str]:
        import msgspec

        from headrace.cli.sse import EventReader

        body = {
            "model": self.model,
            "messages": self.messages,
            "temperature": self._temperature,
            "max_tokens": self._max_tokens,
            "stream": True,
        }
        with self._client.stream("POST", f"{self._server.root}/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                answer.read()
                raise ServerAway(f"{said_error(answer.content) or 'no reason given'} (HTTP {answer.status_code})")
            reader = EventReader()
            for data in answer.iter_bytes():
                for _, event in reader.feed(data):
                    if event == b"[DONE]":
                        return
                    try:
                        chunk = msgspec.json.decode(event)
                    except msgspec.DecodeError as error:
                        raise ServerAway(f"{self._server.root} sent something that is not JSON.") from error
                    if "error" in chunk:
                        raise ServerAway(said_error(event) or "The answer ended with an error.")
                    for choice in chunk.get("choices", ()):
                        if piece := (choice.get("delta") or {}).get("content"):
                            yield piece


def said_error(body: bytes) -> str:
    """The message in an error body, OpenAI's or native; nothing where there is none."""
    import msgspec

    try:
        said: Any = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return ""
    if not isinstance(said, dict):
        return ""
    inner = said.get("error", said)
    message = inner.get("message", inner.get("detail")) if isinstance(inner, dict) else inner
    return message if isinstance(message, str) else ""


def _first_model(client: httpx.Client, server: Target) -> str:
    import httpx

    try:
        answer = client.get(f"{server.root}/v1/models")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        server.away(error)
    if answer.status_code == 401:
        raise ServerAway(f"{server.root} wants a key; give it with --key.")
    try:
        return str(answer.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise ServerAway(f"What answers at {server.root} lists no model (HTTP {answer.status_code}).") from error


def _talk(conversation: Conversation, *, interactive: bool) -> None:
    if interactive:
        with suppress(ImportError):  # input() gets editing and history from it, where Python was built with it
            import readline  # noqa: F401

        typer.echo(f"{conversation.model}. {_HELP}", err=True)
    failed = False
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            if not interactive:
                raise
            typer.echo("\n(/quit or Ctrl-D leaves)", err=True)
            continue
        if not line:
            continue
        if line in ("/quit", "/exit"):
            break
        if line == "/reset":
            conversation.reset()
        elif line == "/help":
            typer.echo(_HELP, err=True)
        else:
            failed = not _answer(conversation, line)
    if failed and not interactive:
        raise typer.Exit(1)


def _answer(conversation: Conversation, text: str) -> bool:
    """Print the answer as it comes; Ctrl-C stops it and nothing else. False where there was none."""
    answer = conversation.say(text)
    begun = False
    try:
        for piece in answer:
            begun = True
            # A model must not move the cursor or retitle the window.
            sys.stdout.write(_CONTROL.sub("\ufffd", piece))
            sys.stdout.flush()
        sys.stdout.write("\n")
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        typer.echo("(stopped)", err=True)
    except ServerAway as error:
        sys.stdout.write("\n" if begun else "")
        typer.echo(f"headrace: {error}", err=True)
        return False
    finally:
        answer.close()  # type: ignore[attr-defined]
        sys.stdout.flush()
    return True
