// Causal attention, forward and backward, without the matrix of scores in memory.
//
// After FlashAttention-2 (Dao, arXiv 2307.08691). Queries, keys and values lie beside each other in
// rows of 3 HIDDEN. A block takes 128 rows of one head, 64 to a group of four warps, and goes over
// tiles of 64 columns. Backward has one kernel for keys and values and one for queries, each of which
// computes the scores again: no two blocks add to the same number, so the order of sums is fixed.
// Scores are in units of log2 e, as is their log-sum.
//
// Row r of a sequence sees the rows from first_seen[r] up to itself, and is seen by the rows before
// seen_until[r]: both grow along the sequence, so that tiles that nobody sees are passed over.
//
// A tile is 64 rows of HEAD_DIM numbers, in panels of at most 64 columns. Where the machine multiplies
// matrices that lie in shared memory by groups of warps (sm_90a), it does; else each warp loads its
// parts.

#define TILE 64
#define GROUPS 2
#define ROWS (TILE * GROUPS)
#define THREADS (128 * GROUPS)
#define CHUNKS (HEAD_DIM / 8)
#define STEPS (HEAD_DIM / 16)
#define PANEL_CHUNKS (CHUNKS < 8 ? CHUNKS : 8)
#define PANEL_BYTES (TILE * PANEL_CHUNKS * 16)
#define TILE_BYTES (TILE * HEAD_DIM * 2)
#define QKV_STRIDE (3 * HIDDEN)

// Where eight numbers of a row lie in a tile: rows begin in turns at other banks.
__device__ __forceinline__ u32 place(u32 tile, int row, int chunk) {
    const int panel = chunk / PANEL_CHUNKS, within = chunk % PANEL_CHUNKS;
    return tile + panel * PANEL_BYTES + row * (PANEL_CHUNKS * 16) + ((within ^ (row & (PANEL_CHUNKS - 1))) * 16);
}

// Asks for `TILES` tiles of rows from `first` on, of which those before `end` exist.
template <int TILES>
__device__ __forceinline__ void ask(u32 tile, const bf16* from, int stride, int first, int end) {
#pragma unroll 4
    for (int i = threadIdx.x; i < TILES * TILE * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        const bool exists = first + row < end;
        const size_t at = static_cast<size_t>(exists ? first + row : 0) * stride + chunk * 8;
        copy_async(place(tile + row / TILE * TILE_BYTES, row % TILE, chunk), from + at, exists);
    }
}

// A warp's 16 rows of the products below: numbers of its lanes.
typedef float Scores[TILE / 8][4];
typedef float Outputs[HEAD_DIM / 8][4];

#ifdef WARP_GROUPS
// Blocks that share a multiprocessor, forward: one computes while the other waits.
#define FORWARD_BLOCKS 2

// Rows of a panel of 64 columns, as a matrix for the tensor cores: every 8 rows are 1024 bytes.
__device__ __forceinline__ u64 described(u32 at, u32 leading_bytes) {
    const u64 swizzled = 1ull << 62;
    return swizzled | static_cast<u64>(1024 >> 4) << 32 | static_cast<u64>(leading_bytes >> 4) << 16 | (at & 0x3ffff) >> 4;
}

__device__ __forceinline__ void products_open() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_close() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until all groups of products but the last `PENDING` are done.
template <int PENDING>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define D4(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define D16(c, n) D4(c, n), D4(c, n + 1), D4(c, n + 2), D4(c, n + 3)

// c = the group's 64 rows of `rows` times the 64 rows of `columns`, transposed.
__device__ __forceinline__ void rows_by_rows(Scores& c, u32 rows, u32 columns) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        const u32 at = step / 4 * PANEL_BYTES + step % 4 * 32;
        const u64 a = described(rows + at, 16), b = described(columns + at, 16);
        asm volatile(
            "{.reg .pred p; setp.ne.b32 p, %34, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
            "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},"
            " %32, %33, p, 1, 1, 0, 0;}\n"
            : D16(c, 0), D16(c, 4)
            : "l"(a), "l"(b), "r"(step));
    }
}

