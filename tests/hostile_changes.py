"""Changes that make hostile files of valid ones: of bytes, of trees of JSON, and of the headers of .npy files."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import re
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from hypothesis import strategies as st

NUMBERS = [0, -1, 1, 2**31, 2**32 + 1, 2**62, 2**63, 2**64, 10**18, 10**400, -(2**63), 0.5, -0.0, 1e308, 1e-320]
NESTED = [json.loads("[" * 90 + "]" * 90), {"a": {"a": {"a": {}}}}, [[]], [{}], {}, []]
TEXTS = [
    "",
    "a",
    "\0",
    "../x",
    "/etc/passwd",
    "own:x",
    "os:system",
    "é\N{BYTE ORDER MARK}",
    "x" * 5000,
    "softmax",
    "\n",
]
VALUES = [*NUMBERS, *NESTED, *TEXTS, None, True, False, float("nan"), float("inf")]
PIECES = [b"\0", b"\xff", b'"', b"'", b",", b"\n", b"\r", b"\r\n", b"[", b"]" * 9, b"{", b"}", b"(", b".", b"=", b"e9"]
PIECES += [b"-", b"9" * 30, b"9" * 5000, b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"[" * 2000, b"nan", b"a." * 60]

PLACE = st.integers(0, 2**20 - 1)  # scaled to the length of what is changed
EDIT = st.tuples(st.sampled_from(["flip", "cut", "insert", "drop", "number", "repeat"]), PLACE, st.integers(0, 255))


def sealed(body: dict[str, Any]) -> bytes:
    """The JSON file of a checkpoint, with the checksum of all else in it."""
    checksum = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps({"checksum": checksum, **body}, indent=1) + "\n").encode()


def scaled(place: int, n: int) -> int:
    return place * n >> 20


def edited(data: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    """The bytes with some changes, one after the other."""
    for kind, place, value in edits:
        k = scaled(place, len(data) + 1)
        if kind == "flip" and k < len(data):
            data = data[:k] + bytes([data[k] ^ (value or 1)]) + data[k + 1 :]
        elif kind == "cut":
            data = data[:k]
        elif kind == "insert":
            data = data[:k] + PIECES[value % len(PIECES)] + data[k:]
        elif kind == "drop":
            data = data[:k] + data[k + value :]
        elif kind == "repeat":
            data = data[: k + value] + data[k:]
        elif kind == "number":
            found = [match.span() for match in re.finditer(rb"\d+", data)]
            if found:
                start, end = found[scaled(place, len(found))]
                data = data[:start] + str(NUMBERS[value % len(NUMBERS)]).encode() + data[end:]
    return data


def changed_bytes(*valid: bytes) -> st.SearchStrategy[bytes]:
    """Bytes of a valid file with changes, or any bytes."""
    edits = st.builds(edited, st.sampled_from(valid), st.lists(EDIT, min_size=1, max_size=5))
    return st.one_of(edits, edits, edits, edits, st.binary(max_size=200))


def nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a tree: a table or a list, and the key or number in it."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from nodes(tree[key])


TREE_EDIT = st.tuples(st.sampled_from(["set", "set", "set", "delete", "add", "copy"]), PLACE, st.sampled_from(VALUES))


def changed_tree(tree: Any, edits: list[tuple[str, int, Any]]) -> Any:
    """A tree of JSON with some changes."""
    tree = json.loads(json.dumps(tree))
    for kind, place, value in edits:
        places = list(nodes(tree))
        if not places:
            break
        table, key = places[scaled(place, len(places))]
        value = copy.deepcopy(value)
        if kind == "delete":
            del table[key]
        elif kind == "add" and isinstance(table, dict):
            table["extra"] = value
        elif kind == "copy":
            other, there = places[-1 - scaled(place, len(places))]
            table[key] = json.loads(json.dumps(other[there]))
        else:
            table[key] = value
    return tree


TREE_EDITS = st.lists(TREE_EDIT, min_size=1, max_size=3)


NPY_DESCR = ["<f8", ">f4", "|O", "<f2", "|b1", "<U9", "<i8", "|V999999999", "<M8[ns]", "f8", "<c16", "?", "<f16", "<q"]
NPY_SHAPE = [
    "(3, 2)",
    "(6,)",
    "(2**62, 2)",
    f"({2**62}, 2)",
    f"({2**31}, {2**33})",
    "(-3, -2)",
    "()",
    "(0, 2)",
    "(3L, 2L)",
]
NPY_SHAPE += [
    "(" * 200,
    "[3, 2]",
    "(3.0, 2)",
    "(3, 2" + ", 1" * 70 + ")",
    f"({'9' * 4000},)",
    "(True, 2)",
    "(3,2)",
    "3",
]


def npy_bytes(descr: str, shape: str, fortran: str, version: int, length: int, numbers: int, extra: str) -> bytes:
    """A .npy file with such a header. `length`: of the header as the file says it, 0 being the truth."""
    header = f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}, {extra}}}\n".encode()
    size = struct.pack("<H" if version == 1 else "<I", (length or len(header)) % (2**16 if version == 1 else 2**32))
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + bytes(numbers)


def npy_files(array: np.ndarray) -> st.SearchStrategy[bytes]:
    """Bytes of .npy files: of an array with changes, or with headers of parts that go together or not."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=False)
    headed = st.builds(
        npy_bytes,
        st.sampled_from(["<f8", *NPY_DESCR]),
        st.sampled_from(["(3, 2)", *NPY_SHAPE]),
        st.sampled_from(["False", "True", "0", "None", "-" * 3000 + "1"]),
        st.sampled_from([1, 1, 1, 2, 3, 4, 255]),
        st.sampled_from([0, 0, 0, 0, 1, 65535, 2**31, 2**32 - 1]),
        st.sampled_from([48, 0, 47, 96]),
        st.sampled_from(["", "", "", "'x': 1, ", "'descr': '<f4', ", "1if 1else 2: 3", "**{}", "'\\d': 1"]),
    )
    return st.one_of(headed, changed_bytes(file.getvalue()))
