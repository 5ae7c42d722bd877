#!/bin/sh
# Makes the environments of frameworks whose torch is not ours, one for each in a folder: environments.sh FOLDER PYTHON
set -eu
folder=$1 python=$2
make() { # name, then what to install
	name=$1
	shift
	test -x "$folder/$name/bin/python" || "$python" -m venv "$folder/$name"
	"$folder/$name/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 "$@" \
		numba lazy-loader scipy 'grpcio>=1.76,<2' 'protobuf>=6.33.1,<8' grpcio-status googleapis-common-protos
}
# Beside what the packages name, what they import: torchtitan triton, which only torch for CUDA brings along, and
# Megatron-core's checkpoints psutil, without which their writers end and the ranks wait for them.
make torchtitan torchtitan==0.3.0 triton
make megatron megatron-core==0.16.1 einops psutil
echo "set FRAMEWORK_ENVIRONMENTS=$folder and run: make test-all"
