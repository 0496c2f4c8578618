#!/usr/bin/env bash
# Makes .venv-NAME for `make test-trainer NAME=…`: a trainer and what tests/trainers/NAME.txt names, in place of what
# .venv has of it, and all else of .venv. Transformer Engine comes from .venv-te, where NAME.txt says so and it is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/beside_venv.sh

name=${1:?usage: bash scripts/setup_trainer.sh NAME, for example verl}
wanted=tests/trainers/$name.txt
folder=.venv-$name
stamp=$folder/complete # written last: without it the folder counts as broken
log=.cache/setup-$name.log

# not every checkout has .venv-te
fingerprint() {
  { pwd; cat .venv/complete .venv-te/complete scripts/beside_venv.sh scripts/setup_trainer.sh "$wanted" || true; } 2>/dev/null | cksum
}

give_up() {
  if [ -f "$stamp" ]; then return; fi
  tail -n 15 "$log" >&2
  rm -rf "$folder"
  echo "setup-trainer: did not finish, see $log; the unfinished $folder was removed" >&2
}

if [ ! -f "$wanted" ]; then
  echo "setup-trainer: no $wanted; NAME is one of $(cd tests/trainers && echo *.txt | sed 's/\.txt//g')" >&2
  exit 1
fi
if [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ]; then exit 0; fi

mkdir -p .cache
: >"$log"
trap give_up EXIT
make_environment "$folder" >>"$log" 2>&1
install_alone -r "$wanted" >>"$log" 2>&1
te=
if grep -q "from .venv-te" "$wanted" && [ -e .venv-te/complete ]; then
  te=$(realpath .venv-te/lib/python3*/site-packages)
fi
link_others "$shared" ${te:+"$te"}
fingerprint >"$stamp"
