#!/usr/bin/env bash
# What to run where a GPU can be had for some minutes: one command each, which ends in time, and leaves in the folder
# OUT what it has so far, whenever it is killed.
#
#   tools/gpu_session.sh first HASH                      gpu.py, then the tests of the device: 580 s at most
#   tools/gpu_session.sh rows HASH SECONDS [NAME ...]    gpu.py again: rows named so, then what is missing or failed
#   tools/gpu_session.sh tests SECONDS [ARGUMENT ...]    the tests of the device, or what pytest is told instead
#   tools/gpu_session.sh small SECONDS                   the kernels' tests of small and odd shapes
#   tools/gpu_session.sh script SECONDS FILE [FLAG ...]  another benchmark, its JSON in OUT
#
# HASH: the commit that is measured. `rows` goes on with OUT/gpu.json or, where OUT is empty, with gpu.json in this tree.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src" PYTHONUNBUFFERED=1
export TRITON_INTERPRET=0 # tests/conftest.py interprets where it sees no device file of the driver
python=${PYTHON:-python3}
OUT=${OUT:-gpu-results}
mkdir -p "$OUT"

WHOLE=570 ROWS=330 LAST=25 # seconds: of `first`; of its rows; that a test may go on when the tests' time is over

# Seconds, flags. Once more where the process was lost, with its device or without.
rows() {
    local end=$((SECONDS + $1)) status
    local given=("${@:2}")
    for _ in 1 2; do
        timeout -k 5 $((end - SECONDS + 20)) "$python" benchmarks/gpu.py --json "$OUT/gpu.json" --commit "$hash" \
            --seconds $((end - SECONDS)) "${given[@]}" 2>&1 | tee -a "$OUT/gpu.log"
        status=${PIPESTATUS[0]}
        if ((status < 3 || end - SECONDS < 60)); then break; fi
        given=(--resume)
    done
    return "$status"
}

# Seconds, arguments of pytest. Of a test that hangs in the driver only the end of its process is the end (thread).
tests() {
    timeout -k 5 $(($1 + LAST)) "$python" -m pytest -n 6 --dist loadgroup --timeout=90 --timeout-method=thread \
        --session-timeout="$1" "${@:2}" 2>&1 | tee "$OUT/tests.log"
}

# Seams and ranks are for several GPUs, and have time of their own.
DEVICE=(tests/gpu --ignore=tests/gpu/test_ranks.py --ignore=tests/gpu/test_seam.py)

case "${1:-} $#" in
"first 2")
    hash=$2
    rows "$ROWS"
    measured=$?
    tests $((WHOLE - LAST - SECONDS)) "${DEVICE[@]}" && exit "$measured"
    ;;
"rows "[3-9]*)
    hash=$2
    if [[ ! -e $OUT/gpu.json && -e gpu.json ]]; then cp gpu.json "$OUT/"; fi
    if (($# == 3)); then rows "$3" --resume; else rows "$3" --again "${@:4}"; fi
    ;;
"tests "[2-9]*)
    if (($# == 2)); then tests "$2" "${DEVICE[@]}"; else tests "$2" "${@:3}"; fi
    ;;
"small 2")
    # What is compiled ahead of time takes minutes, and no GPU.
    tests "$2" -c tests/gpu/pytest.ini --rootdir tests tests/kernels/test_triton_*.py -k "not compiled"
    ;;
"script "[3-9]*)
    timeout -k 5 "$2" "$python" "benchmarks/$3" --json "$OUT/${3%.py}.json" "${@:4}" 2>&1 | tee "$OUT/${3%.py}.log"
    ;;
*)
    sed -n '5,9s/^# *//p' "$0" >&2
    exit 2
    ;;
esac
