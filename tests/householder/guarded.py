# SPDX-License-Identifier: Apache-2.0
"""Native calls on operands that end, or begin, at a page that may not be touched; run by test_bounds.py."""

import ctypes
import itertools

import torch

import frodkernels  # noqa: F401  loads the operators

PAGE = 4096
READ_WRITE, PRIVATE_ANONYMOUS = 3, 0x22
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
native = torch.ops.frodkernels
mapped: list[tuple[int, int]] = []


def guarded(tensor: torch.Tensor, front: bool, gap: int = 0) -> torch.Tensor:
    """A copy, ``gap`` elements between rows, whose last byte (``front``: first) is next to a barred page."""
    rows, columns = tensor.shape
    stride = columns + gap
    used = ((rows - 1) * stride + columns) * tensor.element_size()
    size = (used + PAGE - 1) // PAGE * PAGE
    start = libc.mmap(None, size + 2 * PAGE, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0)
    for barred in (start, start + PAGE + size):
        assert libc.mprotect(barred, PAGE, 0) == 0
    mapped.append((start, size + 2 * PAGE))
    memory = (ctypes.c_char * used).from_address(start + PAGE + (0 if front else size - used))
    out = torch.frombuffer(memory, dtype=tensor.dtype).as_strided((rows, columns), (stride, 1))
    return out.copy_(tensor)


def call(dtype: torch.dtype, T: int, n: int, m: int, r: int, front: bool, gap: int, rounded: bool) -> None:
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def tokens(features: int) -> torch.Tensor:
        return guarded(torch.randn(T, features).to(dtype), front, gap)

    def factor(rows: int) -> torch.Tensor:
        return guarded(torch.randn(rows, r, dtype=acc), front)

    x, g, left, right, q = tokens(n), tokens(m), factor(n), factor(m), factor(T)
    out, coefficients = native.native_householder(x, left, right, g, rounded)
    torch.testing.assert_close(coefficients, x.to(acc) @ left, rtol=0.05, atol=0.5)
    native.native_householder_backward(g, x, q, right, left, x, [True, True], rounded)
    native.native_householder_backward(tokens(n), x, q, left, left, None, [True, True], rounded)
    native.native_householder_gradient(x, q)
    u = guarded(torch.randn(n, r).to(dtype), front)
    unit, _, inverse, norms = native.native_reflections(u, False, True)
    native.native_reflections_again(u, inverse, norms, False, True)
    unit = guarded(unit, front)
    rows = guarded(torch.randn(T, r, dtype=unit.dtype), front)
    native.native_reflections_gradient(u, unit, norms, unit, rows, rows)
    g, c = tokens(n), guarded(torch.randn(T, r, dtype=unit.dtype), front)
    native.native_reflect(x, u, True, rounded)
    for dx in (tokens(n), g):
        native.native_reflect_backward(g, x, u, c, guarded(inverse, front), norms, dx, True, [True, True], rounded)
    while mapped:
        libc.munmap(*mapped.pop())


if __name__ == "__main__":
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    sizes = [(1, 1, 1, 1), (3, 7, 33, 5), (13, 31, 16, 8), (25, 65, 15, 9), (49, 257, 64, 17), (12, 100, 129, 33)]
    for dtype, (T, n, m, r) in itertools.product(dtypes, sizes):
        for front, gap, rounded in itertools.product((False, True), (0, 3), (False, True)):
            call(dtype, T, n, m, r, front, gap, rounded)
    print("within bounds")
