-- Views over the tables of a run folder, and of what was computed from them.
--
-- StatsDB registers the Parquet files as relations _counts, _site_stats, ... (rows of the runs it opened), then runs
-- this file. Every view and every column has a COMMENT; `quambase sql --schema` prints them.
-- `group` is an SQL keyword: the column is `group_name`.

CREATE VIEW runs AS
SELECT * FROM _runs;
COMMENT ON VIEW runs IS 'One collection each: what was run on what.';
COMMENT ON COLUMN runs.run IS 'Run id: a hash of everything that determines the tables.';
COMMENT ON COLUMN runs.model IS 'Name of the model.';
COMMENT ON COLUMN runs.family IS 'mamba1, mamba2, or tensor for an imported file.';
COMMENT ON COLUMN runs.model_path IS 'Where the checkpoint was read from.';
COMMENT ON COLUMN runs.n_layer IS 'Layers of the model.';
COMMENT ON COLUMN runs.d_model IS 'Width of the model.';
COMMENT ON COLUMN runs.headdim IS 'Channels of a head (Mamba-2), else null.';
COMMENT ON COLUMN runs.ngroups IS 'SSD groups (Mamba-2), else null.';
COMMENT ON COLUMN runs.grouping IS 'How heads and channels were sorted into groups: fixed, quamba2; null where they were not.';
COMMENT ON COLUMN runs.data IS 'Name of the text.';
COMMENT ON COLUMN runs.documents IS 'Documents in the calibration set.';
COMMENT ON COLUMN runs.empty IS 'Documents without a token.';
COMMENT ON COLUMN runs.truncated IS 'Documents cut at the sequence length.';
COMMENT ON COLUMN runs.tokens IS 'Tokens counted.';
COMMENT ON COLUMN runs.format_version IS 'Version of the database layout.';
COMMENT ON COLUMN runs.identity IS 'Everything that determines the tables, as JSON.';
COMMENT ON COLUMN runs.created IS 'Versions, host and timings, as JSON.';

CREATE VIEW counts AS
SELECT * FROM _counts;
COMMENT ON VIEW counts IS 'How often each distinct 16-bit value occurred: the whole distribution, exactly. Groups only: a divided site is the sum of its groups.';
COMMENT ON COLUMN counts.run IS 'Run id.';
COMMENT ON COLUMN counts.layer IS 'Layer number from 0; -1 is the language-model head.';
COMMENT ON COLUMN counts.site IS 'Observed point, by upstream Quamba''s key, such as in_proj:input.';
COMMENT ON COLUMN counts.group_name IS 'Channel slice of the site (x, z; dt, B, C), or all for the whole of it.';
COMMENT ON COLUMN counts.value IS 'Activation, rounded to the 16-bit type of the run; -0 is 0, NaN comes last.';
COMMENT ON COLUMN counts.count IS 'How many times it occurred.';

