#!/usr/bin/env bash
# Set-up, called by the Makefile (which remembers what is done, in stamp files inside the virtual environment).
#
#   scripts/setup.sh venv                 make the virtual environment $VENV, with $PYTHON or a suitable Python that is found
#   scripts/setup.sh install FILE...      install requirement files into it, at the versions of constraints.txt
#   scripts/setup.sh render FILE          find a way to render MuJoCo without a screen and write its name to FILE
set -euo pipefail

VENV=${VENV:-.venv}
RENDER_PACKAGES="libegl1 libgl1 libosmesa6"

fail() {
  echo "setup: $*" >&2
  exit 1
}

suits() { # the labmaze wheel of dm_control ends at Python 3.12
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11}; do
    if suits "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  local name=${PYTHON:-python3} version
  version=$("$name" --version 2>/dev/null) || version="not there"
  fail "Python 3.11 or 3.12 is needed, and $name is $version." \
    "Name another: make PYTHON=/path/to/python3.12 ..."
}

make_venv() {
  if [[ -x $VENV/bin/python ]] && suits "$VENV/bin/python" && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    return
  fi
  local python
  python=$(find_python)
  "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python cannot make virtual environments. On Debian or Ubuntu:" \
    "apt-get install $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
  echo "setup: making $VENV with $("$python" --version)"
  "$python" -m venv --clear "$VENV"
}

install() {
  local files=() file quiet=(-qq)
  for file in "$@"; do
    [[ -f $file ]] || fail "there is no $file; the extras are: $(cd requirements && ls -- *.txt | sed 's/\.txt$//' | xargs)"
    files+=(-r "$file")
  done
  [[ -t 1 ]] && quiet=() # the first time some hundred megabytes come (with CUDA, gigabytes): show them coming
  echo "setup: installing $* (the first time this takes some minutes)"
  "$VENV/bin/python" -m pip install ${quiet[@]+"${quiet[@]}"} --disable-pip-version-check -c constraints.txt "${files[@]}" ||
    fail "pip could not install $*; its message is above"
}

renders() { # renders BACKEND: the reason for a failure stays in $VENV/render.log
  MUJOCO_GL=$1 "$VENV/bin/python" scripts/check_render.py >>"$VENV/render.log" 2>&1
}

find_backend() {
  local backend backends="egl osmesa"
  [[ $(uname) == Linux ]] || backends=glfw
  for backend in ${MUJOCO_GL:-$backends}; do
    echo "MUJOCO_GL=$backend" >>"$VENV/render.log"
    if renders "$backend"; then
      echo "$backend"
      return
    fi
  done
  return 1
}

render() {
  local backend advice="apt-get install -y $RENDER_PACKAGES"
  : >"$VENV/render.log"
  if ! backend=$(find_backend); then
    command -v apt-get >/dev/null ||
      fail "MuJoCo cannot render without a screen: install EGL or OSMesa (on Debian: $advice); see $VENV/render.log"
    [[ $(id -u) == 0 ]] || fail "MuJoCo cannot render without a screen. Run this, then make again: sudo $advice"
    echo "setup: MuJoCo cannot render without a screen: installing the Debian packages $RENDER_PACKAGES"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $RENDER_PACKAGES; } \
      >"$VENV/apt.log" 2>&1 || fail "$advice failed: $(tail -n 1 "$VENV/apt.log") (all of it in $VENV/apt.log)"
    backend=$(find_backend) || fail "MuJoCo still cannot render without a screen: see $VENV/render.log"
  fi
  echo "setup: MuJoCo renders without a screen (MUJOCO_GL=$backend)"
  echo "$backend" >"$1"
}

command=${1:-}
shift || true
case $command in
  venv) make_venv ;;
  install) install "$@" ;;
  render) render "$@" ;;
  *) fail "unknown command '$command'; the first lines of $0 list them" ;;
esac
