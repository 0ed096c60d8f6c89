"""The report in a real browser: opened from a file, clicked through, by keyboard, dark, printed; axe-core."""

from __future__ import annotations

import base64
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_report import HOSTILE, TOKENS, make_database

from quambase.collector.import_tensor import import_tensor
from quambase.report.report import report

selenium = pytest.importorskip("selenium", reason="no selenium (extra test), so the report is not opened in a browser")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,900"
).split()
AXE = Path(__file__).parent / "vendored" / "axe.min.js"
TAIL = "#layer-0/x_proj:input"

pytestmark = pytest.mark.skipif(
    not BROWSER or not DRIVER, reason="no Chromium with its driver, so the report is not opened in a browser"
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("browser")
    database = make_database(folder / "db", along=True)
    return report(database, out=folder / "report.html", converge=True).path.as_uri()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.binary_location = str(BROWSER)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def browser(chromium: webdriver.Chrome) -> Iterator[webdriver.Chrome]:
    """Afterwards nothing may stand in its console: no error, no warning, no request that was refused."""
    chromium.get_log("browser")
    yield chromium
    assert [entry["message"] for entry in chromium.get_log("browser")] == []


def opened(browser: webdriver.Chrome, address: str, hash_: str = "#") -> None:
    """Open the page anew at ``hash_`` and wait until everything there is drawn."""
    browser.get("about:blank")
    browser.get(address + (hash_ if hash_ != "#" else ""))
    drawn(browser, hash_)


def drawn(browser: webdriver.Chrome, hash_: str) -> None:
    until(lambda: browser.execute_script("return document.documentElement.dataset.ready") == hash_, f"{hash_} drawn")


def until(true: Any, what: str) -> None:
    """Wait for ten seconds at most."""
    for _ in range(200):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError(f"not within 10 s: {what}")


def find(browser: webdriver.Chrome, selector: str) -> Any:
    return browser.find_element(By.CSS_SELECTOR, selector)


def click(browser: webdriver.Chrome, selector: str) -> None:
    """A click in the middle of the window, where nothing lies over it."""
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", find(browser, selector))
    find(browser, selector).click()


def texts(browser: webdriver.Chrome, selector: str) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent.trim())", selector
    )


