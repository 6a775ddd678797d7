#!/usr/bin/env bash
# Two workers of one thread each beside PyTorch with two processes of one thread, in turns:
#
#   tests/peers/ddp.sh --pairs 5
#
# looptrain is a whole local run, with coordinator, all-reduce, votes and step log; a step counts from
# commit to commit. The peer is data parallel training over gloo. Both train the same shape on the
# loopback of this machine. `--help` lists the options. PYTHON names the Python that has torch, python3
# by default. Wants a release build, and a machine that has nothing else to do.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/ddp.py" "$@"
