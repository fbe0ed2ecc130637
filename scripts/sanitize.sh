#!/usr/bin/env bash
# The core under AddressSanitizer with UndefinedBehaviorSanitizer, and with it llama.cpp's plugin if
# llama-cpp-python is there; then the core under ThreadSanitizer.
# Usage: scripts/sanitize.sh PYTHON [address] [plugin] [thread], by default all of it, with a Python that
# has fallow[lab,dev] installed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
shift
parts=" ${*:-address plugin thread} "
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

wanted() { [[ $parts == *" $1 "* ]]; }

# A virtual environment with its own build of fallow, and all else from the given one.
build() {
    "$python" -m venv "$work/$1"
    echo "$packages" > "$work/$1/lib/$(basename "$(dirname "$packages")")/site-packages/others.pth"
    "$work/$1/bin/python" -m pip install --quiet --no-deps \
        -C cmake.define.FALLOW_SANITIZE="$2" -C build-dir="$work/build-$1" .
}
library() { gcc -print-file-name="lib$1.so"; }

under_address() {
    LD_PRELOAD="$(library asan) $(library ubsan)" ASAN_OPTIONS=detect_leaks=0 \
        "$work/address/bin/python" -m pytest -q -p no:cacheprovider "$@"
}

if wanted address || wanted plugin; then build address address,undefined; fi
if wanted address; then
    under_address tests/test_kernels.py tests/test_core.py tests/test_engine.py \
        tests/test_engine_plans.py tests/test_answers.py \
        tests/test_fuzz.py::test_mutated_headers_never_crash -k 'not smollm2'
fi
if wanted plugin && "$python" -c 'import llama_cpp' 2> /dev/null; then
    CXXFLAGS='-fsanitize=address,undefined -fno-sanitize-recover=all -g -O1' XDG_CACHE_HOME="$work/cache" \
        under_address tests/test_llama_cpp.py
fi
if wanted thread; then
    PYTHONPATH=tests "$python" -m harness.threads pack "$work/packed"
    build thread thread
    # Without address randomisation: some kernels place libraries where the sanitizer wants its own.
    PYTHONPATH=tests LD_PRELOAD="$(library tsan)" setarch -R \
        "$work/thread/bin/python" -m harness.threads run "$work/packed"
fi
echo 'no sanitizer complained'
