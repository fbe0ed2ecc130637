#!/usr/bin/env bash
# Compiles the core, not its bindings, for macOS and Windows by zig's compiler, which brings their headers.
# Usage: scripts/cross.sh PYTHON, into which ziglang (100 MB) is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
"$python" -m pip install --quiet 'ziglang>=0.13'
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for target in aarch64-macos x86_64-macos x86_64-windows-gnu; do
    for file in csrc/{engine,formats,kernels,platform,stats}/*.cpp; do
        flags=()
        case $target-$file in
            aarch64*avx*) continue ;;
            *avx512*) flags=(-mavx2 -mfma -mf16c -mavx512{f,bw,vl,dq,vnni,bf16}) ;;
            *avx2*) flags=(-mavx2 -mfma -mf16c) ;;
            *windows.cpp) flags=(-Wno-unused-private-field) ;;  # other systems use them
        esac
        "$python" -m ziglang c++ -target "$target" -std=c++20 -Wall -Wextra -Werror -Icsrc "${flags[@]}" \
            -c "$file" -o "$work/object"
    done
    echo "$target compiles"
done
