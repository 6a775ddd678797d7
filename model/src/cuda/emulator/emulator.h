// CUDA C++, as far as the kernels use it, on a CPU: slow, and the same arithmetic.
//
// A grid's blocks run one after the other. A block's threads are contexts that take turns: one runs
// until it meets the others, at a barrier or in an operation of its warp. Copies to shared memory are
// done at once, so what is read before its wait is not found out here.

#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <ucontext.h>
#include <vector>

#define EMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define DYNAMIC_SHARED(name) unsigned char* name = emulator::dynamic_shared

typedef unsigned int u32;
typedef unsigned long long u64;
struct alignas(8) uint2 { u32 x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) longlong2 { long long x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { u32 x, y, z; };

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int WARP = 32;
constexpr size_t STACK = 256 << 10;

static unsigned char* dynamic_shared;

// Those that meet: a block, or a warp.
struct Meeting {
    u32 members = 0, arrived = 0;
    u64 round = 0;
};

struct Thread {
    ucontext_t context;
    // Where it goes on, once it has begun: jumps cost less than changes of context.
    jmp_buf place;
    bool begun, ended;
};

static std::vector<Thread> threads;
static std::vector<unsigned char> stacks;
static jmp_buf scheduler_place;
static u32 running;
static Meeting block;
static std::vector<Meeting> warps;
// What a warp's lanes show each other, by turns, for the slow may still read what was shown last.
static std::vector<u32> shown;
static std::vector<u64> turns;

// Lets the others run.
static void yield() {
    if (_setjmp(threads[running].place) == 0) _longjmp(scheduler_place, 1);
}

static void meet(Meeting& meeting) {
    const u64 round = meeting.round;
    if (++meeting.arrived == meeting.members) {
        meeting.arrived = 0;
        meeting.round++;
        return;
    }
    while (meeting.round == round) yield();
}

// Shows `count` words to the lanes of the warp; gives the place of lane 0's, `stride` words before the next's.
constexpr u32 MOST_WORDS = 8;
static const u32* show(const u32* words, u32 count) {
    const u32 warp = running / WARP, lane = running % WARP;
    u32* to = &shown[((warp * 2 + turns[running]++ % 2) * WARP) * MOST_WORDS];
    memcpy(to + lane * MOST_WORDS, words, count * 4);
    meet(warps[warp]);
    return to;
}

static void (*entry)(void**);
static void** given;

static void begin() {
    entry(given);
    threads[running].ended = true;
    // A thread that is done is nobody to wait for.
    Meeting* meetings[] = {&block, &warps[running / WARP]};
    for (Meeting* meeting : meetings) {
        if (--meeting->members > 0 && meeting->arrived == meeting->members) {
            meeting->arrived = 0;
            meeting->round++;
        }
    }
    _longjmp(scheduler_place, 1);
}

// Runs a thread until it yields or ends.
static void resume(u32 thread) {
    running = thread;
    threadIdx = {thread, 0, 0};
    if (_setjmp(scheduler_place) != 0) return;
    if (threads[thread].begun) _longjmp(threads[thread].place, 1);
    threads[thread].begun = true;
    setcontext(&threads[thread].context);
}

static void run_block() {
    const u32 count = blockDim.x;
    threads.resize(count);
    stacks.resize(count * STACK);
    warps.assign((count + WARP - 1) / WARP, {});
    shown.assign(warps.size() * 2 * WARP * MOST_WORDS, 0);
    turns.assign(count, 0);
    block = {count, 0, 0};
    for (u32 i = 0; i < count; i++) {
        warps[i / WARP].members++;
        threads[i].begun = threads[i].ended = false;
        getcontext(&threads[i].context);
        threads[i].context.uc_stack.ss_sp = &stacks[i * STACK];
        threads[i].context.uc_stack.ss_size = STACK;
        threads[i].context.uc_link = nullptr;
        makecontext(&threads[i].context, begin, 0);
    }
    for (u32 alive = count; alive > 0;) {
        for (u32 i = 0; i < count; i++) {
            if (threads[i].ended) continue;
            resume(i);
            if (threads[i].ended) alive--;
        }
    }
}

static void launch(void (*kernel)(void**), const u32* grid, u32 count, size_t shared, void** arguments) {
    std::vector<unsigned char> memory(shared + 128);
    dynamic_shared = memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128) % 128;
    // Whatever was there before.
    memset(dynamic_shared, 0xff, shared);
    entry = kernel;
    given = arguments;
    blockDim = {count, 1, 1};
    gridDim = {grid[0], grid[1], grid[2]};
    for (u32 z = 0; z < grid[2]; z++)
        for (u32 y = 0; y < grid[1]; y++)
            for (u32 x = 0; x < grid[0]; x++) {
                blockIdx = {x, y, z};
                run_block();
            }
}

