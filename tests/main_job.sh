#!/usr/bin/env bash
# What everyone does, on a bundled model and a few documents: every command must end well and say something, and every
# package that quambase needs is used.
set -euo pipefail

run() { echo "\$ $*"; "$@" 2>&1 | tee out.txt; test -s out.txt; }

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

run python -m pip list --disable-pip-version-check
run collect --model mamba-5m --samples 4
run quambase sql "select layer, site, amax / q9995 as ratio from site_stats order by ratio desc limit 3"
run quambase sql @outlier-sites
run quambase sql --schema
run quambase stats --format csv --out stats.csv
run analyze
run quambase compare --site x_proj:input --layer 3
for picture in heatmap.png distribution.svg strategies.pdf; do
  run quambase plot "${picture%.*}" --out "$picture"
done
run apply --scales scales.parquet --strategy mse
run apply --scales scales.parquet --strategy mse --export act_scales.pt
run evaluate --samples 3
run evaluate --scales scales.parquet --strategy mse --strategy quamba --data sample:evaluation --samples 10 --task perplexity --format csv
run quambase results --format json
run quambase report

# A run of two shards, with what a run may hold besides; it has a database of its own.
for shard in 0/2 1/2; do
  run collect --model mamba2-8m --samples 4 --seq-len 64 --batch-size 2 --sensitivity 2 --by-block --shard "$shard" --db shards
done
run quambase merge --db shards
run quambase groups --db shards
run quambase converge --db shards
run analyze --db shards --select effect --strategy absmax --strategy effect --out effect.parquet

python - <<'PYTHON'
import numpy as np, torch
from safetensors.numpy import save_file

values = np.random.default_rng(0).normal(size=(2, 16, 8)).astype(np.float32)
np.save("values.npy", values)
torch.save(torch.from_numpy(values).bfloat16(), "values.pt")
save_file({"values": values}, "values.safetensors")
PYTHON
for file in values.npy values.pt values.safetensors; do
  run quambase import "$file" --site "${file/./-}" --db imported
done
run quambase sql "select run, count(*) from counts group by run" --run all --db imported --format parquet --out imported.parquet
run quambase doctor
echo "the main job is done"
