#!/usr/bin/env bash
# Writes the Python stubs of proto/moeplan/v1 beside the .proto files.
#   proto/generate.sh           lint, and generate
#   proto/generate.sh --check   lint, compare with the last commit for breaking changes, and fail if the stubs are stale
# The generator is pinned: its stubs load with every protobuf from its own version on, and ortools holds protobuf back.
# It lives in its own environment, .venv-gen, so that it never changes what the tests run with.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-gen
if [ ! -x $venv/bin/buf ]; then
  "${PYTHON:-python3}" -m venv $venv
  $venv/bin/pip install --quiet --disable-pip-version-check -r proto/generator.txt
fi
$venv/bin/buf lint proto
$venv/bin/buf format --diff --exit-code proto

generate() {
  PATH="$PWD/$venv/bin:$PATH" $venv/bin/python -m grpc_tools.protoc -Iproto --python_out="$1" --grpc_python_out="$1" \
    --mypy_out=quiet:"$1" --mypy_grpc_out=quiet:"$1" proto/moeplan/v1/*.proto
}

if [ "${1:-}" != --check ]; then
  generate proto
  exit
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/new" "$scratch/old"
generate "$scratch/new"
for stub in "$scratch"/new/moeplan/v1/*; do
  cmp -s "$stub" "proto/moeplan/v1/$(basename "$stub")" || { echo "stale stub: $(basename "$stub"); run make proto" >&2; exit 1; }
done
if git cat-file -e HEAD:proto/buf.yaml 2>/dev/null; then
  git archive HEAD proto | tar -x -C "$scratch/old"
  $venv/bin/buf breaking proto --against "$scratch/old/proto"
fi
