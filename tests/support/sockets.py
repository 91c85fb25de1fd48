"""Where processes listen."""

import contextlib

import psutil


def list_listening(pid: int) -> list[tuple[str, str, int]]:
    """Name, address and port for each listening socket of a process and of those that it started."""
    listening = []
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            sockets = [one for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
            listening += [(process.name(), one.laddr.ip, one.laddr.port) for one in sockets]
    return listening
