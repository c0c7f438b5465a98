// A stand-in for CUDA's header of that name, for g++: what CuPy's own bfloat16.cuh takes from it.
#pragma once

#include <cstring>

struct __nv_bfloat16 {
    unsigned short bits;
    __nv_bfloat16() {}
    __nv_bfloat16(float x) {  // to the nearest, halves to even; a NaN stays one
        unsigned wide;
        std::memcpy(&wide, &x, 4);
        if ((wide & 0x7fffffffu) > 0x7f800000u) bits = 0x7fff;
        else bits = static_cast<unsigned short>((wide + 0x7fffu + (wide >> 16 & 1u)) >> 16);
    }
    operator float() const {
        const unsigned wide = unsigned(bits) << 16;
        float x;
        std::memcpy(&x, &wide, 4);
        return x;
    }
};
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { __nv_bfloat16 x; x.bits = bits; return x; }
inline bool __hisnan(__nv_bfloat16 x) { return (x.bits & 0x7fffu) > 0x7f80u; }
inline bool __hisinf(__nv_bfloat16 x) { return (x.bits & 0x7fffu) == 0x7f80u; }
