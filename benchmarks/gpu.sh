#!/usr/bin/env bash
# What needs a GPU, in one command, in stages that are bounded in time and can be run one by one:
#
#   benchmarks/gpu.sh check    golden files in float32, and losses in bfloat16 beside float32 (within 2 %)
#   benchmarks/gpu.sh table    updates in every mode, the largest network, acting, replay, and training end to end
#   benchmarks/gpu.sh train    dmc_vision walker_walk at train ratio 512, stopped in the middle and resumed
#   benchmarks/gpu.sh all      the three, one after the other: under half an hour
#
#   DEVICE=cpu QUICK=1 benchmarks/gpu.sh all     the rehearsal: the same commands on a CPU with tiny networks, minutes
#
# Logs and results.jsonl (a line per command) go to $OUT, benchmarks/out if not set. PYTHON names the interpreter, LIMIT
# the seconds of a stage, HALF the seconds before and after the interruption, PREFIX words that go before each command.
# Exit status 1 if anything failed; what cannot be done here is skipped, with the reason.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
OUT=${OUT:-benchmarks/out}
DEVICE=${DEVICE:-cuda}
QUICK=${QUICK:-}
LIMIT=${LIMIT:-540}
HALF=${HALF:-$([[ $QUICK ]] && echo 25 || echo 220)}
PREFIX=${PREFIX:-}
export MUJOCO_GL=${MUJOCO_GL:-$(cat .venv/render 2>/dev/null || echo egl)}
failed=0
deadline=0

say() { printf '%-28s %s\n' "$1" "$2" | tee -a "$OUT/summary.txt"; }

fail() {
  say "$1" "FAILED: $2"
  failed=1
}

run() { # run NAME SECONDS COMMAND...
  local name=$1 limit=$2 status=0 left=$((deadline - SECONDS)) start=$SECONDS line
  shift 2
  if ((left < 10)); then
    say "$name" "skipped: the $LIMIT seconds of this stage are over"
    return
  fi
  ((limit < left)) || limit=$left
  # shellcheck disable=SC2086
  $PREFIX timeout -k 20 "$limit" "$@" >"$OUT/$name.log" 2>&1 || status=$?
  line=$(grep '^{' "$OUT/$name.log" | tail -n 1)
  [[ -z $line ]] || echo "$line" >>"$OUT/results.jsonl"
  if ((status)); then
    ((status != 124)) || status="124, not done after $limit s"
    fail "$name" "status $status; the end of $OUT/$name.log:"
    tail -n 12 "$OUT/$name.log"
  else
    say "$name" "$((SECONDS - start)) s; $(grep -oE "$FIGURES" <<<"$line" | tr -d '"' | tr '\n' ' ')"
  fi
}

FIGURES='"(median_s|first_s|share|peak_bytes|busy|frames_per_s|updates_per_s|within|largest|went_on|slope)": [^],}]+'

modes() { # every way to run an update, as flags joined by commas: the fastest is expected last
  echo --compile=false --compile=true
  [[ $DEVICE != cuda* ]] || echo --graph=true --compile=true,--graph=true
}

renders() { # whether DM Control is there and can render; the reason is printed if not
  "$PYTHON" scripts/check_render.py >"$OUT/render.log" 2>&1 && return
  echo "DM Control does not render (MUJOCO_GL=$MUJOCO_GL): $(tail -n 1 "$OUT/render.log")"
  return 1
}

check() {
  local file flag=()
  if "$PYTHON" tests/golden.py --help | grep -q -- --device; then
    flag=(--device "$DEVICE")
  elif [[ $DEVICE != cpu ]]; then
    fail golden "tests/golden.py has no --device"
    return
  fi
  for file in tests/golden/*.npz; do
    run "golden-$(basename "$file" .npz)" 120 "$PYTHON" tests/golden.py "$file" ${flag[@]+"${flag[@]}"}
  done
  run bf16-vision 150 "$PYTHON" benchmarks/bf16.py --obs vision "${device[@]}" "${tiny[@]}"
  run bf16-proprio 150 "$PYTHON" benchmarks/bf16.py --obs proprio "${device[@]}" "${tiny[@]}"
}

table() {
  local mode obs reason common=("${device[@]}" "${tiny[@]}" "${few[@]}")
  for obs in vision proprio; do
    for mode in $MODES; do
      run "update-$obs${mode//[,-]/}" 150 "$PYTHON" benchmarks/train_step.py --obs $obs ${mode//,/ } "${common[@]}"
    done
    run "phases-$obs" 60 "$PYTHON" benchmarks/train_step.py --obs $obs --phases "${common[@]}"
    run "policy-$obs" 90 "$PYTHON" benchmarks/policy.py --obs $obs "${best[@]}" "${common[@]}"
  done
  run update-size200m 200 "$PYTHON" benchmarks/train_step.py "${best[@]}" "${device[@]}" "${few[@]}" "${tiny[@]:---size=size200m}"
  if reason=$(renders); then
    run training 200 "$PYTHON" benchmarks/training.py "${walker[@]}" "${best[@]}" "${device[@]}" "${span[@]}"
  else
    say training "skipped: $reason"
  fi
  run replay 120 "$PYTHON" benchmarks/replay.py --stored "${stored[@]}" --repeats 10
}

train() {
  local reason logdir
  logdir=$OUT/walker-$(date +%Y%m%d-%H%M%S)
  if reason=$(renders); then
    run train 530 "$PYTHON" benchmarks/resume.py --seconds "$HALF" --logdir "$logdir" -- "${walker[@]}" "${best[@]}" "${device[@]}"
  else
    say train "skipped: $reason"
  fi
}

stages=("${@:-all}")
[[ ${stages[0]} != all ]] || stages=(check table train)
for stage in "${stages[@]}"; do
  [[ $stage =~ ^(check|table|train)$ ]] || { sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2; }
done

mkdir -p "$OUT"
: >"$OUT/summary.txt"
if [[ $DEVICE == cuda* ]] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "torch sees no CUDA device. The rehearsal on a CPU: DEVICE=cpu QUICK=1 $0 all"
  exit 1
fi
MODES=${MODES:-$(modes | xargs)}
BEST=${BEST:-${MODES##* }} # the last one named, for what is measured in one mode only
best=(${BEST//,/ })
device=(--device "$DEVICE")
walker=(--configs dmc_vision --task dmc_walker_walk --envs 16 --train_ratio 512)
few=(--repeats 20 --warmup 5) tiny=() span=(--frames 4000 --seconds 120) stored=(1e4 1e5 1e6)
if [[ $QUICK ]]; then
  few=(--repeats 2 --warmup 1) tiny=(--size debug) span=(--frames 60 --seconds 40 --warmup 3) stored=(2e3 1e4)
  walker=(--configs dmc_vision debug --task dmc_walker_walk)
fi
for stage in "${stages[@]}"; do
  deadline=$((SECONDS + LIMIT))
  say "== $stage" "at most $LIMIT s on $DEVICE; modes $MODES"
  "$stage"
done
exit $failed
