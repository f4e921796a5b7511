#!/usr/bin/env bash
# Makes the virtual environment of this repository once, and activates it.
# `--help` says how.
# Sourced, this file runs itself in a shell of its own (so that neither its options nor its names
# reach the caller), then activates what that shell made.

if [[ "${BASH_SOURCE[0]:-}" != "$0" ]]; then
    if [[ -z "${BASH_VERSION:-}" ]]; then
        echo "[environment] ERROR: source this file from bash" >&2
        return 1
    fi
    # `source` without words hands on the caller's own: take dev and gpu, leave the rest alone.
    _mmlm_extras=""
    for _mmlm_word in "$@"; do
        case "$_mmlm_word" in dev | gpu) _mmlm_extras="$_mmlm_extras $_mmlm_word" ;; esac
    done
    # shellcheck disable=SC2086  # the words are meant to be split
    if ! _mmlm_venv=$(bash "${BASH_SOURCE[0]}" $_mmlm_extras); then
        unset _mmlm_extras _mmlm_word _mmlm_venv
        return 1
    fi
    if [[ "$_mmlm_venv" == none ]]; then
        PYTHONPATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)${PYTHONPATH:+:$PYTHONPATH}"
        export PYTHONPATH
    else
        # shellcheck disable=SC1091
        source "$_mmlm_venv/bin/activate"
    fi
    unset _mmlm_extras _mmlm_word _mmlm_venv
    return 0
fi

set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

say() { printf '[environment] %s\n' "$*" >&2; }
fail() {
    say "ERROR: $*"
    exit 1
}

usage() {
    cat <<HELP
source tools/environment.sh [dev] [gpu]

Makes a virtual environment with the versions in constraints.txt and activates it. The first call
takes minutes (it downloads torch), later ones less than a second: a stamp in the environment
says what it was made from. Executed instead of sourced, it only makes the environment and prints
where it is.

  dev              also what tests, lint and types need
  gpu              also transformer-engine and flash-attn (built from source where no wheel fits)

  MMLM_VENV        where the environment is (default: .venv in the repository). An active one that
                   has everything is used when this is not set. none: python as it is on PATH,
                   nothing is installed or checked, and the repository is put on PYTHONPATH.
  MMLM_PYTHON      the interpreter a new environment is made with (3.11 or 3.12; default: the
                   first that fits of python3, python3.11, python3.12, python)

A CUDA build of torch that the interpreter already has is kept, whatever its version.
constraints.txt says how to choose a CPU build of torch on Linux.
HELP
}

# Exit status 0 when the environment has mmlm from this repository with all that its extras ask for.
satisfied() { # python
    "$1" -I - "$repository" "$extras" <<'PY' 2>/dev/null
import sys
from importlib import metadata
from pathlib import Path

import mmlm
from packaging.requirements import Requirement

repository, extras = Path(sys.argv[1]), sys.argv[2].split(",")
if Path(mmlm.__file__).resolve().parent.parent != repository:
    sys.exit(1)
for line in metadata.requires("mmlm") or []:
    need = Requirement(line)
    wanted = need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras)
    if wanted and not need.specifier.contains(metadata.version(need.name), prereleases=True):
        sys.exit(1)
PY
}

