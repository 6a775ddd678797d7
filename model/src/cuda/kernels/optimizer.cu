// Over flat buffers: the gradient's norm, AdamW, and weights as bf16.

// Sums of squares in double precision, one to a block.
extern "C" __global__ void squares(const float* values, u64 count, double* sums) {
    __shared__ double room[32];
    double sum = 0.0;
    const u64 stride = static_cast<u64>(gridDim.x) * blockDim.x * 4;
    for (u64 at = (static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x) * 4; at < count; at += stride) {
        if (at + 4 <= count) {
            const float4 x = *reinterpret_cast<const float4*>(values + at);
            sum += double(x.x) * x.x + double(x.y) * x.y + double(x.z) * x.z + double(x.w) * x.w;
        } else {
            for (u64 i = at; i < count; i++) sum += double(values[i]) * values[i];
        }
    }
    sum = block_sum(sum, room);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101) on one tensor, whose weights are kept in
// bf16, too. `keep` is 1 - rate * decay.
extern "C" __global__ void adamw(float* weights, float* first, float* second, const float* gradient, bf16* narrow, u64 count, float clip,
                                 float beta1, float beta2, float epsilon, float step_size, float inverse_root, float keep) {
    const auto update = [=](float g, float& m, float& v, float& w) {
        g *= clip;
        m = beta1 * m + (1.0f - beta1) * g;
        v = beta2 * v + (1.0f - beta2) * g * g;
        w = w * keep - step_size * m / (sqrtf(v) * inverse_root + epsilon);
    };
    const u64 stride = static_cast<u64>(gridDim.x) * blockDim.x * 8;
    for (u64 at = (static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x) * 8; at < count; at += stride) {
        if (at + 8 <= count) {
            const Eight g = read_eight(gradient + at);
            Eight m = read_eight(first + at), v = read_eight(second + at), w = read_eight(weights + at);
#pragma unroll
            for (int i = 0; i < 8; i++) update(g.v[i], m.v[i], v.v[i], w.v[i]);
            write_eight(first + at, m);
            write_eight(second + at, v);
            write_eight(weights + at, w);
            write_eight(narrow + at, w);
        } else {
            for (u64 i = at; i < count; i++) {
                update(gradient[i], first[i], second[i], weights[i]);
                narrow[i] = static_cast<bf16>(pack(weights[i], 0.0f));
            }
        }
    }
}

extern "C" __global__ void as_bf16(const float* weights, bf16* narrow, u64 count) {
    const u64 stride = static_cast<u64>(gridDim.x) * blockDim.x;
    for (u64 at = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += stride) narrow[at] = static_cast<bf16>(pack(weights[at], 0.0f));
}
