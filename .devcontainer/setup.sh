#!/usr/bin/env bash
# Sets up the course on a bare Debian (12 or later), as root: what the Dockerfile runs, and a machine without Docker can.
#
#   .devcontainer/setup.sh [FOLDER OF THE CHECKOUT]      PIP_FLAGS: more options for pip, as in the Makefile
#
# It installs Python, the package with all that it requires, and the bundled model, in /opt/qlora-lab; adds the command
# qlora-lab and the user learner; and leaves nothing that only the installation needed.
set -euo pipefail
checkout=$(cd "${1:-$(dirname "$0")/..}" && pwd)
home=/opt/qlora-lab
export DEBIAN_FRONTEND=noninteractive

apt-get update -q
apt-get install -q -y --no-install-recommends ca-certificates git python3 python3-venv
apt-get clean
rm -rf /var/lib/apt/lists/*

python3 "$checkout/qlora_lab/wheelhouse.py" fits
python3 -m venv --clear "$home"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$checkout" "$work/checkout" # pip writes into the folder that it builds from
# shellcheck disable=SC2086 # PIP_FLAGS are several words
"$home/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check ${PIP_FLAGS:-} \
  -c "$checkout/constraints.txt" "$work/checkout[export]"
QLORA_LAB_CACHE=$home/models "$home/bin/qlora-lab" fetch
# JupyterLab's question about news would cover the first lesson
"$home/bin/jupyter" labextension disable --level=sys_prefix @jupyterlab/apputils-extension:announcements
chmod -R a+rX "$home"

ln -sf "$home/bin/qlora-lab" /usr/local/bin/qlora-lab
id learner >/dev/null 2>&1 || useradd --create-home --shell /bin/bash learner
install --directory --owner=learner --group=learner /course # a learner's own notebooks
