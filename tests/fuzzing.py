"""Damaged and hostile files, made from sound ones by a seed, and limits within which reading one must end."""

import contextlib
import json
import random
import re
import resource
import signal
import struct
from collections.abc import Callable, Iterator

import yaml

Mutation = Callable[[bytes, random.Random], bytes]

_DEEP = "deep@@"
_VALUES = [None, True, False, -1, 0, 1, 3, 0.5, -1e308, 1e999, 2**31, 2**32 + 1, 10**9, 10**12, 2**63, 10**400]
_VALUES += ["", "x", "\0", "ü" * 2000, "../../etc", "1e9", [], {}, [[]], {"": None}, [1] * 5000, {"a": {"b": [1]}}]
_WORDS = [b"&a [*a, *a]", b"!!python/object:os.system {}", b"2001-99-99", b"0000-00-00", b"? [a] : b", b"1:60:60:60"]
_WORDS += [b"\t", b"- - - -", b"*b", b"<<: [1]", b"%YAML 9.9\n---\n", b"9" * 5000, b"...\n---\n", b"\xff\xfe", b".nan"]


@contextlib.contextmanager
def limits(seconds: int = 30, bytes_more: int = 8 * 2**30) -> Iterator[None]:
    """A TimeoutError after so many seconds, and a MemoryError where much more memory is asked for than is in use."""

    def stop(number, frame):
        raise TimeoutError(f"not done after {seconds} s")

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + bytes_more, hard))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def damaged_bytes(content: bytes, rng: random.Random, *, head: int | None = None) -> bytes:
    """Bytes flipped, cut off, taken out, doubled, or overwritten by huge numbers, within the first `head` bytes."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        start = rng.randrange(max(min(head or len(data), len(data)), 1))
        length = rng.choice([1, 4, 8, 100])
        match rng.randrange(6):
            case 0:
                data[start : start + 1] = bytes([data[start] ^ (1 << rng.randrange(8))]) if data else b"x"
            case 1:
                data[start : start + length] = rng.randbytes(length)
            case 2:
                del data[start : start + length]
            case 3:
                data[start:start] = data[start : start + length]
            case 4:
                number = rng.choice([2**64 - 1, 2**63, 2**40, 2**32 - 1, 2**31, 0])
                data[start : start + 8] = struct.pack("<Q", number)
            case 5 if rng.random() < 0.3:
                del data[start:]
    return bytes(data)


def damaged_json(content: bytes, rng: random.Random) -> bytes:
    """Values replaced by those of other types and sizes, swapped, taken out or nested deeply."""
    return _nested(json.dumps(_damaged_tree(json.loads(content), rng)), rng, "[", "]", '{"a":', "}")


def damaged_yaml(content: bytes, rng: random.Random) -> bytes:
    """As `damaged_json`, with words that mean something in YAML alone."""
    text = yaml.safe_dump(_damaged_tree(yaml.safe_load(content), rng), sort_keys=False)
    data = _nested(text, rng, "[", "]", "{a: ", "}")
    if rng.random() < 0.4:
        lines = data.split(b"\n")
        line = rng.randrange(len(lines))
        key, colon, _ = lines[line].partition(b": ")
        lines[line] = (key + colon if rng.random() < 0.7 else b"") + rng.choice(_WORDS)
        data = b"\n".join(lines)
    return data


def damaged_safetensors(content: bytes, rng: random.Random) -> bytes:
    """A header whose JSON is damaged, behind its right length or a wrong one."""
    length = struct.unpack("<Q", content[:8])[0]
    header = damaged_json(content[8 : 8 + length], rng)
    stated = rng.choice([len(header)] * 9 + [2**63, 0])
    return struct.pack("<Q", stated) + header + content[8 + length :]


def either(first: Mutation, second: Mutation) -> Mutation:
    return lambda content, rng: rng.choice([first, second])(content, rng)


def _damaged_tree(tree, rng: random.Random):
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        places = list(_places(tree))
        holder, key = rng.choice(places)
        match rng.randrange(6):
            case 0:
                del holder[key]
            case 1:
                other_holder, other_key = rng.choice(places)
                holder[key] = json.loads(json.dumps(other_holder[other_key], default=str))
            case 2:
                holder[key] = _DEEP
            case 3 if isinstance(holder, dict):
                holder[rng.choice(["", "a", "__class__", str(key) + "x"])] = holder.pop(key)
            case _:
                holder[key] = rng.choice(_VALUES)
        if not any(True for _ in _places(tree)):
            break
    return tree


def _places(tree) -> Iterator[tuple]:
    """Every holder and key of a tree; of long lists, the first places only."""
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree[:20]))
    for key, value in items:
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


def _nested(text: str, rng: random.Random, *brackets: str) -> bytes:
    depth = rng.choice([50, 500, 20_000])
    opening, closing = rng.choice([brackets[:2], brackets[2:]])
    return re.sub(f'"?{_DEEP}"?', opening * depth + "1" + closing * depth, text).encode()
