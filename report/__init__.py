"""Makes one HTML page of a run, its scale table and its evaluation, that needs no network and no other file.

`report.report` gathers the numbers and writes the page. ``quambase.report(...)`` is that function, too.
"""

from quambase.schema.callable_package import make_callable

make_callable(__name__)
