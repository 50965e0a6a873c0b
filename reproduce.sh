#!/usr/bin/env bash
# From nothing to figures: environment -> data -> training -> evaluation -> ablation -> notebooks -> report.
# Interrupted or killed at any point, the same command goes on.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  cat <<'EOF'
Train and evaluate OS-SCL, an anomalous sound detector that learns from normal machine sounds.

  bash reproduce.sh                                 simulated machines, a few minutes on two CPU cores
  bash reproduce.sh --test                          the tests
  bash reproduce.sh --experiments                   every experiment of `python -m osscl_min ablate`: simulated machines,
                                                    4 epochs, one seed; with --data DIR preset small and two seeds, hours
  bash reproduce.sh --data DIR [--preset small]     your folder: TYPE/train/normal_id_00_00000000.wav, TYPE/test/...
  bash reproduce.sh --full [--data DIR]             the paper's experiment on DCASE 2020 Task 2; downloads the data
                                                    into data/dcase2020 unless DIR has it, and packs it beside

Options
  --data DIR       data folder (wav or flac, in a layout that README.md names) or packed store
  --preset NAME    quick, small (a few hundred clips; the default with --data) or paper (the default with --full)
  --seed N         seed of the training (default: the preset's)
  --out DIR        folder of the run (default: runs/NAME); what is there already is used again
  --device NAME    auto, cpu, cuda or cuda:N (default: auto)
  --test           run the tests instead; what follows a -- goes to pytest
  --help           this text

OSSCL_MIRROR: address of a copy of the data's records that answers like https://zenodo.org.

The environment: an active conda or virtual environment that has the packages is used as it is; otherwise conda
or mamba with environment.yml where there is one; otherwise .venv with the pins of environment.yml.
EOF
}

fail() { echo "reproduce.sh: $1" >&2; exit 2; }
value() { [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value; see --help"; }

story=quick data="" preset="" seed="" out="" device=auto pytest_arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --help | -h) usage; exit 0 ;;
    --test) story=test; shift ;;
    --full) story=full; shift ;;
    --experiments) story=experiments; shift ;;
    --data) value "$@"; data=$2; shift 2 ;;
    --preset) value "$@"; preset=$2; shift 2 ;;
    --seed) value "$@"; seed=$2; shift 2 ;;
    --out) value "$@"; out=$2; shift 2 ;;
    --device) value "$@"; device=$2; shift 2 ;;
    --) shift; pytest_arguments=("$@"); break ;;
    *) fail "unknown option $1; see --help" ;;
  esac
done
case "$preset" in "" | quick | small | paper) ;; *) fail "unknown preset $preset: quick, small or paper" ;; esac
case "$seed" in *[!0-9]*) fail "--seed takes a whole number, not $seed" ;; esac
[ -z "$data" ] || data=$(cd "$data" 2>/dev/null && pwd) || fail "no such data folder; --data takes a folder"
[ -z "$out" ] || { mkdir -p "$out" && out=$(cd "$out" && pwd); } || fail "cannot make the folder $out"
cd "$root"

# --- environment ---------------------------------------------------------------------------------------------

has_packages() {
  "$1" -c 'import sys, torch, numpy, scipy, soundfile, matplotlib, sklearn, nbconvert, ipykernel, pytest, tqdm, tyro, pooch
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

pins() { sed -n 's/^ *- \([a-z-]*==.*\)$/\1/p' environment.yml; }

make_venv() {
  local candidate base=""
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      base=$candidate && break
    fi
  done
  [ -n "$base" ] || fail "no Python 3.11, 3.12 or 3.13 with venv and pip found; install one"
  echo "making .venv with $("$base" --version)"
  [ -x .venv/bin/python ] || "$base" -m venv .venv
  pins >.venv/pins.part
  .venv/bin/python -m pip install --quiet --requirement .venv/pins.part ||
    fail "pip could not install the packages of environment.yml; its message is above"
  mv .venv/pins.part .venv/pins
}

python=""
if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && has_packages python; then
  python=$(command -v python)
else
  for tool in mamba conda; do
    if [ -z "$python" ] && command -v "$tool" >/dev/null; then
      if [ ! -x .venv-conda/bin/python ] || ! has_packages .venv-conda/bin/python; then
        echo "making .venv-conda with $tool"
        "$tool" env update --quiet --prefix "$root/.venv-conda" --file environment.yml ||
          echo "$tool could not make the environment; going on without it" >&2
      fi
      if has_packages .venv-conda/bin/python; then python=$root/.venv-conda/bin/python; fi
    fi
  done
  if [ -z "$python" ]; then
    [ -f .venv/pins ] && [ "$(pins)" = "$(cat .venv/pins)" ] && [ -x .venv/bin/python ] || make_venv
    python=$root/.venv/bin/python
  fi
fi
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
osscl() { "$python" -m osscl_min "$@"; }

if [ "$story" = test ]; then
  began=$SECONDS
  "$python" -m pytest --durations=20 ${pytest_arguments[@]+"${pytest_arguments[@]}"}
  mkdir -p runs && printf 'step,seconds\ntests,%d\n' $((SECONDS - began)) >runs/tests.csv
  exit
fi

# --- the story -----------------------------------------------------------------------------------------------

began=$SECONDS step="" step_began=$SECONDS timing=step,seconds
say() {
  [ -z "$step" ] || timing+=$'\n'"$step,$((SECONDS - step_began))"
  step=$1 step_began=$SECONDS
  [ -z "$1" ] || printf '\n[%d:%02d] %s\n' $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)) "$1"
}
# made RESULT SOURCE: RESULT is there and no older than SOURCE
made() { [ -e "$1" ] && [ ! "$2" -nt "$1" ]; }