-- An undefined ratio is null here: as NaN it would come first in `ORDER BY outlier_ratio DESC`.
CREATE VIEW site_stats AS
SELECT * REPLACE (
    if(isnan(kurtosis), NULL, kurtosis) AS kurtosis,
    if(isnan(outlier_ratio), NULL, outlier_ratio) AS outlier_ratio,
    if(isnan(outlier_ratio_q99), NULL, outlier_ratio_q99) AS outlier_ratio_q99
) FROM _site_stats;
COMMENT ON VIEW site_stats IS 'Summary of each site and of each group of a divided site; everything but overflow follows from counts.';
COMMENT ON COLUMN site_stats.run IS 'Run id.';
COMMENT ON COLUMN site_stats.layer IS 'Layer number from 0; -1 is the language-model head.';
COMMENT ON COLUMN site_stats.site IS 'Observed point, by upstream Quamba''s key, such as in_proj:input.';
COMMENT ON COLUMN site_stats.group_name IS 'Channel slice of the site (x, z; dt, B, C), or all for the whole of it.';
COMMENT ON COLUMN site_stats.count IS 'Finite values.';
COMMENT ON COLUMN site_stats.amax IS 'Largest absolute value.';
COMMENT ON COLUMN site_stats.min IS 'Smallest value.';
COMMENT ON COLUMN site_stats.max IS 'Largest value.';
COMMENT ON COLUMN site_stats.mean IS 'Mean.';
COMMENT ON COLUMN site_stats.std IS 'Population standard deviation.';
COMMENT ON COLUMN site_stats.kurtosis IS 'Pearson kurtosis m4/m2^2; 3 for a Gaussian; null without spread.';
COMMENT ON COLUMN site_stats.q50 IS '50 % quantile of the absolute value: rank p(n-1), linear interpolation.';
COMMENT ON COLUMN site_stats.q90 IS '90 % quantile of the absolute value: rank p(n-1), linear interpolation.';
COMMENT ON COLUMN site_stats.q95 IS '95 % quantile of the absolute value: rank p(n-1), linear interpolation.';
COMMENT ON COLUMN site_stats.q99 IS '99 % quantile of the absolute value: rank p(n-1), linear interpolation.';
COMMENT ON COLUMN site_stats.q995 IS '99.5 % quantile of the absolute value: rank p(n-1), linear interpolation.';
COMMENT ON COLUMN site_stats.q999 IS '99.9 % quantile of the absolute value: rank p(n-1), linear interpolation.';
COMMENT ON COLUMN site_stats.q9995 IS '99.95 % quantile of the absolute value: rank p(n-1), linear interpolation.';
COMMENT ON COLUMN site_stats.q9999 IS '99.99 % quantile of the absolute value: rank p(n-1), linear interpolation.';
COMMENT ON COLUMN site_stats.q99995 IS '99.995 % quantile of the absolute value: rank p(n-1), linear interpolation.';
COMMENT ON COLUMN site_stats.q99999 IS '99.999 % quantile of the absolute value: rank p(n-1), linear interpolation.';
COMMENT ON COLUMN site_stats.outlier_ratio IS 'amax / q9995; null where q9995 is 0.';
COMMENT ON COLUMN site_stats.outlier_ratio_q99 IS 'amax / q99; null where q99 is 0.';
COMMENT ON COLUMN site_stats.beyond_3_sigma IS 'Share of values with |x - mean| > 3 std.';
COMMENT ON COLUMN site_stats.beyond_5_sigma IS 'Share of values with |x - mean| > 5 std.';
COMMENT ON COLUMN site_stats.zeros IS 'Share of zeros.';
COMMENT ON COLUMN site_stats.nonfinite IS 'NaN and infinite values; in no other column.';
COMMENT ON COLUMN site_stats.overflow IS 'Finite float32 values that became infinite in 16 bits (part of nonfinite).';

CREATE VIEW channels AS
SELECT * FROM _channels;
COMMENT ON VIEW channels IS 'Per channel (at the ssm_state sites per state index, of each group), of the unrounded float32 values.';
COMMENT ON COLUMN channels.run IS 'Run id.';
COMMENT ON COLUMN channels.layer IS 'Layer number from 0; -1 is the language-model head.';
COMMENT ON COLUMN channels.site IS 'Observed point, by upstream Quamba''s key, such as in_proj:input.';
COMMENT ON COLUMN channels.group_name IS 'Channel slice of the site (x, z; dt, B, C), or all for the whole of it.';
COMMENT ON COLUMN channels.channel IS 'Channel index within the site.';
COMMENT ON COLUMN channels.count IS 'Finite values.';
COMMENT ON COLUMN channels.min IS 'Smallest value.';
COMMENT ON COLUMN channels.max IS 'Largest value.';
COMMENT ON COLUMN channels.sum IS 'Sum.';
COMMENT ON COLUMN channels.sum_sq IS 'Sum of squares.';
COMMENT ON COLUMN channels.mean_abs_max IS 'Largest, over documents, of the document''s mean absolute value: upstream''s reorder statistic.';
COMMENT ON COLUMN channels.nonfinite IS 'NaN and infinite values.';
COMMENT ON COLUMN channels.overflow IS 'Finite values that become infinite in 16 bits.';

