// Cross-entropy of logits, the exit distribution and the Stage I loss.
//
// With gate logits g and lambda = sigmoid(g): p(t) = lambda_t prod_{j<t} (1 - lambda_j), p(R) the
// rest; the loss is sum_t p(t) L_t - beta H(p) (Ouro, arXiv 2510.25741, section 3). A token's part
// is taken in double precision, in logs, so that nothing has to be clamped.

#define MOST_LOOPS 32

// losses = logsumexp(logits) - logit of the target; the likeliest token, of several the first; dlogits =
// share (softmax - one-hot), unless it is null. One block to a row.
extern "C" __global__ void cross_entropy(const float* logits, const int* targets, const float* shares, float* losses, u32* likeliest,
                                         bf16* dlogits) {
    __shared__ float room[32], rooms[32];
    __shared__ int places[32];
    const size_t row = blockIdx.x;
    const float* line = logits + row * VOCAB;
    float top = -INFINITE, sum = 0.0f;
    int place = VOCAB;
    for (int at = threadIdx.x * 4; at < VOCAB; at += blockDim.x * 4) {
        const float4 x = *reinterpret_cast<const float4*>(line + at);
        const float most = fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w));
        if (most > top) {
            sum *= exponential(top - most);
            top = most;
            place = at;
        }
        sum += exponential(x.x - top) + exponential(x.y - top) + exponential(x.z - top) + exponential(x.w - top);
    }
    float all = top;
#pragma unroll
    for (int by = 16; by > 0; by /= 2) all = fmaxf(all, __shfl_xor_sync(0xffffffffu, all, by));
    if (threadIdx.x % 32 == 0) rooms[threadIdx.x / 32] = all;
    __syncthreads();
    for (int warp = 0; warp < blockDim.x / 32; warp++) all = fmaxf(all, rooms[warp]);
    // Of the four where this thread met its largest, the first that is the largest of all.
    while (place < VOCAB && line[place] != all) place = place % 4 < 3 ? place + 1 : VOCAB;
#pragma unroll
    for (int by = 16; by > 0; by /= 2) {
        const int other = __shfl_xor_sync(0xffffffffu, place, by);
        place = other < place ? other : place;
    }
    if (threadIdx.x % 32 == 0) places[threadIdx.x / 32] = place;
    sum = block_sum(top == -INFINITE ? 0.0f : sum * exponential(top - all), room);
    const float log_sum = all + logf(sum);
    const int target = targets[row];
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < blockDim.x / 32; warp++) place = places[warp] < place ? places[warp] : place;
        likeliest[row] = place < VOCAB ? place : 0;
        losses[row] = log_sum - line[target];
    }
    if (dlogits == nullptr) return;
    const float share = shares[row];
    bf16* to = dlogits + row * VOCAB;
    for (int at = threadIdx.x * 4; at < VOCAB; at += blockDim.x * 4) {
        const float4 x = *reinterpret_cast<const float4*>(line + at);
        const float p[4] = {exponential(x.x - log_sum), exponential(x.y - log_sum), exponential(x.z - log_sum), exponential(x.w - log_sum)};
        uint2 raw;
        raw.x = pack(share * (p[0] - (at == target)), share * (p[1] - (at + 1 == target)));
        raw.y = pack(share * (p[2] - (at + 2 == target)), share * (p[3] - (at + 3 == target)));
        *reinterpret_cast<uint2*>(to + at) = raw;
    }
}

// ln(1 + e^x).
__device__ __forceinline__ double softplus(double x) { return (x > 0.0 ? x : 0.0) + log1p(exp(x > 0.0 ? -x : x)); }

// Logs of the exit distribution of one token.
__device__ __forceinline__ void log_exit_pdf(const float* gates, int token, int tokens, int loops, double* logs) {
    double stay = 0.0;
    for (int t = 0; t + 1 < loops; t++) {
        const double gate = gates[static_cast<size_t>(t) * tokens + token];
        logs[t] = stay - softplus(-gate);
        stay -= softplus(gate);
    }
    logs[loops - 1] = stay;
}

// p(t) / N for each loop and token: the gradient of the mean loss by each cross-entropy.
extern "C" __global__ void exit_shares(const float* gates, int tokens, int loops, float* shares) {
    const int token = blockIdx.x * blockDim.x + threadIdx.x;
    if (token >= tokens) return;
    double logs[MOST_LOOPS];
    log_exit_pdf(gates, token, tokens, loops, logs);
    for (int t = 0; t < loops; t++) shares[static_cast<size_t>(t) * tokens + token] = exp(logs[t]) / tokens;
}

