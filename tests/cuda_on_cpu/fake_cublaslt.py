"""A stand-in for nvmath.bindings.cublasLt: its signatures, computed with NumPy on column-major memory, and as strict.

What is said of a product is kept as it was said, by numbers and bytes; an algorithm is good for that alone.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from cuda_on_cpu.fake_cublas import COMPUTE, DTYPES, CublasError, matrix, memory, multiplied

if TYPE_CHECKING:
    from cuda_on_cpu.fake_cupy import FakeCupy

BIAS, RELU_BIAS, GELU_AUX_BIAS, BGRADB = 4, 6, 164, 512
# Attributes of what is to be done, by number: name, C type, and what it is unless somebody says.
SAID: dict[int, tuple[str, Any, int]] = {
    3: ("transa", ctypes.c_int32, 0),
    4: ("transb", ctypes.c_int32, 0),
    7: ("epilogue", ctypes.c_uint32, 1),
    8: ("bias", ctypes.c_int64, 0),
    11: ("aux", ctypes.c_int64, 0),
    12: ("aux_ld", ctypes.c_int64, 0),
    26: ("bias_type", ctypes.c_int32, -1),
}
PREFERRED: dict[int, tuple[str, Any, int]] = {
    1: ("workspace", ctypes.c_uint64, 0),
    3: ("reduction", ctypes.c_uint32, 7),
    **{number: (name, ctypes.c_uint32, 256) for number, name in zip((5, 6, 7, 8), "abcd", strict=True)},
}
WORKSPACE = 4096  # bytes that every algorithm needs


class cuBLASLtError(Exception):
    """A status that is not success."""


class FakeCublasLt:
    """The names of the module that are used.

    Attributes:
        calls: the names of the functions that were called, in order.
        without: epilogues for which there is no algorithm.
    """

    matmul_heuristic_result_dtype = np.dtype(
        [
            ("algo", [("data_", "<u8", (8,))]),
            ("workspace_size", "<u8"),
            ("state", "<i4"),
            ("waves_count", "<f4"),
            ("reserved", "<i4", (4,)),
        ]
    )
    cuBLASLtError = cuBLASLtError

    def __init__(self, cupy: FakeCupy) -> None:
        self._cupy = cupy
        self._numbers = itertools.count(2**20)
        self._kept: dict[int, dict[str, Any]] = {}  # by handle: what was said
        self._algorithms: dict[int, Any] = {}
        self.calls: list[str] = []
        self.without: set[int] = set()

    @property
    def alive(self) -> int:
        """Handles that were made and not destroyed."""
        return len(self._kept)

    def _make(self, name: str, **said: Any) -> int:
        self.calls.append(name)
        number = next(self._numbers)
        self._kept[number] = said
        return number

    def _get(self, name: str, number: int) -> dict[str, Any]:
        if number not in self._kept:
            raise CublasError(f"{name}: no such handle")
        return self._kept[number]

    def _destroy(self, name: str, number: int) -> None:
        self.calls.append(name)
        self._get(name, number)
        del self._kept[number]

    def create(self) -> int:
        self._cupy.device.uncapturable("allocations", "synchronisations")
        return self._make("create")

    def destroy(self, light_handle: int) -> None:
        self._destroy("destroy", light_handle)

    def matmul_desc_create(self, compute_type: int, scale_type: int) -> int:
        arithmetic, _ = COMPUTE[compute_type]
        assert DTYPES[scale_type] is arithmetic
        said = {name: unless for name, _, unless in SAID.values()}
        return self._make("matmul_desc_create", compute_type=compute_type, **said)

    def matmul_desc_destroy(self, matmul_desc: int) -> None:
        self._destroy("matmul_desc_destroy", matmul_desc)

    def matmul_desc_set_attribute(self, matmul_desc: int, attr: int, buf: int, size_in_bytes: int) -> None:
        self.calls.append("matmul_desc_set_attribute")
        self._say(self._get("matmul_desc_set_attribute", matmul_desc), SAID[attr], buf, size_in_bytes)

    def matrix_layout_create(self, type: int, rows: int, cols: int, ld: int) -> int:
        return self._make("matrix_layout_create", type=type, rows=rows, cols=cols, ld=ld)

    def matrix_layout_destroy(self, mat_layout: int) -> None:
        self._destroy("matrix_layout_destroy", mat_layout)

    def matmul_preference_create(self) -> int:
        return self._make("matmul_preference_create", **{name: unless for name, _, unless in PREFERRED.values()})

    def matmul_preference_destroy(self, pref: int) -> None:
        self._destroy("matmul_preference_destroy", pref)

    def matmul_preference_set_attribute(self, pref: int, attr: int, buf: int, size_in_bytes: int) -> None:
        self.calls.append("matmul_preference_set_attribute")
        self._say(self._get("matmul_preference_set_attribute", pref), PREFERRED[attr], buf, size_in_bytes)

    @staticmethod
    def _say(of: dict[str, Any], attribute: tuple[str, Any, int], buf: int, size_in_bytes: int) -> None:
        name, kind, _ = attribute
        if size_in_bytes != ctypes.sizeof(kind):
            raise cuBLASLtError(f"{name} of {size_in_bytes} bytes")
        of[name] = kind.from_address(buf).value

    def matmul_algo_get_heuristic(
        self,
        light_handle: int,
        operation_desc: int,
        adesc: int,
        bdesc: int,
        cdesc: int,
        ddesc: int,
        preference: int,
        requested_algo_count: int,
        heuristic_results_array: int,
        return_algo_count: int,
    ) -> None:
        self.calls.append("matmul_algo_get_heuristic")
        self._cupy.device.uncapturable("questions to cublasLt")  # which may take its time
        self._get("matmul_algo_get_heuristic", light_handle)
        what, wanted = self._get("what", operation_desc), self._get("wanted", preference)
        a, b, c, d = (dict(self._get("layout", layout)) for layout in (adesc, bdesc, cdesc, ddesc))
        assert (requested_algo_count, wanted["reduction"]) == (1, 2)
        ctypes.c_int.from_address(return_algo_count).value = 0
        epilogue = what["epilogue"]
        product = (a["type"], d["type"], what["compute_type"])
        known = {(0, 0, 68), (0, 0, 77), (1, 1, 70), *((half, out, 68) for half in (2, 14) for out in (half, 0))}
        if (
            a["type"] != b["type"]
            or product not in known
            or epilogue in self.without
            or wanted["workspace"] < WORKSPACE
        ):
            raise cuBLASLtError("CUBLAS_STATUS_NOT_SUPPORTED (15)")
        if epilogue not in (BIAS, RELU_BIAS, GELU_AUX_BIAS, BGRADB) or what["bias_type"] not in (-1, d["type"]):
            raise cuBLASLtError("CUBLAS_STATUS_NOT_SUPPORTED (15)")
        if epilogue == BGRADB and not what["transb"]:
            raise cuBLASLtError("CUBLAS_STATUS_NOT_SUPPORTED (15)")
        gelu = epilogue == GELU_AUX_BIAS
        if not what["bias"] or {gelu} != {what["aux_ld"] > 0, what["aux"] > 0} or what["aux_ld"] % 8:
            raise cuBLASLtError("CUBLAS_STATUS_INVALID_VALUE (7)")
        number = next(self._numbers)
        self._algorithms[number] = self._problem(what, a, b, c, d), dict(wanted)
        found = (ctypes.c_char * self.matmul_heuristic_result_dtype.itemsize).from_address(heuristic_results_array)
        result = np.frombuffer(found, self.matmul_heuristic_result_dtype)
        result["algo"]["data_"][0, 0], result["workspace_size"], result["state"] = number, WORKSPACE, 0
        ctypes.c_int.from_address(return_algo_count).value = 1

    @staticmethod
    def _problem(what: dict[str, Any], *layouts: dict[str, Any]) -> Any:
        return {name: x for name, x in what.items() if name not in ("bias", "aux")}, layouts

    def matmul(
        self,
        light_handle: int,
        compute_desc: int,
        alpha: int,
        a: int,
        adesc: int,
        b: int,
        bdesc: int,
        beta: int,
        c: int,
        cdesc: int,
        d: int,
        ddesc: int,
        algo: int,
        workspace: int,
        workspace_size_in_bytes: int,
        stream: int,
    ) -> None:
        """D = alpha op(A) op(B) + beta C, and its epilogue."""
        self.calls.append("matmul")
        self._get("matmul", light_handle)
        what = dict(self._get("what", compute_desc))
        of_a, of_b, of_c, of_d = (dict(self._get("layout", layout)) for layout in (adesc, bdesc, cdesc, ddesc))
        problem, wanted = self._algorithms[ctypes.c_uint64.from_address(algo).value]
        if problem != self._problem(what, of_a, of_b, of_c, of_d):
            raise CublasError("an algorithm for another product")
        if stream != self._cupy.cuda.get_current_stream().ptr:
            raise CublasError("a product on another stream than what it must come after")
        for address, name in ((a, "a"), (b, "b"), (c, "c"), (d, "d"), (what["bias"], "d")):
            if address % wanted[name]:
                raise CublasError(f"memory that is not aligned to the {wanted[name]} bytes that were said")
        if workspace_size_in_bytes < WORKSPACE:
            raise CublasError("a workspace too small")
        memory(self._cupy, workspace, workspace_size_in_bytes)
        _, scalar = COMPUTE[what["compute_type"]]
        assert (scalar.from_address(alpha).value, scalar.from_address(beta).value) == (1, 0)
        left, right, out = (self._matrix(x, of) for x, of in ((a, of_a), (b, of_b), (d, of_d)))
        if np.may_share_memory(out, left) or np.may_share_memory(out, right):
            raise CublasError("cublasLt reads its factors while it writes the product")
        left, right = left.T if what["transa"] else left, right.T if what["transb"] else right
        assert (*out.shape, left.shape[1]) == (left.shape[0], right.shape[1], right.shape[0])
        length = out.shape[1] if what["epilogue"] == BGRADB else out.shape[0]
        bias = self._matrix(what["bias"], {"type": of_d["type"], "rows": length, "cols": 1, "ld": length})
        aux = None
        if what["epilogue"] == GELU_AUX_BIAS:
            aux = self._matrix(what["aux"], {**of_d, "ld": what["aux_ld"]})

        def run() -> None:
            with np.errstate(all="ignore"):  # as on a device
                product = multiplied(left, right, what["compute_type"])
                if what["epilogue"] == BGRADB:
                    out[...] = product
                    bias[:, 0] = right.astype(product.dtype).sum(axis=0)
                    return
                product += bias.astype(product.dtype)
                if what["epilogue"] == RELU_BIAS:
                    product = np.maximum(product, 0)
                elif aux is not None:
                    aux[...] = product
                    product = product / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (product + 0.044715 * product**3)))
                out[...] = product

        self._cupy.device.launch(run)

    def _matrix(self, address: int, layout: dict[str, Any]) -> np.ndarray:
        return matrix(self._cupy, address, layout["type"], (layout["rows"], layout["cols"]), layout["ld"])