CREATE VIEW documents AS
SELECT * FROM _documents;
COMMENT ON VIEW documents IS 'Per document that has a token: what replays order-dependent observers.';
COMMENT ON COLUMN documents.run IS 'Run id.';
COMMENT ON COLUMN documents.layer IS 'Layer number from 0; -1 is the language-model head.';
COMMENT ON COLUMN documents.site IS 'Observed point, by upstream Quamba''s key, such as in_proj:input.';
COMMENT ON COLUMN documents.group_name IS 'Channel slice of the site (x, z; dt, B, C), or all for the whole of it.';
COMMENT ON COLUMN documents.document IS 'Place of the document in the file, from 0, empty ones counted.';
COMMENT ON COLUMN documents.tokens IS 'Tokens of the document.';
COMMENT ON COLUMN documents.sha256 IS 'SHA-256 of its text.';
COMMENT ON COLUMN documents.amax IS 'Largest absolute value.';
COMMENT ON COLUMN documents.q99 IS '99 % quantile of the absolute value within the document, by torch.quantile in float32.';
COMMENT ON COLUMN documents.q995 IS '99.5 % quantile of the absolute value within the document, by torch.quantile in float32.';
COMMENT ON COLUMN documents.q999 IS '99.9 % quantile of the absolute value within the document, by torch.quantile in float32.';
COMMENT ON COLUMN documents.q9995 IS '99.95 % quantile of the absolute value within the document, by torch.quantile in float32.';
COMMENT ON COLUMN documents.q9999 IS '99.99 % quantile of the absolute value within the document, by torch.quantile in float32.';
COMMENT ON COLUMN documents.q99995 IS '99.995 % quantile of the absolute value within the document, by torch.quantile in float32.';
COMMENT ON COLUMN documents.q99999 IS '99.999 % quantile of the absolute value within the document, by torch.quantile in float32.';

CREATE VIEW outliers AS
SELECT * FROM _outliers;
COMMENT ON VIEW outliers IS 'The largest values of each group and the token that made them.';
COMMENT ON COLUMN outliers.run IS 'Run id.';
COMMENT ON COLUMN outliers.layer IS 'Layer number from 0; -1 is the language-model head.';
COMMENT ON COLUMN outliers.site IS 'Observed point, by upstream Quamba''s key, such as in_proj:input.';
COMMENT ON COLUMN outliers.group_name IS 'Channel slice of the site (x, z; dt, B, C), or all for the whole of it.';
COMMENT ON COLUMN outliers.document IS 'Document number.';
COMMENT ON COLUMN outliers.position IS 'Position of the token in the document, from 0.';
COMMENT ON COLUMN outliers.token_id IS 'Token id.';
COMMENT ON COLUMN outliers.token IS 'Token text.';
COMMENT ON COLUMN outliers.channel IS 'Channel index within the site.';
COMMENT ON COLUMN outliers.value IS 'The activation, float32.';

CREATE VIEW activations AS
SELECT * FROM _activations;
COMMENT ON VIEW activations IS 'Raw activations of sampled tokens.';
COMMENT ON COLUMN activations.run IS 'Run id.';
COMMENT ON COLUMN activations.layer IS 'Layer number from 0; -1 is the language-model head.';
COMMENT ON COLUMN activations.site IS 'Observed point, by upstream Quamba''s key, such as in_proj:input.';
COMMENT ON COLUMN activations.group_name IS 'Channel slice of the site (x, z; dt, B, C), or all for the whole of it.';
COMMENT ON COLUMN activations.document IS 'Document number.';
COMMENT ON COLUMN activations.position IS 'Position of the token in the document, from 0.';
COMMENT ON COLUMN activations.values IS 'Activations of the group, in channel order, float32.';

CREATE VIEW groups AS
SELECT * FROM _groups;
COMMENT ON VIEW groups IS 'Which channels a group holds.';
COMMENT ON COLUMN groups.run IS 'Run id.';
COMMENT ON COLUMN groups.layer IS 'Layer number from 0; -1 is the language-model head.';
COMMENT ON COLUMN groups.site IS 'Observed point, by upstream Quamba''s key, such as in_proj:input.';
COMMENT ON COLUMN groups.group_name IS 'Channel slice of the site (x, z; dt, B, C), or all for the whole of it.';
COMMENT ON COLUMN groups.channels IS 'Channel indices within the site, as the model that was run has them: a sorted Mamba-2''s are sorted.';
COMMENT ON COLUMN groups.ssd_group IS 'SSD group (Mamba-2), else null.';
COMMENT ON COLUMN groups.head_group IS 'Head group (Mamba-2), else null.';
COMMENT ON COLUMN groups.channel_group IS 'Channel group (Mamba-2), else null.';

