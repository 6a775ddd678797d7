#!/usr/bin/env bash
# Makes the golden vectors beside this script again, in float64, with a PyTorch implementation of
# LoopLM that shares no code with this project and is not part of it. `check.py`, which is, computes
# the vectors independently of both and compares.
#
#   tests/golden/make.sh PATH/TO/looplm_torch.py      (needs torch and safetensors from PyPI)
set -euo pipefail
oracle=$1
here=$(cd "$(dirname "$0")" && pwd)

case_of() {
  local name=$1
  shift
  python3 "$oracle" golden "$here/$name" "$@"
}

# Seeds are such that rounding the weights to f32 moves no gradient of the f64 model by more than 3e-6,
# so that a tolerance of 1e-5 measures the arithmetic.
case_of plain --d 24 --layers 2 --loops 3 --heads 3 --ffn 40 --vocab 41 --batch 2 --seq 13 --beta 0.05 --seed 7
case_of one-loop --d 16 --layers 2 --loops 1 --heads 1 --ffn 24 --vocab 37 --batch 3 --seq 7 --beta 0.05 --seed 11
case_of many-loops --d 20 --layers 1 --loops 8 --heads 2 --ffn 33 --vocab 29 --batch 2 --seq 9 --beta 0.1 --seed 23
# More positions than one attention tile, a large rotary base, an odd vocabulary.
case_of long --d 16 --layers 1 --loops 2 --heads 2 --ffn 24 --vocab 31 --batch 2 --seq 80 --theta 1000000 --beta 0 --seed 17

python3 "$oracle" steps "$here/steps" --d 24 --layers 2 --loops 3 --heads 3 --ffn 40 --vocab 41 --batch 2 --seq 13 --steps 8 --seed 7
