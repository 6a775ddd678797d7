// CUDA C++, as far as the kernels use it, on a CPU: slow, and the same arithmetic.
//
// A grid's blocks run one after the other. A block's threads are contexts that take turns: one runs
// until it meets the others, at a barrier or in an operation of its warp. Copies to shared memory, and
// products of groups of warps, are done when they are waited for, as late as a device may do them: what
// is read or overwritten before that shows in the results.

#include <algorithm>
#include <array>
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
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
static size_t shared_bytes;

// So many bytes of the block's shared memory.
static unsigned char* shared_at(u32 at, size_t bytes) {
    if (at + bytes > shared_bytes) {
        fprintf(stderr, "a block reaches for byte %zu of its %zu of shared memory\n", at + bytes, shared_bytes);
        abort();
    }
    return dynamic_shared + at;
}

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

struct Copy {
    u32 to;
    const void* from;
    size_t bytes;
    bool exists;

    void operator()() const {
        unsigned char* at = shared_at(to, bytes);
        if (exists) memcpy(at, from, bytes);
        else memset(at, 0, bytes);
    }
};

// Work that a thread has asked for: what is closed together is done together.
template <class Work>
struct Pending {
    std::deque<std::vector<Work>> closed;
    std::vector<Work> open;

    void close() {
        closed.push_back(std::move(open));
        open.clear();
    }
    // Does all that was closed but the last `groups`.
    void wait(size_t groups) {
        for (; closed.size() > groups; closed.pop_front())
            for (const auto& work : closed.front()) work();
    }
};
static std::vector<Pending<Copy>> copies;
static std::vector<Pending<std::function<void()>>> products;

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
    copies.assign(count, {});
    products.assign(count, {});
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
    shared_bytes = shared;
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
            memcpy(&value, shared_at(addresses[(matrix * 8 + row) * MOST_WORDS] + column * 2, 2), 2);
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

static inline void copy_async(u32 to, const void* from, bool exists) { emulator::copies[emulator::running].open.push_back({to, from, 16, exists}); }
static inline void copy_async(u32 to, const void* from) { copy_async(to, from, true); }
static inline void copy_number_async(u32 to, const float* from, bool exists) { emulator::copies[emulator::running].open.push_back({to, from, 4, exists}); }
static inline void copies_close() { emulator::copies[emulator::running].close(); }
template <int PENDING>
static void copies_wait() { emulator::copies[emulator::running].wait(PENDING); }
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

static inline int __any_sync(u32, bool holds) {
    const u32 word = holds;
    const u32* all = emulator::show(&word, 1);
    u32 any = 0;
    for (u32 lane = 0; lane < emulator::WARP; lane++) any |= all[lane * emulator::MOST_WORDS];
    return any;
}
static inline void __trap() { abort(); }

#ifdef WARP_GROUPS
namespace emulator {

// Up to eight numbers of a line of a matrix in shared memory, as a descriptor says that they lie: every 8
// lines of 128 bytes are `next` bytes after the 8 before, and what is beyond 64 numbers of a line `leading`
// bytes after. The places of 16 bytes within a line change with the line.
static void numbers(float* to, u64 described, u32 line, u32 first, u32 count) {
    const u32 leading = (described >> 16 & 0x3fff) << 4, next = (described >> 32 & 0x3fff) << 4;
    if (described >> 62 != 1) abort();
    u32 at = (described & 0x3fff) << 4;
    at += first / 64 * leading + first % 64 * 2 + line / 8 * next + line % 8 * 128;
    at ^= (at >> 7 & 7) << 4;
    unsigned short values[8];
    memcpy(values, shared_at(at, count * 2), count * 2);
    for (u32 i = 0; i < count; i++) to[i] = floating(static_cast<u32>(values[i]) << 16);
}

// What a lane's numbers of a product are made of: its two rows, and 16 numbers of each of its columns.
template <int PARTS>
struct Factors {
    float rows[2][16], columns[PARTS][2][16];
};

// Has a product of the group's done later. What it is made of must be there by now, and stay as it is.
template <int PARTS, class Gather>
static void multiply_later(float (&c)[PARTS][4], bool add, Gather gather) {
    const auto begun = std::make_shared<Factors<PARTS>>();
    gather(*begun);
    auto* to = &c;
    // Nobody may look at them before they are there.
    if (!add) std::fill_n(&c[0][0], PARTS * 4, NAN);
    products[running].open.push_back([=] {
        static Factors<PARTS> found;
        gather(found);
        if (memcmp(&found, begun.get(), sizeof(found)) != 0) {
            fprintf(stderr, "what a product is made of has changed before it was done\n");
            abort();
        }
        for (u32 n = 0; n < PARTS; n++)
            for (u32 i = 0; i < 4; i++) {
                float sum = 0.0f;
                for (u32 k = 0; k < 16; k++) sum += found.rows[i / 2][k] * found.columns[n][i % 2][k];
                (*to)[n][i] = add ? (*to)[n][i] + sum : sum;
            }
    });
}

}  // namespace emulator

static inline void copies_shown() {}
static inline void products_open() {}
static inline void products_close() { emulator::products[emulator::running].close(); }
template <int PENDING>
static void products_wait() { emulator::products[emulator::running].wait(PENDING); }

template <int PARTS>
static void multiply_shared(float (&c)[PARTS][4], u64 a, u64 b, bool add) {
    const u32 lane = emulator::running % emulator::WARP, row = emulator::running / emulator::WARP % 4 * 16 + lane / 4;
    emulator::multiply_later(c, add, [=](emulator::Factors<PARTS>& factors) {
        for (u32 i = 0; i < 2; i++)
            for (u32 k = 0; k < 16; k += 8) {
                emulator::numbers(&factors.rows[i][k], a, row + i * 8, k, 8);
                for (u32 n = 0; n < PARTS; n++) emulator::numbers(&factors.columns[n][i][k], b, n * 8 + lane % 4 * 2 + i, k, 8);
            }
    });
}

template <int PARTS>
static void multiply_registers(float (&c)[PARTS][4], const u32 (&a)[4], u64 b) {
    const u32 lane = emulator::running % emulator::WARP;
    const u32* all = emulator::show(a, 4);
    std::array<std::array<float, 16>, 2> rows;
    for (u32 half = 0; half < 2; half++)
        for (u32 k = 0; k < 16; k++) {
            const u32 of = lane / 4 * 4 + k % 8 / 2;
            rows[half][k] = emulator::of_half(all[of * emulator::MOST_WORDS + half + k / 8 * 2], k % 2);
        }
    const u32(*own)[4] = &a;
    const std::array<u32, 4> given = {a[0], a[1], a[2], a[3]};
    emulator::multiply_later(c, true, [=](emulator::Factors<PARTS>& factors) {
        memcpy(factors.rows, &rows, sizeof(rows));
        // A lane's own registers must stay as well.
        if (memcmp(own, &given, sizeof(given)) != 0) factors.rows[0][0] = NAN;
        for (u32 k = 0; k < 16; k++)
            for (u32 n = 0; n < PARTS; n++) {
                float pair[2];
                emulator::numbers(pair, b, k, n * 8 + lane % 4 * 2, 2);
                for (u32 i = 0; i < 2; i++) factors.columns[n][i][k] = pair[i];
            }
    });
}
#endif
