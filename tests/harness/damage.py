"""Ways in which files are damaged: bytes of any file, and the structure of JSON, GGUF, safetensors.

Every change is decided by a random generator, hence by its seed.
"""

import copy
import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

Rng = np.random.Generator
ODD_BYTES = (0, 1, 127, 128, 255)
ODD_INTEGERS = (
    0, 1, 2, 127, 128, 255, 256, 65535, 65536,
    2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, -(2**63), 2**64, 10**30,
    0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), float("-inf"),
    "", "a", "é\u4e2d", "\ud800", "\0", "../x", "x" * 5000, "0", "nan",
    [], [0], [None], [[]], ["a", "b"], [1, "a"], [[1, 2], [3]], {}, {"a": 1}, {"": None},
)  # fmt: skip
DEPTHS = (50, 2000, 200_000)


def pick(rng: Rng, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


# Bytes -------------------------------------------------------------------------------------------


def damage_bytes(rng: Rng, data: bytes, head: int | None = None) -> bytes:
    """One to three changes, three quarters of them in the first `head` bytes."""
    for _ in range(pick(rng, (1, 1, 2, 3))):
        if len(data) < 2:
            return bytes(rng.integers(0, 256, 3, dtype=np.uint8))
        size = len(data) if head is None or rng.random() < 0.25 else min(head, len(data))
        data = pick(rng, _BYTE_CHANGES)(rng, data, max(2, size))
    return data


def _chunk(rng: Rng, size: int) -> tuple[int, int]:
    begin = int(rng.integers(size))
    longest = pick(rng, (4, 64, 4096, size))
    return begin, min(size, begin + 1 + int(rng.integers(longest)))


def _flip_bits(rng: Rng, data: bytes, size: int) -> bytes:
    changed = bytearray(data)
    for at in rng.integers(0, size, pick(rng, (1, 1, 2, 8))):
        changed[at] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _set_bytes(rng: Rng, data: bytes, size: int) -> bytes:
    changed = bytearray(data)
    for at in rng.integers(0, size, pick(rng, (1, 2, 3))):
        changed[at] = pick(rng, (*ODD_BYTES, int(rng.integers(256))))
    return bytes(changed)


def _set_integer(rng: Rng, data: bytes, size: int) -> bytes:
    width = pick(rng, (2, 4, 8))
    at = int(rng.integers(size))
    value = pick(rng, ODD_INTEGERS) % 2 ** (8 * width)
    return data[:at] + value.to_bytes(width, "little") + data[at + width :]


def _truncate(rng: Rng, data: bytes, size: int) -> bytes:
    return data[: int(rng.integers(size))]


def _remove(rng: Rng, data: bytes, size: int) -> bytes:
    begin, end = _chunk(rng, size)
    return data[:begin] + data[end:]


def _repeat(rng: Rng, data: bytes, size: int) -> bytes:
    begin, end = _chunk(rng, size)
    return data[:end] + data[begin:]


def _swap(rng: Rng, data: bytes, size: int) -> bytes:
    a, b, c = sorted(int(n) for n in rng.integers(0, size + 1, 3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def _blank(rng: Rng, data: bytes, size: int) -> bytes:
    """As a file system leaves blocks that were never written."""
    begin, end = _chunk(rng, size)
    return data[:begin] + bytes(end - begin) + data[end:]


_BYTE_CHANGES: tuple[Callable[[Rng, bytes, int], bytes], ...] = (
    _flip_bits, _set_bytes, _set_integer, _truncate, _remove, _repeat, _swap, _blank,
)  # fmt: skip


# JSON --------------------------------------------------------------------------------------------


def damage_json(rng: Rng, data: bytes) -> bytes:
    """A JSON document with another structure; sometimes its bytes alone are changed."""
    if rng.random() < 0.25:
        return damage_bytes(rng, data)
    return write_json(rng, damage_value(rng, json.loads(data)))


def damage_json_lines(rng: Rng, data: bytes) -> bytes:
    """One line is damaged, or lines are lost, repeated or cut."""
    lines = data.splitlines()
    if len(lines) > 1 and rng.random() < 0.7:
        i = int(rng.integers(len(lines)))
        lines[i] = damage_json(rng, lines[i])
        return b"\n".join(lines) + b"\n"
    return damage_bytes(rng, data)


def damage_value(rng: Rng, value: Any) -> Any:
    """A copy in which one or two places differ."""
    value = json.loads(json.dumps(value))
    for _ in range(pick(rng, (1, 1, 2))):
        places = list(_places(value))
        if not places:
            return _odd_value(rng)
        holder, key = pick(rng, places)
        _change_place(rng, holder, key)
    return value


def _places(value: Any) -> Any:
    """Every (container, key or index) of a document; of long lists some."""
    if not isinstance(value, dict | list):
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items)[:20]:
        yield value, key
        yield from _places(item)


def _change_place(rng: Rng, holder: Any, key: Any) -> None:
    value = holder[key]
    how = int(rng.integers(7))
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[pick(rng, ("", "x", f"{key} ", str(key).upper()))] = holder.pop(key)
    elif how == 2 and isinstance(value, int | float):
        near = (value + 1, 0.9 * value, 2 * value)
        holder[key] = pick(rng, (*near, -value, 1e9 * value, str(value)))
    elif how == 3 and isinstance(value, list):
        holder[key] = pick(rng, (value[:-1], value + value, value[::-1], [value], value[:1]))
    elif how == 4 and isinstance(value, str):
        holder[key] = pick(rng, (value[:-1], value + "x", value.upper(), [value], 0))
    else:
        holder[key] = _odd_value(rng)


def _odd_value(rng: Rng) -> Any:
    return copy.deepcopy(pick(rng, ODD_VALUES))  # a later change must not reach the list of them


def write_json(rng: Rng, value: Any) -> bytes:
    """The document, now and then as a careless or a hostile program would write it."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.9)
    data = text.encode("utf-8", "surrogatepass")
    odd = rng.random()
    if odd < 0.02:
        return b"\xef\xbb\xbf" + data
    if odd < 0.03:
        return text.encode("utf-16", "surrogatepass")
    if odd < 0.05:
        depth = pick(rng, DEPTHS)
        return b"[" * depth + data + b"]" * depth
    if odd < 0.07:
        depth = pick(rng, DEPTHS)
        return data.replace(b": ", b": " + b'{"a":' * depth + b"1" + b"}" * depth + b" , ", 1)
    if odd < 0.09:
        return data.replace(b"0", pick(rng, (b"1" * 6000, b"1e999", b"0x1")), 1)
    return data


# Text --------------------------------------------------------------------------------------------


def damage_text(rng: Rng, data: bytes) -> bytes:
    """A text in another encoding, with NUL, without letters, or with damaged bytes."""
    how = int(rng.integers(10))
    if how < 3:
        return damage_bytes(rng, data)
    if how == 3:
        lines = data.splitlines()
        i = int(rng.integers(len(lines)))
        return b"\n".join([*lines[:i], *lines[i + 1 :]])
    at = int(rng.integers(len(data) + 1))
    odd = (b"\0" * 100, b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xff\xfe", b"\r\n" * 50, b"[" * 2000)
    if how < 8:
        return data[:at] + pick(rng, odd) + data[at:]
    other = data.decode(errors="replace").encode("utf-16")
    return pick(rng, (b"", b"\n \n", b"\xef\xbb\xbf", other))


# safetensors -------------------------------------------------------------------------------------


def damage_safetensors(rng: Rng, data: bytes) -> bytes:
    """Its bytes, its header, a JSON document in its metadata, or values of its arrays."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    how = rng.random()
    if how < 0.3:
        return damage_bytes(rng, data, 8 + size)
    if how < 0.5:
        return _safetensors(damage_json(rng, json.dumps(header).encode()), body)
    inner = [k for k, v in header.get("__metadata__", {}).items() if v[:1] in ("{", "[", '"')]
    if how < 0.75 and inner:
        key = pick(rng, inner)
        damaged = damage_json(rng, header["__metadata__"][key].encode())
        header["__metadata__"][key] = damaged.decode("utf-8", "surrogateescape")
        return _safetensors(json.dumps(header).encode(), body)
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return damage_bytes(rng, data)
    entry = header[pick(rng, names)]
    if how < 0.9:
        _reshape(rng, entry)
    else:
        begin, end = entry["data_offsets"]
        kind = pick(rng, ("<f4", "<f8", "<u4", "<f2"))
        values = np.full(1 + (end - begin) // 2, pick(rng, _ODD_NUMBERS), dtype="f8").astype(kind)
        if rng.random() < 0.5:  # one of them
            values = np.frombuffer(body[begin:end], dtype="u1").copy()
            values[: len(values) // 2] = pick(rng, ODD_BYTES)
        body = body[:begin] + values.tobytes()[: end - begin].ljust(end - begin, b"\0") + body[end:]
    return _safetensors(json.dumps(header).encode(), body)


_ODD_NUMBERS = (0.0, 1.0, -1.0, 1e30, -1e30, 1e-30, 65504.0, float("nan"), float("inf"))
_SAME_SIZE = {"F32": ("I32", "U32"), "F64": ("I64", "U64"), "F16": ("BF16", "I16"), "U64": ("F64",)}


def _reshape(rng: Rng, entry: dict[str, Any]) -> None:
    """Another shape or type of the same bytes."""
    shape = entry["shape"]
    if rng.random() < 0.3 and entry["dtype"] in _SAME_SIZE:
        entry["dtype"] = pick(rng, _SAME_SIZE[entry["dtype"]])
        return
    n = int(np.prod(shape))
    entry["shape"] = pick(rng, ([n], [1, *shape], [*shape, 1], shape[::-1], [n, 1], [1, n], []))


def _safetensors(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


# GGUF --------------------------------------------------------------------------------------------

# Sizes of scalar types; 8 is a string, 9 an array.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def damage_gguf(rng: Rng, data: bytes) -> bytes:
    """Its bytes, most often those of the header, or an entry of its metadata or tensors."""
    fields, tensors, start = read_gguf_entries(data)
    if rng.random() < 0.5:
        return damage_bytes(rng, data, start)
    for _ in range(pick(rng, (1, 1, 2))):
        entries = pick(rng, (fields, fields, tensors))
        if not entries:
            continue
        i = int(rng.integers(len(entries)))
        how = rng.random()
        if how < 0.15:
            del entries[i]
        elif how < 0.2:
            entries.append(entries[i])
        elif how < 0.25:
            name = pick(rng, (b"", b"x", b"\xff", entries[i][0][:-1], pick(rng, entries)[0]))
            entries[i] = (name, entries[i][1])
        elif entries is fields:
            fields[i] = (fields[i][0], _odd_field(rng, fields[i][1]))
        else:
            tensors[i] = (tensors[i][0], _odd_tensor(rng, tensors[i][1]))
    return write_gguf_entries(data[4:8], fields, tensors, data[start:])


Entry = tuple[bytes, bytes]  # a name, and what follows it in the file


def read_gguf_entries(data: bytes) -> tuple[list[Entry], list[Entry], int]:
    """Metadata, tensors, and where the tensors' data begin. Raises ValueError if they end early."""
    n_tensors, n_fields = struct.unpack("<QQ", data[8:24])
    at = 24

    def name() -> bytes:
        nonlocal at
        size = int.from_bytes(data[at : at + 8], "little")
        move(8 + size)
        return data[at - size : at]

    def move(size: int) -> None:
        nonlocal at
        at += size
        if at > len(data):
            raise ValueError("the header ends early")

    def skip(kind: int) -> None:
        if kind == 8:
            name()
        elif kind == 9:
            item, count = struct.unpack("<IQ", data[at : at + 12])
            move(12)
            for _ in range(count):
                skip(item)
        else:
            move(_SIZES[kind])

    fields, tensors, alignment = [], [], 32
    for _ in range(n_fields):
        key, begin = name(), at
        move(4)
        skip(int.from_bytes(data[begin : begin + 4], "little"))
        fields.append((key, data[begin:at]))
        if key == b"general.alignment":
            alignment = int.from_bytes(data[begin + 4 : at], "little")
    for _ in range(n_tensors):
        key, begin = name(), at
        move(4 + 8 * int.from_bytes(data[begin : begin + 4], "little") + 12)
        tensors.append((key, data[begin:at]))
    return fields, tensors, -(-at // alignment) * alignment


def write_gguf_entries(
    version: bytes, fields: list[Entry], tensors: list[Entry], body: bytes
) -> bytes:
    head = b"GGUF" + version + struct.pack("<QQ", len(tensors), len(fields))
    head += b"".join(len(k).to_bytes(8, "little") + k + v for k, v in [*fields, *tensors])
    alignment = next((v for k, v in fields if k == b"general.alignment"), b"")[4:]
    return head + bytes(-len(head) % (int.from_bytes(alignment[:3], "little") or 32)) + body


def _odd_field(rng: Rng, value: bytes) -> bytes:
    """A value of the same type with an odd content, or of another type."""
    kind = int.from_bytes(value[:4], "little")
    if kind == 9 and rng.random() < 0.6:
        item, count = struct.unpack("<IQ", value[4:16])
        if item in _SIZES:  # an array of numbers: another length, or other numbers
            numbers = value[16:]
            size = _SIZES[item]
            cut = pick(rng, (0, max(0, count - 1), count))
            odd = pick(rng, ODD_INTEGERS) % 2 ** (8 * size)
            kept = numbers[: cut * size] + odd.to_bytes(size, "little") * pick(rng, (0, 1))
            return struct.pack("<IIQ", 9, item, len(kept) // size) + kept
    if kind in _SIZES and rng.random() < 0.6:
        size = _SIZES[kind]
        return value[:4] + (pick(rng, ODD_INTEGERS) % 2 ** (8 * size)).to_bytes(size, "little")
    return pick(rng, _ODD_FIELDS)


def _string(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


_ODD_FIELDS = (
    struct.pack("<IB", 7, 1),
    struct.pack("<Ii", 5, -1),
    struct.pack("<IQ", 10, 1),
    struct.pack("<IQ", 10, 2**64 - 1),
    struct.pack("<If", 6, 0.0),
    struct.pack("<If", 6, float("nan")),
    struct.pack("<Id", 12, float("inf")),
    *(struct.pack("<I", 8) + _string(text) for text in (b"", b"\xff\xfe", b"a b", b"{{ 1 / 0 }}")),
    struct.pack("<IIQ", 9, 4, 0),
    struct.pack("<IIQII", 9, 4, 2, 1, 2**31),
    struct.pack("<IIQff", 9, 6, 2, 0.5, float("nan")),
    struct.pack("<IIQ", 9, 8, 2) + _string(b"a") + _string(b""),
    struct.pack("<IIQIQ", 9, 9, 1, 4, 0),
)


def _odd_tensor(rng: Rng, entry: bytes) -> bytes:
    """Another shape, type or place."""
    n_dims = int.from_bytes(entry[:4], "little")
    dims = list(struct.unpack(f"<{n_dims}Q", entry[4 : 4 + 8 * n_dims]))
    kind, offset = struct.unpack("<IQ", entry[4 + 8 * n_dims :])
    how = int(rng.integers(4))
    if how == 0:
        dims[int(rng.integers(n_dims))] = pick(rng, ODD_INTEGERS)
    elif how == 1:
        dims = pick(rng, (dims[::-1], [*dims, 1], [1, *dims], dims[:-1] or [1], []))
    elif how == 2:
        kind = int(rng.integers(42))
    else:
        offset = pick(rng, (0, offset + 32, offset + 4096, *ODD_INTEGERS))
    return struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
