"""Zip archives read member by member, never unpacked onto the disk, and refused where they are made to do harm."""

import stat
import zipfile
import zlib
from functools import partial
from pathlib import PurePosixPath
from typing import IO, Any

from kpflow_dyn._problems.parameters import CheckpointError, listing

SMALL = 64 * 2**20
RATIO = 100
"""Members may hold so many times the size of the file together, or `SMALL` bytes: zeros shrink to a thousandth."""
MEMBERS = 100_000
PIECE = 2**20
PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Of these alone can a piece be read: others are unpacked whole, however large they are."""


class Archive:
    """A zip archive that is open for reading.

    Args:
        file: it, open for bytes.
        limit: how many bytes its members may have together; None for an archive that is a file of its own.
    """

    def __init__(self, file: IO[bytes], limit: int | None = None) -> None:
        size = file.seek(0, 2)
        self.limit = max(SMALL, RATIO * size) if limit is None else limit
        try:
            self._zip = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError) as error:
            raise CheckpointError(f"a damaged zip archive ({error})") from error
        members = self._zip.infolist()
        for member in members:
            _check_member(member)
        _check_sizes(members, size, self.limit)
        self.names = [member.filename for member in members if not member.is_dir()]

    def read(self, name: str) -> bytes:
        """The bytes of a member; its size is within the limit. Read at once, one could hold far more than it says."""
        try:
            with self._zip.open(name) as member:
                return b"".join(iter(partial(member.read, PIECE), b""))
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, OSError) as error:
            raise CheckpointError(f"the member {name!r} is damaged ({error})") from error
        except KeyError:
            raise CheckpointError(f"there is no member {name!r} in the archive") from None

    def ending(self, suffix: str) -> list[str]:
        """The names of members that end so."""
        return [name for name in self.names if name.endswith(suffix)]


def _check_member(member: zipfile.ZipInfo) -> None:
    path = PurePosixPath(member.filename.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or any(":" in part for part in path.parts[:1]):
        raise CheckpointError(f"the archive has a member at {member.filename!r}, outside of it; no checkpoint has")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise CheckpointError(f"the member {member.filename!r} of the archive is a link; no checkpoint has any")
    if member.flag_bits & 1:
        raise CheckpointError(f"the member {member.filename!r} of the archive is encrypted; save it without a password")
    if member.compress_type not in PACKED:
        raise CheckpointError(f"the member {member.filename!r} is packed as no checkpoint is; save without compression")
    if member.compress_type == zipfile.ZIP_STORED and member.file_size != member.compress_size:
        raise CheckpointError(f"the member {member.filename!r} of the archive says two sizes; the file is damaged")


def _check_sizes(members: list[zipfile.ZipInfo], size: int, limit: int) -> None:
    packed, unpacked = (sum(getattr(member, name) for member in members) for name in ("compress_size", "file_size"))
    if len(members) > MEMBERS or packed > size or unpacked > limit:
        raise CheckpointError(
            f"the archive of {size:,} bytes would unpack to {unpacked:,} bytes in {len(members):,} members; expected "
            f"at most {limit:,} bytes, {RATIO} times the file: a zip bomb, or weights that are zero; save without "
            "compression"
        )


def unknown_archive(archive: Archive) -> CheckpointError:
    """What is said of a zip file without weights."""
    return CheckpointError(
        "a zip archive that is no checkpoint: expected one of torch.save, numpy.savez, Keras or stable-baselines3, got "
        f"{listing(archive.names)}"
    )


def is_zip(start: Any) -> bool:
    """Whether a file with this start is a zip archive."""
    return bytes(start[:4]) in (b"PK\x03\x04", b"PK\x05\x06")
