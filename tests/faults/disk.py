"""A disk that refuses: errors injected at chosen calls, and file systems that are full."""

import errno
import io
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self

import pytest

REFUSALS: Final = (errno.ENOSPC, errno.EIO, errno.EROFS)
_CALLS: Final = ("open", "fsync", "replace", "rename", "mkdir")


class RefusingDisk:
    """Counts calls that change a disk below a folder, and refuses the chosen one.

    Writes through Python's files count too, and write half of what they were given
    before they are refused.
    """

    def __init__(self, code: int, refused: int) -> None:
        self.calls: list[str] = []
        self._code = code
        self._refused = refused

    @property
    def has_refused(self) -> bool:
        """Whether the chosen call has come."""
        return len(self.calls) > self._refused

    def count(self, name: str) -> bool:
        """Note a call; whether it is to be refused."""
        self.calls.append(name)
        return len(self.calls) - 1 == self._refused

    def refuse(self) -> None:
        """Raises: OSError, as the system would."""
        raise OSError(self._code, os.strerror(self._code))


class _Written:
    """A file whose writes can be refused halfway."""

    def __init__(self, file: Any, disk: RefusingDisk) -> None:
        self._file = file
        self._disk = disk

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        if self._disk.count("write"):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            self._disk.refuse()
        return int(self._file.write(data))


@contextmanager
def refusing(code: int, refused: int) -> Iterator[RefusingDisk]:
    """The `refused`-th call from now on fails with `code`; later ones do not."""
    disk = RefusingDisk(code, refused)

    def guarded(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def maybe(*args: Any, **kwargs: Any) -> Any:
            if disk.count(name):
                disk.refuse()
            return call(*args, **kwargs)

        return maybe

    with pytest.MonkeyPatch.context() as patch:
        for name in _CALLS:
            patch.setattr(os, name, guarded(name, getattr(os, name)))
        opened = io.open

        def open_counted(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("aw+x"):
                return opened(file, mode, *args, **kwargs)
            return _Written(guarded("open", opened)(file, mode, *args, **kwargs), disk)

        patch.setattr(io, "open", open_counted)
        yield disk


@contextmanager
def small_disk(kib: int) -> Iterator[Path]:
    """A file system of so many KiB; where none can be mounted, skips, or fails in CI."""
    folder = Path(tempfile.mkdtemp(prefix="small-disk-"))
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(command, check=False, capture_output=True)
    try:
        if not mounted or mounted.returncode:
            reason = "a small file system cannot be mounted here; it takes root"
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(reason)
        yield folder
    finally:
        if mounted and not mounted.returncode:
            subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def resize(folder: Path, kib: int) -> None:
    """Give a small file system another size."""
    subprocess.run(["mount", "-o", f"remount,size={kib}k", str(folder)], check=True)


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """Leave no room on a small file system while the block runs."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Take writing from a small file system while the block runs."""
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
