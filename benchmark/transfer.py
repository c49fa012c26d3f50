"""A run's folder and log, carried in pieces between machines that share no disk.

Whatever breaks in the middle, each file on the receiving side is whole, and checkpoint.pt alone is a state to resume
from.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

PIECE_BYTES = 32 * 2**20
STAYS = "finished.json"  # the sweep's mark, made on its own side

Piece = tuple[str, bytes, bool]
"""name below the run folder's parent, the next bytes of that file, whether it ends with them"""


def pieces(folder: Path, sent: dict[str, tuple]) -> Iterator[Piece]:
    """Of the run folder and the log beside it, the files that have changed since `sent`, which is brought up to date.

    Half-written files are left out: what ends in .tmp, or will have been replaced when its turn comes.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.name != STAYS and path.suffix != ".tmp"]
    for path in [*paths, folder.with_name(folder.name + ".log")]:
        # Replaced or removed since it was listed, or a folder.
        with contextlib.suppress(FileNotFoundError, IsADirectoryError), open(path, "rb") as file:
            status, name = os.fstat(file.fileno()), str(path.relative_to(folder.parent))
            state = (status.st_ino, status.st_size, status.st_mtime_ns)
            if sent.get(name) == state:
                continue
            left, ended = status.st_size, False
            while not ended:
                data = file.read(min(PIECE_BYTES, left))
                left -= len(data)
                ended = not left or not data
                yield name, data, ended
            sent[name] = state


class Receiver:
    """Takes the pieces of one run."""

    def __init__(self, folder: Path):
        self.folder, self.part = folder, folder.with_name(f".{folder.name}.part")
        self.part.unlink(missing_ok=True)  # what was cut off

    def accept(self, piece: Piece) -> None:
        name, data, ended = piece
        path = self.folder.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.part, "ab") as file:
            file.write(data)
        if not ended:
            return
        if path.parent == self.folder.parent:  # the log: the lock is on this very file
            shutil.copyfile(self.part, path)
            self.part.unlink()
        else:
            os.replace(self.part, path)
