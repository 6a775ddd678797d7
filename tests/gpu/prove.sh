#!/usr/bin/env bash
# What cannot be tested without a GPU, in one call of a few minutes, with a program that was built
# anywhere:
#
#   tests/gpu/prove.sh --looptrain target/release/looptrain --out tests/gpu
#   tests/gpu/prove.sh --only curves --only bits
#
# - heads: some steps on one batch with heads of 16 to 128 numbers, whose kernels differ, beside the CPU's;
# - curves: 200 steps of a small run on the CPU and on the GPU, from the same tokens;
# - gate: the exit gate of a small model, trained on the CPU and on the GPU;
# - bits: the same run on the GPU again, computing layers again, stopped and resumed, and by two
#   workers on one GPU of which one is killed: the weights must be the same, bit for bit;
# - nccl: the same by two workers on one GPU that reduce over NCCL 2.31 or newer, exact, fast and in bf16, and with
#   one that is killed in the middle of an all-reduce;
# - step: `looptrain bench step` on the shape of Ouro-1.4B and on a smaller one, exact and not;
# - peer: the same steps in PyTorch, bf16 and compiled, where the program to compare with is given
#   (--reference) and PyTorch is there.
#
# Writes results.json and curves.svg; exit status 1 when something does not hold. Wants Python 3, and
# CUDA's NVRTC and cuBLASLt where the program finds them. `--help` lists the options.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/prove.py" "$@"
