"""A sentencepiece character map, compiled here: what `nmt_nfkc` holds for Latin letters, ligatures and controls."""

import itertools
import unicodedata


def latin_rules() -> dict[str, str]:
    """Characters -> their NFKC form, in every order of composing them; controls are dropped or a space."""
    rules = {chr(c): "" for c in range(1, 32)} | dict.fromkeys("\t\n\r", " ")
    points = itertools.chain(range(0xA0, 0x250), range(0x1E00, 0x1F00), range(0xFB00, 0xFB07), range(0xFF01, 0xFF5F))
    for character in map(chr, (*points, 0x2026)):
        new = unicodedata.normalize("NFKC", character)
        if new != character:
            rules[character] = new
            continue
        full = unicodedata.normalize("NFD", character)
        for k in range(1, len(full)):
            rules[unicodedata.normalize("NFC", full[:k]) + full[k:]] = character
    rules.pop("\0", None)
    return {key: new for key, new in rules.items() if key != new}


def compile_map(rules: dict[str, str]) -> bytes:
    """The bytes that sentencepiece calls `precompiled_charsmap`: a darts-clone double array and its strings."""
    strings = bytearray()
    tree: dict = {}
    for key, new in rules.items():
        node = tree
        for byte in key.encode():
            node = node.setdefault(byte, {})
        node[0] = len(strings)  # no key holds a NUL
        strings += new.encode() + b"\0"
    units: dict[int, int] = {0: 0}
    bases: set[int] = set()
    waiting, lowest = [(0, tree)], 1
    while waiting:
        place, node = waiting.pop()
        base = next(b for b in itertools.count(lowest) if b not in bases and all((b ^ c) not in units for c in node))
        bases.add(base)
        lowest = max(lowest, base - 512)
        units[place] |= (base ^ place) << 10 | (0x100 if 0 in node else 0)
        for label, below in node.items():
            units[base ^ label] = below | 1 << 31 if label == 0 else label
            if label:
                waiting.append((base ^ label, below))
    array = [units.get(k, 0) for k in range((max(units) | 0xFF) + 1)]
    trie = b"".join(unit.to_bytes(4, "little") for unit in array)
    return len(trie).to_bytes(4, "little") + trie + bytes(strings)
