// SwiGLU on rows [gate, up] of 2 INNER, and its gradient.

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// inner = silu(gate) up. Eight elements to a thread, blockIdx.x for the row.
extern "C" __global__ void swiglu(const bf16* gates, bf16* inner) {
    const int at = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (at >= INNER) return;
    const size_t row = blockIdx.x;
    const Eight g = read_eight(gates + row * 2 * INNER + at), up = read_eight(gates + row * 2 * INNER + INNER + at);
    Eight h;
#pragma unroll
    for (int i = 0; i < 8; i++) h.v[i] = g.v[i] * sigmoid(g.v[i]) * up.v[i];
    write_eight(inner + row * INNER + at, h);
}

// The gradients of gate and up, and inner once more.
extern "C" __global__ void swiglu_backward(const bf16* gates, const bf16* dinner, bf16* dgates, bf16* inner) {
    const int at = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (at >= INNER) return;
    const size_t row = blockIdx.x;
    const Eight g = read_eight(gates + row * 2 * INNER + at), up = read_eight(gates + row * 2 * INNER + INNER + at);
    const Eight dh = read_eight(dinner + row * INNER + at);
    Eight h, dg, dup;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float s = sigmoid(g.v[i]), silu = g.v[i] * s;
        h.v[i] = silu * up.v[i];
        dup.v[i] = dh.v[i] * silu;
        dg.v[i] = dh.v[i] * up.v[i] * (s + silu * (1.0f - s));
    }
    write_eight(inner + row * INNER + at, h);
    write_eight(dgates + row * 2 * INNER + at, dg);
    write_eight(dgates + row * 2 * INNER + INNER + at, dup);
}
