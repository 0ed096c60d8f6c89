-- The named queries of the product, `StatsDB.query(name, parameters)`.
--
-- A query begins with a line `-- name: NAME`; what it answers is said in the comment under it. `$word` is a parameter.

-- name: sites_by_outliers
-- The summary of each site and group, largest outlier ratio (amax / q9995) first.
SELECT layer, site, group_name, count, amax, q99, q9995, outlier_ratio, mean, std, kurtosis, beyond_5_sigma, zeros,
    nonfinite
FROM site_stats
WHERE ($site IS NULL OR site = $site) AND ($layer IS NULL OR layer = $layer)
ORDER BY outlier_ratio DESC NULLS LAST, layer, site, group_name, run
LIMIT $limit;

-- name: reach_of_sites
-- What the yardstick compares: amax and q9995 of each site and group of a run.
SELECT layer, site, group_name, amax, q9995
FROM site_stats
WHERE run = $run
ORDER BY ALL;

-- name: nonfinite_values
-- Where a run has NaN or infinite values, and how many of them were finite before they were rounded to 16 bits.
SELECT layer, site, max(nonfinite) AS nonfinite, max(overflow) AS overflow
FROM site_stats
WHERE run = $run AND (nonfinite > 0 OR overflow > 0)
GROUP BY ALL
ORDER BY layer, site;

-- name: channel_amax
-- The largest absolute value of each channel of a site (of a state: of each state index), by layer and group.
SELECT layer, group_name, list(greatest(abs(min), abs(max)) ORDER BY channel) AS amax
FROM channels
WHERE run = $run AND site = $site
GROUP BY ALL;

-- name: amax_of_every_channel
-- The largest absolute value of each channel of a site, layer by layer.
SELECT greatest(abs(min), abs(max))::DOUBLE AS amax
FROM channels
WHERE site = $site
ORDER BY layer, channel;

-- name: channels_of_group
-- How many channels a group of a site has; the whole site for `all`.
SELECT sum(len(channels)) AS n
FROM groups
WHERE layer = $layer AND site = $site AND ($group = 'all' OR group_name = $group);

-- name: channels_by_reach
-- Every channel of a site (of every site where none is named), the largest absolute value first.
SELECT layer, site, channel, group_name, amax, mean, ratio
FROM channel_stats
WHERE run = $run AND ($site IS NULL OR (layer = $layer AND site = $site))
ORDER BY layer, site, amax DESC, group_name, channel;

-- name: largest_tokens
-- The largest values of a site (of every site where none is named) and the tokens that made them, the largest first.
SELECT *
FROM outliers
WHERE run = $run AND ($site IS NULL OR (layer = $layer AND site = $site))
QUALIFY $limit IS NULL
    OR row_number() OVER (PARTITION BY layer, site ORDER BY abs(value) DESC, document, position, channel, group_name) <= $limit
ORDER BY layer, site, abs(value) DESC, document, position, channel, group_name;

-- name: positions_of_group
-- How far a group of a site reaches after how many tokens; the whole site for `all`.
SELECT tokens_from, tokens_to, count, amax, q9999, q999, q99, q50, std
FROM position_stats
WHERE run = $run AND layer = $layer AND site = $site AND group_name = $group
ORDER BY tokens_from;

-- name: positions_of_every_site
-- The same of each site as a whole.
SELECT layer, site, tokens_from, tokens_to, count, amax, q9999, q999, q99, q50, std
FROM position_stats
WHERE run = $run AND group_name = 'all'
ORDER BY layer, site, tokens_from;

-- name: scales_of_run
-- The scale table's rows of a run.
SELECT * FROM scales WHERE run = $run;

-- name: scales_of_group
-- The scale table's rows of one scale group.
SELECT * FROM scales WHERE run = $run AND layer = $layer AND site = $site AND group_name = $group;

-- name: whole_sites
-- The summary of each site as a whole.
SELECT layer, site, amax, outlier_ratio, mean, std
FROM site_stats
WHERE run = $run AND group_name = 'all'
ORDER BY layer, site;

-- name: sites
-- The sites of the opened runs.
SELECT DISTINCT site FROM site_stats;

-- name: layers
-- The layers of the opened runs.
SELECT DISTINCT layer FROM site_stats;

-- name: schema
-- Every view and table macro and its columns; a view's own row comes first.
WITH listed AS (
    SELECT view_name AS view, 0 AS place, '' AS "column", 'view' AS type, comment
    FROM duckdb_views() WHERE NOT internal AND comment IS NOT NULL
    UNION ALL
    SELECT table_name, column_index, column_name, data_type, comment
    FROM duckdb_columns() WHERE NOT internal AND comment IS NOT NULL
    UNION ALL
    SELECT function_name || '(' || array_to_string(parameters, ', ') || ')', 0, '', 'macro', comment
    FROM duckdb_functions() WHERE NOT internal AND comment IS NOT NULL
)
SELECT view, "column", type, comment FROM listed ORDER BY view LIKE '%)', view, place;
