// Causal attention, forward and backward, without the matrix of scores in memory.
//
// After FlashAttention-2 and -3 (Dao, arXiv 2307.08691; Shah and others, arXiv 2407.08608). Queries, keys
// and values lie beside each other in rows of 3 HIDDEN. A block takes 128 rows of one head, 64 to a group
// of four warps, and goes over tiles of columns, the next of which is copied meanwhile. Backward has one
// kernel for keys and values and one for queries, each of which computes the scores again: no two blocks
// add to the same number, so the order of sums is fixed. Scores are in units of log2 e, as is their log-sum.
//
// Row r of a sequence sees the rows from first_seen[r] up to itself, and is seen by the rows before
// seen_until[r]: both grow along the sequence, so that tiles that nobody sees are passed over.
//
// A tile is rows of HEAD_DIM numbers, KEYS or QUERIES of them or a block's own, in panels of at most 64
// columns. With WARP_GROUPS products run by themselves, and the numbers between two of them are worked on
// while others run; else each warp loads its parts of a tile.

#define GROUPS 2
#define GROUP_ROWS 64
#define ROWS (GROUP_ROWS * GROUPS)
#define THREADS (128 * GROUPS)
#define CHUNKS (HEAD_DIM / 8)
#define STEPS (HEAD_DIM / 16)
#define PANEL_CHUNKS (CHUNKS < 8 ? CHUNKS : 8)
#define LINE_BYTES (PANEL_CHUNKS * 16)
#define TILE_BYTES(rows) ((rows) * HEAD_DIM * 2)
#define QKV_STRIDE (3 * HIDDEN)

// Where eight numbers of a row lie in a tile of `IN` rows: rows begin in turns at other banks.
template <int IN>
__device__ __forceinline__ u32 place(u32 tile, int row, int chunk) {
    const int panel = chunk / PANEL_CHUNKS, within = chunk % PANEL_CHUNKS;
    return tile + (panel * IN + row) * LINE_BYTES + ((within ^ (row & (PANEL_CHUNKS - 1))) * 16);
}

// What a thread copies of tiles of `IN` rows, `STRIDE` numbers apart: of every AT_ONCE-th row eight numbers.
template <int IN, int STRIDE>
struct Copier {
    static constexpr int AT_ONCE = THREADS / CHUNKS;
    static_assert(AT_ONCE % 8 == 0);
    const bf16* at;
    u32 place_in_tile;
    int row, end;

    // Of rows from `from` on, of which there are `end`.
    __device__ __forceinline__ Copier(const bf16* from, int end) : row(threadIdx.x / CHUNKS), end(end) {
        const int chunk = threadIdx.x % CHUNKS;
        at = from + row * STRIDE + chunk * 8;
        place_in_tile = place<IN>(0, row, chunk);
    }

    // Asks for the tile from row `first` on.
    __device__ __forceinline__ void ask(u32 tile, int first) const {
        if (AT_ONCE > IN && row >= IN) return;
        const u32 to = tile + place_in_tile;
        const bf16* of_tile = at + static_cast<long long>(first) * STRIDE;
        if (first + IN <= end) {
#pragma unroll
            for (int more = 0; more < IN; more += AT_ONCE) copy_async(to + more * LINE_BYTES, of_tile + more * STRIDE);
        } else {
#pragma unroll 1
            for (int more = 0; more < IN; more += AT_ONCE) {
                const bool exists = first + row + more < end;
                copy_async(to + more * LINE_BYTES, exists ? of_tile + more * STRIDE : at - row * STRIDE, exists);
            }
        }
    }
};

// A warp's 16 rows of the products below, numbers of its lanes: 8 columns to a part.
typedef float Outputs[HEAD_DIM / 8][4];

