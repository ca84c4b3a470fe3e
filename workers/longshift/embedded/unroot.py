"""Run a command as the user ``nobody``: PostgreSQL refuses to run as root, and containers often have only root.

A script on the bare standard library (``python -I -S unroot.py COMMAND ...``). Where Linux allows it, the command keeps
one capability, CAP_DAC_OVERRIDE, so that it can reach its binaries and its data below a folder such as ``/root``
without anybody changing the permissions of that folder. That is still far less than the root it started from.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import sys

ACCOUNT = "nobody"

# linux/prctl.h, linux/securebits.h, linux/capability.h
PR_SET_SECUREBITS = 28
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
SECBIT_NO_SETUID_FIXUP = 1 << 2
CAPABILITY_VERSION_3 = 0x20080522
CAP_DAC_OVERRIDE = 1


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def become(account: pwd.struct_passwd) -> None:
    """Give up root for good. That Linux refuses the capability is no error: the folders may be readable without it."""
    os.setgroups([])
    os.setgid(account.pw_gid)
    if sys.platform != "linux":
        os.setuid(account.pw_uid)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    # Without this bit access(2) ignores capabilities of everybody but root, and initdb asks it for its binaries.
    libc.prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0)
    os.setuid(account.pw_uid)
    if _set_capabilities(libc, 1 << CAP_DAC_OVERRIDE):
        libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_OVERRIDE, 0, 0)
    elif not _set_capabilities(libc, 0):
        raise OSError(ctypes.get_errno(), "cannot give up the capabilities of root")


def _set_capabilities(libc: ctypes.CDLL, bits: int) -> bool:
    """Make these the only ones; False if the kernel refuses, because this process does not have them."""
    sets = (_Sets * 2)(_Sets(bits, bits, bits), _Sets(0, 0, 0))
    return bool(libc.capset(ctypes.byref(_Header(CAPABILITY_VERSION_3, 0)), sets) == 0)


def main(command: list[str]) -> None:
    become(pwd.getpwnam(ACCOUNT))
    os.execv(command[0], command)  # noqa: S606 - to replace this process is the point


if __name__ == "__main__":
    main(sys.argv[1:])
