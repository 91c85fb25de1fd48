"""Where processes listen, and may listen."""

import contextlib
import socket

import psutil


def list_listening(pid: int) -> list[tuple[str, str, int]]:
    """Name, address and port for each listening socket of a process and of those that it started."""
    listening = []
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            sockets = [one for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
            listening += [(process.name(), one.laddr.ip, one.laddr.port) for one in sockets]
    return listening


def free_ports(count: int) -> list[int]:
    """Ports on which nobody listens, on any interface."""
    with contextlib.ExitStack() as sockets:
        opened = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for one in opened:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in opened]


def find_own_address() -> str:
    """This machine's address on the network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Nothing is sent: the kernel chooses the address from which it would be.
        probe.connect(("192.0.2.1", 9))
        return probe.getsockname()[0]
