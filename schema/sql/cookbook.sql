-- The cookbook: questions that users ask, `quambase sql @NAME`. docs/cookbook.md shows each with its answer.
--
-- A query begins with a line `-- name: NAME`; then its question; then its parameters with their defaults, a line each,
-- which `--set PARAMETER=VALUE` changes. The outputs of a block's identities (ssm_state_act, z_act, ...) repeat their
-- inputs, so lists of sites leave them out.

-- name: outlier-sites
-- Which sites have the largest outliers?
-- $limit = 5
SELECT layer, site, amax, q9995, outlier_ratio, kurtosis
FROM site_stats
WHERE group_name = 'all' AND site NOT SIMILAR TO '.*(_act|_conv_in|_conv_out):output'
ORDER BY outlier_ratio DESC NULLS LAST, layer, site
LIMIT $limit;

-- name: outlier-layers
-- In which layers does a site reach furthest, and from where on does it grow?
-- $site = x_proj:input
SELECT layer, amax, q9995, amax / max(amax) OVER () AS of_largest, bar(amax, 0, max(amax) OVER (), 20) AS reach
FROM site_stats
WHERE site = $site AND group_name = 'all'
ORDER BY layer;

-- name: outlier-channels
-- Which channels make a site's outliers, and how much less would the scale be without them?
-- $layer = 3
-- $site = x_proj:input
-- $limit = 5
SELECT channel, group_name, amax, ratio AS of_median_channel, amax / max(amax) OVER () AS of_site,
    lead(amax) OVER (ORDER BY amax DESC, channel) / amax AS scale_without_it
FROM channel_stats
WHERE layer = $layer AND site = $site
ORDER BY amax DESC, channel
LIMIT $limit;

-- name: outlier-documents
-- Which documents set the largest value, and does one document decide the scale of absmax?
-- $limit = 5
SELECT document, any_value(tokens) AS tokens, count(*) AS sites_it_leads, max(amax / second) AS furthest_ahead
FROM (
    SELECT *, row_number() OVER w AS place, lead(amax) OVER w AS second
    FROM documents WHERE group_name = 'all'
    WINDOW w AS (PARTITION BY layer, site ORDER BY amax DESC, document)
)
WHERE place = 1
GROUP BY document
ORDER BY sites_it_leads DESC, document
LIMIT $limit;

-- name: outlier-tokens
-- Which tokens make a site's largest values, and in which text?
-- $layer = 3
-- $site = x_proj:input
-- $limit = 5
SELECT token, count(*) AS times, arg_max(value, abs(value)) AS largest, arg_max(before, abs(value)) AS before,
    arg_max(after, abs(value)) AS after
FROM outliers
WHERE layer = $layer AND site = $site
GROUP BY token
ORDER BY times DESC, token
LIMIT $limit;

-- name: outlier-positions
-- Where in the document are the largest values?
-- $layer = 3
-- $site = x_proj:input
SELECT CASE WHEN position = 0 THEN 'first token' WHEN position < 8 THEN '2 to 8' WHEN position < 64 THEN '9 to 64'
    ELSE 'later' END AS place, count(*) AS of_the_largest, max(abs(value)) AS largest
FROM outliers
WHERE layer = $layer AND site = $site
GROUP BY place
ORDER BY min(position);

-- name: clipped
-- What does a scale clip, in share of the values and in share of their energy (sum of squares)?
-- $layer = 3
-- $site = x_proj:input
-- $scale = 0.03
WITH coded AS (
    SELECT value, count, round_even(value / $scale::REAL, 0) AS code
    FROM counts WHERE layer = $layer AND site = $site AND isfinite(value)
), clamped AS (
    SELECT *, code NOT BETWEEN -128 AND 127 AS clipped, greatest(least(code, 127), -128) * $scale AS decoded FROM coded
)
SELECT sum(count) FILTER (clipped) / sum(count) AS clipped_share,
    sum(count * value ** 2) FILTER (clipped) / sum(count * value ** 2) AS energy_of_clipped,
    sum(count * (value - decoded) ** 2) FILTER (clipped) / sum(count * (value - decoded) ** 2) AS of_squared_error
FROM clamped;

