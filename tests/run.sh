#!/usr/bin/env bash
# Sets up the environment, then runs the tests. Words are handed to pytest; paths start at the
# repository's root:  bash tests/run.sh tests/unit/data -k packing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh dev
# Tests start several processes on few cores: one thread each.
export OMP_NUM_THREADS=1
exec python -m pytest "$@"