// out += p b: p [64, 64] from the group's registers, times the 64 rows of `tile`.
__device__ __forceinline__ void weighted_rows(Outputs& out, const Scores& p, u32 tile) {
#pragma unroll
    for (int step = 0; step < TILE / 16; step++) {
        const u32 a0 = pack(p[2 * step][0], p[2 * step][1]), a1 = pack(p[2 * step][2], p[2 * step][3]);
        const u32 a2 = pack(p[2 * step + 1][0], p[2 * step + 1][1]), a3 = pack(p[2 * step + 1][2], p[2 * step + 1][3]);
        const u64 b = described(tile + step * 2048, PANEL_BYTES);
#if HEAD_DIM == 128
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
            "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
            "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},"
            " {%64,%65,%66,%67}, %68, 1, 1, 1, 1;\n"
            : D16(out, 0), D16(out, 4), D16(out, 8), D16(out, 12)
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
#else
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
            "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},"
            " {%32,%33,%34,%35}, %36, 1, 1, 1, 1;\n"
            : D16(out, 0), D16(out, 4)
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
#endif
    }
}
#else
#define FORWARD_BLOCKS 1
__device__ __forceinline__ void products_open() {}
__device__ __forceinline__ void products_close() {}
template <int PENDING>
__device__ __forceinline__ void products_wait() {}

