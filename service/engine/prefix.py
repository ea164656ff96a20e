"""The hash chain that names a prefix: SHA-256 over (digest so far, one grain of token ids).

A grain is 32 tokens: the unit in which computed keys and values are shared. The digest of grain i
names all tokens up to its end, and the namespace they were computed under, so equal digests mean
equal content wherever it lies. The chain starts from the namespace: everything that changes keys
and values, or who may share them.
"""

from __future__ import annotations

import hashlib
import struct

GRAIN = 32  # tokens


def chain_root(namespace: bytes, adapter: str = "", version: int = 0) -> bytes:
    """What an adapter computes is shared with nothing but the same version of it."""
    root = hashlib.sha256(b"pronk prefix namespace:" + namespace).digest()
    if not version:
        return root
    own = b"pronk prefix adapter:" + struct.pack("<Q", version) + adapter.encode()
    return hashlib.sha256(root + own).digest()


class PrefixChain:
    """Digests of the whole grains of one growing list of tokens; each grain is hashed once."""

    __slots__ = ("_pack", "_root", "digests", "grain")

    def __init__(self, root: bytes, grain: int = GRAIN) -> None:
        self.grain = grain
        self.digests: list[bytes] = []
        self._root = root
        self._pack = struct.Struct(f"<{grain}i").pack

    def extend(self, tokens: list[int], num_tokens: int) -> None:
        """Hashes the grains of ``tokens[:num_tokens]`` that are not hashed yet."""
        digests, grain = self.digests, self.grain
        last = digests[-1] if digests else self._root
        for start in range(len(digests) * grain, num_tokens - grain + 1, grain):
            last = hashlib.sha256(last + self._pack(*tokens[start : start + grain])).digest()
            digests.append(last)

    def fork(self) -> PrefixChain:
        child = PrefixChain(self._root, self.grain)
        child.digests = self.digests.copy()
        return child
