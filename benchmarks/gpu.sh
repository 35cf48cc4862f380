#!/bin/sh
# What a card does, in at most 6 minutes: sh benchmarks/gpu.sh [PYTHON]
# SMALL=1 runs every line of it on a CPU with tiny settings, to try the script itself.
set -eu
cd "$(dirname "$0")/.."
exec "${1:-python}" -m benchmarks.gpu