// c = the group's 64 rows of `rows` times the 64 rows of `columns`, transposed.
__device__ __forceinline__ void rows_by_rows(Scores& c, u32 rows, u32 columns) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) c[n][i] = 0.0f;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        u32 a[4];
        load_matrices(a, place(rows, warp * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
        for (int n = 0; n < TILE / 16; n++) {
            u32 b[4];
            load_matrices(b, place(columns, n * 16 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
            multiply_add(c[2 * n], a, b[0], b[1]);
            multiply_add(c[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// out += p b: p [64, 64] from the group's registers, times the 64 rows of `tile`.
__device__ __forceinline__ void weighted_rows(Outputs& out, const Scores& p, u32 tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < TILE / 16; step++) {
        const u32 a[4] = {pack(p[2 * step][0], p[2 * step][1]), pack(p[2 * step][2], p[2 * step][3]),
                          pack(p[2 * step + 1][0], p[2 * step + 1][1]), pack(p[2 * step + 1][2], p[2 * step + 1][3])};
#pragma unroll
        for (int n = 0; n < STEPS; n++) {
            u32 b[4];
            load_transposed(b, place(tile, step * 16 + lane % 16, n * 2 + lane / 16));
            multiply_add(out[2 * n], a, b[0], b[1]);
            multiply_add(out[2 * n + 1], a, b[2], b[3]);
        }
    }
}
#endif

// Which group of four warps this is, told so that the compiler knows it to be one number for a warp.
__device__ __forceinline__ int group_of_warps() { return __shfl_sync(0xffffffffu, threadIdx.x / 128, 0); }

// What was copied is there for all threads, tensor cores included.
template <int PENDING>
__device__ __forceinline__ void arrived() {
    copies_wait<PENDING>();
#ifdef WARP_GROUPS
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    __syncthreads();
}

__device__ __forceinline__ void zero(Outputs& c) {
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) c[n][i] = 0.0f;
}

// Writes a warp's 16 rows, those before `end`, times a factor.
__device__ __forceinline__ void write_rows(bf16* to, int stride, const Outputs& c, int row, int end, float top, float bottom) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int at = row + lane / 4 + half * 8;
        const float factor = half ? bottom : top;
        if (at >= end) continue;
        bf16* line = to + static_cast<size_t>(at) * stride + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++)
            *reinterpret_cast<u32*>(line + n * 8) = pack(c[n][half * 2] * factor, c[n][half * 2 + 1] * factor);
    }
}

// Turns queries and keys by their positions' angles, halves split; backward by `sign` -1. One block
// to a token.
extern "C" __global__ void rotate(bf16* qkv, const float* cosines, const float* sines, int length, float sign) {
    const size_t token = blockIdx.x;
    const int half = HEAD_DIM / 2;
    const float* cosine = cosines + token % length * half;
    const float* sine = sines + token % length * half;
    for (int i = threadIdx.x; i < 2 * HIDDEN / 4; i += blockDim.x) {
        const int head = i / (half / 2), at = i % (half / 2) * 2;
        u32* low = reinterpret_cast<u32*>(qkv + token * QKV_STRIDE + head * HEAD_DIM + at);
        u32* high = low + half / 2;
        const float c0 = cosine[at], c1 = cosine[at + 1], s0 = sign * sine[at], s1 = sign * sine[at + 1];
        const float a0 = low_half(*low), a1 = high_half(*low), b0 = low_half(*high), b1 = high_half(*high);
        *low = pack(a0 * c0 - b0 * s0, a1 * c1 - b1 * s1);
        *high = pack(b0 * c0 + a0 * s0, b1 * c1 + a1 * s1);
    }
}

// The first row that a row sees, and that the last row of a group does: no row of it begins later.
__device__ __forceinline__ int start_of(const u32* first_seen, int row, int length) { return row < length ? first_seen[row] : 0; }
__device__ __forceinline__ int start_of_group(const u32* first_seen, int first, int group, int length) {
    const int end = first + (group + 1) * TILE;
    return first_seen[(end < length ? end : length) - 1];
}

// mixed = softmax(scale q k^T) v, and the scores' log-sums [sequences, HEADS, length]. Grid: blocks of
// rows, heads, sequences.
extern "C" __global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS) attention(const bf16* qkv, const u32* first_seen, int length,
                                                                                         float scale, bf16* mixed, float* log_sums) {
    DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = group_of_warps();
    const int first = (gridDim.x - 1 - blockIdx.x) * ROWS, head = blockIdx.y, sequence = blockIdx.z;
    const bf16* q = qkv + static_cast<size_t>(sequence) * length * QKV_STRIDE + head * HEAD_DIM;
    const bf16 *k = q + HIDDEN, *v = k + HIDDEN;
    const u32 queries = shared_address(shared), keys = queries + GROUPS * TILE_BYTES, values = keys + 2 * TILE_BYTES;
    const int rows_end = first + ROWS < length ? first + ROWS : length;
    const int tiles = (rows_end + TILE - 1) / TILE;
    // The first row of this warp, and the group's last tile.
    const int row = first + warp * 16, last = first / TILE + group;
    first_seen += static_cast<size_t>(sequence) * length;
    const int begin = first_seen[first] / TILE, of_group = start_of_group(first_seen, first, group, length);
    const int start[2] = {start_of(first_seen, row + lane / 4, length), start_of(first_seen, row + lane / 4 + 8, length)};

    ask<GROUPS>(queries, q, QKV_STRIDE, first, length);
    ask<1>(keys, k, QKV_STRIDE, begin * TILE, length);
    copies_close();
    ask<1>(values, v, QKV_STRIDE, begin * TILE, length);
    copies_close();

    Outputs out;
    zero(out);
    // Less than any score, and yet a number: of a row's first tiles, all may be masked.
    float most[2] = {-1e30f, -1e30f}, sum[2] = {0.0f, 0.0f};
    for (int tile = begin; tile < tiles; tile++) {
        const u32 buffer = (tile - begin) % 2 * TILE_BYTES, other = TILE_BYTES - buffer;
        arrived<1>();
        if (tile + 1 < tiles) ask<1>(keys + other, k, QKV_STRIDE, (tile + 1) * TILE, length);
        copies_close();
        Scores scores;
        if (tile <= last) {
            products_open();
            rows_by_rows(scores, queries + group * TILE_BYTES, keys + buffer);
            products_close();
            products_wait<0>();
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int query = row + lane / 4 + half * 8;
                const bool masked = tile == last || tile * TILE < of_group;
                float top = -INFINITE;
#pragma unroll
                for (int n = 0; n < TILE / 8; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float& s = scores[n][half * 2 + i];
                        const int key = tile * TILE + n * 8 + lane % 4 * 2 + i;
                        if (masked && (key > query || key < start[half])) s = -INFINITE;
                        top = fmaxf(top, s);
                    }
                top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
                top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
                top = fmaxf(most[half], top * scale);
                const float before = power_of_two(most[half] - top);
                most[half] = top;
                float of_tile = 0.0f;
#pragma unroll
                for (int n = 0; n < TILE / 8; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float& s = scores[n][half * 2 + i];
                        s = power_of_two(s * scale - top);
                        of_tile += s;
                    }
                sum[half] = sum[half] * before + of_tile;
#pragma unroll
                for (int n = 0; n < HEAD_DIM / 8; n++) {
                    out[n][half * 2] *= before;
                    out[n][half * 2 + 1] *= before;
                }
            }
        }
        arrived<1>();
        if (tile + 1 < tiles) ask<1>(values + other, v, QKV_STRIDE, (tile + 1) * TILE, length);
        copies_close();
        if (tile <= last) {
            products_open();
            weighted_rows(out, scores, values + buffer);
            products_close();
            products_wait<0>();
        }
    }
    float factor[2];
    float* logs = log_sums + (static_cast<size_t>(sequence) * HEADS + head) * length;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float all = sum[half];
        all += __shfl_xor_sync(0xffffffffu, all, 1);
        all += __shfl_xor_sync(0xffffffffu, all, 2);
        factor[half] = 1.0f / all;
        const int query = row + lane / 4 + half * 8;
        if (lane % 4 == 0 && query < length) logs[query] = most[half] + log2f(all);
    }
    bf16* to = mixed + static_cast<size_t>(sequence) * length * HIDDEN + head * HEAD_DIM;
    write_rows(to, HIDDEN, out, row, length, factor[0], factor[1]);
}

