-- Views over the tables of a run folder, and of what was computed from them.
--
-- StatsDB registers the Parquet files as relations _counts, _site_stats, ... (rows of the runs it opened), then runs
-- this file. What each view and column means is written in tables.py (stored tables) and views.py (the views computed
-- here), from where every one gets its COMMENT; `quambase sql --schema` prints them.
-- `group` is an SQL keyword: the column is `group_name`.

CREATE VIEW runs AS SELECT * FROM _runs;
CREATE VIEW counts AS SELECT * FROM _counts;

-- An undefined ratio is null here: as NaN it would come first in `ORDER BY outlier_ratio DESC`.
CREATE VIEW site_stats AS
SELECT * REPLACE (
    if(isnan(kurtosis), NULL, kurtosis) AS kurtosis,
    if(isnan(outlier_ratio), NULL, outlier_ratio) AS outlier_ratio,
    if(isnan(outlier_ratio_q99), NULL, outlier_ratio_q99) AS outlier_ratio_q99
) FROM _site_stats;

CREATE VIEW channels AS SELECT * FROM _channels;
CREATE VIEW documents AS SELECT * FROM _documents;
CREATE VIEW outliers AS SELECT * FROM _outliers;
CREATE VIEW activations AS SELECT * FROM _activations;
CREATE VIEW groups AS SELECT * FROM _groups;
CREATE VIEW sensitivities AS SELECT * FROM _sensitivities;
CREATE VIEW second_moments AS SELECT * FROM _second_moments;
CREATE VIEW block_counts AS SELECT * FROM _block_counts;
CREATE VIEW position_counts AS SELECT * FROM _position_counts;

CREATE VIEW position_stats AS
SELECT * REPLACE (
    if(isnan(kurtosis), NULL, kurtosis) AS kurtosis,
    if(isnan(outlier_ratio), NULL, outlier_ratio) AS outlier_ratio,
    if(isnan(outlier_ratio_q99), NULL, outlier_ratio_q99) AS outlier_ratio_q99
) FROM _position_stats;

CREATE VIEW position_channels AS SELECT * FROM _position_channels;

CREATE VIEW channel_stats AS
SELECT *, amax / nullif(median(amax) OVER (PARTITION BY run, layer, site), 0) AS ratio
FROM (
    SELECT run, layer, site, group_name, channel, count, min, max,
        greatest(abs(min), abs(max))::DOUBLE AS amax,
        sum / nullif(count, 0) AS mean,
        sqrt(greatest(sum_sq / nullif(count, 0) - (sum / nullif(count, 0)) ** 2, 0)) AS std
    FROM _channels
);

CREATE VIEW outlier_channels AS
SELECT * FROM channel_stats WHERE ratio >= 5;

CREATE VIEW group_spread AS
SELECT part.run, part.layer, part.site, count(*) AS groups, min(part.amax) AS least_amax, max(part.amax) AS largest_amax,
    max(part.amax) / nullif(min(part.amax), 0) AS spread,
    sum(part.amax * part.count::DOUBLE) / nullif(sum(part.count), 0) / nullif(any_value(whole.amax), 0) AS mean_step
FROM _site_stats AS part JOIN _site_stats AS whole USING (run, layer, site)
WHERE part.group_name <> 'all' AND whole.group_name = 'all' GROUP BY ALL;

CREATE VIEW scales AS SELECT * FROM _scales;

-- Pooled over the groups: sums of squared errors add up, whatever the groups are.
CREATE VIEW granularity_gain AS
WITH pooled AS (
    SELECT run, layer, site, label, granularity, count(*) AS groups, sum(mse * count) / nullif(sum(count), 0) AS mse
    FROM _scales GROUP BY ALL
), whole AS (
    SELECT run, layer, site, label, mse AS tensor_mse FROM pooled WHERE granularity = 'tensor'
)
SELECT *, 10 * log10(nullif(tensor_mse, 0) / nullif(mse, 0)) AS gain_db
FROM pooled JOIN whole USING (run, layer, site, label);

CREATE VIEW results AS SELECT * EXCLUDE positions FROM _results;

CREATE VIEW results_by_position AS
SELECT evaluation, strategy, task, data, document, cluster, position.decoded_from, position.decoded_to, position.tokens,
    position.nll, position.kl, position.top1_agreement
FROM (SELECT *, unnest(positions) AS position FROM _results WHERE positions IS NOT NULL);