// This block's sums over its tokens: loss, entropy, all gates' gradients, each loop's cross-entropy, each
// exit's probability.
__device__ __forceinline__ void leave_sums(double loss, double entropy, double slope, const float* losses, const double* logs, int tokens,
                                           int loops, double* sums, double* room) {
    const int token = blockIdx.x * blockDim.x + threadIdx.x;
    const bool exists = token < tokens;
    double* own = sums + static_cast<size_t>(blockIdx.x) * (3 + 2 * loops);
    loss = block_sum(loss, room);
    entropy = block_sum(entropy, room);
    slope = block_sum(slope, room);
    if (threadIdx.x == 0) own[0] = loss, own[1] = entropy, own[2] = slope;
    for (int t = 0; t < loops; t++) {
        const double of_loop = block_sum(exists ? double(losses[static_cast<size_t>(t) * tokens + token]) : 0.0, room);
        const double p = block_sum(exists ? exp(logs[t]) : 0.0, room);
        if (threadIdx.x == 0) own[3 + t] = of_loop, own[3 + loops + t] = p;
    }
}

// Stage I: gradients of the mean loss by the gate logits, and sums.
extern "C" __global__ void stage_one(const float* losses, const float* gates, int tokens, int loops, double beta, float* dgates, double* sums) {
    __shared__ double room[32];
    const int token = blockIdx.x * blockDim.x + threadIdx.x;
    double logs[MOST_LOOPS], loss = 0.0, entropy = 0.0, slope = 0.0;
    if (token < tokens) {
        log_exit_pdf(gates, token, tokens, loops, logs);
        double later = 0.0;
        for (int t = loops - 1; t >= 0; t--) {
            const size_t at = static_cast<size_t>(t) * tokens + token;
            const double p = exp(logs[t]), a = losses[at] + beta * logs[t];
            loss += p * a;
            entropy -= p * logs[t];
            float dgate = 0.0f;
            if (t + 1 < loops) {
                const double gate = gates[at], leave = exp(-softplus(-gate)), stay = exp(-softplus(gate));
                dgate = (stay * p * a - leave * later) / tokens;
            }
            dgates[at] = dgate;
            slope += dgate;
            later += p * a;
        }
    }
    leave_sums(loss, entropy, slope, losses, logs, tokens, loops, sums, room);
}

// Stage II: the gate after a loop learns to say whether that loop has helped. With the improvement I = max(0, L_{t-1} - L_t)
// and the label w = sigmoid(k (I - gamma)), the loss is -1/R sum_{t=2..R} mean [w ln(1 - lambda_t) + (1 - w) ln lambda_t]
// (section 3.4); k is `slope_of_label`, gamma `margin`.
extern "C" __global__ void stage_two(const float* losses, const float* gates, int tokens, int loops, double slope_of_label, double margin,
                                     float* dgates, double* sums) {
    __shared__ double room[32];
    const int token = blockIdx.x * blockDim.x + threadIdx.x;
    double logs[MOST_LOOPS], loss = 0.0, entropy = 0.0, slope = 0.0;
    if (token < tokens) {
        log_exit_pdf(gates, token, tokens, loops, logs);
        for (int t = 0; t < loops; t++) {
            const size_t at = static_cast<size_t>(t) * tokens + token;
            entropy -= exp(logs[t]) * logs[t];
            float dgate = 0.0f;
            if (t > 0) {
                const double gate = gates[at], better = double(losses[at - tokens]) - losses[at];
                const double label = slope_of_label * ((better > 0.0 ? better : 0.0) - margin);
                const double stay = exp(-softplus(-label)), leave = exp(-softplus(label));
                loss += (stay * softplus(gate) + leave * softplus(-gate)) / loops;
                dgate = (exp(-softplus(-gate)) - leave) / loops / tokens;
            }
            dgates[at] = dgate;
            slope += dgate;
        }
    }
    leave_sums(loss, entropy, slope, losses, logs, tokens, loops, sums, room);
}

// What each loop is like, summed over tokens: the stream's root mean squares, whether the likeliest token
// is that of the last loop, and the squares of the state's gradient, unless there are none. One block to a
// loop.
extern "C" __global__ void loop_sums(const float* rms, const u32* likeliest, const float* squares, int tokens, int loops, double* sums) {
    __shared__ double room[32];
    const size_t first = static_cast<size_t>(blockIdx.x) * tokens, last = static_cast<size_t>(loops - 1) * tokens;
    double of_rms = 0.0, agreeing = 0.0, of_squares = 0.0;
    for (int token = threadIdx.x; token < tokens; token += blockDim.x) {
        of_rms += rms[first + token];
        agreeing += likeliest[first + token] == likeliest[last + token];
        if (squares != nullptr) of_squares += squares[first + token];
    }
    of_rms = block_sum(of_rms, room);
    agreeing = block_sum(agreeing, room);
    of_squares = block_sum(of_squares, room);
    if (threadIdx.x == 0) {
        double* own = sums + blockIdx.x * 3;
        own[0] = of_rms, own[1] = agreeing, own[2] = of_squares;
    }
}

// Adds the gates' gradients, which `stage_one` or `stage_two` left as sums of its blocks, to that of the bias.
extern "C" __global__ void gate_bias_backward(const double* sums, int blocks, int width, float* dbias) {
    double sum = 0.0;
    for (int block = 0; block < blocks; block++) sum += sums[static_cast<size_t>(block) * width + 2];
    dbias[0] += sum;
}
