#!/usr/bin/env bash
# Tests under other arithmetic than this processor's own: older instruction sets of torch, oneDNN and
# MKL, and other numbers of threads, one setting after the other. One run of the suite sees one
# processor; what passes here passes on most.
#
#   bash shells/test_arithmetic.sh                   the numeric tests under every setting
#   bash shells/test_arithmetic.sh --quick           without whole commands, under two settings side
#                                                    by side: what shells/test.sh runs
#   bash shells/test_arithmetic.sh --all [ARGS]      every test, or those that ARGS for pytest choose
chosen=(-m numeric) quick=""
case "${1:-}" in
    --quick) chosen=(-m "numeric and not dist and not e2e"); quick=1; shift ;;
    --all) chosen=(); shift ;;
    "") ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

# more threads than cores: let those that wait sleep, or they take the cores from those that work
export OMP_WAIT_POLICY=passive
# the last one computes rows of a product differently on one thread and on two, as AMD's do
settings=(
    "ATEN_CPU_CAPABILITY=default"
    "UNIVIT_NUM_THREADS=4"
    "UNIVIT_NUM_THREADS=1"
    "ATEN_CPU_CAPABILITY=avx2"
    "ONEDNN_MAX_CPU_ISA=SSE41"
    "ONEDNN_MAX_CPU_ISA=AVX2"
    "MKL_CBWR=COMPATIBLE"
    "MKL_ENABLE_INSTRUCTIONS=AVX2"
)

failed=()
if [ -n "$quick" ]; then
    # one process each: half of the time goes into imports, which more of them would repeat
    logs="$(mktemp -d)" running=()
    trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$logs"' EXIT
    for number in 0 1; do
        env "${settings[number]}" python -m pytest --quiet "${chosen[@]}" "$@" > "$logs/$number" 2>&1 &
        running+=("$!")
    done
    for number in 0 1; do
        wait "${running[number]}" || failed+=("${settings[number]}")
        printf '\n== %s\n' "${settings[number]}"
        cat "$logs/$number"
    done
    settings=()
fi
for setting in "${settings[@]}"; do
    printf '\n== %s\n' "$setting"
    env "$setting" python -m pytest --quiet --numprocesses "${TEST_WORKERS:-2}" --dist loadfile "${chosen[@]}" "$@" \
        || failed+=("$setting")
done
if [ "${#failed[@]}" -gt 0 ]; then
    printf 'failed under: %s\n' "${failed[*]}" >&2
    exit 1
fi
