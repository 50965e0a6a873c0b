#!/usr/bin/env bash
# From nothing to figures: environment -> data -> training -> evaluation -> high-frequency ablation -> report.
# Interrupted or killed at any point, the same command resumes.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  cat <<'EOF'
Train and evaluate OS-SCL, an anomalous sound detector that learns from normal machine sounds.

  bash reproduce.sh                                 simulated machines, six minutes on two CPU cores
  bash reproduce.sh --test                          the tests; -- passes arguments to pytest:
  bash reproduce.sh --test -- tests/kernels         the kernels' correctness tests alone
  bash reproduce.sh --experiments [--data DIR]      the experiments: simulated machines, 4 epochs, one seed;
                                                    with --data: preset small, two seeds; takes hours
  bash reproduce.sh --data DIR [--preset small]     your folder: TYPE/train/normal_id_00_00000000.wav, TYPE/test/...
  bash reproduce.sh --full [--data DIR]             the paper's experiment on DCASE 2020 Task 2; downloads the data
                                                    into data/dcase2020 unless DIR has it; packs it into data/

Options
  --data DIR       data folder (wav or flac, in a layout that README.md names) or packed store
  --preset NAME    quick, small (a few hundred clips; the default with --data) or paper (the default with --full)
  --seed N         seed of the training (default: the preset's; with --experiments 0, or 0 and 1)
  --out DIR        folder of the run (default: runs/NAME); what it already holds is reused
  --device NAME    auto, cpu, cuda or cuda:N (default: auto)

An active conda or virtual environment that has the packages is used as it is (`conda env create -f environment.yml`,
`conda activate osscl-min`); otherwise .venv is made with the pins of environment.yml. OSSCL_MIRROR: server to download
the data from instead of https://zenodo.org; OSSCL_TRUST_MIRROR=1: accept its zips whatever their checksums.
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
supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
pins() { sed -n 's/^ *- \([a-z-]*==.*\)$/\1/p' environment.yml; }

python=$root/.venv/bin/python
if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && python -c "
import torch, numpy, scipy, soundfile, matplotlib, sklearn, nbconvert, ipykernel, pytest, xdist, tqdm, tyro, pooch
$supported" >/dev/null 2>&1; then
  python=$(command -v python)
elif [ ! -f .venv/pins ] || [ "$(pins)" != "$(cat .venv/pins)" ] || [ ! -x "$python" ]; then
  base=""
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c "import venv, ensurepip; $supported" 2>/dev/null; then base=$candidate && break; fi
  done
  [ -n "$base" ] || fail "no Python 3.11, 3.12 or 3.13 with venv and pip found; install one"
  echo "making .venv with $("$base" --version)"; [ -x "$python" ] || "$base" -m venv .venv
  pins >.venv/pins.part
  "$python" -m pip install --quiet --requirement .venv/pins.part ||
    fail "pip could not install the packages of environment.yml; its message is above"
  mv .venv/pins.part .venv/pins
fi
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
osscl() { "$python" -m osscl_min "$@"; }

[ "$story" != test ] || OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" exec "$python" -m pytest --numprocesses auto \
  --no-loadscope-reorder --durations=20 ${pytest_arguments[@]+"${pytest_arguments[@]}"} # a process per core

# --- the story -----------------------------------------------------------------------------------------------

began=$SECONDS step="" step_began=$SECONDS timing=step,seconds
say() {
  [ -z "$step" ] || timing+=$'\n'"$step,$((SECONDS - step_began))"
  step=$1 step_began=$SECONDS
  [ -z "$1" ] || printf '\n[%d:%02d] %s\n' $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)) "$1"
}
# made RESULT SOURCE: RESULT exists and is no older than SOURCE
made() { [ -e "$1" ] && [ ! "$2" -nt "$1" ]; }

if [ "$story" = full ]; then preset=${preset:-paper}; elif [ -n "$data" ]; then preset=${preset:-small}; fi
preset=${preset:-quick} name=$story
[ -z "$data" ] || case "$story" in
  quick) name=$(basename "$data")-$preset${seed:+-seed$seed} ;;
  experiments) name+=-$(basename "$data") ;;
esac
run=${out:-$root/runs/$name}

if [ "$story" = full ]; then
  if [ -z "$data" ]; then
    say "DCASE 2020 data" && data=$root/data/dcase2020
    osscl download "$data" ${OSSCL_MIRROR:+--mirror "$OSSCL_MIRROR"} ${OSSCL_TRUST_MIRROR:+--trust-mirror}
  fi
  if [ ! -e "$data/index.jsonl" ]; then # no packed store yet
    say "packed store" && store=$root/data/$(basename "$data")-$preset
    osscl pack "$data" "$store" --preset "$preset"
    data=$store
  fi
elif [ -z "$data" ]; then
  say "simulated machines"
  data=$run/data && osscl synth "$data"
fi
common=(--preset "$preset" --data "$data" --device "$device")

if [ "$story" = experiments ]; then
  say "experiments"
  seeds=(${seed:-0 1}) short=()
  [ "$preset" != quick ] || short=(--train.epochs 4) seeds=("${seed:-0}")
  osscl ablate all "${common[@]}" --out "$run" --seeds "${seeds[@]}" ${short[@]+"${short[@]}"}
  exit # its status says whether an experiment failed; it wrote timing.csv
fi

say training
osscl train "${common[@]}" --out "$run" ${seed:+--train.seed "$seed"}

say evaluation
for pair in best:evaluation initial:untrained; do # initial.pt is the untrained network, for comparison
  folder=$run/${pair#*:} checkpoint=$run/${pair%:*}.pt
  made "$folder/evaluation.json" "$checkpoint" ||
    osscl evaluate --checkpoint "$checkpoint" "${common[@]}" --out "$folder"
done

if [ -e "$run/evaluation/metrics.json" ]; then
  say "high-frequency ablation"
  cutoffs=()
  [ "$preset" = paper ] || cutoffs=(--cutoffs 1000 3000 6000)
  made "$run/high_frequency/high_frequency.json" "$run/best.pt" ||
    osscl ablate high-frequency --checkpoint "$run/best.pt" "${common[@]}" --out "$run/high_frequency" \
      ${cutoffs[@]+"${cutoffs[@]}"}
fi

say "notebooks and report"
osscl report "$run" --data "$data"
say ""
[ -e "$run/timing.csv" ] || echo "$timing" >"$run/timing.csv"
