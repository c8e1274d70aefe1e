"""Give resident pages of a mapped file back to the system where nothing reads them for now. Linux; elsewhere nothing is
given back. Knows no weights: whoever reads such a tensor later finds it as it was, from the file.
"""

from __future__ import annotations

import ctypes
import mmap
from itertools import pairwise

import torch
from torch import Tensor

_FILE, _SWAPPED = 61, 62  # bits of an entry of the page map; the sign says "present"


def give_back(tensor: Tensor) -> int:
    """Bytes of a contiguous CPU `tensor` that are resident in this process no more; whole pages only.

    Only pages that are the file's own go: one that was written to, or that no file stands behind, stays.
    """
    size = mmap.PAGESIZE
    first, last = -(-tensor.data_ptr() // size), (tensor.data_ptr() + tensor.nbytes) // size
    if first >= last or not tensor.is_contiguous():
        return 0
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(8 * first)
            entries = bytearray(pagemap.read(8 * (last - first)))
    except OSError:
        return 0
    if len(entries) < 8 * (last - first):
        return 0
    page = torch.frombuffer(entries, dtype=torch.int64)
    # Without this a weight that was changed in place would silently be the file's again.
    written = ((page < 0) | (page >> _SWAPPED & 1).bool()) & ~(page >> _FILE & 1).bool()
    edges = ((written[1:] != written[:-1]).nonzero().flatten() + 1).tolist()
    madvise, given = ctypes.CDLL(None).madvise, 0
    for start, stop in pairwise([0, *edges, len(page)]):
        place, length = ctypes.c_void_p((first + start) * size), ctypes.c_size_t((stop - start) * size)
        if not written[start] and madvise(place, length, mmap.MADV_DONTNEED) == 0:
            given += int((page[start:stop] < 0).sum()) * size
    return given
