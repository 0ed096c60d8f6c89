#!/usr/bin/env bash
# The whole pipeline on the bundled models and text: no network, a few minutes on two cores.
set -euo pipefail

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() { say "\$ $*"; "$@"; }

rm -rf demo
mkdir demo
cd demo
start=$SECONDS

say "1. Run the bundled Mamba-1 over 128 texts and keep the exact distribution of every activation."
run collect --model mamba-5m --samples 128

say "2. Ask: which sites that an INT8 model reads have outliers, and which tokens make the largest?"
run quambase sql "select layer, site, amax, q9995, amax / q9995 as ratio from site_stats
  where group_name = 'all' and site not like 'ssm_state%' order by ratio desc limit 8"
run quambase sql "select layer, token, value, channel, document from outliers
  where site = 'x_proj:input' order by abs(value) desc limit 8"

say "3. Every strategy, in batch; then one site in detail, with a picture."
run analyze
run quambase compare --site x_proj:input --layer 3 --values 2,4.5

say "4. Build the INT8 model with the least-squares scales, and evaluate it against the floating-point one."
run apply --strategy mse
run evaluate --samples 24

say "5. Every strategy against the floating-point model and against upstream's recipe, on the same texts."
run evaluate --scales scales.parquet --strategy all --samples 24

say "6. The same for a Mamba-2: heads and channels sorted into groups, a scale for each group, and what that buys."
run collect --model mamba2-8m --samples 64
run quambase groups
run analyze --out scales2.parquet
run quambase sql --scales scales2.parquet "select granularity, label, sum(groups)::int as scales, avg(gain_db) as gain_db
  from granularity_gain where site = 'x_conv_out:input' and label in ('quamba', 'mse') group by all order by all"
run evaluate --scales scales2.parquet --strategy quamba,mse --granularity all --samples 12 --task perplexity

say "Done in $((SECONDS - start)) s. Look at:"
cat <<'END'
  demo/quambase-db/runs/*/        the database: plain Parquet and run.json
  demo/scales.parquet             every scale of every strategy at every site, with its exact error
  demo/compare.png                one site: original against reconstruction, error by magnitude
  demo/groups.png                 a Mamba-2 layer's scale groups, in the model's own order and sorted
  demo/quambase-db/models/*/      the INT8 model: safetensors, config, the scales it holds
  demo/quambase-db/results/*/     every document's result, so strategies can be compared again without running
Next:
  cd demo && ../.venv/bin/quambase sql --schema      what can be asked
  ../.venv/bin/quambase results                      the evaluations again
END