def serious(browser: webdriver.Chrome) -> list[str]:
    """What axe-core finds serious or critical on what is seen now."""
    browser.execute_script(AXE.read_text(encoding="utf-8"))
    found = browser.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        "axe.run(document, {resultTypes: ['violations']}).then((r) => done(r.violations), (e) => done(String(e)))"
    )
    assert isinstance(found, list), found
    return [
        f"{one['id']}: {node['html'][:160]}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


def test_the_overview_opens_with_its_pictures(browser: webdriver.Chrome, address: str) -> None:
    opened(browser, address)
    assert "mse loses" in find(browser, "#answer").text and browser.title.startswith(HOSTILE)
    assert find(browser, "#overview").is_displayed() and not find(browser, "#site").is_displayed()
    pictures = browser.find_elements(By.CSS_SELECTOR, "#overview .picture svg.marks")
    assert len(pictures) == 5  # strategies, one text, decoding, positions, convergence
    for picture in pictures:
        assert picture.size["width"] > 300 and picture.size["height"] > 50
    assert serious(browser) == []


def test_every_deep_link_opens_its_site(browser: webdriver.Chrome, address: str) -> None:
    opened(browser, address)
    links = browser.execute_script(
        "return [...document.querySelectorAll('#heat a')].map((a) => a.getAttribute('href'))"
    )
    assert len(links) == 22
    for link in links:
        browser.execute_script("location.hash = arguments[0]", link)
        drawn(browser, link)
        layer, site = link.removeprefix("#layer-").split("/")
        name = "Head" if layer == "-1" else f"Layer {layer}"
        assert find(browser, "#site-title").text == f"{name}: {site}" and browser.title.startswith(f"{name}: {site}")
        here = texts(browser, "#site-drawing a.here .site")
        assert here == [site]
    opened(browser, address, TAIL)  # not by a click, but as somebody else's link
    assert find(browser, "#site-title").text == "Layer 0: x_proj:input"
    assert not find(browser, "#overview").is_displayed()
    assert serious(browser) == []


def test_a_number_of_the_heat_map_leads_to_its_site(browser: webdriver.Chrome, address: str) -> None:
    opened(browser, address)
    click(browser, "#heat a[href='#layer-1/out_proj:input']")
    drawn(browser, "#layer-1/out_proj:input")
    assert find(browser, "#site-title").text == "Layer 1: out_proj:input"
    browser.back()
    drawn(browser, "#")
    assert find(browser, "#overview").is_displayed()
    click(browser, "#answer .block a[data-site='in_proj:input'] circle")
    until(lambda: find(browser, "#site-title").text.endswith("in_proj:input"), "the drawing leads to a site")


def test_the_switch_changes_numbers_and_shades(browser: webdriver.Chrome, address: str) -> None:
    opened(browser, address)

    def shown() -> tuple[list[str], list[str]]:
        shades = "return [...document.querySelectorAll('#heat td')].map((td) => getComputedStyle(td).backgroundColor)"
        return texts(browser, "#heat td"), browser.execute_script(shades)

    effect = shown()
    click(browser, "#switch input[value='outlier_ratio']")
    ratio = shown()
    assert ratio[0] != effect[0] and ratio[1] != effect[1]
    assert "Outlier ratio: the largest" in find(browser, "#measure-meaning").text
    assert not find(browser, "#of-strategy").is_enabled()
    click(browser, "#switch input[value='sqnr_db']")
    best = shown()
    click(browser, "#of-strategy option[value='absmax']")
    absmax = shown()
    assert absmax[0] != best[0] and "SQNR of absmax" in find(browser, "#measure-meaning").text
    click(browser, "#switch input[value='clipped_share']")
    numbers = [text for text in shown()[0] if text]
    assert "0 %" in numbers and set(numbers) <= {"0 %", "–"}  # absmax clips nothing


def test_a_strategy_is_chosen_in_the_table_and_in_the_picture(browser: webdriver.Chrome, address: str) -> None:
    opened(browser, address, TAIL)
    chosen = "return document.querySelector('#site-marks tr.chosen input').value"
    first = browser.execute_script(chosen)
    click(browser, "#site-marks input[value='quamba']")
    assert browser.execute_script(chosen) == "quamba" != first
    orange = "return [...document.querySelectorAll('#site .picture')].map((f) => f.innerHTML.includes('#d55e00'))"
    until(lambda: browser.execute_script(orange)[0], "the chosen strategy is drawn in another colour")
    assert "quamba" in find(browser, "#site .picture svg.marks").get_attribute("textContent")
    rules = browser.find_elements(By.CSS_SELECTOR, "#site .picture svg.marks .mark-rule line[stroke='#888888']")
    assert len(rules) >= 5
    browser.execute_script(
        "arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true, view: window}))", rules[0]
    )
    until(lambda: browser.execute_script(chosen) != "quamba", "a click on a clipping point chooses its strategy")


def test_the_least_error_is_marked_on_both_curves(browser: webdriver.Chrome, address: str) -> None:
    opened(browser, address, TAIL)
    for curve in ("#curve-mse", "#curve-kl"):
        assert len(browser.find_elements(By.CSS_SELECTOR, f"{curve} svg.marks path[fill='#0072b2']")) == 1
        assert "The least, at scale" in find(browser, f"{curve} figcaption").text


def test_positions_and_decoding_are_drawn(browser: webdriver.Chrome, address: str) -> None:
    opened(browser, address)
    lines = "{} svg.marks .mark-line path"
    # Decoding: two strategies and one with a format of the state; each strategy's prefill.
    assert len(browser.find_elements(By.CSS_SELECTOR, lines.format("#decoding"))) == 3 + 2
    assert len(browser.find_elements(By.CSS_SELECTOR, "#decoding svg.marks .mark-area path")) == 3
    reach = browser.find_elements(By.CSS_SELECTOR, lines.format("#positions"))
    assert len(reach) == 5, "a line for each quantile"
    click(browser, "#positions tbody a")
    until(lambda: find(browser, "#site").is_displayed(), "the first row leads to its site")
    opened(browser, address, TAIL)
    assert len(browser.find_elements(By.CSS_SELECTOR, lines.format("#site-by-position"))) == 5
    clips = browser.find_elements(By.CSS_SELECTOR, "#site-by-position svg.marks .mark-rule line[stroke='#d55e00']")
    assert len(clips) == 2, "the selected scale and upstream's"
    assert texts(browser, "#site-positions tbody th")[:2] == ["1 to 8", "9 to 16"]
    assert "layer 0 x_proj:input: 99.99 % of |x| within" in find(browser, "#by-position-words").text


def test_tables_sort_and_filter(browser: webdriver.Chrome, address: str) -> None:
    opened(browser, address)
    column = "#scale-table tbody td:nth-child(5)"
    header = "#scale-table thead th:nth-child(5) button"
    click(browser, header)
    numbers = [float(text) for text in texts(browser, column)]
    assert numbers == sorted(numbers) and numbers[0] < numbers[-1]
    assert find(browser, "#scale-table thead th:nth-child(5)").get_attribute("aria-sort") == "ascending"
    click(browser, header)
    assert [float(text) for text in texts(browser, column)] == sorted(numbers, reverse=True)
    click(browser, "#scales-of option[value='every strategy']")
    every = len(texts(browser, column))
    find(browser, "#scales-filter").send_keys("1 OUT_PROJ:INPUT quamba")
    rows = texts(browser, "#scale-table tbody tr")
    assert len(rows) == 1 < every and "out_proj:input" in rows[0] and "quamba" in rows[0]
    assert find(browser, "#scales-count").text == "1 scales"
    strategies = "#strategies table tbody th"
    names = texts(browser, strategies)
    click(browser, "#strategies table thead button")
    assert texts(browser, strategies) == sorted(names, key=str.lower)
    find(browser, "#strategies form.filter input").send_keys("MSE")
    left = texts(browser, "#strategies table tbody tr:not([hidden]) th")
    assert left == [name for name in sorted(names, key=str.lower) if "mse" in name.lower()] != []


def test_the_tables_of_a_site_filter_and_forget_it_at_the_next(browser: webdriver.Chrome, address: str) -> None:
    opened(browser, address, TAIL)
    left = "#site-marks tbody tr:not([hidden]) th"
    every = texts(browser, left)
    fields = browser.find_elements(By.CSS_SELECTOR, "#site form.filter input")
    assert len(fields) == 4, "strategies, positions, channels, tokens"
    fields[0].send_keys("absmax")
    assert texts(browser, left) == ["absmax"] and len(every) > 1
    elsewhere = TAIL.replace("layer-0", "layer-1")
    browser.execute_script("location.hash = arguments[0]", elsewhere)
    drawn(browser, elsewhere)
    assert len(texts(browser, left)) > 1 and fields[0].get_attribute("value") == ""


def test_tokens_of_others_are_text(browser: webdriver.Chrome, address: str) -> None:
    opened(browser, address, TAIL)
    assert browser.find_elements(By.CSS_SELECTOR, "img") == []
    shown = texts(browser, "#site-tokens .token")
    assert shown[0] == HOSTILE and len(shown) == len(TOKENS)
    turning = "\\u202egnp.exe\\u2066"  # what would turn the line is written out
    assert shown[1] == f"one two {turning} {HOSTILE}" and shown[2] == "⏎"
    assert texts(browser, "#site-tokens mark")[1] == turning
    assert "broken" not in browser.title.split(" · ")[0]


def test_an_imported_tensor_has_a_page(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """It has no tokens, no drawing and a name of its own."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_t(3, (40, 8)).astype(np.float32))
    import_tensor(tmp_path / "x.npy", "a/b <i>", db=tmp_path / "db")
    address = report(tmp_path / "db", out=tmp_path / "r.html").path.as_uri()
    opened(browser, address)
    assert browser.find_elements(By.CSS_SELECTOR, "#positions, #decoding, #site-by-position") == []
    click(browser, "#heat a")
    drawn(browser, "#layer-0/a%2Fb%20%3Ci%3E")
    assert find(browser, "#site-title").text == "Layer 0: a/b <i>"
    assert texts(browser, "#site-tokens .token")[:1] == ["–"]
    compare, sql = texts(browser, "#site-commands")[0].split("\n")  # safe to paste, whatever the site is called
    assert shlex.split(compare) == ["quambase", "compare", "--layer", "0", "--site", "a/b <i>"]
    assert "site = 'a/b <i>'" in shlex.split(sql)[2]


def test_by_keyboard_alone(browser: webdriver.Chrome, address: str) -> None:
    opened(browser, address)
    page = find(browser, "body")
    page.send_keys(Keys.TAB)
    assert browser.switch_to.active_element.text == "Skip to the answer"
    page.send_keys("/")
    finder = browser.switch_to.active_element
    assert finder.get_attribute("id") == "find-site"
    finder.send_keys("1 x_proj:input")
    drawn(browser, "#layer-1/x_proj:input")
    assert browser.switch_to.active_element.get_attribute("id") == "site-title"
    for _ in range(60):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        if browser.switch_to.active_element.get_attribute("name") == "mark":
            break
    before = browser.switch_to.active_element.get_attribute("value")
    browser.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    after = browser.execute_script("return document.querySelector('#site-marks tr.chosen input').value")
    assert after != before
    opened(browser, address)
    find(browser, "#heat a").send_keys(Keys.ENTER)
    until(lambda: find(browser, "#site").is_displayed(), "Enter opens a site")


@pytest.mark.parametrize("where", ["#", TAIL])
def test_dark_is_dark_and_legible(browser: webdriver.Chrome, address: str, where: str) -> None:
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    try:
        opened(browser, address, where)
        assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
        assert serious(browser) == []
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize("where", ["#", TAIL])
def test_a_telephone_scrolls_in_one_direction(browser: webdriver.Chrome, address: str, where: str) -> None:
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        opened(browser, address, where)
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert serious(browser) == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_prints(browser: webdriver.Chrome, address: str) -> None:
    opened(browser, address)
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert printed.startswith(b"%PDF") and printed.count(b"/Type /Page\n") in range(3, 16)


def test_without_javascript_it_still_answers(browser: webdriver.Chrome, address: str) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get("about:blank")
        browser.get(address)
        assert "Without JavaScript" in find(browser, "noscript").text
        assert "mse loses" in find(browser, "#answer").text
        assert find(browser, "#heat").is_displayed() and not find(browser, "#switch").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