if [ "$story" = full ]; then
  preset=${preset:-paper} run=${out:-$root/runs/full}
elif [ "$story" = experiments ]; then
  if [ -n "$data" ]; then preset=${preset:-small}; else preset=${preset:-quick}; fi
  run=${out:-$root/runs/experiments${data:+-$(basename "$data")}}
elif [ -n "$data" ]; then
  preset=${preset:-small} run=${out:-$root/runs/$(basename "$data")-$preset${seed:+-seed$seed}}
else
  preset=${preset:-quick} run=${out:-$root/runs/quick}
fi

if [ "$story" = full ]; then
  if [ -z "$data" ]; then
    say "DCASE 2020 data"
    data=$root/data/dcase2020
    osscl download "$data" ${OSSCL_MIRROR:+--mirror "$OSSCL_MIRROR"} ${OSSCL_TRUST_MIRROR:+--trust-mirror}
  fi
  if [ ! -e "$data/index.jsonl" ]; then # no packed store yet
    say "packed store"
    store=$root/data/$(basename "$data")-$preset
    osscl pack "$data" "$store" --preset "$preset"
    data=$store
  fi
elif [ -z "$data" ]; then
  say "simulated machines"
  data=$run/data
  osscl synth "$data"
fi

if [ "$story" = experiments ]; then
  quick=() failed=0
  if [ -n "$seed" ]; then seeds=("$seed"); else seeds=(0 1); fi
  [ "$preset" != quick ] || quick=(--train.epochs 4) seeds=("${seed:-0}")
  for name in scores high-frequency bands noise embeddings training inputs components high-frequency-training; do
    say "$name"
    only=()
    if [ "$preset" = quick ] && [ "$name" = high-frequency-training ]; then
      only=(--variants "low-pass 1 kHz" "low-pass 4 kHz" "high-pass 1 kHz" "high-pass 4 kHz")
    fi
    osscl ablate "$name" --preset "$preset" --data "$data" --out "$run" --device "$device" --seeds "${seeds[@]}" \
      ${quick[@]+"${quick[@]}"} ${only[@]+"${only[@]}"} || failed=1
  done
  say ""
  [ -e "$run/timing.csv" ] || echo "$timing" >"$run/timing.csv"
  exit "$failed"
fi

say training
osscl train --preset "$preset" --data "$data" --out "$run" --device "$device" ${seed:+--train.seed "$seed"}

say "evaluation"
score() {
  made "$run/$2/evaluation.json" "$run/$1" ||
    osscl evaluate --checkpoint "$run/$1" --preset "$preset" --data "$data" --out "$run/$2" --device "$device"
}
echo "the trained network:" && score best.pt evaluation
echo "the untrained network, for comparison:" && score initial.pt untrained

if [ -e "$run/evaluation/metrics.json" ]; then
  say "high-frequency ablation"
  cutoffs=()
  [ "$preset" = paper ] || cutoffs=(--cutoffs 1000 3000 5000 7000)
  made "$run/high_frequency/high_frequency.json" "$run/best.pt" ||
    osscl ablate high-frequency --checkpoint "$run/best.pt" --preset "$preset" --data "$data" \
      --out "$run/high_frequency" --device "$device" ${cutoffs[@]+"${cutoffs[@]}"}

  say "notebooks"
  for notebook in notebooks/*.ipynb; do
    executed=$run/notebooks/$(basename "$notebook")
    if ! made "$executed" "$run/best.pt" || ! made "$executed" "$notebook"; then
      # the kernel's remark on loopback TCP is noise here
      OSSCL_RUN=$run OSSCL_DATA=$data "$python" -m nbconvert --log-level WARN --to notebook --execute \
        --ExecutePreprocessor.startup_timeout=300 --output-dir "$run/notebooks/.part" "$notebook" \
        2> >(grep -v 'IPKernelApp. WARNING . Kernel is running over TCP' >&2)
      mv "$run/notebooks/.part/$(basename "$notebook")" "$executed"
    fi
  done
else
  say "no test clip has a known truth: no ablation, and no notebooks"
fi

say "report"
osscl report "$run" --data "$data"
say ""
[ -e "$run/timing.csv" ] || echo "$timing" >"$run/timing.csv"
