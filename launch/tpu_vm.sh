#!/usr/bin/env bash
# Runs the trainer on Cloud TPU VMs without a cluster: see --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
Runs the trainer on Cloud TPU VMs, asked for as a queued resource.

  tpu_vm.sh create --name=N --zone=Z --type=T [--num_slices=] [--spot]
                   [--runtime=]
  tpu_vm.sh run    --name=N --zone=Z [--num_slices=] [--max_restarts=] [--data=]
                   -- train --config=FILE.py[:ARG] --workdir=gs://BUCKET/RUN
                   (or evaluate or sample, with the --workdir of a run)
  tpu_vm.sh logs   --name=N --zone=Z [--num_slices=] [--worker=]
  tpu_vm.sh delete --name=N --zone=Z

create  asks for the TPUs; they are yours, and cost, when it says ACTIVE
run     copies this checkout to all hosts, installs it and starts the command
        in the background; a run of before is stopped, saved, and replaced
logs    follows what a host prints
delete  gives the TPUs back, running or not

  --name          of the queued resource                      [TPU_NAME]
  --zone          such as us-east5-a                          [ZONE]
  --type          such as v5p-256, v5litepod-16 or v6e-64     [ACCELERATOR_TYPE]
  --runtime       software version of the VMs; default: by --type
                                                              [RUNTIME_VERSION]
  --num_slices    of --type each, joined by DCN; default: 1   [NUM_SLICES]
  --spot          capacity that may be taken away at any time
  --max_restarts  of a host after failures; default: 100
  --data          gs:// folder of a prepared data set; copied to all hosts, and
                  the config's data.path
  --worker        host of slice 0 to follow, or all; default: 0
  --dry_run       print the gcloud commands and run none of them

Flags are read from the variables in brackets where they are not given; the
project is gcloud's own (gcloud config set project PROJECT).
TEXT
}

fail() {
  echo "tpu_vm.sh: $*" >&2
  exit 2
}

# Runs gcloud, or prints the command as it would be typed.
cloud() {
  if [[ $dry_run == yes ]]; then
    local line
    line=$(printf '%q ' gcloud "$@")
    echo "${line% }"
    return
  fi
  local status=0
  gcloud "$@" || status=$?
  if ((status)); then
    echo "tpu_vm.sh: gcloud failed with exit status $status: $1 $2 $3 $4" >&2
    exit "$status"
  fi
}

runtime_of() {
  case $1 in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    tpu7x-*) echo v2-alpha-tpu7-ubuntu2404 ;;
    *) fail "--type=$1 is none whose software is known here; use one that" \
      "begins with v4-, v5litepod-, v5p-, v6e- or tpu7x-, or give --runtime" ;;
  esac
}

# Slices, as gcloud names them.
nodes() {
  if ((num_slices == 1)); then
    echo "$name"
  else
    seq --format="$name-%g" 0 $((num_slices - 1))
  fi
}

create() {
  [[ -n $type ]] || fail 'create needs --type, such as --type=v5p-256'
  if [[ -z $runtime ]]; then
    runtime=$(runtime_of "$type")
  fi
  local flags=(
    --zone="$zone" --accelerator-type="$type" --runtime-version="$runtime"
  )
  if ((num_slices == 1)); then
    flags+=(--node-id="$name")
  else
    flags+=(--node-count="$num_slices" --node-prefix="$name")
  fi
  if [[ $spot == yes ]]; then
    flags+=(--spot)
  fi
  cloud compute tpus queued-resources create "$name" "${flags[@]}"
  describe
}

# Prints the state of the queued resource, such as ACTIVE.
describe() {
  cloud compute tpus queued-resources describe "$name" --zone="$zone" \
    --format='value(state.state)'
}

# Runs a command on all hosts of all slices, one slice after the other.
everywhere() {
  local node
  for node in $(nodes); do
    cloud compute tpus tpu-vm ssh "$node" --zone="$zone" --worker=all \
      --command="$1"
  done
}

