"""What quambase stores and what it is called. The first folder to read.

site
    A named point of the model, by upstream Quamba's own key: ``in_proj:input``,
    ``ssm_state_act:input``. Layer -1 is the language-model head.
group
    The smallest slice of a site's channels that has its own statistics: ``x`` and
    ``z`` of ``in_proj:output``; ``dt``, ``B``, ``C`` of ``x_proj:output``. A site
    that is not divided has one group, ``all``. Where a table also holds the whole
    of a divided site, that row is called ``all`` too. In a Mamba-2 whose heads and
    channels are sorted, x and the state have groups of an SSD group, a head group and
    a channel group: ``g0h1c2``; channels are numbered as the sorted model has them.
scale group
    The groups that share one INT8 scale; its distribution is the sum of theirs.
document
    One calibration text, numbered by its place in the file (empty ones included).
block
    A fixed run of consecutive documents: the unit of forward pass, files, resume
    and merge.
run
    One collection: a folder ``runs/<run id>/``.
distribution
    Sorted distinct 16-bit values and how often each occurred: nothing is lost.
scale
    INT8: ``code = clamp(round(x / scale), -128, 127)``.

Tensor letters used in every docstring: ``t`` packed tokens of a batch, ``d``
d_model, ``e`` d_inner, ``n`` d_state, ``r`` dt_rank, ``v`` vocabulary, ``k`` conv
width.
"""

FORMAT_VERSION = 2
"""Version of scale tables, evaluations and INT8 model folders; readers refuse newer ones."""

CHECKED_SINCE = 2
"""The first of these versions of which every file carries its own checksum."""

RUN_FORMAT_VERSION = 2
"""Version of run folders and shards. In version 1 every table was a single file; readers read both."""
