#!/usr/bin/env bash
# Makes .venv-te for `make test-te`, once: Transformer Engine on top of .venv, whose torch and Megatron it shares.
# No GPU and no CUDA are needed; a C++ compiler, Python's headers and 15 to 40 minutes on two cores are, because
# the index holds TE's extension for PyTorch as source only: its own build takes the wheel of TE's release page where
# there is one for this torch (github.com/NVIDIA/TransformerEngine/releases), and else compiles. To do without:
#   TE_WHEELS=FOLDER bash scripts/setup_te.sh    FOLDER holds transformer_engine_torch-*.whl built for this torch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

te=2.11.0
stamp=.venv-te/complete # written last: without it .venv-te counts as broken
log=.cache/setup-te.log

say() { echo "setup-te: $*"; }
pinned() { sed -n "s/^$1==//p" constraints.txt; }
pip() { .venv-te/bin/python -m pip --disable-pip-version-check "$@" </dev/null >>"$log" 2>&1; }

fingerprint() { { pwd; cat constraints.txt scripts/setup_te.sh; } | cksum; }

give_up() {
  if [ -f "$stamp" ]; then return; fi
  tail -n 15 "$log" >&2
  rm -rf .venv-te
  say "did not finish, see $log; the unfinished .venv-te was removed" >&2
}

# The extension compiled against the torch of .venv, into folder $1. Not from pip's cache: that does not know the torch.
build() {
  local cuda folder
  cuda=$(realpath .cache)/te-build
  say "building transformer_engine_torch $te for torch $(pinned torch) (this takes a while)"
  pip install --target "$cuda" --upgrade --no-deps "nvidia-cuda-nvcc==$(pinned nvidia-cuda-nvrtc)" \
    "nvidia-cuda-crt==$(pinned nvidia-cuda-nvrtc)" "nvidia-cuda-cccl==$(pinned nvidia-cuda-cupti)"
  pip install -c constraints.txt setuptools wheel ninja
  folder=$(realpath .venv-te/bin)
  CPLUS_INCLUDE_PATH=$(printf '%s:' "$shared"/nvidia/*/include) CUDA_HOME=$cuda/nvidia/cu13 \
    NVTE_FRAMEWORK=pytorch MAX_JOBS=${MAX_JOBS:-2} PATH=$folder:$PATH \
    pip wheel --no-deps --no-build-isolation --no-cache-dir -w "$1" "transformer-engine-torch==$te"
  rm -rf "$cuda"
}

if [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ]; then exit 0; fi

started=$SECONDS
mkdir -p .cache
: >"$log"
trap give_up EXIT
rm -rf .venv-te
python=$(.venv/bin/python -c 'import os, sys; print(os.path.realpath(sys._base_executable))')
shared=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
say "making .venv-te over .venv: 200 MB of downloads, 700 MB of disk"
"$python" -m venv .venv-te
site=$(.venv-te/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$shared" >"$site/venv.pth"
ln -s "$shared/nvidia" "$site/nvidia" # TE looks for cuDNN and NVRTC beside itself

wheels=${TE_WHEELS:-.cache/te-torch-$(pinned torch)}
if ! ls "$wheels"/transformer_engine_torch-*.whl >/dev/null 2>&1; then
  if [ -n "${TE_WHEELS:-}" ]; then
    say "TE_WHEELS=$TE_WHEELS has no transformer_engine_torch-*.whl: put the one for Python" \
      "$("$python" -V | cut -d' ' -f2) and torch $(pinned torch) there, or leave TE_WHEELS out to build it" | tee -a "$log" >&2
    exit 1
  fi
  build "$wheels"
fi
pip install -c constraints.txt --find-links "$wheels" "transformer-engine[core-cu13,pytorch]==$te"
.venv-te/bin/python -c 'import transformer_engine.pytorch' 2>>"$log"
fingerprint >"$stamp"
say "done in $((SECONDS - started)) s"
