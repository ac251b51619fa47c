#!/usr/bin/env bash
# Builds sdist and wheel and tries both in empty environments: the newest versions of what is declared, and the lowest.
#
#     scripts/check_release.sh [VERSION OF TORCH]
#
# The lowest versions are those of setup.py, except for torch: one version of it is used in all environments, by default
# the newest, because older ones are published for CUDA alone on PyPI and take gigabytes. `torch>=2.5` is not tried here.
set -euo pipefail
cd "$(dirname "$0")/.."
torch="torch${1:+==$1}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/build"
"$work/build/bin/pip" install --quiet build twine setuptools wheel
"$work/build/bin/python" -m build --outdir "$work/dist" . >"$work/build.log" || { cat "$work/build.log"; exit 1; }
"$work/build/bin/python" -m twine check --strict "$work"/dist/*

# torch>=2.5 einops>=0.8 ... -> einops==0.8 ...
lowest=$(sed -n '/install_requires/,/\]/p' setup.py | grep -o '"[a-z]*>=[0-9.]*"' | tr -d '"' | grep -v '^torch>' | sed 's/>=/==/')

try() { # name, file, requirements...
    echo "+ $1: ${*:2}"
    python3 -m venv "$work/$1"
    "$work/$1/bin/pip" install --quiet "${@:2}"
    (
        mkdir "$work/$1/empty"
        cd "$work/$1/empty"
        PATH="$work/$1/bin:$PATH"
        pip check
        pip list --format=freeze | grep -E '^(torch|einops|beartype|packaging|tqdm|numpy|safetensors)=' | xargs echo
        python -c 'import sys; print("a line of text for a model to learn,", "again and again\n" * 4000)' > text.txt
        brt-train --preset tiny --steps 4 --device cpu --threads 1 --data text.txt --cache cache --out run | tail -n 1
        brt-train --resume run --steps 6 | tail -n 1
        brt-evaluate run --device cpu | tail -n 1
        brt-generate run --prompt "a line" --max-new-tokens 8 --device cpu > told.txt
        test -s told.txt
    )
}

# shellcheck disable=SC2086
for kind in whl tar.gz; do
    file=$(ls "$work"/dist/*."$kind")
    try "newest-$kind" "$file" "$torch"
    try "lowest-$kind" "$file" "$torch" $lowest
done
echo "the release is sound: $(ls "$work/dist" | xargs echo)"
