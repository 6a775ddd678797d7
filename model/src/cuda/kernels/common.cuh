// What all kernels share: bf16 numbers, sums over a block, rows of the residual stream.
//
// The model's sizes are constants of the compilation: HIDDEN (d), INNER (f), VOCAB, HEADS, HEAD_DIM.
// Sums have a fixed order: each thread its own elements, then the lanes of a warp, then the warps.

#ifndef EMULATED
// Whether groups of four warps multiply matrices that lie in shared memory.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && HEAD_DIM >= 64
#define WARP_GROUPS
#endif

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
