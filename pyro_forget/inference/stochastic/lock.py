"""One writer at a time: a lock that goes when its process does."""

import errno
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

LOCK = "writer.lock"
_HELD = (errno.EAGAIN, errno.EACCES)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Within the context no other run writes to `folder`, which is made if it is missing.

    The lock is the system's on a file that tells whose it is: it ends with the process, whatever ends that, so that
    there are no stale ones. The file stays. There is no lock on Windows, nor where the file system knows none.

    Raises:
        ValueError: another run, in this process or another, is writing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        if not _locked(file.fileno()):
            file.seek(0)
            raise ValueError(
                f"{folder} is being written to by {file.read() or 'another run'}: wait for its end, or choose another "
                "`store`. To read what is there, `Sampling.open`."
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def _locked(descriptor: int) -> bool:
    """Take the lock, until the file is closed; False where someone has it."""
    if sys.platform != "win32":
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in _HELD
    return True
