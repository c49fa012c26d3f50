"""A run's folder and log, carried in pieces between machines that share no disk.

Whatever breaks in the middle, the receiving side holds a state to resume from: files arrive beside the run folder and
replace the old ones together, checkpoint.pt last, so that progress.csv always reaches as far as the checkpoint (the
script drops the rows after it).
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

PIECE_BYTES = 32 * 2**20
LAST = "checkpoint.pt"
# The older checkpoint and half-written files serve only where they are; the sweep's mark is made on its own side.
STAYS = (".lock", "checkpoint.previous.pt", "finished.json")

Piece = tuple[str | None, bytes]
"""name below the run folder's parent and the next bytes of that file, or None when all files are complete"""


def pieces(folder: Path, sent: dict[str, tuple]) -> Iterator[Piece]:
    """Of the run folder and the log beside it, the files that have changed since `sent`, which is brought up to date.

    The checkpoint is opened before the others are read: what they hold is at least as new.
    """
    paths = [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
    paths = [path for path in paths if path.name not in STAYS and path.suffix != ".tmp"]
    paths.sort(key=lambda path: path.name != LAST)
    paths.append(folder.with_name(folder.name + ".log"))
    with contextlib.ExitStack() as stack:
        changed = []
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # replaced or removed since it was listed
                file = stack.enter_context(open(path, "rb"))
                status, name = os.fstat(file.fileno()), str(path.relative_to(folder.parent))
                state = (status.st_ino, status.st_size, status.st_mtime_ns)
                if sent.get(name) != state:
                    sent[name] = state
                    changed.append((name, file, status.st_size))
        for name, file, size in changed:
            while True:
                data = file.read(min(PIECE_BYTES, size))
                size -= len(data)
                yield name, data
                if not data or not size:
                    break
        if changed:
            yield None, b""


class Receiver:
    """Takes the pieces of one run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.incoming = folder.with_name(f".{folder.name}.incoming")
        shutil.rmtree(self.incoming, ignore_errors=True)  # what was cut off
        self.file, self.name = None, None

    def accept(self, piece: Piece) -> None:
        name, data = piece
        if name != self.name:
            if self.file:
                self.file.close()
            self.file, self.name = None, name
            if name is None:
                self.replace()
                return
            path = self.incoming / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "wb")  # noqa: SIM115 - stays open between calls
        self.file.write(data)

    def replace(self) -> None:
        paths = [path for path in self.incoming.rglob("*") if path.is_file()]
        for path in sorted(paths, key=lambda path: path.name == LAST):
            target = self.folder.parent / path.relative_to(self.incoming)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        shutil.rmtree(self.incoming)
