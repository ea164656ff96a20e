"""The listening socket, bound before anything slow starts, so that a taken port is said at once."""

from __future__ import annotations

import errno
import ipaddress
import socket as sockets
import stat

from service.settings import Settings

Socket = sockets.socket
BACKLOG = 2048


class CannotListen(RuntimeError):
    """Why the address cannot be listened on, in one line with what to do."""


def bind(settings: Settings) -> Socket:
    """Bind ``uds`` or ``host:port``. Raises ``CannotListen``."""
    return _bind_unix(settings) if settings.uds else _bind_tcp(settings)


def _bind_tcp(settings: Settings) -> Socket:
    where = f"{settings.host} port {settings.port}"
    try:
        found = sockets.getaddrinfo(
            settings.host, settings.port, type=sockets.SOCK_STREAM, flags=sockets.AI_PASSIVE
        )
        family, kind, protocol, _, target = found[0]
        made = sockets.socket(family, kind, protocol)
        made.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
        made.bind(target)
        made.listen(BACKLOG)
    except OSError as error:
        raise CannotListen(f"cannot listen on {where}: {_explain(error)}") from None
    made.setblocking(False)
    return made


def _bind_unix(settings: Settings) -> Socket:
    path = settings.uds
    assert path is not None
    made = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode) and not _answers(str(path)):
            path.unlink()  # left by a server that was killed
        made.bind(str(path))
        made.listen(BACKLOG)
    except OSError as error:
        raise CannotListen(f"cannot listen on {path}: {_explain(error)}") from None
    made.setblocking(False)
    return made


def _answers(path: str) -> bool:
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == 0


def _explain(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "it is in use; choose another with --port (0 takes a free one) or stop what holds it"
    if error.errno == errno.EACCES:
        return "not permitted; ports below 1024 need rights, choose a higher --port"
    return error.strerror or str(error)


def is_local(bound: Socket) -> bool:
    """Whether only this machine reaches it."""
    if bound.family == sockets.AF_UNIX:
        return True
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


def address(settings: Settings, bound: Socket) -> str:
    """What a client would type."""
    if settings.uds:
        return f"unix:{settings.uds}"
    scheme = "https" if settings.ssl_certfile else "http"
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{scheme}://{host}:{port}"
