# Set up the Python environment; sourced by the other scripts of this folder. Installs flash-moe with
# the given extras of pyproject.toml, at the versions of constraints.txt, and puts the checkout on
# PYTHONPATH.
#
#   . launch/setup.sh train,test
#
# Uses the active virtual or conda environment; if there is none, creates .venv in the checkout.
#   PYTHON=python3.12   interpreter that .venv is created with
#   SKIP_INSTALL=1      install nothing and use the current environment (a machine without network,
#                       a cluster image)

extras=$1
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
case ${SKIP_INSTALL:-0} in
  0) ;;
  1) return 0 ;;
  *)
    echo "error: SKIP_INSTALL must be 0 or 1, got $SKIP_INSTALL" >&2
    exit 2
    ;;
esac

if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
  if [ ! -x "$repository/.venv/bin/python" ]; then
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
      echo "error: $python must be Python 3.10 or newer; set PYTHON=/path/to/python3" >&2
      exit 1
    fi
    echo "creating $repository/.venv"
    if ! "$python" -m venv "$repository/.venv"; then
      rm -rf "$repository/.venv"
      echo "error: $python cannot create a virtual environment (Debian: apt install python3-venv)" >&2
      exit 1
    fi
  fi
  . "$repository/.venv/bin/activate"
fi

# Skips the installation if checkout, extras and both files are unchanged since the last one.
wanted=$(cat "$repository/pyproject.toml" "$repository/launch/constraints.txt" | cksum)
stamp=$(python3 -c 'import sys; print(sys.prefix)')/flash-moe-installed
if ! grep -qxF "$repository $extras $wanted" "$stamp" 2>/dev/null; then
  echo "installing flash-moe[$extras] with launch/constraints.txt"
  python3 -m pip install --quiet --disable-pip-version-check \
    --constraint "$repository/launch/constraints.txt" --editable "$repository[$extras]" || exit 1
  echo "$repository $extras $wanted" >> "$stamp"
fi
