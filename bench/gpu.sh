#!/usr/bin/env bash
# One call on a fresh CUDA machine that has torch, pytest and pytest-benchmark, and no network:
#
#     bench/gpu.sh OUT_DIR [SECONDS] [pytest options]
#
# builds csrc/, runs the tests marked gpu, then the benches by importance. Every row is in OUT_DIR/<device>.json as soon
# as it is measured; what hangs is cut off, and within SECONDS (530) it ends with a short table. Output: OUT_DIR/gpu.log.
# STAGES="scale models" runs the named stages alone, for what a first call had no time left for.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=$(realpath -m "${1:?usage: bench/gpu.sh OUT_DIR [SECONDS] [pytest options]}")
limit=${2:-530}
options=("${@:3}")
python=${PYTHON:-python3}
export PYTHONPATH=. PYTHONUNBUFFERED=1
mkdir -p "$out"
: >"$out/gpu.log"

# stage NAME SECONDS COMMAND: at most so long, and 30 s are kept for the table
stage() {
    local name=$1 most=$2 start=$SECONDS left=$((limit - SECONDS - 30)) code said
    shift 2
    [[ -z ${STAGES-} || " $STAGES " == *" $name "* ]] || return
    ((most < left)) || most=$left
    ((most > 0)) || { echo "$name: no time left"; return; }
    printf '\n== %s\n' "$name" >>"$out/gpu.log"
    # an interrupted pytest still says what failed so far
    timeout -s INT -k 10 "$most" "$@" >>"$out/gpu.log" 2>&1
    code=$?
    ((code != 124 && code != 137)) || code="cut off"
    # pytest's own last line, which libraries may print past
    said=$(sed -n "/^== $name\$/,\$p" "$out/gpu.log" | grep -aE '^(=+ )?[0-9]+ .* in [0-9.]+s' | tail -n 1)
    echo "$name: $code, $((SECONDS - start)) s; $(echo "${said:-$(tail -n 1 "$out/gpu.log")}" | cut -c1-100)"
}
bench() {
    local name=$1 most=$2
    shift 2
    stage "$name" "$most" "$python" -m pytest -q --benchmark-columns=median,iqr,rounds --results "$out" "${options[@]}" "$@"
}

workers=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 8")
stage build 180 "$python" setup.py build_ext --inplace
# shellcheck disable=SC2086
stage tests 120 "$python" -m pytest -q -m gpu $workers tests
bench rows 40 bench/bench_rows.py
bench workspace 40 bench/bench_workspace.py
# most of these three is rivals that compile
bench kl 140 bench/bench_kl.py::bench_reverse
bench logprob 120 bench/bench_logprob.py::bench_{logprob,kept_logits}
bench jsd 120 bench/bench_kl.py::bench_jsd
# every access and every race of the native rows, on short rows
for tool in memcheck racecheck; do
    command -v compute-sanitizer >/dev/null || { echo "$tool: no compute-sanitizer"; break; }
    stage "$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -q -m gpu \
        -k "cuda_rows and not real" tests/ops/test_native.py
done
bench teachers 90 bench/bench_kl.py::bench_teachers bench/bench_kl.py::bench_routed_teachers
bench scale 80 bench/bench_scale.py
bench accuracy 40 bench/bench_accuracy.py
bench forward 60 bench/bench_kl.py::bench_{forward_alone,frozen_head} bench/bench_logprob.py::bench_forward_alone
bench mutual 60 bench/bench_mutual_kl.py bench/bench_agreement.py
bench step 40 bench/bench_step.py
bench models 90 bench/bench_kl.py::bench_{model,divergence} bench/bench_logprob.py::bench_{softcap,frozen_head}

timeout 12 "$python" -m bench.report "$out" 2>>"$out/gpu.log"
timeout 8 "$python" -m bench.report "$out" --print
exit 0
