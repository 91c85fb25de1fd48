"""As `python flockless.py ERRNO VERB...`: `lgd VERB...` on a kernel whose flock fails so, as on a file system without.

A filter of system calls (seccomp) answers for the kernel, in this process and in those that it starts.
"""

import ctypes
import platform
import struct
import sys
from pathlib import Path

_FLOCK = {"x86_64": 73, "aarch64": 32}
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_RETURN_ERRNO, _ALLOW = 0x00050000, 0x7FFF0000
_SET_SECCOMP, _FILTER, _NO_NEW_PRIVILEGES = 22, 2, 38


def is_possible() -> bool:
    """Whether this machine has such filters."""
    return sys.platform == "linux" and platform.machine() in _FLOCK and Path("/proc/sys/kernel/seccomp").exists()


def break_flock(number: int) -> None:
    """Have flock fail with an errno from here on."""

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    rules = [
        (_LOAD, 0, 0, 0),
        (_JUMP_IF_EQUAL, 0, 1, _FLOCK[platform.machine()]),
        (_RETURN, 0, 0, _RETURN_ERRNO | number),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *rule) for rule in rules))
    program = Program(len(rules), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in ((_NO_NEW_PRIVILEGES, 1, 0, 0, 0), (_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0)):
        if libc.prctl(*call):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    break_flock(int(sys.argv[1]))
    from lgd.cli import main

    sys.exit(main(sys.argv[2:]))
