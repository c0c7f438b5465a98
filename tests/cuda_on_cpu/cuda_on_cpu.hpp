// What a CUDA kernel may use, for g++; and the launch of its threads on one CPU thread.
//
// A kernel with no barrier runs its threads one after the other. One with barriers or warp shuffles gets a fiber
// (ucontext) a thread: a barrier puts the fiber to sleep until all whom it waits for have come to the same place.
// Where they never come, the launch ends with an error. Blocks run one after the other.
#pragma once

#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include <ucontext.h>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static

// The functions of CUDA's maths library that have overloads for float and double. Not `using namespace std`: its
// other names (std::clamp) would meet the kernels' own.
using std::cbrt; using std::ceil; using std::cos; using std::cosh; using std::erf; using std::erfc; using std::exp;
using std::exp2; using std::expm1; using std::fabs; using std::floor; using std::fma; using std::fmax; using std::fmin;
using std::isfinite; using std::isinf; using std::isnan; using std::log; using std::log1p; using std::log2;
using std::pow; using std::rint; using std::sin; using std::sinh; using std::sqrt; using std::tan; using std::tanh;

// pi times what is left after the nearest half, which is exact, in long double.
inline double sinpi(double x) {
    const double halves = std::rint(2 * x);
    const long double angle = 3.14159265358979323846264338327950288L * (x - 0.5 * halves);
    const int quarter = int((long long)(halves) & 3);
    const long double y = quarter & 1 ? std::cos(angle) : std::sin(angle);
    return double(quarter & 2 ? -y : y);
}
inline double cospi(double x) {
    const double halves = std::rint(2 * x);
    const long double angle = 3.14159265358979323846264338327950288L * (x - 0.5 * halves);
    const int quarter = int((long long)(halves) & 3);
    const long double y = quarter & 1 ? std::sin(angle) : std::cos(angle);
    return double((quarter + 1) & 2 ? -y : y);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}

struct Triple { unsigned x, y, z; };
static Triple threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

enum Result { FINE = 0, BARRIER_NOT_REACHED_BY_ALL = 1, WARP_DIVERGED = 2, BARRIER_WITHOUT_FIBERS = 3 };
enum State { READY, AT_BLOCK_BARRIER, AT_WARP_BARRIER, DONE };

constexpr unsigned WARP = 32;
constexpr std::size_t STACK_BYTES = 1 << 16;

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(STACK_BYTES);
    State state;
    int line;            // of the barrier it waits at
    unsigned barriers;   // how many it has met: two calls of one inlined function share a line
    unsigned mask;       // lanes that the warp barrier names
    std::uint64_t sent[2];  // what it gave to the last two shuffles: a quick lane may be one shuffle ahead
};

static std::vector<Fiber*> fibers;
static ucontext_t scheduler;
static unsigned current;
static bool with_fibers = false;
static Result failure;
static void (*body)(void**);
static void** arguments;

static void wait(State state, int line, unsigned mask) {
    if (!with_fibers) { failure = BARRIER_WITHOUT_FIBERS; return; }
    Fiber& me = *fibers[current];
    me.state = state;
    me.line = line;
    me.mask = mask;
    ++me.barriers;
    swapcontext(&me.context, &scheduler);
}

// The value that lane `lane` of the own warp gives to the same shuffle; the own one where there is no such lane.
template <class T> T shuffle(T value, unsigned mask, int lane, int line) {
    static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
    const unsigned first = current / WARP * WARP;
    const unsigned source = lane >= 0 && lane < int(WARP) ? first + lane : current;
    if (!with_fibers) { failure = BARRIER_WITHOUT_FIBERS; return value; }
    const unsigned turn = fibers[current]->barriers % 2;
    std::memcpy(&fibers[current]->sent[turn], &value, sizeof(T));
    wait(AT_WARP_BARRIER, line, mask);
    if (!(mask >> (source % WARP) & 1)) { failure = WARP_DIVERGED; return value; }
    std::memcpy(&value, &fibers[source]->sent[turn], sizeof(T));
    return value;
}

static void fiber_main() {
    body(arguments);
    fibers[current]->state = DONE;
    swapcontext(&fibers[current]->context, &scheduler);
}

static bool same_place(const Fiber& a, const Fiber& b) {
    return a.state == b.state && a.line == b.line && a.barriers == b.barriers && a.mask == b.mask;
}

// Lets go the warps whose named lanes have all come to one barrier.
static bool release_warps(unsigned threads) {
    bool released = false;
    for (unsigned first = 0; first < threads; first += WARP) {
        for (unsigned t = first; t < first + WARP && t < threads; ++t) {
            const Fiber& one = *fibers[t];
            if (one.state != AT_WARP_BARRIER || !(one.mask >> (t % WARP) & 1)) continue;
            bool all = true;
            for (unsigned lane = 0; lane < WARP; ++lane)
                if (one.mask >> lane & 1) all = all && first + lane < threads && same_place(*fibers[first + lane], one);
            if (!all) continue;
            const unsigned mask = one.mask;
            for (unsigned lane = 0; lane < WARP; ++lane)
                if (mask >> lane & 1) fibers[first + lane]->state = READY;
            released = true;
        }
    }
    return released;
}