// Calls a kernel with arguments that lie where the pointers say.
template <class... P, size_t... I>
static void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<P*>(arguments[I])...);
}
template <auto KERNEL>
struct Entry;
template <class... P, void (*KERNEL)(P...)>
struct Entry<KERNEL> {
    static void enter(void** arguments) { call(KERNEL, arguments, std::index_sequence_for<P...>{}); }
};

static u32 bits(float x) {
    u32 y;
    memcpy(&y, &x, 4);
    return y;
}
static float floating(u32 x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
static u32 as_bf16(float x) {
    const u32 raw = bits(x);
    if (std::isnan(x)) return 0x7fff;
    return (raw + 0x7fff + (raw >> 16 & 1)) >> 16;
}
static float of_half(u32 both, u32 half) { return floating(half ? both & 0xffff0000u : both << 16); }

static void load(u32 (&to)[4], u32 at, bool transposed) {
    const u32 lane = running % WARP;
    const u32* addresses = show(&at, 1);
    for (u32 matrix = 0; matrix < 4; matrix++) {
        u32 both = 0;
        for (u32 half = 0; half < 2; half++) {
            u32 row = lane / 4, column = lane % 4 * 2 + half;
            if (transposed) std::swap(row, column);
            unsigned short value;
            memcpy(&value, dynamic_shared + addresses[(matrix * 8 + row) * MOST_WORDS] + column * 2, 2);
            both |= static_cast<u32>(value) << (16 * half);
        }
        to[matrix] = both;
    }
}

}  // namespace emulator

static inline u32 shared_address(const void* at) { return static_cast<const unsigned char*>(at) - emulator::dynamic_shared; }
static inline float __int_as_float(int x) { return emulator::floating(x); }
static inline float __uint_as_float(u32 x) { return emulator::floating(x); }
static inline u32 __float_as_uint(float x) { return emulator::bits(x); }
static inline long long __double2ll_rn(double x) { return llrint(x); }
static inline void atomicMin(u64* at, u64 x) { *at = x < *at ? x : *at; }
static inline void atomicAdd(u64* at, u64 x) { *at += x; }
static inline u32 pack(float low, float high) { return emulator::as_bf16(low) | emulator::as_bf16(high) << 16; }
static inline float power_of_two(float x) { return exp2f(x); }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline void __syncthreads() { emulator::meet(emulator::block); }

template <class T>
static T __shfl_xor_sync(u32, T x, int by) {
    u32 words[2] = {};
    memcpy(words, &x, sizeof(T));
    const u32* all = emulator::show(words, 2);
    memcpy(&x, all + ((emulator::running % emulator::WARP) ^ by) * emulator::MOST_WORDS, sizeof(T));
    return x;
}

template <class T>
static T __shfl_sync(u32, T x, int from) {
    return __shfl_xor_sync(0, x, from ^ static_cast<int>(emulator::running % emulator::WARP));
}

static inline void copy_async(u32 to, const void* from, bool exists) {
    if (exists) memcpy(emulator::dynamic_shared + to, from, 16);
    else memset(emulator::dynamic_shared + to, 0, 16);
}
static inline void copies_close() {}
template <int PENDING>
static void copies_wait() {}
static inline void load_matrices(u32 (&to)[4], u32 at) { emulator::load(to, at, false); }
static inline void load_transposed(u32 (&to)[4], u32 at) { emulator::load(to, at, true); }

static inline void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const u32 words[6] = {a[0], a[1], a[2], a[3], b0, b1}, lane = emulator::running % emulator::WARP;
    const u32* all = emulator::show(words, 6);
    for (u32 i = 0; i < 4; i++) {
        const u32 bottom = i / 2, row = lane / 4, column = lane % 4 * 2 + i % 2;
        float sum = 0.0f;
        for (u32 k = 0; k < 16; k++) {
            const u32 at = k % 8 / 2, later = k / 8;
            const u32 left = all[(row * 4 + at) * emulator::MOST_WORDS + bottom + 2 * later];
            const u32 right = all[(column * 4 + at) * emulator::MOST_WORDS + 4 + later];
            sum += emulator::of_half(left, k % 2) * emulator::of_half(right, k % 2);
        }
        c[i] += sum;
    }
}