CREATE VIEW channel_stats AS
SELECT *, amax / nullif(median(amax) OVER (PARTITION BY run, layer, site), 0) AS ratio
FROM (
    SELECT run, layer, site, group_name, channel, count, min, max,
        greatest(abs(min), abs(max))::DOUBLE AS amax,
        sum / nullif(count, 0) AS mean,
        sqrt(greatest(sum_sq / nullif(count, 0) - (sum / nullif(count, 0)) ** 2, 0)) AS std
    FROM _channels
);
COMMENT ON VIEW channel_stats IS 'Mean, spread and reach of each channel, and how far it stands out from its site.';
COMMENT ON COLUMN channel_stats.run IS 'Run id.';
COMMENT ON COLUMN channel_stats.layer IS 'Layer number from 0; -1 is the language-model head.';
COMMENT ON COLUMN channel_stats.site IS 'Observed point, by upstream Quamba''s key, such as in_proj:input.';
COMMENT ON COLUMN channel_stats.group_name IS 'Channel slice of the site (x, z; dt, B, C), or all for the whole of it.';
COMMENT ON COLUMN channel_stats.channel IS 'Channel index within the site.';
COMMENT ON COLUMN channel_stats.count IS 'Finite values.';
COMMENT ON COLUMN channel_stats.min IS 'Smallest value.';
COMMENT ON COLUMN channel_stats.max IS 'Largest value.';
COMMENT ON COLUMN channel_stats.amax IS 'Largest absolute value.';
COMMENT ON COLUMN channel_stats.mean IS 'Mean.';
COMMENT ON COLUMN channel_stats.std IS 'Population standard deviation, from sum and sum_sq.';
COMMENT ON COLUMN channel_stats.ratio IS 'amax / median amax of the channels of this layer and site.';

CREATE VIEW outlier_channels AS
SELECT * FROM channel_stats WHERE ratio >= 5;
COMMENT ON VIEW outlier_channels IS 'Channels whose largest absolute value is at least 5 times the median channel of their layer and site.';
COMMENT ON COLUMN outlier_channels.run IS 'Run id.';
COMMENT ON COLUMN outlier_channels.layer IS 'Layer number from 0; -1 is the language-model head.';
COMMENT ON COLUMN outlier_channels.site IS 'Observed point, by upstream Quamba''s key, such as in_proj:input.';
COMMENT ON COLUMN outlier_channels.group_name IS 'Channel slice of the site (x, z; dt, B, C), or all for the whole of it.';
COMMENT ON COLUMN outlier_channels.channel IS 'Channel index within the site.';
COMMENT ON COLUMN outlier_channels.count IS 'Finite values.';
COMMENT ON COLUMN outlier_channels.min IS 'Smallest value.';
COMMENT ON COLUMN outlier_channels.max IS 'Largest value.';
COMMENT ON COLUMN outlier_channels.amax IS 'Largest absolute value.';
COMMENT ON COLUMN outlier_channels.mean IS 'Mean.';
COMMENT ON COLUMN outlier_channels.std IS 'Population standard deviation.';
COMMENT ON COLUMN outlier_channels.ratio IS 'amax / median amax of the channels of this layer and site; at least 5.';

CREATE VIEW group_spread AS
SELECT part.run, part.layer, part.site, count(*) AS groups, min(part.amax) AS least_amax, max(part.amax) AS largest_amax,
    max(part.amax) / nullif(min(part.amax), 0) AS spread,
    sum(part.amax * part.count::DOUBLE) / nullif(sum(part.count), 0) / nullif(any_value(whole.amax), 0) AS mean_step
FROM _site_stats AS part JOIN _site_stats AS whole USING (run, layer, site)
WHERE part.group_name <> 'all' AND whole.group_name = 'all' GROUP BY ALL;
COMMENT ON VIEW group_spread IS 'How unequal the groups of a divided site are.';
COMMENT ON COLUMN group_spread.run IS 'Run id.';
COMMENT ON COLUMN group_spread.layer IS 'Layer number from 0; -1 is the language-model head.';
COMMENT ON COLUMN group_spread.site IS 'Observed point, by upstream Quamba''s key, such as x_conv_out:input.';
COMMENT ON COLUMN group_spread.groups IS 'The smallest groups of the site.';
COMMENT ON COLUMN group_spread.least_amax IS 'Largest absolute value of the group in which it is least.';
COMMENT ON COLUMN group_spread.largest_amax IS 'Largest absolute value of the site.';
COMMENT ON COLUMN group_spread.spread IS 'largest_amax / least_amax.';
COMMENT ON COLUMN group_spread.mean_step IS 'Mean over the values of their group''s amax over the site''s: the mean INT8 step of absmax scales by group, relative to one scale.';

