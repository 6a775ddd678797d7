#!/usr/bin/env bash
# A training step beside the same step in PyTorch, on the same shape with the same threads, in turns:
#
#   tests/peers/step.sh                                    all shapes, eager
#   tests/peers/step.sh --shape default --shape long --pairs 7 --mode eager --mode compile
#
# Both do forward, backward, clipping by the global norm and AdamW on a fixed batch of token ids, leave
# two steps out, and give the median of the others; each turn is a process of its own. Once for each
# shape looptrain also computes a loop at a time again, for its memory. `--help` lists the options.
# PYTHON names the Python that has torch, python3 by default. Wants a release build, and a machine that
# has nothing else to do.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/step.py" "$@"