// As bf16, to be multiplied from registers, 16 columns at a time.
template <int PARTS>
__device__ __forceinline__ void narrow(u32 (&to)[PARTS / 2][4], const float (&c)[PARTS][4]) {
#pragma unroll
    for (int step = 0; step < PARTS / 2; step++)
#pragma unroll
        for (int i = 0; i < 4; i++) to[step][i] = pack(c[2 * step + i / 2][i % 2 * 2], c[2 * step + i / 2][i % 2 * 2 + 1]);
}

#ifdef WARP_GROUPS
// Blocks that share a multiprocessor: one computes while the other waits.
#define SHARING (HEAD_DIM == 128 ? 1 : 2)

// Rows of a tile for the tensor cores: every 8 rows of a panel are 1024 bytes.
typedef u64 Matrix;
__device__ __forceinline__ Matrix matrix(u32 at, u32 leading_bytes) {
    const u64 swizzled = 1ull << 62;
    return swizzled | static_cast<u64>(1024 >> 4) << 32 | static_cast<u64>(leading_bytes >> 4) << 16 | (at & 0x3ffff) >> 4;
}
// To be multiplied along its rows, or along its columns.
template <int IN>
__device__ __forceinline__ Matrix along_rows(u32 at) { return matrix(at, 16); }
template <int IN>
__device__ __forceinline__ Matrix along_columns(u32 at) { return matrix(at, IN * LINE_BYTES); }
// One that lies so many bytes after.
__device__ __forceinline__ Matrix after(Matrix matrix, u32 bytes) { return matrix + (bytes >> 4); }

// c = the group's 64 rows of a tile of ROWS times the 8 PARTS rows of `columns`, transposed.
template <int PARTS>
__device__ __forceinline__ void rows_by_rows(float (&c)[PARTS][4], Matrix rows, Matrix columns) {
#pragma unroll
    for (int step = 0; step < STEPS; step++)
        multiply_shared(c, after(rows, step / 4 * ROWS * LINE_BYTES + step % 4 * 32),
                        after(columns, step / 4 * PARTS * 8 * LINE_BYTES + step % 4 * 32), step > 0);
}

// out += p b: p from the group's registers, times the rows of a tile.
template <int COUNT>
__device__ __forceinline__ void weighted_rows(Outputs& out, const u32 (&p)[COUNT][4], Matrix tile) {
#pragma unroll
    for (int step = 0; step < COUNT; step++) multiply_registers(out, p[step], after(tile, step * 16 * LINE_BYTES));
}
#else
#define SHARING 1

typedef u32 Matrix;
template <int IN>
__device__ __forceinline__ Matrix along_rows(u32 at) { return at; }
template <int IN>
__device__ __forceinline__ Matrix along_columns(u32 at) { return at; }
__device__ __forceinline__ Matrix after(Matrix matrix, u32 bytes) { return matrix + bytes; }

__device__ __forceinline__ void copies_shown() {}
__device__ __forceinline__ void products_open() {}
__device__ __forceinline__ void products_close() {}
template <int PENDING>
__device__ __forceinline__ void products_wait() {}