CREATE VIEW scales AS
SELECT * FROM _scales;
COMMENT ON VIEW scales IS 'The scale table: one row per scale group and strategy, for the runs opened.';
COMMENT ON COLUMN scales.run IS 'Run id.';
COMMENT ON COLUMN scales.layer IS 'Layer number from 0; -1 is the language-model head.';
COMMENT ON COLUMN scales.site IS 'Observed point, by upstream Quamba''s key, such as in_proj:input.';
COMMENT ON COLUMN scales.group_name IS 'Channel slice of the site (x, z; dt, B, C), or all for the whole of it.';
COMMENT ON COLUMN scales.strategy IS 'Name of the strategy.';
COMMENT ON COLUMN scales.params IS 'Its parameters, as JSON.';
COMMENT ON COLUMN scales.label IS 'Name and parameters, as given on the command line.';
COMMENT ON COLUMN scales.granularity IS 'How finely this group divides its site: tensor, ssd_group, head_group, group.';
COMMENT ON COLUMN scales.count IS 'Finite values that share the scale.';
COMMENT ON COLUMN scales.scale IS 'INT8 scale: code = clamp(round(x / scale), -128, 127).';
COMMENT ON COLUMN scales.component_scales IS 'Scales of the two segments (outlier_piecewise), or of each state index (absmax and quamba at a Mamba-2''s state), else null.';
COMMENT ON COLUMN scales.qmin IS 'Smallest code.';
COMMENT ON COLUMN scales.qmax IS 'Largest code.';
COMMENT ON COLUMN scales.amax IS 'Largest absolute value of the distribution.';
COMMENT ON COLUMN scales.clipped_share IS 'Share of values beyond the codes.';
COMMENT ON COLUMN scales.mse IS 'Mean squared error.';
COMMENT ON COLUMN scales.sqnr_db IS 'Signal to quantization noise, in dB.';
COMMENT ON COLUMN scales.codes_used IS 'Distinct codes that occur.';
COMMENT ON COLUMN scales.codes_above_120 IS 'Distinct codes with |code| > 120 that occur.';
COMMENT ON COLUMN scales.entropy_bits IS 'Shannon entropy of the codes, in bits.';
COMMENT ON COLUMN scales.consumed IS 'The INT8 model reads this scale (of a site it may read by group, the smallest groups of the table).';
COMMENT ON COLUMN scales.decode_only IS 'Only token-by-token decoding reads it.';
COMMENT ON COLUMN scales.needs_decode IS 'Not one multiplication: needs a decoder for its segments.';
COMMENT ON COLUMN scales.clip_safe IS 'The consumer saturates, or nothing clips.';
COMMENT ON COLUMN scales.selected IS 'The least MSE among uniform, clip-safe strategies of its scale group.';

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
COMMENT ON VIEW granularity_gain IS 'What dividing a site buys: the error of all its groups together, beside that of one scale, per strategy.';
COMMENT ON COLUMN granularity_gain.run IS 'Run id.';
COMMENT ON COLUMN granularity_gain.layer IS 'Layer number from 0; -1 is the language-model head.';
COMMENT ON COLUMN granularity_gain.site IS 'Observed point, by upstream Quamba''s key, such as x_conv_out:input.';
COMMENT ON COLUMN granularity_gain.label IS 'Strategy and parameters.';
COMMENT ON COLUMN granularity_gain.granularity IS 'How finely scales divide the site: tensor, ssd_group, head_group, group.';
COMMENT ON COLUMN granularity_gain.groups IS 'Scales of the site at this granularity.';
COMMENT ON COLUMN granularity_gain.mse IS 'Mean squared error over all values of the site.';
COMMENT ON COLUMN granularity_gain.tensor_mse IS 'The same with one scale.';
COMMENT ON COLUMN granularity_gain.gain_db IS '10 log10(tensor_mse / mse): 6.02 is one bit; null where an error is 0.';