// What backward subtracts from the gradients of a row's probabilities: dmixed . mixed of each head,
// [sequences, HEADS, length]. One warp to a token and head.
extern "C" __global__ void attention_means(const bf16* mixed, const bf16* dmixed, int tokens, int length, float* means) {
    const int lane = threadIdx.x % 32;
    const size_t number = static_cast<size_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    const size_t token = number / HEADS;
    const int head = number % HEADS;
    if (token >= tokens) return;
    float sum = 0.0f;
    for (int at = lane * 2; at < HEAD_DIM; at += 64) {
        const size_t place = token * HIDDEN + head * HEAD_DIM + at;
        const u32 a = *reinterpret_cast<const u32*>(mixed + place), b = *reinterpret_cast<const u32*>(dmixed + place);
        sum += low_half(a) * low_half(b) + high_half(a) * high_half(b);
    }
    sum = warp_sum(sum);
    if (lane == 0) means[(token / length * HEADS + head) * length + token % length] = sum;
}

// The first row that does not see a row any more.
__device__ __forceinline__ int end_of(const u32* seen_until, int row, int length) { return row < length ? seen_until[row] : length; }

// Gradients of keys and values. Rows are keys, columns are queries. Grid as forward.
extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_keys(const bf16* qkv, const bf16* dmixed, const float* log_sums,
                                                                              const float* means, const u32* seen_until, int length,
                                                                              float scale, float score_scale, bf16* dqkv) {
    DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = group_of_warps();
    const int first = blockIdx.x * ROWS, head = blockIdx.y, sequence = blockIdx.z;
    const bf16* q = qkv + static_cast<size_t>(sequence) * length * QKV_STRIDE + head * HEAD_DIM;
    const bf16* dout = dmixed + static_cast<size_t>(sequence) * length * HIDDEN + head * HEAD_DIM;
    const float* logs = log_sums + (static_cast<size_t>(sequence) * HEADS + head) * length;
    const float* mean = means + (static_cast<size_t>(sequence) * HEADS + head) * length;
    const u32 keys = shared_address(shared), values = keys + GROUPS * TILE_BYTES;
    const u32 queries = values + GROUPS * TILE_BYTES, douts = queries + 2 * TILE_BYTES;
    seen_until += static_cast<size_t>(sequence) * length;
    const int rows_end = first + ROWS < length ? first + ROWS : length;
    const int begin = first / TILE, tiles = (seen_until[rows_end - 1] + TILE - 1) / TILE;

    ask<GROUPS>(keys, q + HIDDEN, QKV_STRIDE, first, length);
    ask<GROUPS>(values, q + 2 * HIDDEN, QKV_STRIDE, first, length);
    ask<1>(queries, q, QKV_STRIDE, first, length);
    ask<1>(douts, dout, HIDDEN, first, length);
    copies_close();

    Outputs dkeys, dvalues;
    zero(dkeys);
    zero(dvalues);
    // The first row of this warp, and the group's first tile.
    const int row = first + warp * 16, diagonal = begin + group;
    // Where the rows stop to be seen, and where the first of the group does.
    const int of_group = end_of(seen_until, first + group * TILE, length);
    const int until[2] = {end_of(seen_until, row + lane / 4, length), end_of(seen_until, row + lane / 4 + 8, length)};
    for (int tile = begin; tile < tiles; tile++) {
        const u32 buffer = (tile - begin) % 2 * TILE_BYTES, other = TILE_BYTES - buffer;
        arrived<0>();
        if (tile + 1 < tiles) {
            ask<1>(queries + other, q, QKV_STRIDE, (tile + 1) * TILE, length);
            ask<1>(douts + other, dout, HIDDEN, (tile + 1) * TILE, length);
            copies_close();
        }
        if (tile < diagonal) continue;
        Scores p, dp;
        products_open();
        rows_by_rows(p, keys + group * TILE_BYTES, queries + buffer);
        products_close();
        rows_by_rows(dp, values + group * TILE_BYTES, douts + buffer);
        products_close();
        products_wait<1>();
        const bool masked = tile == diagonal || (tile + 1) * TILE > of_group;
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int query = tile * TILE + n * 8 + lane % 4 * 2 + i;
                const float log = query < length ? logs[query] : INFINITE;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float& s = p[n][half * 2 + i];
                    s = power_of_two(s * score_scale - log);
                    if (masked && (row + lane / 4 + half * 8 > query || query >= until[half])) s = 0.0f;
                }
            }
        products_wait<0>();
        products_open();
        weighted_rows(dvalues, p, douts + buffer);
        products_close();
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int query = tile * TILE + n * 8 + lane % 4 * 2 + i;
                const float of_row = query < length ? mean[query] : 0.0f;