-- name: outlier-energy
-- How much of a site's energy (sum of squares) lies beyond its 99 % quantile?
-- $limit = 5
SELECT layer, site, sum(c.count * magnitude ** 2) FILTER (magnitude > q99) / sum(c.count * magnitude ** 2) AS beyond_q99
FROM absolute_counts AS c JOIN site_stats USING (run, layer, site, group_name)
WHERE group_name = 'all' AND site NOT SIMILAR TO '.*(_act|_conv_in|_conv_out):output'
GROUP BY layer, site
ORDER BY beyond_q99 DESC, layer, site
LIMIT $limit;

-- name: one-scale-for-parts
-- What do x and z, or dt, B and C, lose by sharing one scale?
-- $site = x_proj:output
-- $limit = 6
SELECT layer, group_name, amax, amax / max(amax) OVER site AS own_step_of_shared,
    log2(max(amax) OVER site / nullif(amax, 0)) AS bits_lost
FROM site_stats
WHERE site = $site AND group_name <> 'all'
WINDOW site AS (PARTITION BY layer)
ORDER BY bits_lost DESC NULLS LAST, layer, group_name
LIMIT $limit;

-- name: seed-scale
-- How far is the scale Q(0.99) / 120 from the scale of least squared error, layer by layer?
-- $site = x_proj:input
SELECT s.layer, s.q99 / 120 AS seed_scale, m.scale AS mse_scale, s.q99 / 120 / m.scale AS ratio,
    o.sqnr_db - m.sqnr_db AS db
FROM site_stats AS s
JOIN scales AS m ON (m.layer, m.site, m.group_name, m.label) = (s.layer, s.site, 'all', 'mse')
JOIN scales AS o ON (o.layer, o.site, o.group_name, o.label) = (s.layer, s.site, 'all', 'outlier_aware')
WHERE s.site = $site AND s.group_name = 'all' AND m.granularity = 'tensor' AND o.granularity = 'tensor'
ORDER BY s.layer;

-- name: document-order
-- How does upstream's moving average of 99.95 % quantiles depend on the order of the documents?
-- $site = x_proj:input
-- $sigma = 0.01
WITH orders AS (
    SELECT layer, q9995::DOUBLE AS q, count(*) OVER (PARTITION BY layer) AS n,
        row_number() OVER (PARTITION BY layer ORDER BY document) AS forwards,
        row_number() OVER (PARTITION BY layer ORDER BY document DESC) AS backwards,
        row_number() OVER (PARTITION BY layer ORDER BY sha256) AS shuffled,
        row_number() OVER (PARTITION BY layer ORDER BY q9995) AS rising
    FROM documents WHERE site = $site AND group_name = 'all'
)
SELECT layer, sum(q * if(forwards = 1, 1, $sigma) * (1 - $sigma) ** (n - forwards)) AS forwards,
    sum(q * if(backwards = 1, 1, $sigma) * (1 - $sigma) ** (n - backwards)) AS backwards,
    sum(q * if(shuffled = 1, 1, $sigma) * (1 - $sigma) ** (n - shuffled)) AS shuffled,
    sum(q * if(rising = 1, 1, $sigma) * (1 - $sigma) ** (n - rising)) AS rising
FROM orders GROUP BY layer ORDER BY layer;

-- name: drift
-- Two runs (--run all): at which sites do their quantiles differ most?
-- $limit = 5
SELECT layer, site, min(q9995) AS lower, max(q9995) AS higher, max(q9995) / min(q9995) AS ratio
FROM site_stats
WHERE group_name = 'all' AND site NOT SIMILAR TO '.*(_act|_conv_in|_conv_out):output'
GROUP BY layer, site
HAVING count(*) > 1
ORDER BY ratio DESC NULLS LAST, layer, site
LIMIT $limit;

-- name: safe-for-both
-- Two runs (--run all): one scale that clips in neither, and what one run's own scale clips in the other.
-- $limit = 5
WITH reach AS (
    SELECT layer, site, max(amax) AS larger, arg_min(run, amax) AS short_run, min(amax) AS smaller
    FROM site_stats WHERE group_name = 'all' AND site NOT SIMILAR TO '.*(_act|_conv_in|_conv_out):output'
    GROUP BY layer, site HAVING count(*) > 1
)
SELECT layer, site, larger / 127 AS safe_scale, larger / smaller AS of_the_other_runs,
    sum(count) FILTER (run <> short_run AND magnitude > smaller / 127 * 127.5)
        / sum(count) FILTER (run <> short_run) AS clipped_there