CREATE VIEW results AS
SELECT * FROM _results;
COMMENT ON VIEW results IS 'Evaluations: one row per document and strategy; nll and kl are sums over tokens, in nats.';
COMMENT ON COLUMN results.evaluation IS 'Evaluation id.';
COMMENT ON COLUMN results.model IS 'Model evaluated.';
COMMENT ON COLUMN results.scales IS 'Scale table used.';
COMMENT ON COLUMN results.strategy IS 'Strategy label; float is the floating-point model.';
COMMENT ON COLUMN results.task IS 'What was measured.';
COMMENT ON COLUMN results.data IS 'Name of the evaluation text.';
COMMENT ON COLUMN results.document IS 'Document number in the evaluation text.';
COMMENT ON COLUMN results.sha256 IS 'SHA-256 of its text.';
COMMENT ON COLUMN results.tokens IS 'Predicted tokens.';
COMMENT ON COLUMN results.nll IS 'Sum of the negative log-likelihood, nats.';
COMMENT ON COLUMN results.kl IS 'Sum of KL(float || quantized), nats.';
COMMENT ON COLUMN results.top1_agreement IS 'Tokens whose most likely token is the floating-point model''s.';
COMMENT ON COLUMN results.top1_right IS 'Tokens whose most likely token is the one that follows.';
COMMENT ON COLUMN results.correct IS 'Last word right; null for other tasks.';
COMMENT ON COLUMN results.quantize_lm_head IS 'The head was quantized.';
COMMENT ON COLUMN results.quantize_embedding IS 'The embedding was quantized.';
COMMENT ON COLUMN results.compat_upstream IS 'Upstream''s wrap-around was reproduced.';

-- Absolute values and how often each occurred, per group and for the whole of each site; finite values only.
CREATE VIEW absolute_counts AS
WITH finite AS (
    SELECT run, layer, site, group_name, abs(value) AS magnitude, count FROM _counts WHERE isfinite(value)
)
SELECT run, layer, site, group_name, magnitude, sum(count)::BIGINT AS count FROM finite GROUP BY ALL
UNION ALL
SELECT run, layer, site, 'all' AS group_name, magnitude, sum(count)::BIGINT AS count
FROM finite WHERE group_name <> 'all' GROUP BY ALL;
COMMENT ON VIEW absolute_counts IS 'How often each distinct absolute value occurred, per group and for the whole of each site.';
COMMENT ON COLUMN absolute_counts.run IS 'Run id.';
COMMENT ON COLUMN absolute_counts.layer IS 'Layer number from 0; -1 is the language-model head.';
COMMENT ON COLUMN absolute_counts.site IS 'Observed point, by upstream Quamba''s key, such as in_proj:input.';
COMMENT ON COLUMN absolute_counts.group_name IS 'Channel slice of the site (x, z; dt, B, C), or all for the whole of it.';
COMMENT ON COLUMN absolute_counts.magnitude IS 'Absolute value.';
COMMENT ON COLUMN absolute_counts.count IS 'How many times it occurred.';

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
COMMENT ON MACRO TABLE quantile IS 'Exact p quantile of the absolute value of every group, such as quantile(0.9995).';

-- The code is round(x / scale) in float32, ties to even, as the INT8 model computes it.
CREATE MACRO clipping(scale) AS TABLE
WITH coded AS (
    SELECT run, layer, site, group_name, count, round_even(value / scale::REAL, 0) AS code
    FROM _counts WHERE isfinite(value)
), whole AS (
    SELECT * FROM coded
    UNION ALL BY NAME SELECT * REPLACE ('all' AS group_name) FROM coded WHERE group_name <> 'all'
)
SELECT run, layer, site, group_name,
    coalesce(sum(count) FILTER (WHERE code < -128 OR code > 127), 0)::BIGINT AS clipped,
    sum(count)::BIGINT AS count,
    coalesce(sum(count) FILTER (WHERE code < -128 OR code > 127), 0) / sum(count) AS share
FROM whole GROUP BY ALL ORDER BY run, layer, site, group_name;
COMMENT ON MACRO TABLE clipping IS 'How many values of every group an INT8 scale clips, and their share, such as clipping(0.05).';

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
COMMENT ON MACRO TABLE regrouped IS 'The spread of x_conv_out:input (columns as group_spread) in other numbers of groups, such as regrouped(8, 4) in each SSD group: heads ranked by mean channel amax and channels ranked by amax, cut in equal parts. From channels, without collecting again.';
