#!/usr/bin/env bash
# What needs a GPU, in one command, in stages that are bounded in time and can be run one by one:
#
#   benchmarks/gpu.sh check    golden files in float32, as written and compiled; bfloat16 beside float32 (within 2 %)
#   benchmarks/gpu.sh vision   workload V: updates in every mode and precision, acting, parts, replay on the card
#   benchmarks/gpu.sh large    the update of size200m, training end to end, the replay's sampling
#   benchmarks/gpu.sh train    dmc_vision walker_walk at train ratio 512, stopped in the middle and resumed
#   benchmarks/gpu.sh proprio  workload P: updates in every mode, acting, parts
#   benchmarks/gpu.sh tests    the tests that need a card (pytest -m gpu): graphs beside what they were captured from
#   benchmarks/gpu.sh all      all of them in this order, at most an hour
#
#   DEVICE=cpu QUICK=1 benchmarks/gpu.sh all          the rehearsal: the same commands on a CPU with tiny networks
#   HALF=600 benchmarks/gpu.sh train                  twenty minutes of training instead of seven
#
# Logs and results.jsonl (a line per command) go to $OUT, benchmarks/out if not set. PYTHON names the interpreter, LIMIT
# the seconds of a stage, HALF the seconds before and after the interruption, PREFIX words that go before each command.
# Exit status 1 if anything failed or had no time left; what cannot be done here is skipped, with the reason.
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
    fail "$name" "not begun: the $LIMIT seconds of this stage are over"
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

FIGURES='"(median_s|first_s|share|kernels|kernel_s|peak_bytes|busy|in_updates|frames_per_s|updates_per_s|within|largest|went_on|slope)": [^],}]+'

modes() { # every way to run an update, as flags joined by commas: the fastest is expected first
  [[ $DEVICE != cuda* ]] || echo --compile=true,--graph=true --graph=true
  echo --compile=true --compile=false
}

renders() { # whether DM Control is there and can render; the reason is printed if not
  "$PYTHON" scripts/check_render.py >"$OUT/render.log" 2>&1 && return
  echo "DM Control does not render (MUJOCO_GL=$MUJOCO_GL): $(tail -n 1 "$OUT/render.log")"
  return 1
}

check() {
  local file
  for file in tests/golden/*.npz; do
    run "golden-$(basename "$file" .npz)" 120 "$PYTHON" tests/golden.py "$file" --device "$DEVICE"
  done
  for file in "${recompiled[@]}"; do
    run "golden-compiled-$(basename "$file" .npz)" 200 "$PYTHON" tests/golden.py "$file" --device "$DEVICE" --compile
  done
  run bf16-vision 150 "$PYTHON" benchmarks/bf16.py --obs vision "${device[@]}" "${tiny[@]}"
  run bf16-proprio 150 "$PYTHON" benchmarks/bf16.py --obs proprio "${device[@]}" "${tiny[@]}"
}

updates() { # updates OBS: a workload in every mode, acting, and where the time goes
  local obs=$1 mode
  for mode in $MODES; do
    run "update-$obs${mode//[,-]/}" 200 "$PYTHON" benchmarks/train_step.py --obs "$obs" ${mode//,/ } "${common[@]}"
  done
  run "policy-$obs" 90 "$PYTHON" benchmarks/policy.py --obs "$obs" "${best[@]}" "${common[@]}"
  run "phases-$obs" 60 "$PYTHON" benchmarks/train_step.py --obs "$obs" --phases "${common[@]}"
}

vision() {
  updates vision
  run update-float16 200 "$PYTHON" benchmarks/train_step.py "${best[@]}" --precision float16 "${common[@]}"
  if [[ $DEVICE == cuda* ]]; then
    run update-frames-on-the-card 150 "$PYTHON" benchmarks/train_step.py "${best[@]}" --replay_device cuda "${common[@]}"
  else
    say update-frames-on-the-card "skipped: replay_device cuda needs one"
  fi
}

proprio() { updates proprio; }

large() {
  local reason
  run update-size200m 250 "$PYTHON" benchmarks/train_step.py "${best[@]}" "${device[@]}" "${few[@]}" "${tiny[@]:---size=size200m}"
  if reason=$(renders); then
    run training 240 "$PYTHON" benchmarks/training.py "${walker[@]}" "${best[@]}" "${device[@]}" "${span[@]}"
  else
    say training "skipped: $reason"
  fi
  run replay 120 "$PYTHON" benchmarks/replay.py --stored "${stored[@]}" --repeats 10
}

tests() {
  if "$PYTHON" -c 'import pytest, pytest_timeout, beartype' 2>/dev/null; then
    run tests 500 "$PYTHON" -m pytest -q -rs -m gpu
  else
    say tests "skipped: needs requirements/test.txt"
  fi
}

train() {
  local reason logdir
  logdir=$OUT/walker-$(date +%Y%m%d-%H%M%S)
  if reason=$(renders); then
    deadline=$((SECONDS + 2 * HALF + 120)) # its own length, whatever LIMIT is
    run train $((2 * HALF + 100)) "$PYTHON" benchmarks/resume.py --seconds "$HALF" --logdir "$logdir" -- "${walker[@]}" "${best[@]}" "${device[@]}"
  else
    say train "skipped: $reason"
  fi
}

stages=("${@:-all}")
[[ ${stages[0]} != all ]] || stages=(check vision large train proprio tests)
for stage in "${stages[@]}"; do
  [[ $stage =~ ^(check|vision|large|train|proprio|tests)$ ]] || { sed -n '2,19s/^# \{0,1\}//p' "$0"; exit 2; }
done

mkdir -p "$OUT"
: >"$OUT/summary.txt"
if [[ $DEVICE == cuda* ]] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "torch sees no CUDA device. The rehearsal on a CPU: DEVICE=cpu QUICK=1 $0 all"
  exit 1
fi
MODES=${MODES:-$(modes | xargs)}
BEST=${BEST:-${MODES%% *}} # the first one named, for what is measured in one mode only
best=(${BEST//,/ })
device=(--device "$DEVICE")
walker=(--configs dmc_vision --task dmc_walker_walk --envs 16 --train_ratio 512)
few=(--repeats 20 --warmup 5) tiny=() span=(--frames 4000 --seconds 120) stored=(1e4 1e5 1e6)
if [[ $QUICK ]]; then
  few=(--repeats 2 --warmup 1) tiny=(--size debug) span=(--frames 60 --seconds 40 --warmup 3) stored=(2e3 1e4)
  walker=(--configs dmc_vision debug --task dmc_walker_walk)
fi
common=("${device[@]}" "${tiny[@]}" "${few[@]}")
recompiled=(tests/golden/*.npz)
[[ ! $QUICK ]] || recompiled=() # minutes each on a CPU: they are among the slow tests
for stage in "${stages[@]}"; do
  deadline=$((SECONDS + LIMIT))
  say "== $stage" "at most $LIMIT s on $DEVICE; modes $MODES"
  "$stage"
done
exit $failed
