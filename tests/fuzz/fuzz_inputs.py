"""The inputs of a target: each is a real file with changes that a seed and a number determine."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import fuzz_containers as containers
import pyarrow as pa
from fuzz_bytes import change_bytes
from fuzz_checksums import forged
from fuzz_json import change_json, change_json_lines
from fuzz_queries import change_parameters, change_query
from fuzz_targets import Seed, Target

Change = Callable[[Random, bytes], bytes]

BOMB_SHARE = 1 / 2000
"""Share of a target's inputs that are bombs: each takes seconds to make and to read."""


def _change_packed(random: Random, name: str, data: bytes) -> bytes:
    """A packed text: the text changed and packed again."""
    unpack: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".xz": lzma.decompress, ".zst": _unpacked}
    content = unpack[name[name.rindex(".") :]](data)
    change = change_json_lines if ".jsonl" in name and random.random() < 0.5 else change_bytes
    return containers.packed(name, change(random, content))


def _unpacked(data: bytes) -> bytes:
    with pa.CompressedInputStream(pa.BufferReader(data), "zstd") as stream:
        return bytes(stream.read())


def change_tokenizer(random: Random, data: bytes) -> bytes:
    """A tokenizer.json with other ids, added tokens, or steps that make a text grow."""
    raw: dict[str, Any] = json.loads(data)
    vocabulary = raw["model"]["vocab"]
    kind = random.randrange(7)
    if kind == 0:
        vocabulary[random.choice(list(vocabulary))] = random.choice(
            (63, 64, 65, 10**9, 2**32 - 1, 2**32, -1, 1.5, None)
        )
    elif kind == 1:
        token = {
            "id": random.choice((3, 60, 63, 64, 10**9, 2**32 - 1)),
            "content": random.choice(("w1", "[PAD]", "", "\x1b[31m", "x" * 900)),
        }
        flags = {name: random.random() < 0.5 for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        raw["added_tokens"] = [token | flags] * random.choice((1, 2))
    elif kind == 2:
        step = {
            "type": "Replace",
            "pattern": {"String": random.choice(("w", "", "a"))},
            "content": "w" * random.choice((2, 40)),
        }
        raw["normalizer"] = {"type": "Sequence", "normalizers": [step] * random.choice((1, 2, 3, 6))}
    elif kind == 3:
        patterns = ("(w+)+$", "(?:a|a)*b", "\\p{L}+", "(", "", "((w*)*)*x", "(?=w)")
        behaviors = ("Isolated", "Removed", "MergedWithNext", "Contiguous", "x")
        split = {"type": "Split", "pattern": {"Regex": random.choice(patterns)}}
        raw["pre_tokenizer"] = split | {"behavior": random.choice(behaviors), "invert": random.random() < 0.5}
    elif kind == 4:
        names = ("ByteLevel", "Metaspace", "Fuse", "WordPiece", "BPEDecoder", "CTC", "ByteFallback", "Strip", "x")
        raw[random.choice(("decoder", "post_processor", "pre_tokenizer", "normalizer"))] = {
            "type": random.choice((*names, "NFC", "Lowercase", "Prepend", "Precompiled", "Digits", "BertNormalizer")),
            "content": "w",
            "start": random.choice((0, 1, 10**9, -1)),
            "stop": random.choice((0, 1, 10**9)),
            "prepend": "w",
            "prefix": "##",
            "cleanup": True,
            "precompiled_charsmap": random.choice(("", "AAAA", "/////wAAAA==")),
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
            "individual_digits": True,
            "replacement": "▁",
            "prepend_scheme": "always",
        }
    elif kind == 5:
        model: dict[str, Any] = {
            "type": random.choice(("BPE", "Unigram", "WordPiece", "WordLevel")),
            "unk_token": random.choice(("?", "no", None)),
        }
        model |= {
            "merges": random.choice(([], ["w 1"], [["w", "1"]], ["a"])),
            "unk_id": random.choice((0, 5, 10**9, None)),
        }
        model |= {"vocab": random.choice((vocabulary, [["w", -1.0], ["?", 0.0]], {}, [])), "byte_fallback": True}
        raw["model"] = model | {
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": random.choice((100, 0, 10**12)),
        }
    else:
        raw["truncation"] = {
            "max_length": random.choice((0, 1, 10**12)),
            "strategy": "LongestFirst",
            "stride": random.choice((0, 5)),
            "direction": "Right",
        }
        raw["padding"] = {
            "strategy": {"Fixed": random.choice((1, 10**9))},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "?",
        }
    return json.dumps(raw).encode()


KINDS: dict[str, Change] = {
    "bytes": change_bytes,
    "json": change_json,
    "json lines": change_json_lines,
    "tokenizer": change_tokenizer,
    "safetensors": containers.change_safetensors,
    "npy": containers.change_npy,
    "zip": containers.change_zip,
    "footer": containers.change_footer,
    "table": containers.change_table,
    "query": change_query,
    "parameters": change_parameters,
}

BOMBS = {
    "text bomb": (),
    "parquet bombs": ("parquet", "parquet dictionary"),
    "zip bomb": ("zip",),
    "npz bomb": ("npz",),
}


@dataclass(frozen=True)
class Input:
    """Changed bytes, the real file that they come from, and how they were changed."""

    place: int
    seed: Seed
    kind: str
    data: bytes


def make_input(target: Target, seeds: list[Seed], contents: list[bytes], seed: int, number: int) -> Input:
    """Input ``number`` of a target: the same for the same seed, whatever was made before."""
    random = Random(f"{seed}:{target.name}:{number}")
    place = random.randrange(len(seeds))
    chosen, data = seeds[place], contents[place]
    bombs = [kind for kind in chosen.kinds if kind in BOMBS]
    if bombs and random.random() < BOMB_SHARE:
        names = BOMBS[bombs[0]] or (chosen.file.suffix,)
        return Input(place, chosen, bombs[0], containers.bomb(random.choice(names)))
    kind = random.choice([kind for kind in chosen.kinds if kind not in BOMBS])
    if kind == "packed":
        return Input(place, chosen, kind, _change_packed(random, chosen.file.name, data))
    changed = KINDS[kind](random, data)
    if kind != "bytes" and random.random() < 0.05:
        changed = change_bytes(random, changed)
    return Input(place, chosen, kind, forged(changed) if target.forged else changed)
