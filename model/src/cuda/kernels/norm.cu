// RMSNorm beside the residual stream, forward and backward.
//
// The stream is f32. What a norm reads of it is its bf16 copy, which is kept: backward sees the same
// numbers as forward. One block takes a row; backward's blocks take several, and leave their part of
// the weights' gradients in `parts`, to be added up by `add_parts`.

struct Row {
    Eight v[ROW_PARTS];
};

// The stream's row plus the normed branch; gives the branch's inverse rms.
__device__ __forceinline__ float add_branch(Row& x, const bf16* branch, const float* weight, float eps, float* room) {
    Row u;
    float squares = 0.0f;
    FOR_ROW(part, at) {
        u.v[part] = read_eight(branch + at);
#pragma unroll
        for (int i = 0; i < 8; i++) squares += u.v[part].v[i] * u.v[part].v[i];
    }
    const float inverse = rsqrtf(block_sum(squares, room) / HIDDEN + eps);
    FOR_ROW(part, at) {
        const Eight w = read_eight(weight + at);
#pragma unroll
        for (int i = 0; i < 8; i++) x.v[part].v[i] += u.v[part].v[i] * inverse * w.v[i];
    }
    return inverse;
}

// Keeps the stream's row as bf16 and makes it that; gives its inverse rms.
__device__ __forceinline__ float keep(Row& x, bf16* kept, float eps, float* room) {
    float squares = 0.0f;
    FOR_ROW(part, at) {
        write_eight(kept + at, x.v[part]);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            x.v[part].v[i] = rounded(x.v[part].v[i]);
            squares += x.v[part].v[i] * x.v[part].v[i];
        }
    }
    return rsqrtf(block_sum(squares, room) / HIDDEN + eps);
}

__device__ __forceinline__ void scale(Row& x, float inverse, const float* weight) {
    FOR_ROW(part, at) {
        const Eight w = read_eight(weight + at);
#pragma unroll
        for (int i = 0; i < 8; i++) x.v[part].v[i] *= inverse * w.v[i];
    }
}

// Rows of the embedding's table.
extern "C" __global__ void embed(const int* ids, const float* table, float* stream) {
    const size_t row = blockIdx.x, id = ids[row];
    FOR_ROW(part, at) write_eight(stream + row * HIDDEN + at, read_eight(table + id * HIDDEN + at));
}

// normed = norm(stream).
extern "C" __global__ void stream_norm(const float* stream, const float* weight, float eps, bf16* kept, float* inverses, bf16* normed) {
    __shared__ float room[32];
    const size_t row = blockIdx.x;
    Row x;
    FOR_ROW(part, at) x.v[part] = read_eight(stream + row * HIDDEN + at);
    const float inverse = keep(x, kept + row * HIDDEN, eps, room);
    scale(x, inverse, weight);
    FOR_ROW(part, at) write_eight(normed + row * HIDDEN + at, x.v[part]);
    if (threadIdx.x == 0) inverses[row] = inverse;
}

// stream += norm(branch); normed = norm(stream).
extern "C" __global__ void residual_norm(float* stream, const bf16* branch, const float* branch_weight, const float* weight, float eps,
                                         float* branch_inverses, bf16* kept, float* inverses, bf16* normed) {
    __shared__ float room[32];
    const size_t row = blockIdx.x;
    Row x;
    FOR_ROW(part, at) x.v[part] = read_eight(stream + row * HIDDEN + at);
    const float of_branch = add_branch(x, branch + row * HIDDEN, branch_weight, eps, room);
    FOR_ROW(part, at) write_eight(stream + row * HIDDEN + at, x.v[part]);
    const float inverse = keep(x, kept + row * HIDDEN, eps, room);
    scale(x, inverse, weight);
    FOR_ROW(part, at) write_eight(normed + row * HIDDEN + at, x.v[part]);
    if (threadIdx.x == 0) {
        branch_inverses[row] = of_branch;
        inverses[row] = inverse;
    }
}

// The end of a loop: state = norm(stream + norm(branch)), which is the next loop's stream; and the
// exit gate's logit, and the stream's root mean square.
extern "C" __global__ void state_norm(float* stream, const bf16* branch, const float* branch_weight, const float* weight, float eps,
                                      float* branch_inverses, bf16* kept, float* inverses, bf16* states, const float* gate_weight,
                                      const float* gate_bias, float* gates, float* rms) {
    __shared__ float room[32];
    const size_t row = blockIdx.x;
    Row x;
    FOR_ROW(part, at) x.v[part] = read_eight(stream + row * HIDDEN + at);
    const float of_branch = add_branch(x, branch + row * HIDDEN, branch_weight, eps, room);
    const float inverse = keep(x, kept + row * HIDDEN, eps, room);
    scale(x, inverse, weight);
    float gate = 0.0f;
    FOR_ROW(part, at) {
        write_eight(stream + row * HIDDEN + at, x.v[part]);
        write_eight(states + row * HIDDEN + at, x.v[part]);
        const Eight w = read_eight(gate_weight + at);
#pragma unroll
        for (int i = 0; i < 8; i++) gate += x.v[part].v[i] * w.v[i];
    }
    gate = block_sum(gate, room);
    if (threadIdx.x == 0) {
        branch_inverses[row] = of_branch;
        inverses[row] = inverse;
        gates[row] = gate + gate_bias[0];
        rms[row] = 1.0f / inverse;
    }
}

