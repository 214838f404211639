"""What a failed file operation means for the user, in one line with the true cause."""

from __future__ import annotations

import errno
import os
import re

FULL = (errno.ENOSPC, errno.EDQUOT)
_SERVER = "the file server does not answer; check the mount, or choose another path"
_FIXES = {
    errno.ENOSPC: "make room, or choose another path",
    errno.EDQUOT: "make room within the quota, or choose another path",
    errno.EFBIG: "no file may grow so far here (ulimit -f, or the file system); raise it, or choose another path",
    errno.EACCES: "get the right to write it, or choose another path",
    errno.EPERM: "get the right to write it, or choose another path",
    errno.EROFS: "it is mounted read-only; choose another path",
    errno.ESTALE: "the file server has lost or replaced it meanwhile; mount it again, or choose another path",
    errno.EIO: "the disk or the file server failed; check it (dmesg), or choose another path",
    errno.EBUSY: "another program or a mount holds it; end that, or choose another path",
    errno.ETXTBSY: "another program runs it; end that, or choose another path",
    errno.ETIMEDOUT: _SERVER,
    errno.EHOSTDOWN: _SERVER,
    errno.ENOTCONN: _SERVER,
    errno.EREMOTEIO: _SERVER,
    errno.ENOLINK: _SERVER,
    errno.ENXIO: "its device is gone; choose another path",
    errno.ENODEV: "its device is gone; choose another path",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine; end other programs",
    errno.ENOLCK: "the file system has no locks left, or none at all; choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "its links lead in a circle; choose another path",
}


def file_error_line(error: Exception) -> str | None:
    """The file, what the system says of it and what to do; None for an error of another kind, such as a file that is
    not there: that may be a bug. Also reads the errors of safetensors, which give the number in their text."""
    number = errno_of(error)
    if number not in _FIXES:
        return None
    unnamed = "a file could not be written" if number in (*FULL, errno.EFBIG, errno.EROFS) else "a file failed"
    name = getattr(error, "filename", None) or unnamed
    return f"{name}: {os.strerror(number)}; {_FIXES[number]}"


def errno_of(error: Exception) -> int | None:
    """The system's number of an error; None where there is none."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\bos error (\d+)\b", str(error))
    return int(match.group(1)) if match else None
