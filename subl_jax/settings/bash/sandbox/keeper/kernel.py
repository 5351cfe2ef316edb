"""The system calls that Python 3.11 does not offer: namespaces, mounts, capabilities, seccomp.

Every function raises OSError with the name of the call, so that a refusal can be told apart from any other failure.
"""

from __future__ import annotations

import ctypes
import os

NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2

# linux/capability.h
CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER, CAP_FSETID = 0, 1, 2, 3, 4
CAP_KILL, CAP_SETGID, CAP_SETUID = 5, 6, 7

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 8, 22, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 36, 38, 47
_SECCOMP_MODE_FILTER = 2
_AMBIENT_RAISE = 2
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def _called(name: str, *arguments: object) -> int:
    result = getattr(_libc, name)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """The system call unshare."""
    _called("unshare", ctypes.c_int(flags))


def setns(descriptor: int, flags: int) -> None:
    """The system call setns; `descriptor` is a namespace file or a pidfd."""
    _called("setns", ctypes.c_int(descriptor), ctypes.c_int(flags))


def mount(source: str | None, target: str, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    """The system call mount."""
    texts = [None if text is None else text.encode() for text in (source, target, kind, data)]
    _called("mount", texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])


def detach(target: str) -> None:
    """The system call umount2 with MNT_DETACH."""
    _called("umount2", target.encode(), ctypes.c_int(MNT_DETACH))


def pivot_root(new: str, old: str) -> None:
    """The system call pivot_root; glibc exports it without declaring it."""
    _called("pivot_root", new.encode(), old.encode())


def prctl(option: int, *values: int) -> None:
    """The system call prctl with integer arguments."""
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    _called("prctl", ctypes.c_int(option), *padded)


def die_with_parent(signal: int = 9) -> None:
    """PR_SET_PDEATHSIG; call it after the last change of user, which clears it."""
    prctl(_PR_SET_PDEATHSIG, signal)


def show_in_proc() -> None:
    """PR_SET_DUMPABLE: gives /proc/<pid> back to its user after a change of user, which takes it away."""
    prctl(_PR_SET_DUMPABLE, 1)


def adopt_orphans() -> None:
    """PR_SET_CHILD_SUBREAPER."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def become(user: int, group: int, groups: list[int], capabilities: list[int], last_capability: int) -> None:
    """Turns this process, sandbox root until now, into `user` with these capabilities and no way to any other.

    `capabilities` end in the effective, permitted, inheritable, ambient and bounding sets, so an executed program keeps them.
    """
    for capability in range(last_capability + 1):
        if capability not in capabilities:
            prctl(_PR_CAPBSET_DROP, capability)
    os.setgroups(groups)
    os.setresgid(group, group, group)
    prctl(_PR_SET_KEEPCAPS, 1)
    os.setresuid(user, user, user)
    mask = sum(1 << capability for capability in capabilities)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)(mask, mask, mask, 0, 0, 0)  # effective, permitted, inheritable; all below bit 32
    _called("capset", header, data)
    for capability in capabilities:
        prctl(_PR_CAP_AMBIENT, _AMBIENT_RAISE, capability)
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def filter_calls(program: bytes) -> None:
    """Installs a seccomp filter (struct sock_filter[]) for good; needs no_new_privs."""
    buffer = ctypes.create_string_buffer(program, len(program))
    fprog = _Program(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    _called(
        "prctl",
        ctypes.c_int(_PR_SET_SECCOMP),
        ctypes.c_ulong(_SECCOMP_MODE_FILTER),
        ctypes.byref(fprog),
        ctypes.c_ulong(0),
        ctypes.c_ulong(0),
    )