FROM reach JOIN absolute_counts USING (layer, site)
WHERE group_name = 'all'
GROUP BY ALL
ORDER BY of_the_other_runs DESC, layer, site
LIMIT $limit;

-- name: convergence
-- After how many documents has a site's maximum come within a tenth of its last value?
-- $limit = 5
WITH growing AS (
    SELECT layer, site, row_number() OVER w AS documents, max(amax) OVER w AS so_far,
        max(amax) OVER (PARTITION BY layer, site) AS last, count(*) OVER (PARTITION BY layer, site) AS of
    FROM documents
    WHERE group_name = 'all' AND site NOT SIMILAR TO '.*(_act|_conv_in|_conv_out):output'
    WINDOW w AS (PARTITION BY layer, site ORDER BY document)
)
SELECT layer, site, any_value(of) AS documents, min(documents) FILTER (so_far >= 0.9 * last) AS within_a_tenth,
    min(documents) FILTER (so_far = last) AS at_the_maximum
FROM growing
GROUP BY layer, site
ORDER BY within_a_tenth DESC, layer, site
LIMIT $limit;

-- name: zero-points
-- At which sites would a zero point help: values that are hardly ever negative?
-- $limit = 5
SELECT layer, site, min, max, -min / max AS negative_part, (max - min) / (2 * greatest(max, -min)) AS codes_used
FROM site_stats
WHERE group_name = 'all' AND max > 0
ORDER BY codes_used, layer, site
LIMIT $limit;

-- name: zeros
-- Where are activations exactly zero, or rounded to zero by the selected scale?
-- $limit = 5
SELECT layer, site, any_value(zeros) AS zero, sum(c.count) FILTER (magnitude <= scale / 2) / sum(c.count) AS zero_codes
FROM absolute_counts AS c JOIN site_stats USING (run, layer, site, group_name)
JOIN scales AS s USING (run, layer, site, group_name)
WHERE group_name = 'all' AND selected AND consumed AND s.granularity = 'tensor'
GROUP BY layer, site
ORDER BY zero_codes DESC, layer, site
LIMIT $limit;

-- name: costliest-scales
-- Which of the selected scales cost the output most?
-- $limit = 5
SELECT layer, site, group_name, label, scale, sqnr_db, 1000 * predicted_kl AS kl_x1000,
    predicted_kl / sum(predicted_kl) OVER () AS of_all
FROM scales
WHERE selected AND consumed AND NOT decode_only AND predicted_kl IS NOT NULL
ORDER BY predicted_kl DESC, layer, site, group_name
LIMIT $limit;

-- name: best-strategies
-- At how many scales is each strategy the best, and how far is it from the best elsewhere?
SELECT label, count(*) FILTER (sqnr_db >= best) AS best_at, median(best - sqnr_db) AS median_db_behind,
    max(best - sqnr_db) AS most_db_behind
FROM (
    SELECT *, max(sqnr_db) OVER (PARTITION BY layer, site, group_name, granularity) AS best
    FROM scales WHERE consumed AND NOT needs_decode AND isfinite(sqnr_db)
)
GROUP BY label
ORDER BY median_db_behind, most_db_behind, label;

-- name: other-groups
-- A Mamba-2: what would another number of head and channel groups give?
-- $layer = 0
WITH asked AS (
    SELECT 1 AS heads, 1 AS channels, * FROM regrouped(1, 1)
    UNION ALL SELECT 2, 2, * FROM regrouped(2, 2)
    UNION ALL SELECT 4, 4, * FROM regrouped(4, 4)
    UNION ALL SELECT 8, 4, * FROM regrouped(8, 4)
)
SELECT heads, channels, groups, spread, mean_step
FROM asked
WHERE layer = $layer
ORDER BY groups;

-- name: evaluations
-- What did each strategy cost on each text?
SELECT task, data, strategy, count(*) AS documents, 1000 * sum(kl) / sum(tokens) AS kl_x1000
FROM results
WHERE strategy <> 'float'
GROUP BY ALL
ORDER BY task, data, kl_x1000, strategy;
