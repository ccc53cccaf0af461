#!/usr/bin/env bash
# All that only a GPU can say, in one go: kernel parity, the kernel's bandwidth at Qwen3-8B's shape,
# publish and receive at 4k to 128k tokens, training speed of detector and gate on SmolLM2.
#
# scripts/gpu_day.sh                     # into benchmarks/results/gpu
# scripts/gpu_day.sh --list              # the steps, their time limits and what they run
# scripts/gpu_day.sh --only kernel,publish
# scripts/gpu_day.sh --cpu --out DIR     # the same steps in small, without a GPU: does it run?
#
# Each step leaves NAME.log (device, date, command, output) and, once it is through, NAME.done; a
# step that is done is not run again, one that failed or ran into its limit is. Exit code 1 where
# any is missing in the end. PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-.venv/bin/python}"
cpu=0 list=0 only="" out="" limit=""
die() { echo "gpu_day.sh: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case "$1" in
    --cpu) cpu=1 ;;
    --list) list=1 ;;
    --only) only="${2:?gpu_day.sh: --only needs names of steps}"; shift ;;
    --out) out="${2:?gpu_day.sh: --out needs a folder}"; shift ;;
    --limit) limit="${2:?gpu_day.sh: --limit needs seconds}"; shift ;;
    *) die "$1 is unknown: use --cpu, --list, --only NAMES, --out DIR, --limit SECONDS" ;;
  esac
  shift
done
[ -n "$out" ] || { [ "$cpu" = 1 ] && out=build/gpu-day-cpu || out=benchmarks/results/gpu; }
# Models and guards of the steps: large, and made again in minutes.
work="build/gpu-day"
[ "$cpu" = 0 ] || work="$out/work"

names=() limits=() commands=()
step() { names+=("$1"); limits+=("${limit:-$2}"); commands+=("$3"); }  # NAME SECONDS COMMAND

if [ "$cpu" = 1 ]; then
  export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=""
  shape="--layers 2 --hidden 64 --heads 2 --kv-heads 1 --head-dim 32 --dtype float32"
  lengths="--tokens 64 128 --repeats 1 --dtype float32"
  kernel="--layers 2 --kv-heads 1 --head-dim 32 --tokens 64 --dtype float32 --repeats 1"
  parity="-k kernel_is_the_reference and (plain or gate_odd)"
  records="[{source: generator, seed: 14, train_records: 24, test_records: 8}]"
  detector="{model: nano, sources: $records, detector: {steps: 3}}"
  tiny="data={source: generator, seed: 14, train_records: 24, test_records: 8}"
  gate="--set model=nano --set '$tiny' --set train.steps=2 --set train.label_steps=1 --set train.batch=2"
else
  shape="" # Qwen3-8B
  lengths="--tokens 4096 16384 32768 65536 131072 --repeats 5 --dtype bfloat16"
  kernel="--layers 36 --kv-heads 8 --head-dim 128 --tokens 32768 --dtype bfloat16"
  parity="-m gpu"
  # Records that the package makes itself: speed is what is asked.
  records="[{source: generator, seed: 14, train_records: 700, test_records: 150}]"
  detector="{model: smollm2, sources: $records}"
  gate="--set model=smollm2 --set train.steps=100 --set train.label_steps=20"
fi
agent="--model $work/agent/model --guard gate --guard-path $work/agent/gate"

step parity 900 "$python -m pytest -q -p no:cacheprovider tests/ops/test_ops_triton.py '${parity%% *}' '${parity#* }'"
step kernel 600 "$python scripts/bench_kernel.py $kernel --guard identity gaussian residual gate --out $out/kernel.json"
step agent 900 "$python scripts/random_agent.py $shape --out $work/agent"
step publish 1800 "$python scripts/bench_publish.py $agent $lengths --out $out/publish.json"
step receive 1800 "$python scripts/bench_handoff.py $agent $lengths --out $out/handoff.json"
step detector 1800 "printf '%s\n' '$detector' >$work/detector.yaml && $python -m lcguard.cli detect train $work/detector.yaml --out $work/detector && cp $work/detector/summary.json $out/train-detector.json"
step gate 1800 "$python -m lcguard.cli train gate $gate --out $work/gate && cp $work/gate/summary.json $out/train-gate.json"

chosen() { [ -z "$only" ] || [[ ",$only," == *",$1,"* ]]; }
for name in ${only//,/ }; do
  [[ " ${names[*]} " == *" $name "* ]] || die "--only $name is no step: use ${names[*]}"
done
if [ "$list" = 1 ]; then
  for i in "${!names[@]}"; do
    chosen "${names[i]}" && printf '%-9s %5s s  %s\n' "${names[i]}" "${limits[i]}" "${commands[i]}"
  done
  exit 0
fi

if [ "$cpu" = 1 ]; then
  device="no GPU: $(getconf _NPROCESSORS_ONLN) CPU cores, in small"
elif device="$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null)" &&
  [ -n "$device" ]; then
  :
else
  die "no GPU here (nvidia-smi says nothing): run it where there is one, or with --cpu"
fi
mkdir -p "$out" "$work"

said() {  # what became of a step
  if [ -f "$out/$1.done" ]; then cat "$out/$1.done"; elif [ -f "$out/$1.failed" ]; then cat "$out/$1.failed"; else echo "not run"; fi
}
for i in "${!names[@]}"; do
  name="${names[i]}"
  chosen "$name" || continue
  if [ -f "$out/$name.done" ]; then
    echo "$name: done before"
    continue
  fi
  rm -f "$out/$name.failed"
  { printf 'device: %s\ndate: %s\nrevision: %s\ncommand: %s\n\n' "$device" \
      "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$(git rev-parse HEAD 2>/dev/null)" "${commands[i]}"; } >"$out/$name.log"
  echo "$name: at most ${limits[i]} s, see $out/$name.log"
  SECONDS=0
  # --kill-after: an engine that hangs does not hear the first signal
  timeout --kill-after=30 "${limits[i]}" bash -c "${commands[i]}" >>"$out/$name.log" 2>&1 </dev/null
  code=$?
  case "$code" in
    0) echo "done in $SECONDS s" >"$out/$name.done" ;;
    124 | 137) echo "stopped at its limit of ${limits[i]} s" >"$out/$name.failed" ;;
    *) echo "failed with exit code $code after $SECONDS s" >"$out/$name.failed" ;;
  esac
done

missing=0
{
  echo "device: $device"
  echo "date: $(date -u +%Y-%m-%dT%H:%M:%SZ)"
  for name in "${names[@]}"; do
    chosen "$name" || continue
    printf '%-9s %s\n' "$name" "$(said "$name")"
  done
} | tee "$out/summary.txt"
for name in "${names[@]}"; do
  if chosen "$name" && [ ! -f "$out/$name.done" ]; then missing=1; fi
done
exit "$missing"
