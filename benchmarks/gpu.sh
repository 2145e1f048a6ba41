#!/bin/bash
# Everything that needs a GPU, in under 9 minutes, as one table: bash benchmarks/gpu.sh [--small] [--only WORD]
# PYTHON: the interpreter (default: .venv/bin/python, or python3). OUT: the folder of the table (default: benchmarks).
cd "$(dirname "$0")/.." || exit
[ -x .venv/bin/python ] && default=.venv/bin/python || default=python3
exec "${PYTHON:-$default}" -m benchmarks.gpu "$@"
