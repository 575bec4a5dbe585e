#!/usr/bin/env bash
# Patch the vLLM of a virtual environment, or install the line's pinned one and patch that.
# All files or none; --revert puts them back. Run it from a checkout of vllm-forge:
#
#     scripts/install_vllm_with_patches.sh [--python VENV/bin/python] [--line 0.26] [--revert]
#
# The work is done by `vllm-forge install` (src/vllm_forge/patches/wheel.py); this script
# only gives it an environment of its own, so that nothing is added to yours.
set -euo pipefail
unset PYTHONHOME PYTHONPATH # of modules on a cluster, for another environment

root=$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ ! -f "${root}/matrix.toml" ]; then
    echo "install_vllm_with_patches.sh: ${root} is not a checkout of vllm-forge" >&2
    echo "  remedy: clone the repository and run the script from there; the patches are in it" >&2
    exit 2
fi
for tool in python3 git; do
    if ! command -v "${tool}" > /dev/null; then
        echo "install_vllm_with_patches.sh: ${tool} is not installed" >&2
        exit 34
    fi
done

# One environment for each checkout, by its path: it runs the code of that checkout (--editable).
cache="${VLLM_FORGE_CACHE:-${XDG_CACHE_HOME:-${HOME:?is not set: set it or VLLM_FORGE_CACHE}/.cache}/vllm-forge}/installers"
own="${cache}/$(printf '%s' "${root}" | sha256sum | cut -c1-16)"
stamp="${own}/$(sha256sum "${root}/pyproject.toml" | cut -d' ' -f1)"
mkdir -p "${cache}"
exec 9> "${own}.lock"
flock 9
# The interpreter that it was made with may have been upgraded or removed since.
if [ ! -f "${stamp}" ] || ! "${own}/bin/python" -c "" 2> /dev/null; then
    rm -rf "${own}"
    python3 -m venv "${own}"
    "${own}/bin/python" -m pip install --quiet --editable "${root}"
    : > "${stamp}"
fi
flock -u 9
VLLM_FORGE_ROOT="${root}" exec "${own}/bin/vllm-forge" install "$@" 9>&-
