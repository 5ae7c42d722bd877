"""A link to a server that is slow, or that swallows everything."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

from psycopg.conninfo import conninfo_to_dict

__all__ = ["SlowLink", "link_to", "through"]


class SlowLink:
    """Passes connections on, each piece `delay_s` later; while `dead`, nothing passes and nothing is closed.

    Attributes:
        address: host:port to connect to.
        delay_s: How much later pieces are passed on.
        dead: Set while it swallows everything.
    """

    def __init__(self, connect: Callable[[], socket.socket], delay_s: float = 0.0) -> None:
        self._connect, self.delay_s = connect, delay_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.dead = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no further connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._join, args=(near, self._connect()), daemon=True).start()

    def _join(self, near: socket.socket, far: socket.socket) -> None:
        with near, far:
            back = threading.Thread(target=self._pass, args=(far, near), daemon=True)
            back.start()
            self._pass(near, far)
            back.join()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                time.sleep(self.delay_s)
                while self.dead.is_set():
                    time.sleep(0.05)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def link_to(postgres: str, delay_s: float) -> SlowLink:
    """A link to the database of a URL, which has a Unix socket."""
    parts = conninfo_to_dict(postgres)
    folder, port = str(parts["host"]), parts.get("port", 5432)

    def connect() -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(f"{folder}/.s.PGSQL.{port}")
        return connection

    return SlowLink(connect, delay_s)


def through(link: SlowLink, postgres: str) -> str:
    """URL of the database behind a link."""
    parts = conninfo_to_dict(postgres)
    return f"postgresql://{parts['user']}@{link.address}/{parts['dbname']}"