#pragma unroll
                for (int half = 0; half < 2; half++) dp[n][half * 2 + i] = p[n][half * 2 + i] * (dp[n][half * 2 + i] - of_row);
            }
        products_open();
        weighted_rows(dkeys, dp, queries + buffer);
        products_close();
        products_wait<0>();
    }
    bf16* to = dqkv + static_cast<size_t>(sequence) * length * QKV_STRIDE + head * HEAD_DIM;
    write_rows(to + HIDDEN, QKV_STRIDE, dkeys, row, length, scale, scale);
    write_rows(to + 2 * HIDDEN, QKV_STRIDE, dvalues, row, length, 1.0f, 1.0f);
}

// Gradients of queries. Rows are queries, columns are keys. Grid as forward.
extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_queries(const bf16* qkv, const bf16* dmixed,
                                                                                 const float* log_sums, const float* means,
                                                                                 const u32* first_seen, int length, float scale,
                                                                                 float score_scale, bf16* dqkv) {
    DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = group_of_warps();
    const int first = (gridDim.x - 1 - blockIdx.x) * ROWS, head = blockIdx.y, sequence = blockIdx.z;
    const bf16* q = qkv + static_cast<size_t>(sequence) * length * QKV_STRIDE + head * HEAD_DIM;
    const bf16 *k = q + HIDDEN, *v = k + HIDDEN;
    const bf16* dout = dmixed + static_cast<size_t>(sequence) * length * HIDDEN + head * HEAD_DIM;
    const size_t of_head = (static_cast<size_t>(sequence) * HEADS + head) * length;
    const u32 queries = shared_address(shared), douts = queries + GROUPS * TILE_BYTES;
    const u32 keys = douts + GROUPS * TILE_BYTES, values = keys + 2 * TILE_BYTES;
    const int rows_end = first + ROWS < length ? first + ROWS : length;
    first_seen += static_cast<size_t>(sequence) * length;
    const int begin = first_seen[first] / TILE, tiles = (rows_end + TILE - 1) / TILE;

    ask<GROUPS>(queries, q, QKV_STRIDE, first, length);
    ask<GROUPS>(douts, dout, HIDDEN, first, length);
    ask<1>(keys, k, QKV_STRIDE, begin * TILE, length);
    ask<1>(values, v, QKV_STRIDE, begin * TILE, length);
    copies_close();

    Outputs dqueries;
    zero(dqueries);
    // The first row of this warp, and the group's last tile.
    const int row = first + warp * 16, last = first / TILE + group;
    const int of_group = start_of_group(first_seen, first, group, length);
    const int start[2] = {start_of(first_seen, row + lane / 4, length), start_of(first_seen, row + lane / 4 + 8, length)};
    float log[2], mean[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int query = row + lane / 4 + half * 8;
        log[half] = query < length ? log_sums[of_head + query] : INFINITE;
        mean[half] = query < length ? means[of_head + query] : 0.0f;
    }
    for (int tile = begin; tile < tiles; tile++) {
        const u32 buffer = (tile - begin) % 2 * TILE_BYTES, other = TILE_BYTES - buffer;
        arrived<0>();
        if (tile + 1 < tiles) {
            ask<1>(keys + other, k, QKV_STRIDE, (tile + 1) * TILE, length);
            ask<1>(values + other, v, QKV_STRIDE, (tile + 1) * TILE, length);
            copies_close();
        }
        if (tile > last) continue;
        Scores p, dp;
        products_open();
        rows_by_rows(p, queries + group * TILE_BYTES, keys + buffer);
        products_close();
        rows_by_rows(dp, douts + group * TILE_BYTES, values + buffer);
        products_close();
        products_wait<1>();
        const bool masked = tile == last || tile * TILE < of_group;
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int query = row + lane / 4 + i / 2 * 8, key = tile * TILE + n * 8 + lane % 4 * 2 + i % 2;
                p[n][i] = power_of_two(p[n][i] * score_scale - log[i / 2]);
                if (masked && (key > query || key < start[i / 2])) p[n][i] = 0.0f;
            }
        products_wait<0>();
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) p[n][i] *= dp[n][i] - mean[i / 2];
        products_open();
        weighted_rows(dqueries, p, keys + buffer);
        products_close();
        products_wait<0>();
    }
    bf16* to = dqkv + static_cast<size_t>(sequence) * length * QKV_STRIDE + head * HEAD_DIM;
    write_rows(to, QKV_STRIDE, dqueries, row, length, scale, scale);
}
