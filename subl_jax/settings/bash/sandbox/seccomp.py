"""The system call filter of the sandbox, written as classic BPF by hand for x86_64 and aarch64.

A hand-written program because the alternatives need more on the machine than they give: pyseccomp is a binding that needs
libseccomp2 installed, and the filter is one flat list of numbers. Everything not named here is allowed: the other walls (user,
mount, pid and network namespaces, capabilities) do not depend on it.
"""

from __future__ import annotations

import errno
import struct

# linux/filter.h, linux/seccomp.h, linux/audit.h
_LOAD, _EQUAL, _GREATER_EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16
_ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000
MACHINES = tuple(_ARCHES)

# (x86_64, aarch64) numbers of the calls refused outright.
_REFUSED: dict[str, tuple[int, int]] = {
    # namespaces
    "unshare": (272, 97),
    "setns": (308, 268),
    # mounts and roots
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    # keys
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # large attack surfaces
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "fanotify_init": (300, 262),
    "open_by_handle_at": (304, 265),
    "personality": (135, 92),
    # the machine
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    "lookup_dcookie": (212, 18),
    "settimeofday": (170, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    # memory that outlives a process or is counted to nobody: System V objects, memory files
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "setxattrat": (463, 463),
    # every socket: no shell task needs one, and abstract ones ignore the file system
    "socket": (41, 198),
    "socketpair": (53, 199),
}
_X86_ONLY = {"modify_ldt": 154, "uselib": 134, "iopl": 172, "ioperm": 173, "sysfs": 139, "_sysctl": 156, "ustat": 136}
_CLONE, _CLONE3, _IOCTL = (56, 220), (435, 435), (16, 29)
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_NAMESPACE_FLAGS = 0x7E020000
# TIOCSTI types into a terminal, TIOCLINUX pastes into a console.
_TERMINAL_REQUESTS = (0x5412, 0x541C)
# setxattr, lsetxattr, fsetxattr: an access list of 64 KiB on every file is kernel memory that no cgroup counts. A longest
# value that any sensible list stays far below.
_SET_ATTRIBUTE = ((188, 5), (189, 6), (190, 7))
_LONGEST_ATTRIBUTE = 1024


def _statement(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def program(machine: str) -> bytes:
    """The filter (struct sock_filter[]) for one of MACHINES."""
    column = 0 if machine == "x86_64" else 1
    refuse = _statement(_RETURN, _ERRNO | errno.EPERM)
    lines = [_statement(_LOAD, _ARCH_AT), _statement(_EQUAL, _ARCHES[machine], 1, 0), refuse]
    lines.append(_statement(_LOAD, _NUMBER_AT))
    if machine == "x86_64":
        lines += [_statement(_GREATER_EQUAL, _X32_BIT, 0, 1), refuse]
    refused = [numbers[column] for numbers in _REFUSED.values()]
    if machine == "x86_64":
        refused += _X86_ONLY.values()
    for number in refused:
        lines += [_statement(_EQUAL, number, 0, 1), refuse]
    # clone3 hides its flags behind a pointer; ENOSYS makes the C library fall back to clone.
    lines += [_statement(_EQUAL, _CLONE3[column], 0, 1), _statement(_RETURN, _ERRNO | errno.ENOSYS)]
    # clone: flags are the low half of the first argument (both machines are little-endian).
    lines += [_statement(_EQUAL, _CLONE[column], 0, 4), _statement(_LOAD, _ARGUMENTS_AT)]
    lines += [_statement(_ANY_BIT, _NAMESPACE_FLAGS, 0, 1), refuse, _statement(_RETURN, _ALLOW)]
    # ioctl: the request is the low half of the second argument; the kernel looks at no more either.
    lines += [_statement(_EQUAL, _IOCTL[column], 0, 5), _statement(_LOAD, _ARGUMENTS_AT + 8)]
    lines += [_statement(_EQUAL, request, 3 - place, 0) for place, request in enumerate(_TERMINAL_REQUESTS, 1)]
    lines += [_statement(_RETURN, _ALLOW), refuse]
    # The size is the fourth argument; the kernel itself refuses one that needs the upper half.
    for numbers in _SET_ATTRIBUTE:
        lines += [_statement(_EQUAL, numbers[column], 0, 4), _statement(_LOAD, _ARGUMENTS_AT + 24)]
        lines += [_statement(_GREATER_EQUAL, _LONGEST_ATTRIBUTE + 1, 0, 1), refuse, _statement(_RETURN, _ALLOW)]
    lines.append(_statement(_RETURN, _ALLOW))
    return b"".join(lines)
