#!/usr/bin/env bash
# The core under AddressSanitizer with UndefinedBehaviorSanitizer, and with it llama.cpp's plugin if
# llama-cpp-python is there; then the core under ThreadSanitizer.
# Usage: scripts/sanitize.sh PYTHON, a Python that has fallow[lab,dev] installed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A virtual environment with its own build of fallow, and all else from the given one.
build() {
    "$python" -m venv "$work/$1"
    echo "$packages" > "$work/$1/lib/$(basename "$(dirname "$packages")")/site-packages/others.pth"
    "$work/$1/bin/python" -m pip install --quiet --no-deps \
        -C cmake.define.FALLOW_SANITIZE="$2" -C build-dir="$work/build-$1" .
}
library() { gcc -print-file-name="lib$1.so"; }

PYTHONPATH=tests "$python" -m harness.threads pack "$work/packed"

build address address,undefined
LD_PRELOAD="$(library asan) $(library ubsan)" ASAN_OPTIONS=detect_leaks=0 \
    "$work/address/bin/python" -m pytest -q -p no:cacheprovider \
    tests/test_kernels.py tests/test_core.py tests/test_engine.py \
    tests/test_engine_plans.py tests/test_answers.py \
    tests/test_fuzz.py::test_mutated_headers_never_crash -k 'not smollm2'

if "$python" -c 'import llama_cpp' 2> /dev/null; then
    CXXFLAGS='-fsanitize=address,undefined -fno-sanitize-recover=all -g -O1' XDG_CACHE_HOME="$work/cache" \
        LD_PRELOAD="$(library asan) $(library ubsan)" ASAN_OPTIONS=detect_leaks=0 \
        "$work/address/bin/python" -m pytest -q -p no:cacheprovider tests/test_llama_cpp.py
fi

build thread thread
# Without address randomisation: some kernels place libraries where the sanitizer wants its own.
PYTHONPATH=tests LD_PRELOAD="$(library tsan)" setarch -R \
    "$work/thread/bin/python" -m harness.threads run "$work/packed"
echo 'no sanitizer complained'