static bool release_block(unsigned threads) {
    for (unsigned t = 0; t < threads; ++t)
        if (fibers[t]->state != AT_BLOCK_BARRIER || !same_place(*fibers[t], *fibers[0])) return false;
    for (unsigned t = 0; t < threads; ++t) fibers[t]->state = READY;
    return true;
}

static Result run_block(unsigned threads, const std::int64_t* order) {
    while (fibers.size() < threads) fibers.push_back(new Fiber);
    for (unsigned t = 0; t < threads; ++t) {
        Fiber& fiber = *fibers[t];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        fiber.state = READY;
        fiber.barriers = 0;
        makecontext(&fiber.context, fiber_main, 0);
    }
    for (;;) {
        unsigned done = 0;
        for (unsigned k = 0; k < threads; ++k) {
            current = static_cast<unsigned>(order[k]);
            if (fibers[current]->state == READY) {
                threadIdx = {current, 0, 0};
                swapcontext(&scheduler, &fibers[current]->context);
                if (failure != FINE) return failure;
            }
            done += fibers[current]->state == DONE;
        }
        if (done == threads) return FINE;
        if (release_warps(threads) || release_block(threads)) continue;
        for (unsigned t = 0; t < threads; ++t)
            if (fibers[t]->state == AT_WARP_BARRIER) return WARP_DIVERGED;
        return BARRIER_NOT_REACHED_BY_ALL;
    }
}

// order: the threads of the whole grid as they are to run; with fibers, those of a block.
static int launch(void (*kernel)(void**), void** args, unsigned grid, unsigned block, const std::int64_t* order, bool use_fibers) {
    body = kernel;
    arguments = args;
    gridDim = {grid, 1, 1};
    blockDim = {block, 1, 1};
    with_fibers = use_fibers;
    failure = FINE;
    if (use_fibers) {
        for (unsigned b = 0; b < grid && failure == FINE; ++b) {
            blockIdx = {b, 0, 0};
            failure = run_block(block, order);
        }
        return failure;
    }
    const std::int64_t threads = std::int64_t(grid) * block;
    for (std::int64_t k = 0; k < threads && failure == FINE; ++k) {
        blockIdx = {static_cast<unsigned>(order[k] / block), 0, 0};
        threadIdx = {static_cast<unsigned>(order[k] % block), 0, 0};
        body(args);
    }
    return failure;
}

template <class... A, std::size_t... I> void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_const_t<std::remove_reference_t<A>>*>(args[I])...);
}

// Calls a kernel with arguments of its own types, each given by its address, as cuLaunchKernel does.
template <class... A> void call(void (*kernel)(A...), void** args) {
    call(kernel, args, std::index_sequence_for<A...>{});
}

template <class T> constexpr const char* type_name() {
    using Bare = std::remove_cv_t<T>;
    if constexpr (std::is_pointer_v<Bare>) return type_name<std::remove_pointer_t<Bare>>();
    else if constexpr (std::is_floating_point_v<Bare>) return sizeof(T) == 4 ? "float32" : "float64";
    else if constexpr (std::is_integral_v<Bare>)
        return sizeof(T) == 8 ? (std::is_signed_v<Bare> ? "int64" : "uint64")
             : sizeof(T) == 4 ? (std::is_signed_v<Bare> ? "int32" : "uint32") : "integer";
    else return "class";
}

// What argument k is: its bytes, 0 where there is none; its type as NumPy calls it; whether it is a pointer.
struct Parameter { std::size_t bytes; const char* type; int is_pointer; };

template <class... A> Parameter parameter(void (*)(A...), int k) {
    const Parameter all[] = {{sizeof(A), type_name<A>(), std::is_pointer_v<A>}..., {0, "", 0}};
    return all[k];
}

}  // namespace cuda_on_cpu

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }

#define __syncthreads() cuda_on_cpu::wait(cuda_on_cpu::AT_BLOCK_BARRIER, __LINE__, 0)
#define __syncwarp(...) cuda_on_cpu::wait(cuda_on_cpu::AT_WARP_BARRIER, __LINE__, 0xffffffffu)
#define CUDA_ON_CPU_LANE int(cuda_on_cpu::current % cuda_on_cpu::WARP)
#define __shfl_sync(mask, value, lane) cuda_on_cpu::shuffle(value, mask, int(lane) % 32, __LINE__)
#define __shfl_xor_sync(mask, value, k) cuda_on_cpu::shuffle(value, mask, CUDA_ON_CPU_LANE ^ int(k), __LINE__)
#define __shfl_up_sync(mask, value, k) cuda_on_cpu::shuffle(value, mask, CUDA_ON_CPU_LANE - int(k), __LINE__)
#define __shfl_down_sync(mask, value, k) cuda_on_cpu::shuffle(value, mask, CUDA_ON_CPU_LANE + int(k), __LINE__)