// c = the group's 64 rows of a tile of ROWS times the 8 PARTS rows of `columns`, transposed.
template <int PARTS>
__device__ __forceinline__ void rows_by_rows(float (&c)[PARTS][4], Matrix rows, Matrix columns) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
    for (int n = 0; n < PARTS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) c[n][i] = 0.0f;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        u32 a[4];
        load_matrices(a, place<ROWS>(rows, warp * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
        for (int n = 0; n < PARTS / 2; n++) {
            u32 b[4];
            load_matrices(b, place<PARTS * 8>(columns, n * 16 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
            multiply_add(c[2 * n], a, b[0], b[1]);
            multiply_add(c[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// out += p b: p from the group's registers, times the rows of a tile.
template <int COUNT>
__device__ __forceinline__ void weighted_rows(Outputs& out, const u32 (&p)[COUNT][4], Matrix tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < COUNT; step++)
#pragma unroll
        for (int n = 0; n < STEPS; n++) {
            u32 b[4];
            load_transposed(b, place<COUNT * 16>(tile, step * 16 + lane % 16, n * 2 + lane / 16));
            multiply_add(out[2 * n], p[step], b[0], b[1]);
            multiply_add(out[2 * n + 1], p[step], b[2], b[3]);
        }
}
#endif

// Which group of four warps this is, told so that the compiler knows it to be one number for a warp.
__device__ __forceinline__ int group_of_warps() { return __shfl_sync(0xffffffffu, threadIdx.x / 128, 0); }

// What was copied is there for all threads, tensor cores included, but for the last `PENDING` groups of
// copies; and all have come here.
template <int PENDING>
__device__ __forceinline__ void arrived() {
    copies_wait<PENDING>();
    copies_shown();
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
    const int end = first + (group + 1) * GROUP_ROWS;
    return first_seen[(end < length ? end : length) - 1];
}

// Keeps the compiler from waiting for products first and computing afterwards what should be computed while
// they run: `never` is made of those numbers, and the compiler does not know that it never holds.
__device__ __forceinline__ void before_waiting(bool never) {
    if (__any_sync(0xffffffffu, never)) __trap();
}

// Puts `nothing` where a group's rows do not see a key: a lane's rows are `row` and 8 after, and see the
// keys from `start` on; the group's begin at `first`, and all see those from `of_group` on.
__device__ __forceinline__ void mask(float (&scores)[KEYS / 8][4], float nothing, int tile, int first, int of_group, int row, const int (&start)[2]) {
    if ((tile + 1) * KEYS <= first + 1 && tile * KEYS >= of_group) return;
    const int at = tile * KEYS + threadIdx.x % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int from = start[half] - at, before = row + half * 8 + 1 - at;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (n * 8 + i < from || n * 8 + i >= before) scores[n][half * 2 + i] = nothing;
    }
}

// Turns scores into their probabilities over that of the greatest so far, and adds them to `sum`; what was
// added up before has to be multiplied by `factor`. A lane's rows are 8 apart, and shared by four lanes.
template <int PARTS>
__device__ __forceinline__ void probabilities(float (&s)[PARTS][4], float scale, float (&most)[2], float (&sum)[2], float (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float top = -INFINITE;
#pragma unroll
        for (int n = 0; n < PARTS; n++) top = fmaxf(top, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        top = fmaxf(most[half], top * scale);
        factor[half] = power_of_two(most[half] - top);
        most[half] = top;
        float of_tile = 0.0f;
#pragma unroll
        for (int n = 0; n < PARTS; n++)
#pragma unroll
            for (int i = half * 2; i < half * 2 + 2; i++) {
                s[n][i] = power_of_two(s[n][i] * scale - top);
                of_tile += s[n][i];
            }
        sum[half] = sum[half] * factor[half] + of_tile;
    }
}

// mixed = softmax(scale q k^T) v, and the scores' log-sums [sequences, HEADS, length]. Grid: blocks of
// rows, heads, sequences.
extern "C" __global__ void __launch_bounds__(THREADS, SHARING) attention(const bf16* qkv, const u32* first_seen, int length, float scale,
                                                                         bf16* mixed, float* log_sums) {
    DYNAMIC_SHARED(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = group_of_warps();
    const int first = (gridDim.x - 1 - blockIdx.x) * ROWS, head = blockIdx.y, sequence = blockIdx.z;
    const bf16* q = qkv + static_cast<size_t>(sequence) * length * QKV_STRIDE + head * HEAD_DIM;
    const bf16 *k = q + HIDDEN, *v = k + HIDDEN;
    const u32 queries = shared_address(shared), keys = queries + TILE_BYTES(ROWS), values = keys + 2 * TILE_BYTES(KEYS);
    const int rows_end = first + ROWS < length ? first + ROWS : length;
    first_seen += static_cast<size_t>(sequence) * length;
    const int begin = first_seen[first] / KEYS, tiles = (rows_end + KEYS - 1) / KEYS;
    // Those that a row of the group sees.
    const int end = (first + (group + 1) * GROUP_ROWS + KEYS - 1) / KEYS, seen = end < tiles ? end : tiles;
    // The first row of this warp.
    const int row = first + warp * 16;
    const int of_group = start_of_group(first_seen, first, group, length);
    const int start[2] = {start_of(first_seen, row + lane / 4, length), start_of(first_seen, row + lane / 4 + 8, length)};

    const Copier<KEYS, QKV_STRIDE> of_keys(k, length), of_values(v, length);
    Copier<ROWS, QKV_STRIDE>(q, length).ask(queries, first);
    of_keys.ask(keys, begin * KEYS);
    copies_close();
    of_values.ask(values, begin * KEYS);
    if (begin + 1 < tiles) of_keys.ask(keys + TILE_BYTES(KEYS), (begin + 1) * KEYS);
    copies_close();

    const Matrix rows = along_rows<ROWS>(queries + group * GROUP_ROWS * LINE_BYTES);
    const Matrix columns = along_rows<KEYS>(keys), weighted = along_columns<KEYS>(values);

    Outputs out;
    zero(out);
    // Less than any score, and yet a number: of a row's first tiles, all may be masked.
    float most[2] = {-1e30f, -1e30f}, sum[2] = {0.0f, 0.0f}, factor[2];
    float scores[KEYS / 8][4];
    u32 p[KEYS / 16][4];
    arrived<1>();
    products_open();
    rows_by_rows(scores, rows, columns);
    products_close();
    products_wait<0>();
    mask(scores, -INFINITE, begin, first + group * GROUP_ROWS, of_group, row + lane / 4, start);
    probabilities(scores, scale, most, sum, factor);
    narrow(p, scores);
    // The next tile's probabilities are computed while this one's weigh the values.
    int tile = begin;
    for (; tile + 1 < tiles; tile++) {
        const u32 buffer = (tile - begin) % 2 * TILE_BYTES(KEYS), other = TILE_BYTES(KEYS) - buffer;
        arrived<0>();
        of_values.ask(values + other, (tile + 1) * KEYS);
        if (tile + 2 < tiles) of_keys.ask(keys + buffer, (tile + 2) * KEYS);
        copies_close();
        if (tile + 1 >= seen) break;
        products_open();
        rows_by_rows(scores, rows, after(columns, other));
        products_close();
        weighted_rows(out, p, after(weighted, buffer));
        products_close();
        products_wait<1>();
        mask(scores, -INFINITE, tile + 1, first + group * GROUP_ROWS, of_group, row + lane / 4, start);
        probabilities(scores, scale, most, sum, factor);
        before_waiting(sum[0] + sum[1] < 0.0f);
        products_wait<0>();
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) out[n][i] *= factor[i / 2];
        narrow(p, scores);
    }
    arrived<0>();
    products_open();
    weighted_rows(out, p, after(weighted, (tile - begin) % 2 * TILE_BYTES(KEYS)));
    products_close();
    products_wait<0>();

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
    means += (static_cast<size_t>(sequence) * HEADS + head) * length;
    const u32 keys = shared_address(shared), values = keys + TILE_BYTES(ROWS);
    const u32 queries = values + TILE_BYTES(ROWS), douts = queries + 2 * TILE_BYTES(QUERIES);
    // Of each query of a tile the log-sum, and after those of all the means.
    const u32 numbers = douts + 2 * TILE_BYTES(QUERIES), numbers_bytes = 2 * QUERIES * sizeof(float);
    seen_until += static_cast<size_t>(sequence) * length;
    const int rows_end = first + ROWS < length ? first + ROWS : length;
    const int begin = first / QUERIES, tiles = (seen_until[rows_end - 1] + QUERIES - 1) / QUERIES;
    const Copier<QUERIES, QKV_STRIDE> of_queries(q, length);
    const Copier<QUERIES, HIDDEN> of_douts(dout, length);
    // Of queries that do not exist, all is zero: they add nothing.
    const auto ask_tile = [&](int tile) {
        const int buffer = (tile - begin) % 2;
        of_queries.ask(queries + buffer * TILE_BYTES(QUERIES), tile * QUERIES);
        of_douts.ask(douts + buffer * TILE_BYTES(QUERIES), tile * QUERIES);
        if (threadIdx.x < 2 * QUERIES) {
            const int query = tile * QUERIES + threadIdx.x % QUERIES;
            const float* from = threadIdx.x < QUERIES ? logs : means;
            copy_number_async(numbers + buffer * numbers_bytes + threadIdx.x * sizeof(float), from + (query < length ? query : 0), query < length);
        }
        copies_close();
    };

    Copier<ROWS, QKV_STRIDE>(q + HIDDEN, length).ask(keys, first);
    Copier<ROWS, QKV_STRIDE>(q + 2 * HIDDEN, length).ask(values, first);
    ask_tile(begin);

    const Matrix key_rows = along_rows<ROWS>(keys + group * GROUP_ROWS * LINE_BYTES);
    const Matrix value_rows = along_rows<ROWS>(values + group * GROUP_ROWS * LINE_BYTES);
    const Matrix query_rows = along_rows<QUERIES>(queries), query_columns = along_columns<QUERIES>(queries);
    const Matrix dout_rows = along_rows<QUERIES>(douts), dout_columns = along_columns<QUERIES>(douts);
    Outputs dkeys, dvalues;
    zero(dkeys);
    zero(dvalues);
    // The first row of this warp.
    const int row = first + warp * 16;
    // Where the rows stop to be seen, and where the first of the group does.
    const int of_group = end_of(seen_until, first + group * GROUP_ROWS, length);
    const int until[2] = {end_of(seen_until, row + lane / 4, length), end_of(seen_until, row + lane / 4 + 8, length)};
    for (int tile = begin; tile < tiles; tile++) {
        const int buffer = (tile - begin) % 2;
        arrived<0>();
        if (tile + 1 < tiles) ask_tile(tile + 1);
        // It sees none of the group's rows.
        if ((tile + 1) * QUERIES <= first + group * GROUP_ROWS) continue;
        float p[QUERIES / 8][4], dp[QUERIES / 8][4];
        products_open();
        rows_by_rows(p, key_rows, after(query_rows, buffer * TILE_BYTES(QUERIES)));
        products_close();
        rows_by_rows(dp, value_rows, after(dout_rows, buffer * TILE_BYTES(QUERIES)));
        products_close();
        const float* of_tile = reinterpret_cast<const float*>(shared + (numbers - shared_address(shared)) + buffer * numbers_bytes) + lane % 4 * 2;
        products_wait<1>();
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++) {
            const float2 log = *reinterpret_cast<const float2*>(of_tile + n * 8);
#pragma unroll
            for (int i = 0; i < 4; i++) p[n][i] = power_of_two(p[n][i] * score_scale - (i % 2 ? log.y : log.x));
        }
        if (tile * QUERIES < first + (group + 1) * GROUP_ROWS || (tile + 1) * QUERIES > of_group) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int at = tile * QUERIES + lane % 4 * 2, from = row + lane / 4 + half * 8 - at, before = until[half] - at;
#pragma unroll
                for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        if (n * 8 + i < from || n * 8 + i >= before) p[n][half * 2 + i] = 0.0f;
            }
        }
        u32 weights[QUERIES / 16][4];
        narrow(weights, p);
        products_open();
        weighted_rows(dvalues, weights, after(dout_columns, buffer * TILE_BYTES(QUERIES)));
        products_close();
        products_wait<1>();
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++) {
            const float2 mean = *reinterpret_cast<const float2*>(of_tile + QUERIES + n * 8);
#pragma unroll
            for (int i = 0; i < 4; i++) dp[n][i] = p[n][i] * (dp[n][i] - (i % 2 ? mean.y : mean.x));
        }
        u32 of_scores[QUERIES / 16][4];
        narrow(of_scores, dp);
        products_open();
        weighted_rows(dkeys, of_scores, after(query_columns, buffer * TILE_BYTES(QUERIES)));
        products_close();
        products_wait<0>();
    }
    bf16* to = dqkv + static_cast<size_t>(sequence) * length * QKV_STRIDE + head * HEAD_DIM;
    write_rows(to + HIDDEN, QKV_STRIDE, dkeys, row, length, scale, scale);
    write_rows(to + 2 * HIDDEN, QKV_STRIDE, dvalues, row, length, 1.0f, 1.0f);
}

// Gradients of queries. Rows are queries, columns are keys. Grid as forward.
extern "C" __global__ void __launch_bounds__(THREADS, SHARING) attention_backward_queries(const bf16* qkv, const bf16* dmixed,
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
    const u32 queries = shared_address(shared), douts = queries + TILE_BYTES(ROWS);
    const u32 keys = douts + TILE_BYTES(ROWS), values = keys + 2 * TILE_BYTES(KEYS);
    const int rows_end = first + ROWS < length ? first + ROWS : length;
    first_seen += static_cast<size_t>(sequence) * length;
    const int begin = first_seen[first] / KEYS, tiles = (rows_end + KEYS - 1) / KEYS;

    const Copier<KEYS, QKV_STRIDE> of_keys(k, length), of_values(v, length);
    Copier<ROWS, QKV_STRIDE>(q, length).ask(queries, first);
    Copier<ROWS, HIDDEN>(dout, length).ask(douts, first);
    of_keys.ask(keys, begin * KEYS);
    of_values.ask(values, begin * KEYS);
    copies_close();

    const Matrix query_rows = along_rows<ROWS>(queries + group * GROUP_ROWS * LINE_BYTES);
    const Matrix dout_rows = along_rows<ROWS>(douts + group * GROUP_ROWS * LINE_BYTES);
    const Matrix key_rows = along_rows<KEYS>(keys), key_columns = along_columns<KEYS>(keys), value_rows = along_rows<KEYS>(values);
    Outputs dqueries;
    zero(dqueries);
    // The first row of this warp.
    const int row = first + warp * 16;
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
        const u32 buffer = (tile - begin) % 2 * TILE_BYTES(KEYS), other = TILE_BYTES(KEYS) - buffer;
        arrived<0>();
        if (tile + 1 < tiles) {
            of_keys.ask(keys + other, (tile + 1) * KEYS);
            of_values.ask(values + other, (tile + 1) * KEYS);
            copies_close();
        }
        // None of the group's rows sees it.
        if (tile * KEYS >= first + (group + 1) * GROUP_ROWS) continue;
        float p[KEYS / 8][4], dp[KEYS / 8][4];
        products_open();
        rows_by_rows(p, query_rows, after(key_rows, buffer));
        products_close();
        rows_by_rows(dp, dout_rows, after(value_rows, buffer));
        products_close();
        products_wait<1>();
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) p[n][i] = power_of_two(p[n][i] * score_scale - log[i / 2]);
        mask(p, 0.0f, tile, first + group * GROUP_ROWS, of_group, row + lane / 4, start);
        products_wait<0>();
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) p[n][i] *= dp[n][i] - mean[i / 2];
        u32 of_scores[KEYS / 16][4];
        narrow(of_scores, p);
        products_open();
        weighted_rows(dqueries, of_scores, after(key_columns, buffer));
        products_close();
        products_wait<0>();
    }
    bf16* to = dqkv + static_cast<size_t>(sequence) * length * QKV_STRIDE + head * HEAD_DIM;
    write_rows(to, QKV_STRIDE, dqueries, row, length, scale, scale);
}
