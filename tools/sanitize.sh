#!/usr/bin/env bash
# usage: sanitize.sh PYTHON [pytest arguments]
# The C++ kernels with AddressSanitizer and UndefinedBehaviorSanitizer, built apart from the working tree's, under the
# tests that pytest is told to run; the first fault ends the run with its stack.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
shift
out=build/sanitize
sanitizers="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
flags="$sanitizers -D_GLIBCXX_ASSERTIONS -D_GLIBCXX_SANITIZE_VECTOR"
# Which of the two variables C++ is compiled with depends on the version of setuptools.
FOCUSKERNELS_BUILD=1 CFLAGS=$flags CXXFLAGS=$flags LDFLAGS=$sanitizers \
    "$python" setup.py -q build --build-base "$out" --build-lib "$out/lib"
# not grep -q, which ends before nm does, so that the pipe fails
nm -D "$out"/lib/focuskernels/_C*.so | grep __asan_ > /dev/null || { echo "error: built without sanitizers" >&2; exit 1; }

# Python is not built with the sanitizers: their libraries must come first, and libstdc++ for them to find its throw.
preload=$(for library in asan ubsan stdc++; do "${CXX:-c++}" -print-file-name="lib$library.so"; done | paste -sd:)
# Python and torch keep what they allocate at start to the end, so that leaks of ours would not be seen among theirs.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
# -P: else the working tree would be imported, and its kernels.
PYTHONPATH=$out/lib FOCUSKERNELS_STRICT=1 LD_PRELOAD=$preload "$python" -P -m pytest -p no:cacheprovider "$@"
