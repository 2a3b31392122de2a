"""A disk of a few records: a directory that is full as a real one is, and a mounted file system that really is."""

import errno
import os
import shutil
import subprocess
from contextlib import contextmanager

from cacheflow.stores.directory import RecordDirectory
from support.lacking import lacking


class SmallDisk(RecordDirectory):
    """A directory on a disk of so many bytes, of which other users take some; counts the writes that found no room."""

    def __init__(self, root, disk_bytes, *, error=errno.ENOSPC):
        super().__init__(root)
        self.disk_bytes = disk_bytes
        self.others_bytes = 0
        self.error = error
        self.num_full = 0

    def record_bytes(self):
        return sum(path.stat().st_size for path in self.root.glob("objects/*/*/*"))

    def free_bytes(self):
        return max(0, self.disk_bytes - self.others_bytes - self.record_bytes())

    def write(self, name, parts, *, sync):
        if sum(part.nbytes for part in parts) > self.free_bytes():
            self.num_full += 1
            raise OSError(self.error, os.strerror(self.error))
        super().write(name, parts, sync=sync)


@contextmanager
def mounted(folder, *, num_bytes):
    """A tmpfs of ``num_bytes`` at ``folder``; where none may be mounted it skips a user's test and fails CI's."""
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if mount is None or umount is None:
        lacking("needs `mount`, which is not installed here")
    folder.mkdir()
    command = [mount, "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    if tried.returncode:
        reason = tried.stderr.strip().partition("\n")[0]
        lacking(f"needs to mount a tmpfs, which is not permitted here: {reason}")
    try:
        yield folder
    finally:
        subprocess.run([umount, str(folder)], check=True)