// normed, once more, from what was kept of it.
extern "C" __global__ void normed_again(const bf16* kept, const float* inverses, const float* weight, bf16* normed) {
    const size_t row = blockIdx.x;
    const float inverse = inverses[row];
    FOR_ROW(part, at) {
        Eight x = read_eight(kept + row * HIDDEN + at);
        const Eight w = read_eight(weight + at);
#pragma unroll
        for (int i = 0; i < 8; i++) x.v[i] *= inverse * w.v[i];
        write_eight(normed + row * HIDDEN + at, x);
    }
}

// From the gradient of a norm's output to that of its input; its weight's part is added to `dweight`.
__device__ __forceinline__ void norm_back(Row& dy, const bf16* kept, float inverse, const float* weight, Row& dweight, float* room) {
    Row x;
    float along = 0.0f;
    FOR_ROW(part, at) {
        x.v[part] = read_eight(kept + at);
        const Eight w = read_eight(weight + at);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            x.v[part].v[i] *= inverse;
            dweight.v[part].v[i] += dy.v[part].v[i] * x.v[part].v[i];
            dy.v[part].v[i] *= w.v[i];
            along += dy.v[part].v[i] * x.v[part].v[i];
        }
    }
    along = block_sum(along, room) / HIDDEN;
    FOR_ROW(part, at) {
#pragma unroll
        for (int i = 0; i < 8; i++) dy.v[part].v[i] = inverse * (dy.v[part].v[i] - x.v[part].v[i] * along);
    }
}

__device__ __forceinline__ void clear(Row& x) {
#pragma unroll
    for (int part = 0; part < ROW_PARTS; part++) {
#pragma unroll
        for (int i = 0; i < 8; i++) x.v[part].v[i] = 0.0f;
    }
}

// This block's part of the `which`-th sum.
__device__ __forceinline__ void leave(const Row& sum, float* parts, int which) {
    float* to = parts + (static_cast<size_t>(which) * gridDim.x + blockIdx.x) * HIDDEN;
    FOR_ROW(part, at) write_eight(to + at, sum.v[part]);
}

// Backward of `stream_norm`: dstream += ...
extern "C" __global__ void stream_norm_backward(int rows, const bf16* dnormed, const bf16* kept, const float* inverses, const float* weight,
                                         float* dstream, float* parts) {
    __shared__ float room[32];
    Row dweight;
    clear(dweight);
    for (size_t row = blockIdx.x; row < rows; row += gridDim.x) {
        Row dy;
        FOR_ROW(part, at) dy.v[part] = read_eight(dnormed + row * HIDDEN + at);
        norm_back(dy, kept + row * HIDDEN, inverses[row], weight, dweight, room);
        FOR_ROW(part, at) {
            Eight dx = read_eight(dstream + row * HIDDEN + at);
#pragma unroll
            for (int i = 0; i < 8; i++) dx.v[i] += dy.v[part].v[i];
            write_eight(dstream + row * HIDDEN + at, dx);
        }
    }
    leave(dweight, parts, 0);
}

// Backward of `residual_norm`: dstream += ..., dbranch = ...
extern "C" __global__ void residual_norm_backward(int rows, const bf16* dnormed, const bf16* kept, const float* inverses,
                                                  const float* weight, float* dstream, const bf16* branch,
                                                  const float* branch_inverses, const float* branch_weight, bf16* dbranch,
                                                  float* parts) {
    __shared__ float room[32];
    Row dweight, dbranch_weight;
    clear(dweight);
    clear(dbranch_weight);
    for (size_t row = blockIdx.x; row < rows; row += gridDim.x) {
        Row dy;
        FOR_ROW(part, at) dy.v[part] = read_eight(dnormed + row * HIDDEN + at);
        norm_back(dy, kept + row * HIDDEN, inverses[row], weight, dweight, room);
        FOR_ROW(part, at) {
            const Eight dx = read_eight(dstream + row * HIDDEN + at);
#pragma unroll
            for (int i = 0; i < 8; i++) dy.v[part].v[i] += dx.v[i];
            write_eight(dstream + row * HIDDEN + at, dy.v[part]);
        }
        norm_back(dy, branch + row * HIDDEN, branch_inverses[row], branch_weight, dbranch_weight, room);
        FOR_ROW(part, at) write_eight(dbranch + row * HIDDEN + at, dy.v[part]);
    }
    leave(dweight, parts, 0);
    leave(dbranch_weight, parts, 1);
}

