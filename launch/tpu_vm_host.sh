#!/usr/bin/env bash
# What tpu_vm.sh has a TPU VM do; it is of no use elsewhere.
#   install DATA        replaces ~/perceiver-ar by ~/perceiver-ar.new, and
#                       copies gs:// folder DATA, unless it is ''
#   start MAX COMMAND   runs COMMAND in the background, restarted MAX times
set -euo pipefail

source_dir=$HOME/perceiver-ar
venv=$HOME/perceiver-ar.venv
data=/tmp/perceiver-ar.data
log=$HOME/perceiver-ar.log
pid_file=$HOME/perceiver-ar.pid

# Ends a run of before, and waits until it has saved.
stop() {
  local pid seconds=0
  pid=$(cat "$pid_file" 2>/dev/null) || return 0
  is_loop "$pid" || return 0
  kill -TERM "$pid"
  while is_loop "$pid"; do
    if ((seconds++ > 600)); then
      kill -KILL -- "-$pid" # and what it started
    fi
    sleep 1
  done
}

# Whether that process is ours still; numbers are given out again.
is_loop() {
  grep --quiet --no-messages tpu_vm_host.sh "/proc/$1/cmdline"
}

install() {
  stop
  rm -rf "$source_dir"
  mv "$source_dir.new" "$source_dir"
  # The system's Python is too old on some images; uv brings its own. Where the
  # system's pip is told to leave users alone, this is its way to say no.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --allow-existing --python=3.12 "$venv"
  cd "$source_dir"
  python3 -m uv pip install --quiet --python="$venv/bin/python" \
    --constraints=constraints.txt --editable='.[tpu]'
  if [[ -n $1 ]]; then
    mkdir -p "$data"
    gcloud storage rsync --recursive --delete-unmatched-destination-objects \
      "$1" "$data"
  fi
}

start() {
  cd "$source_dir"
  # Of its own session, so that it outlives this connection.
  nohup setsid "$source_dir/launch/tpu_vm_host.sh" loop "$@" \
    >>"$log" 2>&1 </dev/null &
}

say() {
  echo "tpu_vm: $(date --iso-8601=seconds) $*"
}

# Runs the trainer until it has finished. Its exit status says what is next:
# 0 finished, 2 a mistake, 75 saved and to be started again, others a failure.
loop() {
  local max_restarts=$1 failures=0 status
  shift
  child='' stopping=no
  trap 'stopping=yes; kill -TERM $child 2>/dev/null || true' TERM
  echo $$ >"$pid_file"
  while [[ $stopping == no ]]; do
    say "starts $*"
    # Else, where the chips are not to be had, it would train on the CPU.
    JAX_PLATFORMS=tpu,cpu "$venv/bin/perceiver-ar" "$@" &
    child=$!
    status=0
    wait "$child" || status=$?
    # A signal ends the first wait, and the trainer later.
    while kill -0 "$child" 2>/dev/null; do
      status=0
      wait "$child" || status=$?
    done
    case $status in
      0) say 'finished' && return 0 ;;
      2) say 'ends: a mistake, which a restart would repeat' && return 2 ;;
      75) say 'saved, or nothing to save' ;;
      *)
        say "failed with exit status $status"
        failures=$((failures + 1))
        if ((failures > max_restarts)); then
          say "ends: --max_restarts=$max_restarts" && return "$status"
        fi
        ;;
    esac
    [[ $stopping == yes ]] || sleep 10
  done
  say 'stopped'
}

"$@"
