"""What a report says, read from its HTML: the numbers against the database, hostile names, one file, the same bytes."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fabricate import half, make_run, random_activations
from made_report import HOSTILE, LABELS, TOKENS, Page, make_database

from quambase.analyzer.analyze import analyze
from quambase.analyzer.least_squares import optimal_scale
from quambase.analyzer.scale_groups import scale_groups
from quambase.cli.main import load_command
from quambase.collector.import_tensor import import_tensor
from quambase.report.drawing import DRAWINGS
from quambase.report.report import Report, report
from quambase.schema.errors import OutputRefused, ScalesInvalid, UnknownName
from quambase.schema.scale_table import read_scales
from quambase.schema.sites import FAMILIES
from quambase.schema.sql.database import StatsDB

ROOT = Path(__file__).parent.parent.parent
SITE = (0, "x_proj:output")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_database(tmp_path_factory.mktemp("report") / "db")


@pytest.fixture(scope="module")
def found(database: Path) -> Report:
    return report(database, out=database.parent / "report.html")


@pytest.fixture(scope="module")
def page(found: Report) -> Page:
    return Page(found.path)


def test_one_file_that_fetches_nothing(page: Page) -> None:
    for name, attributes in page.elements:
        for attribute in ("src", "href", "action", "srcset", "poster", "data"):
            assert attribute not in attributes or attributes[attribute].startswith("#"), (name, attributes)
        assert name not in ("link", "iframe", "object", "embed", "base", "img"), name
        assert not [attribute for attribute in attributes if attribute.startswith("on")], (name, attributes)
    style = "".join(text for name, text in page.texts if name == "style")
    assert "url(" not in style and "@import" not in style


def test_only_its_own_scripts_may_run(page: Page) -> None:
    policy = next(a["content"] for n, a in page.elements if n == "meta" and "http-equiv" in a)
    scripts = re.findall(r"<script>(.*?)</script>", page.source, re.S)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(scripts) == 4  # three vendored ones and the page's own
    allowed = re.search(r"script-src ([^;]*);", policy)[1]
    assert allowed == " ".join(f"'sha256-{one}'" for one in hashes)
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy and "http" not in policy


def test_hostile_names_are_text(page: Page) -> None:
    assert [name for name, _ in page.elements if name == "script"] == ["script"] * 6
    assert HOSTILE in next(text for name, text in page.texts if name == "title")
    assert page.words().count(HOSTILE) > 3
    assert HOSTILE not in page.source
    tokens = {(p["layer"], p["site"]): p["tokens"] for p in page.data["pages"]}[0, "x_proj:input"]
    assert [row[1] for row in tokens] == list(TOKENS)
    assert tokens[1][2:4] == ["one two ", f" {HOSTILE}"] and tokens[0][2:4] == [None, None]


def test_its_script_never_reads_data_as_html() -> None:
    text = (ROOT / "report" / "templates" / "page.js").read_text(encoding="utf-8")
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert forbidden not in text, forbidden
    for name in ("page.html",):
        marked = re.findall(r"\{\{[^}]*\|\s*safe[^}]*\}\}", (ROOT / "report" / "templates" / name).read_text())
        assert marked == ["{{ style|safe }}", "{{ script|safe }}"]


def test_it_opens_on_the_answer(page: Page, found: Report) -> None:
    words = page.words().split("Without JavaScript")[1]
    assert words.index("Answer") < words.index("mse loses") < words.index("Where it hurts") < words.index("Provenance")
    assert any("mse loses" in line for line in found.summary)
    assert re.fullmatch(r"quambase apply --scales \S*scales\.parquet --strategy mse --db \S+", found.command)
    assert f"Next: {found.command}" in words


def test_every_site_has_a_page_and_a_link(page: Page, database: Path) -> None:
    with StatsDB(database) as opened:
        sites = opened.sql("select distinct layer, site from site_stats").to_pylist()
    keys = {(row["layer"], row["site"]) for row in sites}
    pages = page.data["pages"]
    assert {(p["layer"], p["site"]) for p in pages} == keys and len(pages) == len(keys)
    links = {a["href"] for name, a in page.elements if name == "a" and str(a.get("href")).startswith("#layer-")}
    assert links == {f"#layer-{layer}/{site}" for layer, site in keys}


def test_every_anchor_leads_somewhere(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for name, attributes in page.elements:
        target = str(attributes.get("href", "#answer"))
        assert target.startswith("#layer-") or target[1:] in ids, (name, attributes)
        for reference in ("aria-labelledby", "for", "list"):
            assert attributes.get(reference, "answer") in ids, (name, attributes)


def test_the_histogram_counts_every_value(page: Page) -> None:
    group = next(p for p in page.data["pages"] if (p["layer"], p["site"]) == SITE)["groups"][0]
    drawn = random_activations(3)[SITE]
    values = np.abs(np.concatenate([half(a).ravel() for arrays in drawn.values() for a in arrays]).astype(np.float64))
    histogram = group["histogram"]
    assert group["total"] == values.size and group["zeros"] == (values == 0).sum()
    # No float16 lies nearer than 1e-4 to a bin's end other than a power of two, which log2 gives exactly.
    twin = np.floor(8 * np.log2(values[values > 0])).astype(int)
    first = twin.min()
    assert histogram["first"] == first and histogram["counts"] == np.bincount(twin - first).tolist()
    assert group["amax"] == pytest.approx(values.max(), rel=5e-4)  # four digits
    assert group["ratio"] == pytest.approx(values.max() / np.quantile(values, 0.9995), rel=5e-4)


def test_the_marks_are_the_scale_table(page: Page, database: Path) -> None:
    rows = read_scales(database / "scales.parquet").table.to_pylist()
    seen = 0
    for p in page.data["pages"]:
        for group in p["groups"]:
            mine = {r["label"]: r for r in rows if (r["layer"], r["site"], r["group_name"]) == _key(p, group)}
            marks = group["marks"]
            assert sorted(marks["label"]) == sorted(mine)
            for i, label in enumerate(marks["label"]):
                row = mine[label]
                for name in ("scale", "mse", "clipped_share", "sqnr_db", "predicted_kl"):
                    stored = row[name]
                    told = None if stored is None or not np.isfinite(stored) else pytest.approx(stored, rel=5e-4)
                    assert marks[name][i] == told, (label, name)
                assert marks["selected"][i] == row["selected"]
                if label == "absmax":
                    assert marks["clips_at"][i] == pytest.approx(row["amax"], rel=1e-3, abs=2e-3)  # 127 of float32
                seen += 1
    assert seen == len(rows) > 100


def _key(page: dict[str, object], group: dict[str, object]) -> tuple[object, ...]:
    return page["layer"], page["site"], group["name"]


def test_the_curve_marks_the_least_error(page: Page, database: Path) -> None:
    with StatsDB(database) as opened:
        groups = {(g.layer, g.site): g for g in scale_groups(opened, "run-a")}
    curves = 0
    for p in page.data["pages"]:
        curve = p["groups"][0]["curve"]
        group = groups[p["layer"], p["site"]]
        assert (curve is None) == (not group.consumed or group.distribution.amax == 0)
        if curve is not None:
            curves += 1
            assert curve["least_mse"] == pytest.approx(optimal_scale(group.distribution), rel=5e-4)
            assert curve["least_mse"] in curve["scale"] and curve["least_kl"] in curve["scale"]
            assert curve["mse"][curve["scale"].index(curve["least_mse"])] == min(curve["mse"])
    assert curves > 10


def test_the_heat_map_says_its_numbers_without_javascript(page: Page, database: Path) -> None:
    rows = read_scales(database / "scales.parquet").table.to_pylist()
    label = next(
        str(a["aria-label"])
        for n, a in page.elements
        if n == "a" and "layer 1 out_proj:input:" in str(a.get("aria-label"))
    )
    (row,) = [r for r in rows if (r["layer"], r["site"], r["selected"]) == (1, "out_proj:input", True)]
    assert label == f"layer 1 out_proj:input: {1000 * row['predicted_kl']:.3g}"


def test_it_says_where_the_numbers_come_from(page: Page, database: Path) -> None:
    words = page.words()
    assert "quambase collect --model fabricated --data random --samples 6 --sensitivity 6" in words
    analyzed = " ".join(f"--strategy {label}" for label in read_scales(database / "scales.parquet").labels())
    assert f"quambase analyze --run run-a {analyzed} --out {database / 'scales.parquet'}" in words
    assert hashlib.sha256(b"run-a").hexdigest() in words and "0123456789abcdef" in words
    assert "elsewhere" not in words  # the host's name stays at home


def test_the_command_says_the_answer_and_what_is_next(database: Path, tmp_path: Path) -> None:
    asked = ["--db", str(database), "--out", str(tmp_path / "r.html")]
    done = CliRunner().invoke(load_command("report"), asked)
    assert done.exit_code == 0, done.output
    assert "mse loses" in done.stdout and max(map(len, done.stdout.splitlines())) <= 100
    assert re.search(r"written: \S+r\.html \(0\.\d+ MB, 22 sites\)", done.stderr)
    assert "next: quambase apply --scales" in done.stderr
    refused = CliRunner().invoke(load_command("report"), [*asked, "--scales", str(tmp_path / "none.parquet")])
    assert refused.exit_code == 1 and refused.stderr.endswith("run `analyze` to make a scale table\n")


def test_the_same_bytes_twice(found: Report, database: Path, tmp_path: Path) -> None:
    again = report(database, out=tmp_path / "again.html")
    assert again.path.read_bytes() == found.path.read_bytes()
    assert again.size == again.path.stat().st_size


def test_without_a_scale_table_it_says_what_is_missing(tmp_path: Path) -> None:
    made = make_database(tmp_path / "db", name="m", scales=False, evaluation=False)
    found = report(made, out=tmp_path / "r.html")
    assert "There is no scale table of this run" in found.summary[0] and "analyze --run run-a" in found.command
    page = Page(found.path)
    assert "Strategies over all sites" not in page.words() and "outlier ratio" in page.words()
    assert page.data["labels"] == [] and all(g["marks"]["label"] == [] for p in page.data["pages"] for g in p["groups"])


def test_without_an_evaluation_it_says_what_is_predicted(tmp_path: Path) -> None:
    made = make_database(tmp_path / "db", name="m", evaluation=False)
    found = report(made, out=tmp_path / "r.html")
    assert found.summary == ["No INT8 model of this run was evaluated: what follows is predicted, not measured."]
    assert "evaluate --scales" in found.command and "predicted loss of the activations" in Page(found.path).words()


def test_what_is_not_of_the_run_is_left_out_or_refused(tmp_path: Path) -> None:
    made = make_database(tmp_path / "db", name="m")
    make_run(made, "run-b", random_activations(4), number=2)
    found = report(made, out=tmp_path / "r.html")
    assert found.run == "run-b" and "There is no scale table of this run" in found.summary[0]
    assert any("no evaluation of run run-b" in line for line in found.notes)
    with pytest.raises(ScalesInvalid, match="has no scales of run run-b, but of run-a; name that run with --run"):
        report(made, scales=made / "scales.parquet", out=tmp_path / "r.html")
    with pytest.raises(UnknownName, match="2 runs were chosen; report looks at one: name it with --run"):
        report(made, run="all", out=tmp_path / "r.html")
    with pytest.raises(UnknownName, match="unknown evaluation 'ffff'"):
        report(made, run="run-a", evaluation="ffff", out=tmp_path / "r.html")
    assert "mse loses" in " ".join(report(made, run="run-a", out=tmp_path / "r.html").summary)


def test_an_imported_tensor_has_a_page(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_t(3, (40, 8)).astype(np.float32))
    import_tensor(tmp_path / "x.npy", "a/b <i>", db=tmp_path / "db", layer=2)
    analyze(tmp_path / "db", out=tmp_path / "db" / "scales.parquet")
    found = report(tmp_path / "db", out=tmp_path / "r.html")
    page = Page(found.path)
    assert "imported tensor" in found.summary[0] and found.command.startswith("quambase compare --run x-")
    assert "quambase import x.npy --site 'a/b <i>' --layer 2" in page.words()
    (link,) = [a["href"] for n, a in page.elements if n == "a" and str(a.get("href")).startswith("#layer-")][:1]
    assert link == "#layer-2/a%2Fb%20%3Ci%3E" and page.data["pages"][0]["site"] == "a/b <i>"


def test_a_file_of_others_is_not_replaced(database: Path, tmp_path: Path) -> None:
    mine = tmp_path / "notes.html"
    mine.write_text("<p>mine</p>")
    with pytest.raises(OutputRefused, match="is no report that quambase wrote"):
        report(database, out=mine)
    assert mine.read_text() == "<p>mine</p>"
    report(database, out=mine, force=True)
    report(database, out=mine)  # now it is one of ours


def test_twenty_four_layers_are_small(tmp_path: Path) -> None:
    """A run of mamba-130m itself is in docs/report.md; here as many sites with a few values each."""
    make_run(tmp_path / "db", activations=random_activations(1, n_layer=24), sensitive=True)
    analyze(tmp_path / "db", strategies=LABELS, out=tmp_path / "db" / "scales.parquet")
    found = report(tmp_path / "db", out=tmp_path / "r.html")
    assert found.sites == 242 and found.size < 2_500_000


@pytest.mark.parametrize("family", FAMILIES)
def test_a_drawing_has_every_site_once(family: str) -> None:
    drawing = DRAWINGS[family]
    assert sorted(tap.site for tap in drawing.taps) == sorted(
        site.name for site in FAMILIES[family] if not site.sampled
    )
    assert len({(tap.x, tap.y) for tap in drawing.taps}) == len(drawing.taps)
    for x, y in [*((t.x, t.y) for t in drawing.taps), *((b.x, b.y) for b in drawing.boxes)]:
        assert 0 < x < drawing.width and 0 < y < drawing.height


@pytest.mark.parametrize("folder", ["report/vendored", "tests/report/vendored"])
def test_vendored_scripts_are_those_stated(folder: str) -> None:
    lines = (ROOT / folder / "README.md").read_text(encoding="utf-8").splitlines()
    stated = {c[1].strip(): c[5].strip() for line in lines if len(c := line.split("|")) > 6 and ".min.js" in c[1]}
    assert sorted(stated) == sorted(path.name for path in (ROOT / folder).glob("*.js"))
    for name, sha256 in stated.items():
        assert hashlib.sha256((ROOT / folder / name).read_bytes()).hexdigest() == sha256, name
        assert (ROOT / folder / name.replace(".min.js", ".LICENSE")).exists()


def test_it_works_without_torch_and_loads_jinja_only_when_it_runs(database: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "for name in ('torch', 'tokenizers', 'safetensors'): sys.modules[name] = None\n"
        "import quambase, quambase.cli.results\n"
        "assert 'jinja2' not in sys.modules\n"
        f"found = quambase.report({str(database)!r}, out={str(tmp_path / 'r.html')!r})\n"
        "assert found.sites == 22 and 'jinja2' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
