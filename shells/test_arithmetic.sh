#!/usr/bin/env bash
# Tests under other arithmetic than this processor's own: older instruction sets of torch, oneDNN and
# MKL, and other numbers of threads, one setting after the other. One run of the suite sees one
# processor; what passes here passes on most.
#
#   bash shells/test_arithmetic.sh                   the numeric tests under every setting
#   bash shells/test_arithmetic.sh --quick           one process each, under the two of them that
#                                                    shells/test.sh runs
#   bash shells/test_arithmetic.sh --all [ARGS]      every test, or those that ARGS for pytest choose
chosen=(-m numeric) most=99
case "${1:-}" in
    --quick) chosen=(-m "numeric and not dist"); most=2; shift ;;
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
for setting in "${settings[@]:0:most}"; do
    printf '\n== %s\n' "$setting"
    env "$setting" python -m pytest --quiet --numprocesses "${TEST_WORKERS:-2}" --dist loadfile "${chosen[@]}" "$@" \
        || failed+=("$setting")
done
if [ "${#failed[@]}" -gt 0 ]; then
    printf 'failed under: %s\n' "${failed[*]}" >&2
    exit 1
fi
