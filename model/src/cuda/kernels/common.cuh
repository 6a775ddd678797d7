// What all kernels share: bf16 numbers, sums over a block, rows of the residual stream.
//
// The model's sizes are constants of the compilation: HIDDEN (d), INNER (f), VOCAB, HEADS, HEAD_DIM. So are
// attention's tiles, of KEYS and QUERIES, and WARP_GROUPS is defined where groups of four warps multiply
// matrices that lie in shared memory. All of them come from `Target` in kernels.rs.
// Sums have a fixed order: each thread its own elements, then the lanes of a warp, then the warps.

#ifndef EMULATED
typedef unsigned int u32;
typedef unsigned long long u64;

// An address in the block's shared memory.
__device__ __forceinline__ u32 shared_address(const void* at) {
    return static_cast<u32>(__cvta_generic_to_shared(at));
}

#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

// Two floats as bf16, rounded to nearest even; `low` in the lower half.
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// 2^x.
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 16 bytes from global to shared memory, without waiting; zeros where there is nothing to copy.
__device__ __forceinline__ void copy_async(u32 to, const void* from, bool exists) {
    const int bytes = exists ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copies_close() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// The same of a row that is there.
__device__ __forceinline__ void copy_async(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// One number, or zero.
__device__ __forceinline__ void copy_number_async(u32 to, const float* from, bool exists) {
    const int bytes = exists ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Waits until all groups of copies but the last `PENDING` are there, for this thread.
template <int PENDING>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of bf16; each lane names a row of 8.
__device__ __forceinline__ void load_matrices(u32 (&to)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at) : "memory");
}

__device__ __forceinline__ void load_transposed(u32 (&to)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at) : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8], over the lanes of a warp.
__device__ __forceinline__ void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#ifdef WARP_GROUPS
// What was copied is there for the tensor cores as well.
__device__ __forceinline__ void copies_shown() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Products of a group of four warps go on while it does: between opening and waiting, neither their
// registers nor what they read may be written to.
__device__ __forceinline__ void products_open() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_close() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until all that was closed but the last `PENDING` is done.
template <int PENDING>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define IN4(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define IN32(c, n) IN4(c, n), IN4(c, n + 1), IN4(c, n + 2), IN4(c, n + 3), IN4(c, n + 4), IN4(c, n + 5), IN4(c, n + 6), IN4(c, n + 7)
#define NAMES32                                                                                                   \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
    "%30,%31"
#define NAMES64                                                                                                  \
    NAMES32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56," \
            "%57,%58,%59,%60,%61,%62,%63"

// c = a b, or c + a b: a [64, 16] by rows, b [16, 8 PARTS] by columns, both in shared memory.
template <int PARTS>
__device__ __forceinline__ void multiply_shared(float (&c)[PARTS][4], u64 a, u64 b, bool add) {
    static_assert(PARTS == 8 || PARTS == 16);
    const int plus = add;
    if constexpr (PARTS == 8)
        asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES32 "}, %32, %33, p, 1, 1, 0, 0;}\n"
                     : IN32(c, 0)
                     : "l"(a), "l"(b), "r"(plus));
    else
        asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES64 "}, %64, %65, p, 1, 1, 0, 0;}\n"
                     : IN32(c, 0), IN32(c, 8)
                     : "l"(a), "l"(b), "r"(plus));
}

// c += a b: a [64, 16] from the group's registers, b [16, 8 PARTS] by rows in shared memory.
template <int PARTS>
__device__ __forceinline__ void multiply_registers(float (&c)[PARTS][4], const u32 (&a)[4], u64 b) {
    static_assert(PARTS == 8 || PARTS == 16);
    if constexpr (PARTS == 8)
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;\n"
                     : IN32(c, 0)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    else
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;\n"
                     : IN32(c, 0), IN32(c, 8)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#endif
#endif

typedef unsigned short bf16;

// e^x, to about 1e-6.
__device__ __forceinline__ float exponential(float x) { return power_of_two(x * 1.44269504f); }

#define INFINITE __int_as_float(0x7f800000)

__device__ __forceinline__ float wide(bf16 x) { return __uint_as_float(static_cast<u32>(x) << 16); }
__device__ __forceinline__ float low_half(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high_half(u32 x) { return __uint_as_float(x & 0xffff0000u); }

// As it is when it has been a bf16.
__device__ __forceinline__ float rounded(float x) { return low_half(pack(x, 0.0f)); }

struct Eight {
    float v[8];
};

__device__ __forceinline__ Eight read_eight(const bf16* at) {
    const uint4 raw = *reinterpret_cast<const uint4*>(at);
    return {{low_half(raw.x), high_half(raw.x), low_half(raw.y), high_half(raw.y), low_half(raw.z),
             high_half(raw.z), low_half(raw.w), high_half(raw.w)}};
}

__device__ __forceinline__ Eight read_eight(const float* at) {
    const float4 a = reinterpret_cast<const float4*>(at)[0], b = reinterpret_cast<const float4*>(at)[1];
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

__device__ __forceinline__ void write_eight(bf16* at, const Eight& x) {
    uint4 raw;
    raw.x = pack(x.v[0], x.v[1]);
    raw.y = pack(x.v[2], x.v[3]);
    raw.z = pack(x.v[4], x.v[5]);
    raw.w = pack(x.v[6], x.v[7]);
    *reinterpret_cast<uint4*>(at) = raw;
}

__device__ __forceinline__ void write_eight(float* at, const Eight& x) {
    float4 a, b;
    a.x = x.v[0], a.y = x.v[1], a.z = x.v[2], a.w = x.v[3];
    b.x = x.v[4], b.y = x.v[5], b.z = x.v[6], b.w = x.v[7];
    reinterpret_cast<float4*>(at)[0] = a;
    reinterpret_cast<float4*>(at)[1] = b;
}

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(0xffffffffu, x, by);
    return x;
}

// Sum over a block of whole warps, the same in all threads. `room` holds 32 values.
template <class T>
__device__ __forceinline__ T block_sum(T x, T* room) {
    const int warps = blockDim.x / 32;
    x = warp_sum(x);
    if (warps == 1) return x;
    __syncthreads();
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    __syncthreads();
    T sum = room[0];
    for (int warp = 1; warp < warps; warp++) sum += room[warp];
    return sum;
}

// A row of the residual stream lies over a block, eight elements to a thread at a time.
#define ROW_EIGHTS (HIDDEN / 8)
#define ROW_THREADS (ROW_EIGHTS >= 256 ? 256 : (ROW_EIGHTS + 31) / 32 * 32)
#define ROW_PARTS ((ROW_EIGHTS + ROW_THREADS - 1) / ROW_THREADS)

// For each of this thread's eights: its number `part`, and its first element `at`.
#define FOR_ROW(part, at)                                          \
    _Pragma("unroll") for (int part = 0; part < ROW_PARTS; part++) \
        if (const int at = (part * ROW_THREADS + threadIdx.x) * 8; at < HIDDEN)
