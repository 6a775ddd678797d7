// Sums over the slots of a step: in 64-bit fixed point, whose order does not matter, or in f32, which may be
// rounded to bf16 in the end.

// Notes the first value that has no place in the sum: its place, which fits in 32 bits, and its bits.
__device__ __forceinline__ bool within(float value, float limit, u64 at, u64* fault) {
    if (fabsf(value) <= limit) return true;
    atomicMin(fault, at << 32 | __float_as_uint(value));
    return false;
}

// sums += round(gradient * scale), to the nearest even integer, from one element to before another; the first of
// a step's slots sets them.
extern "C" __global__ void exact_add(const float* gradient, u64 from, u64 until, double scale, float limit, int first, long long* sums, u64* fault) {
    const u64 stride = static_cast<u64>(gridDim.x) * blockDim.x * 4;
    for (u64 at = from + (static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x) * 4; at < until; at += stride) {
        const float4 g = *reinterpret_cast<const float4*>(gradient + at);
        const float values[4] = {g.x, g.y, g.z, g.w};
        longlong2* to = reinterpret_cast<longlong2*>(sums + at);
        longlong2 before[2] = {};
        if (!first) before[0] = to[0], before[1] = to[1];
        long long added[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // What has no place has no meaning either: the step fails, or is skipped.
            added[i] = within(values[i], limit, at + i, fault) ? __double2ll_rn(values[i] * scale) : 0;
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            before[i].x += added[2 * i];
            before[i].y += added[2 * i + 1];
            to[i] = before[i];
        }
    }
}

// The same check for sums in f32.
extern "C" __global__ void check_sums(const float* sums, u64 from, u64 until, float limit, u64* fault) {
    const u64 stride = static_cast<u64>(gridDim.x) * blockDim.x * 4;
    for (u64 at = from + (static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x) * 4; at < until; at += stride) {
        const float4 g = *reinterpret_cast<const float4*>(sums + at);
        within(g.x, limit, at, fault);
        within(g.y, limit, at + 1, fault);
        within(g.z, limit, at + 2, fault);
        within(g.w, limit, at + 3, fault);
    }
}

// The same, and the sums as bf16.
extern "C" __global__ void narrow_sums(const float* sums, u64 from, u64 until, float limit, bf16* narrow, u64* fault) {
    const u64 stride = static_cast<u64>(gridDim.x) * blockDim.x * 4;
    for (u64 at = from + (static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x) * 4; at < until; at += stride) {
        const float4 g = *reinterpret_cast<const float4*>(sums + at);
        within(g.x, limit, at, fault);
        within(g.y, limit, at + 1, fault);
        within(g.z, limit, at + 2, fault);
        within(g.w, limit, at + 3, fault);
        uint2 raw;
        raw.x = pack(g.x, g.y);
        raw.y = pack(g.z, g.w);
        *reinterpret_cast<uint2*>(narrow + at) = raw;
    }
}

// A number whose every bit depends on every bit of x (the last steps of SplitMix64).
__device__ __forceinline__ u64 mixed(u64 x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// Two sums of what words become together with their places: any change of a word, or of the order,
// changes them. Wrapping sums have no order of their own.
__device__ __forceinline__ void note(u64 word, u64 at, u64& one, u64& other) {
    const u64 first = mixed(word + at * 0x9e3779b97f4a7c15ull);
    one += first;
    other += first * (2 * at + 1);
}

__device__ __forceinline__ void leave_digest(u64 one, u64 other, u64* digest) {
    __shared__ u64 room[32];
    one = block_sum(one, room);
    other = block_sum(other, room);
    if (threadIdx.x == 0) {
        atomicAdd(digest, one);
        atomicAdd(digest + 1, other);
    }
}

// means = sums / 2^bits / divisor, and the digest of the sums.
extern "C" __global__ void exact_settle(const long long* sums, u64 count, double scale, double divisor, float* means, u64* digest) {
    u64 one = 0, other = 0;
    const u64 stride = static_cast<u64>(gridDim.x) * blockDim.x * 2;
    // The scale is a power of two, so this is exact, and as good as dividing by it.
    const double back = 1.0 / scale;
    for (u64 at = (static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x) * 2; at < count; at += stride) {
        const longlong2 sum = *reinterpret_cast<const longlong2*>(sums + at);
        float2 mean;
        mean.x = static_cast<float>(static_cast<double>(sum.x) * back / divisor);
        mean.y = static_cast<float>(static_cast<double>(sum.y) * back / divisor);
        *reinterpret_cast<float2*>(means + at) = mean;
        note(static_cast<u64>(sum.x), at, one, other);
        note(static_cast<u64>(sum.y), at + 1, one, other);
    }
    leave_digest(one, other, digest);
}

// means = sums / divisor, in place, and the digest of the sums.
extern "C" __global__ void fast_settle(float* sums, u64 count, float divisor, u64* digest) {
    u64 one = 0, other = 0;
    const u64 stride = static_cast<u64>(gridDim.x) * blockDim.x;
    for (u64 at = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += stride) {
        const float sum = sums[at];
        sums[at] = sum / divisor;
        note(__float_as_uint(sum), at, one, other);
    }
    leave_digest(one, other, digest);
}

// means = sums / divisor, and the digest of the sums.
extern "C" __global__ void narrow_settle(const bf16* sums, u64 count, float divisor, float* means, u64* digest) {
    u64 one = 0, other = 0;
    const u64 stride = static_cast<u64>(gridDim.x) * blockDim.x;
    for (u64 at = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += stride) {
        const bf16 sum = sums[at];
        means[at] = wide(sum) / divisor;
        note(sum, at, one, other);
    }
    leave_digest(one, other, digest);
}