# Prints an interpreter that can make an environment; outside of any environment that is active.
find_python() {
    local candidate found without_venv=""
    local -a candidates=(python3 python3.11 python3.12 python)
    [[ -z "${MMLM_PYTHON:-}" ]] || candidates=("$MMLM_PYTHON")
    for candidate in "${candidates[@]}"; do
        found=$("$candidate" -c 'import sys
if (3, 11) <= sys.version_info[:2] < (3, 13):
    print(getattr(sys, "_base_executable", None) or sys.executable)' 2>/dev/null) || continue
        [[ -n "$found" ]] || continue
        if "$found" -c 'import ensurepip, venv' 2>/dev/null; then
            printf '%s\n' "$found"
            return
        fi
        without_venv="$found"
    done
    if [[ -n "$without_venv" ]]; then
        fail "$without_venv has no venv module: install it (Debian and Ubuntu: the package" \
            "python3.11-venv or python3.12-venv)"
    fi
    fail "no Python 3.11 or 3.12 among: ${candidates[*]}. Install one, or set MMLM_PYTHON to its path"
}

# Prints the version of the torch that an interpreter sees, when it is a CUDA build.
cuda_torch() { # python
    "$1" -c 'import torch
if torch.version.cuda is not None:
    print(torch.__version__)' 2>/dev/null || true
}

make_venv() {
    local python options=""
    python=$(find_python)
    if [[ -n "$(cuda_torch "$python")" ]]; then
        say "$python has a CUDA build of torch: the environment will use it"
        options="--system-site-packages"
    fi
    say "making $venv with $("$python" --version)"
    # shellcheck disable=SC2086
    "$python" -m venv --clear $options "$venv" || fail "$python could not make $venv"
}

# pip with its words in a log that is shown when it fails.
pip_install() { # what to say, arguments of pip install
    say "installing $1 (log: $log)"
    shift
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input \
        --progress-bar off "$@" >>"$log" 2>&1; then
        tail -n 25 "$log" >&2
        fail "pip could not install this; the lines above end its log, $log"
    fi
}

# constraints.txt without the packages that come from outside the environment, and with their torch.
constraints_around() { # version of torch
    "$venv/bin/python" - "$repository/constraints.txt" "$1" <<'PY'
import sys
from importlib import metadata
from pathlib import Path

lines = Path(sys.argv[1]).read_text().splitlines()
outside = {
    dist.name.lower().replace("_", "-")
    for dist in metadata.distributions()
    if Path(sys.prefix).resolve() not in Path(str(dist.locate_file(""))).resolve().parents
}
for line in lines:
    name = line.partition("==")[0].strip().lower().replace("_", "-")
    if name != "torch" and name not in outside:
        print(line)
print(f"torch=={sys.argv[2]}")
PY
}

install() {
    local pinned present constraints="$repository/constraints.txt"
    log="$venv/install.log"
    : >"$log"
    pinned=$(sed -n 's/^torch==//p' "$constraints")
    present=$(cuda_torch "$venv/bin/python")
    if [[ -n "$present" && "${present%%+*}" != "$pinned" ]]; then
        say "keeping torch $present"
        constraints_around "$present" >"$venv/constraints.txt"
        constraints="$venv/constraints.txt"
    else
        # First and alone: it is the bulk, and which build comes is for the user's index to say.
        if [[ "$(uname -s)" == Linux && -z "${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}" ]] &&
            ! command -v nvidia-smi >/dev/null; then
            say "no GPU here: constraints.txt says how to choose torch's smaller CPU build"
        fi
        pip_install "torch $pinned" -c "$constraints" "torch==$pinned"
    fi
    local ordinary=""
    if [[ ",$extras," == *,dev,* ]]; then ordinary="[dev]"; fi
    pip_install "mmlm$ordinary" -c "$constraints" -e "$repository$ordinary"
    if [[ ",$extras," == *,gpu,* ]]; then
        # These build against the torch that is installed, so not in pip's isolated environment.
        pip_install "transformer-engine and flash-attn" -c "$constraints" --no-build-isolation \
            -e "${repository}[gpu]"
    fi
}

# What an environment is made from; changes of it call for an installation.
fingerprint() {
    { cat "$repository/setup.py" "$repository/constraints.txt" "$venv/pyvenv.cfg" &&
        printf '%s\n' "$repository"; } | cksum
}

# Exit status 0 when the stamp is of today's files and names every extra that is asked for.
stamped() {
    local made_from has_extras word
    [[ -f "$stamp" && -x "$venv/bin/python" && -f "$venv/pyvenv.cfg" ]] || return 1
    { read -r made_from && read -r has_extras; } <"$stamp" || return 1
    [[ "$made_from" == "$(fingerprint)" ]] || return 1
    for word in ${extras//,/ }; do
        [[ ",$has_extras," == *",$word,"* ]] || return 1
    done
}

add_extra() { [[ ",$extras," == *",$1,"* ]] || extras="${extras:+$extras,}$1"; }

extras=""
for word in "$@"; do
    case "$word" in
    dev | gpu) add_extra "$word" ;;
    -h | --help)
        usage
        exit 0
        ;;
    *) fail "unknown word '$word': dev, gpu or nothing (--help says more)" ;;
    esac
done

default_venv="$repository/.venv"
venv="${MMLM_VENV:-$default_venv}"
if [[ "$venv" == none ]]; then
    printf 'none\n'
    exit 0
fi
[[ "$venv" == /* ]] || venv="$PWD/$venv"
stamp="$venv/.mmlm-environment"

active="${VIRTUAL_ENV:-}"
if [[ -z "${MMLM_VENV:-}" && -n "$active" && "$active" != "$default_venv" ]]; then
    if satisfied "$active/bin/python"; then
        printf '%s\n' "$active"
        exit 0
    fi
    say "using $venv: the active $active has not all of mmlm's dependencies"
fi

if stamped; then
    printf '%s\n' "$venv"
    exit 0
fi

mkdir -p "$(dirname "$venv")"
if command -v flock >/dev/null; then
    exec 9>"$venv.lock"
    if ! flock -n 9; then
        say "waiting for another process that is making $venv"
        flock 9
    fi
fi
if ! stamped; then
    if [[ -f "$stamp" ]]; then
        # Extras that are there stay: asking for less never takes something away.
        for word in $(sed -n '2s/,/ /g;2p' "$stamp"); do
            case "$word" in dev | gpu) add_extra "$word" ;; esac
        done
        rm -f "$stamp"
    fi
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then make_venv; fi
    install
    printf '%s\n%s\n' "$(fingerprint)" "$extras" >"$stamp"
    say "ready: $venv"
fi
printf '%s\n' "$venv"