// Backward of `state_norm`, from the gradients by the head, by the gate and by the next loop:
// dstream = ..., dbranch = ...; and the squares of that of the state.
extern "C" __global__ void state_norm_backward(int rows, const float* dstates, const float* dgates, const float* gate_weight,
                                               const bf16* kept, const float* inverses, const float* weight, float* dstream,
                                               const bf16* branch, const float* branch_inverses, const float* branch_weight,
                                               bf16* dbranch, float* parts, float* squares) {
    __shared__ float room[32];
    Row dweight, dbranch_weight, dgate_weight;
    clear(dweight);
    clear(dbranch_weight);
    clear(dgate_weight);
    for (size_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const float dgate = dgates[row], inverse = inverses[row];
        Row dy;
        float of_row = 0.0f;
        FOR_ROW(part, at) {
            const Eight x = read_eight(kept + row * HIDDEN + at), w = read_eight(weight + at);
            const Eight dx = read_eight(dstream + row * HIDDEN + at), g = read_eight(gate_weight + at);
            dy.v[part] = read_eight(dstates + row * HIDDEN + at);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                dgate_weight.v[part].v[i] += dgate * (x.v[i] * (inverse * w.v[i]));
                dy.v[part].v[i] += dx.v[i] + dgate * g.v[i];
                of_row += dy.v[part].v[i] * dy.v[part].v[i];
            }
        }
        of_row = block_sum(of_row, room);
        if (threadIdx.x == 0) squares[row] = of_row;
        norm_back(dy, kept + row * HIDDEN, inverse, weight, dweight, room);
        FOR_ROW(part, at) write_eight(dstream + row * HIDDEN + at, dy.v[part]);
        norm_back(dy, branch + row * HIDDEN, branch_inverses[row], branch_weight, dbranch_weight, room);
        FOR_ROW(part, at) write_eight(dbranch + row * HIDDEN + at, dy.v[part]);
    }
    leave(dweight, parts, 0);
    leave(dbranch_weight, parts, 1);
    leave(dgate_weight, parts, 2);
}

// The gradient of the exit gate's weight by the states of all loops, where nothing before the gate is trained.
extern "C" __global__ void gate_weight_backward(int rows, const bf16* states, const float* dgates, float* parts) {
    Row dweight;
    clear(dweight);
    for (size_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const float dgate = dgates[row];
        FOR_ROW(part, at) {
            const Eight x = read_eight(states + row * HIDDEN + at);
#pragma unroll
            for (int i = 0; i < 8; i++) dweight.v[part].v[i] += dgate * x.v[i];
        }
    }
    leave(dweight, parts, 0);
}

// Adds up `count` parts of each of up to three sums, in their order: 32 columns to a block of 256
// threads, blockIdx.y for the sum.
extern "C" __global__ void add_parts(int count, const float* parts, float* first, float* second, float* third) {
    __shared__ float room[8][33];
    const int lane = threadIdx.x % 32, group = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    const float* from = parts + static_cast<size_t>(blockIdx.y) * count * HIDDEN;
    float sum = 0.0f;
    if (column < HIDDEN)
        for (int part = group; part < count; part += 8) sum += from[static_cast<size_t>(part) * HIDDEN + column];
    room[group][lane] = sum;
    __syncthreads();
    if (group == 0 && column < HIDDEN) {
        for (int other = 1; other < 8; other++) sum += room[other][lane];
        float* to = blockIdx.y == 0 ? first : blockIdx.y == 1 ? second : third;
        to[column] += sum;
    }
}

// Rows of the embedding's gradient: those of its positions, in their order. One block to an id.
extern "C" __global__ void embed_backward(const int* ids, const int* starts, const int* positions, const float* dstream, float* dtable) {
    const int number = blockIdx.x, end = starts[number + 1];
    const size_t id = ids[number];
    FOR_ROW(part, at) {
        Eight sum = read_eight(dtable + id * HIDDEN + at);
        for (int place = starts[number]; place < end; place++) {
            const Eight dx = read_eight(dstream + static_cast<size_t>(positions[place]) * HIDDEN + at);
#pragma unroll
            for (int i = 0; i < 8; i++) sum.v[i] += dx.v[i];
        }
        write_eight(dtable + id * HIDDEN + at, sum);
    }
}
