"""Who has which pages of a device's cache: what a sequence takes, what prompts that begin alike share, what is freed first.

A block is PAGE positions of one sequence in a group of layers that need their pages for as long: all that have the same
window. Blocks are full of tokens that never change before anybody shares them, so that nobody ever writes what others read.
What no sequence has any more is kept as long as nobody needs its pages, the least recently used going first. Plain rules
over numbers; touches no device.
"""

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from dancemoe_jax.inference.cache import PAGE, blocks_of

Tokens = Callable[[int, int], Sequence[int]]
"""(start, count) -> tokens of a sequence."""


@dataclasses.dataclass(eq=False)
class _Block:
    """Pages of one block, one for each layer of its group; users: sequences that have it; key: by what it is found."""

    pages: np.ndarray
    users: int = 1
    key: tuple[int, bytes] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class _Group:
    """Layers with the same window, in tokens; 0: they need all positions."""

    layers: np.ndarray
    window: int

    def first_block(self, position: int) -> int:
        """The first block that a token at this position, or one behind it, looks at."""
        return max(0, position + 1 - self.window) // PAGE if self.window else 0


@dataclasses.dataclass(eq=False)
class _Held:
    """What the sequence in a slot has: by group its blocks, None where they are not needed any more; and the keys of its
    full blocks so far."""

    blocks: list[list[_Block | None]]
    keys: list[bytes]