check_command() {
  if [[ ! ${command[0]:-} =~ ^(train|evaluate|sample)$ ]]; then
    fail 'the trainer is told to train, evaluate or sample behind --, as in:' \
      '-- train --config=configs/books.py:long --workdir=gs://BUCKET/RUN'
  fi
  if [[ " ${command[*]} " != *' --workdir'[=\ ]'gs://'* ]]; then
    fail 'all hosts must see one --workdir; add --workdir=gs://BUCKET/RUN' \
      'behind --'
  fi
  if [[ -n $data && " ${command[*]} " == *' --config.data.path'* ]]; then
    fail "--data=$data sets --config.data.path, too; give one of them"
  fi
  if [[ " ${command[*]} " == *' --config.data.path'[=\ ]'gs://'* ]]; then
    fail 'a gs:// --config.data.path is no folder of a host; give it as' \
      '--data=gs://... in front of --, which copies it there'
  fi
}

# Packs the files of this checkout, new and changed ones too.
pack() {
  local root
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  git -C "$root" ls-files -z --cached --others --exclude-standard |
    tar --create --gzip --file="$1" --directory="$root" --null \
      --ignore-failed-read --files-from=-
}

run() {
  check_command
  local state
  state=$(describe)
  if [[ $dry_run == yes ]]; then
    echo "$state"
  elif [[ $state != ACTIVE ]]; then
    fail "--name=$name is $state; run it again when it is ACTIVE"
  fi
  local folder=. archive=perceiver-ar.tar.gz node
  if [[ $dry_run == no ]]; then
    folder=$(mktemp -d)
    # shellcheck disable=SC2064  # the folder of now
    trap "rm -rf '$folder'" EXIT
    pack "$folder/$archive"
  fi
  for node in $(nodes); do
    cloud compute tpus tpu-vm scp "$folder/$archive" "$node:$archive" \
      --zone="$zone" --worker=all
  done
  local new=perceiver-ar.new
  everywhere "rm -rf $new && mkdir $new && tar -xzf $archive -C $new && \
$new/launch/tpu_vm_host.sh install $(printf '%q' "$data")"
  if [[ -n $data ]]; then
    command+=(--config.data.path=/tmp/perceiver-ar.data)
  fi
  everywhere "perceiver-ar/launch/tpu_vm_host.sh start $max_restarts\
$(printf ' %q' "${command[@]}")"
}

logs() {
  local first
  first=$(nodes | head -n 1)
  cloud compute tpus tpu-vm ssh "$first" --zone="$zone" --worker="$worker" \
    --command='tail -n 200 -F perceiver-ar.log'
}

delete() {
  cloud compute tpus queued-resources delete "$name" --zone="$zone" --force \
    --quiet
}

check_flags() {
  [[ -n $name ]] || fail "$verb needs --name"
  [[ -n $zone ]] || fail "$verb needs --zone, such as --zone=us-east5-a"
  [[ $num_slices =~ ^[1-9][0-9]*$ ]] ||
    fail "--num_slices=$num_slices must be a number of at least 1"
  [[ $max_restarts =~ ^[0-9]+$ ]] ||
    fail "--max_restarts=$max_restarts must be a number of at least 0"
  [[ $data =~ ^(gs://.+)?$ ]] || fail "--data=$data must be a gs:// folder"
  [[ $worker =~ ^([0-9]+|all)$ ]] ||
    fail "--worker=$worker must be the number of a host, or all"
}

name=${TPU_NAME:-} zone=${ZONE:-} type=${ACCELERATOR_TYPE:-}
runtime=${RUNTIME_VERSION:-} num_slices=${NUM_SLICES:-1}
data='' max_restarts=100 worker=0 spot=no dry_run=no command=()
verb=${1:-}
case $verb in
  create | run | logs | delete) shift ;;
  -h | --help | help) usage && exit ;;
  *) fail "'$verb' is no command; use create, run, logs or delete (--help)" ;;
esac
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --num_slices=*) num_slices=${1#*=} ;;
    --max_restarts=*) max_restarts=${1#*=} ;;
    --data=*) data=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --spot) spot=yes ;;
    --dry_run) dry_run=yes ;;
    -h | --help) usage && exit ;;
    --) shift && command=("$@") && break ;;
    *) fail "$1 is no flag of tpu_vm.sh; write --FLAG=VALUE (--help)" ;;
  esac
  shift
done
check_flags
"$verb"
