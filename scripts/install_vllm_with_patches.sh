#!/usr/bin/env bash
# Patch the vLLM of a virtual environment, or install the line's pinned one and patch that.
# All files or none; --revert puts them back. Run it from a checkout of vllm-forge:
#
#     scripts/install_vllm_with_patches.sh [--python VENV/bin/python] [--line 0.26] [--revert]
#
# The work is done by `vllm-forge install` (src/vllm_forge/patches/install.py); this script
# only gives it an environment of its own, so that nothing is added to yours.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
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

own="${VLLM_FORGE_CACHE:-${XDG_CACHE_HOME:-${HOME}/.cache}/vllm-forge}/installer"
stamp=$(sha256sum "${root}/pyproject.toml" | cut -d' ' -f1)
if [ ! -f "${own}/${stamp}" ]; then
    rm -rf "${own}"
    python3 -m venv "${own}"
    "${own}/bin/python" -m pip install --quiet --editable "${root}"
    : > "${own}/${stamp}"
fi
VLLM_FORGE_ROOT="${root}" exec "${own}/bin/vllm-forge" install "$@"
