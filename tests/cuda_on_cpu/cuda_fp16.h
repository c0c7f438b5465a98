// A stand-in for CUDA's header of that name, for g++: what CuPy's own float16.cuh takes from it.
#pragma once

#include <cstring>

struct __half_raw { unsigned short x; };

struct half {
    _Float16 value;  // g++ rounds to the nearest, halves to even
    half() {}
    half(float x) : value(static_cast<_Float16>(x)) {}
    half(const __half_raw& raw) { std::memcpy(&value, &raw, 2); }
    operator float() const { return static_cast<float>(value); }
    operator __half_raw() const { __half_raw raw; std::memcpy(&raw, &value, 2); return raw; }
};
inline unsigned short __half_as_ushort(half x) { return __half_raw(x).x; }
inline half __ushort_as_half(unsigned short bits) { return half(__half_raw{bits}); }
