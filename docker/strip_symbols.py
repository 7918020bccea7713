"""Cut what only debuggers read from shared libraries: symbol tables and section headers behind the last segment.

TensorFlow's libraries are published with 200 MB of it. The dynamic linker reads segments alone, so that what is
left behaves the same; only stack traces of native code lose names of functions that a library doesn't export. This
does what binutils' `strip` would, without a compiler's tools in the build. Used by slim.py; standard library only.

Source:
    System V ABI, "ELF header" and "Program header".
"""

import struct
from pathlib import Path
from typing import BinaryIO

# ELF, 64 bits, little-endian.
MAGIC = b"\x7fELF\x02\x01"
HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")


def strip_symbols(path: Path) -> int:
    """Cut the file at `path`, if it is a 64-bit ELF file; return the number of bytes saved."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        start = file.read(HEADER.size)
        if len(start) < HEADER.size or not start.startswith(MAGIC):
            return 0
        fields = list(HEADER.unpack(start))
        end = _end_of_segments(file, fields)
        if not HEADER.size < end < size:
            return 0
        fields[6] = fields[12] = fields[13] = 0  # e_shoff, e_shnum, e_shstrndx: there are no sections
        file.seek(0)
        file.write(HEADER.pack(*fields))
        file.truncate(end)
    return size - end


def _end_of_segments(file: BinaryIO, fields: list[int]) -> int:
    """Return the offset behind everything that a program header names, those headers included."""
    offset, entry_size, count = fields[5], fields[9], fields[10]
    end = offset + entry_size * count
    for number in range(count):
        file.seek(offset + number * entry_size)
        _, _, segment_offset, _, _, in_file, _, _ = PROGRAM_HEADER.unpack(file.read(PROGRAM_HEADER.size))
        end = max(end, segment_offset + in_file)
    return end