-- Absolute values and how often each occurred, per group and for the whole of each site; finite values only.
CREATE VIEW absolute_counts AS
WITH finite AS (
    SELECT run, layer, site, group_name, abs(value) AS magnitude, count FROM _counts WHERE isfinite(value)
)
SELECT run, layer, site, group_name, magnitude, sum(count)::BIGINT AS count FROM finite GROUP BY ALL
UNION ALL
SELECT run, layer, site, 'all' AS group_name, magnitude, sum(count)::BIGINT AS count
FROM finite WHERE group_name <> 'all' GROUP BY ALL;

-- numpy.quantile's linear rule: rank p(n-1), interpolated from the nearer end.
CREATE MACRO quantile(p) AS TABLE
WITH ranked AS (
    SELECT run, layer, site, group_name, magnitude::DOUBLE AS magnitude,
        sum(count) OVER (PARTITION BY run, layer, site, group_name ORDER BY magnitude) AS up_to,
        sum(count) OVER (PARTITION BY run, layer, site, group_name) - 1 AS last
    FROM absolute_counts
), placed AS (
    SELECT *, p::DOUBLE * last::DOUBLE AS rank FROM ranked
), ends AS (
    SELECT run, layer, site, group_name, rank,
        min(magnitude) FILTER (WHERE up_to > floor(rank)) AS low,
        min(magnitude) FILTER (WHERE up_to > least(floor(rank) + 1, last)) AS high
    FROM placed GROUP BY run, layer, site, group_name, rank
)
SELECT run, layer, site, group_name,
    CASE WHEN rank - floor(rank) >= 0.5 THEN high - (high - low) * (1 - (rank - floor(rank)))
         ELSE low + (high - low) * (rank - floor(rank)) END AS quantile
FROM ends ORDER BY run, layer, site, group_name;

-- The code is round(x / scale) in float32, ties to even, as the INT8 model computes it.
CREATE MACRO clipping(scale) AS TABLE
WITH coded AS (
    SELECT run, layer, site, group_name, count, round_even(value / scale::REAL, 0) AS code, qmin, qmax
    FROM _counts, _number_format WHERE isfinite(value)
), whole AS (
    SELECT * FROM coded
    UNION ALL BY NAME SELECT * REPLACE ('all' AS group_name) FROM coded WHERE group_name <> 'all'
)
SELECT run, layer, site, group_name,
    coalesce(sum(count) FILTER (WHERE code < qmin OR code > qmax), 0)::BIGINT AS clipped,
    sum(count)::BIGINT AS count,
    coalesce(sum(count) FILTER (WHERE code < qmin OR code > qmax), 0) / sum(count) AS share
FROM whole GROUP BY ALL ORDER BY run, layer, site, group_name;

-- Equal parts of ranked heads and channels: no clustering, which SQL cannot do.
CREATE MACRO regrouped(head_groups, channel_groups) AS TABLE
WITH placed AS (
    SELECT run, layer, channel, greatest(abs(c.min), abs(c.max))::DOUBLE AS amax, channel // headdim AS head,
        channel * ngroups // count(*) OVER (PARTITION BY run, layer) AS ssd_group
    FROM _channels AS c JOIN _runs USING (run)
    WHERE site = 'x_conv_out:input' AND headdim IS NOT NULL
), heads AS (
    SELECT run, layer, ssd_group, head, avg(amax) AS mean_amax FROM placed GROUP BY ALL
), by_head AS (
    SELECT *, ntile(head_groups) OVER (PARTITION BY run, layer, ssd_group ORDER BY mean_amax, head) AS head_group
    FROM heads
), by_channel AS (
    SELECT *, ntile(channel_groups) OVER (PARTITION BY run, layer, head ORDER BY amax, channel) AS channel_group
    FROM placed
), grouped AS (
    SELECT run, layer, count(*) AS channels, max(amax) AS amax
    FROM by_channel JOIN by_head USING (run, layer, ssd_group, head)
    GROUP BY run, layer, ssd_group, head_group, channel_group
)
SELECT run, layer, count(*) AS groups, min(amax) AS least_amax, max(amax) AS largest_amax,
    max(amax) / nullif(min(amax), 0) AS spread,
    sum(amax * channels) / sum(channels) / nullif(max(amax), 0) AS mean_step
FROM grouped GROUP BY run, layer ORDER BY run, layer;