class Pages:
    """The pages of one device.

    Args:
        pages: how many there are; windows: of each layer (ModelConfig.layer_windows).
        sequences: slots; context: longest sequence, in tokens; chunk: tokens that a step takes of a sequence at most.

    Attributes:
        table: int32 [layers, sequences, blocks], as `State.pages` has it; changed: whether anything in it is new.
        count: how many there are.
        found: prompt tokens that were there already, since the start; evicted: kept blocks whose pages were needed.
    """

    def __init__(self, pages: int, windows: Sequence[int], sequences: int, context: int, chunk: int) -> None:
        self.table = np.full((len(windows), sequences, blocks_of(context)), pages, np.int32)
        self.changed = True
        self.found = self.evicted = 0
        self._groups = [
            _Group(np.flatnonzero(np.asarray(windows) == window), window) for window in sorted(set(windows))
        ]
        self._chunk, self.count = chunk, pages
        self._free = list(range(pages - 1, -1, -1))
        self._known: dict[tuple[int, bytes], _Block] = {}
        self._kept: OrderedDict[_Block, None] = OrderedDict()  # no sequence has them; least recently used first
        self._kept_pages = 0
        self._held: dict[int, _Held] = {}

    @property
    def used(self) -> int:
        """Pages that sequences have."""
        return self.count - self._room

    @property
    def _room(self) -> int:
        """Pages that are free, or can be made so."""
        return len(self._free) + self._kept_pages

    def begin(self, slot: int, tokens: Tokens, prompt: int, share: bool = True) -> int | None:
        """Give a new sequence the pages of its prompt: how many of its tokens are in the cache already. None where there is
        no room for it, beside a block more for each that runs.

        Args:
            prompt: its tokens; share: whether it may have what others have left.
        """
        keys = self._keys(tokens, [], (prompt - 1) // PAGE) if share else []
        found = self._longest(keys)
        taken = [self._taken(g, group, keys, found) for g, group in enumerate(self._groups)]
        wanted = sum(len(group.layers) * self._coming(group, found, prompt) for group in self._groups)
        used_again = sum(len(b.pages) for blocks in taken for b in blocks if b is not None and not b.users)
        if wanted + (len(self._held) + 1) * len(self.table) > self._room - used_again:
            return None
        for blocks in taken:
            for block in blocks:
                if block is not None:
                    self._use(block)
        self._held[slot] = _Held(taken, keys[:found])
        for g, group in enumerate(self._groups):
            for number, block in enumerate(taken[g]):
                if block is not None:
                    self._write(group, slot, number, block)
            if not group.window:
                self._extend(slot, g, blocks_of(prompt))
        self.found += found * PAGE
        return found * PAGE

    def extend(self, slot: int, start: int, count: int) -> bool:
        """Make sure that tokens `start` to `start + count` of a sequence have their pages, and give back those that none of
        them looks at any more; false where there is no room."""
        held = self._held[slot]
        for g, group in enumerate(self._groups):
            for number in range(min(group.first_block(start), len(held.blocks[g]))):
                self._drop(held.blocks[g][number])
                held.blocks[g][number] = None
        return all(self._extend(slot, g, blocks_of(start + count)) for g in range(len(self._groups)))

    def note(self, slot: int, tokens: Tokens, cached: int) -> None:
        """The first `cached` tokens of a sequence are in its pages: others that begin with them may find them."""
        held = self._held[slot]
        known, full = len(held.keys), cached // PAGE
        if full == known:
            return
        held.keys = self._keys(tokens, held.keys, full)
        for number in range(known, full):
            for g in range(len(self._groups)):
                block, key = held.blocks[g][number], (g, held.keys[number])
                if block is not None and key not in self._known:
                    self._known[key], block.key = block, key

    def end(self, slot: int) -> None:
        """A sequence needs its pages no longer."""
        for blocks in self._held.pop(slot).blocks:
            for block in reversed(blocks):  # the end of a text is less likely to be asked for again
                self._drop(block)

    def _keys(self, tokens: Tokens, known: list[bytes], count: int) -> list[bytes]:
        """Keys of a sequence's first `count` blocks, each made of all tokens up to its end."""
        keys = list(known)
        for number in range(len(keys), count):
            own = np.asarray(tokens(number * PAGE, PAGE), np.int64).tobytes()
            keys.append(hashlib.blake2b((keys[-1] if keys else b"") + own, digest_size=16).digest())
        return keys

    def _longest(self, keys: list[bytes]) -> int:
        """How many of the blocks with these keys a new sequence can begin with: every group has what it still looks at."""
        for count in range(len(keys), 0, -1):
            if all(
                (g, keys[number]) in self._known
                for g, group in enumerate(self._groups)
                for number in range(group.first_block(count * PAGE), count)
            ):
                return count
        return 0

    def _taken(self, g: int, group: _Group, keys: list[bytes], found: int) -> list[_Block | None]:
        first = group.first_block(found * PAGE)
        return [None if number < first else self._known[g, keys[number]] for number in range(found)]

    def _coming(self, group: _Group, found: int, prompt: int) -> int:
        """Blocks that a prompt will need at once beside those that it finds."""
        most = blocks_of(prompt) - found
        return min(most, blocks_of(group.window + self._chunk) + 1) if group.window else most

    def _extend(self, slot: int, g: int, blocks: int) -> bool:
        group, own = self._groups[g], self._held[slot].blocks[g]
        while len(own) < blocks:
            pages = self._allocate(len(group.layers))
            if pages is None:
                return False
            own.append(new := _Block(pages))
            self._write(group, slot, len(own) - 1, new)
        return True

    def _write(self, group: _Group, slot: int, number: int, block: _Block) -> None:
        self.table[group.layers, slot, number] = block.pages
        self.changed = True

    def _allocate(self, count: int) -> np.ndarray | None:
        if self._room < count:
            return None
        while len(self._free) < count:
            block, _ = self._kept.popitem(last=False)
            self._kept_pages -= len(block.pages)
            self._forget(block)
            self.evicted += 1
        pages = self._free[-count:]
        del self._free[-count:]
        return np.array(pages, np.int32)

    def _use(self, block: _Block) -> None:
        if not block.users:
            del self._kept[block]
            self._kept_pages -= len(block.pages)
        block.users += 1

    def _drop(self, block: _Block | None) -> None:
        if block is None:
            return
        block.users -= 1
        if block.users:
            return
        if block.key is None:
            self._free += block.pages.tolist()
        else:
            self._kept[block] = None
            self._kept_pages += len(block.pages)

    def _forget(self, block: _Block) -> None:
        assert block.key is not None
        del self._known[block.key]
        self._free += block.pages.tolist()


def least_pages(windows: Sequence[int], context: int, chunk: int) -> int:
    """Pages that one sequence of the whole context needs at once, so that it can always be served."""
    blocks = [
        min(blocks_of(context), blocks_of(window + chunk) + 1) if window else blocks_of(context) for window in windows
    ]
    return sum(blocks) + len(windows)
