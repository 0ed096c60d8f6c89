#!/usr/bin/env bash
# What everyone does, on a bundled model and a few documents: every command must end well and say something.
set -euo pipefail

run() { echo "\$ $*"; "$@" > out.txt; test -s out.txt; }

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

run python -m pip list
grep -E -i '^(torch|numpy|pyarrow|duckdb|click|matplotlib|numba|safetensors|tokenizers|scikit-learn|scipy) ' out.txt
run collect --model mamba-5m --samples 4
run quambase sql "select layer, site, amax / q9995 as ratio from site_stats order by ratio desc limit 3"
run quambase sql --schema
run quambase stats
run analyze
run quambase compare --site x_proj:input --layer 3
run apply --scales scales.parquet --strategy mse
run evaluate --samples 3
run evaluate --scales scales.parquet --strategy mse --strategy quamba --data sample:evaluation --samples 10 --task perplexity --format csv
run quambase results --format json
run quambase doctor
echo "the main job is done"
