#!/usr/bin/env bash
# The whole chain on SmolLM2-135M: profile, calibrate at +1 % PPL, evaluate, compare rules, pack, answer, time.
# Usage: scripts/demo.sh FALLOW_COMMAND OUTPUT_FOLDER
set -euo pipefail
fallow=$1
out=$2
mkdir -p "$out"

run() {
    local word
    printf '\n$ fallow'
    for word; do
        case $word in
            *[!A-Za-z0-9_./,-]*) printf " '%s'" "$word" ;;
            *) printf ' %s' "$word" ;;
        esac
    done
    printf '\n'
    "$fallow" "$@"
}

run models
run profile smollm2 --windows 4 -o "$out/profile"
run calibrate smollm2 --rule tail --max-ppl-increase 1 --windows 4 -o "$out/tail.plan"
run evaluate smollm2 --plan "$out/tail.plan" --windows 8
run tradeoff smollm2 --rules percentile,cats,topk,tail,cett,wina_uniform --sparsities 0.3,0.5 \
    --windows 4 --calibration-windows 4 -o "$out/tradeoff"
question='Why is the sky blue? Answer in one sentence.'
run pack smollm2 -o "$out/smollm2.gguf"
run generate "$out/smollm2.gguf" "$question" --chat --max-new-tokens 48
run generate "$out/smollm2.gguf" "$question" --chat --max-new-tokens 48 --plan "$out/tail.plan"
run bench "$out/smollm2.gguf" -p 256 -n 64
run bench "$out/smollm2.gguf" -p 256 -n 64 --plan "$out/tail.plan"
run evaluate "$out/smollm2.gguf" --plan "$out/tail.plan" --windows 4

printf '\nEverything is in %s:\n' "$(cd "$out" && pwd)"
(cd "$out" && find . -type f | sort)
printf '\nNext: a model with more to win, docs/tutorial.md.\n'
