"""The report: one file that asks no network, right in its figures, and working in a real browser."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from fastode.cli import main
from fastode.evaluate.report import page, table, write_report
from fastode.evaluate.results import read
from tests import comparison


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return comparison.write(tmp_path_factory.mktemp("report") / "results.jsonl")


def test_the_page_is_one_file_and_asks_no_network(results):
    text = page(*read(results))
    assert "{{" not in text.replace("{{ ", "")
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"'#][^"']*)""", text)
    assert all(link.startswith("data:") for link in links)
    assert not re.findall(r"""(?:https?:)?//(?!www\.w3\.org/2000/svg)[a-z0-9.-]+\.[a-z]{2,}/""", text)
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|import)\s*\(", text)
    assert text.count("</script>") == 2  # a name in the data cannot end the script
    assert '<meta name="viewport"' in text and 'lang="en"' in text


def test_the_data_of_the_page_is_that_of_the_file(results):
    text = page(*read(results))
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    assert data["model"] == "mnist </script>"
    assert len(data["cases"]) == len(comparison.SOLVERS) * len(comparison.NFES)
    assert data["converged"]["frechet"] == 4.2 and data["solution"]["steps"] == 32


def test_the_table_has_every_figure_and_marks_the_best(results):
    text = table(*read(results), metrics=["rmse", "accuracy"])
    for label, (start, order) in comparison.SOLVERS.items():
        row = re.search(rf"\| `{label}` \| (.*) \|", text)[1]
        values = [cell.strip(" *") for cell in row.split("|")]
        assert values == [f"{start * (3 / n) ** order:.3g}" for n in comparison.NFES]
    assert "| `ipndm_v` | **0.33** |" in text and "**0.108** |" in text
    assert (
        "The converged solution has 94.1%." in text
        and "1,000 perfect samples would get a Fréchet distance of 1.1" in text
    )


def test_pictures_for_papers(results):
    pytest.importorskip("matplotlib")
    made = {p.name for p in write_report(results)}
    assert {"results.html", "results.md", "results-rmse.png", "results-frechet.png", "results-steps.png"} <= made
    assert (results.parent / "results-planes.png").read_bytes().startswith(b"\x89PNG")
    assert not [p for p in results.parent.iterdir() if p.name.startswith(".")]


def test_from_the_command_line(results, capsys):
    assert main(["compare", "--report", "--out", str(results)]) == 0
    assert f"wrote {results.with_suffix('.html')}" in capsys.readouterr().out
    assert main(["compare", "--report", "--out", str(results.with_name("none.jsonl"))]) == 2
    assert "results: " in capsys.readouterr().err
    half = results.with_name("half.jsonl")
    half.write_text("\n".join(results.read_text().splitlines()[:2]) + "\n")
    assert main(["compare", "--report", "--out", str(half)]) == 2
    assert "no case of" in capsys.readouterr().err


# -- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def open_page(results):
    """``open_page(width, height)`` starts headless Chromium on the page."""
    selenium = pytest.importorskip("selenium", reason="selenium is not installed: pip install selenium")
    binary = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no Chromium with chromedriver found: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    assert selenium
    write_report(results, figures=False)
    started = []

    def start(width: int, height: int):
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"):
            options.add_argument(f"--{flag}")
        options.add_argument("--disable-background-networking")
        options.add_argument("--disable-component-update")
        options.add_argument(f"--window-size={width},{height}")
        if width < 600:
            metrics = {"width": width, "height": height, "pixelRatio": 1}
            options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = webdriver.Chrome(options=options, service=Service(driver))
        started.append(browser)
        browser.get(results.with_suffix(".html").as_uri())
        return browser

    yield start
    for browser in started:
        browser.quit()


def keep(browser, name: str) -> None:
    """The screenshot of a run, for people: in $FASTODE_SCREENSHOTS, by default out/screenshots."""
    folder = Path(os.environ.get("FASTODE_SCREENSHOTS") or Path(__file__).parents[1] / "out" / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    assert browser.save_screenshot(str(folder / f"{name}.png"))
    assert (folder / f"{name}.png").stat().st_size > 10_000


def errors(browser) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def test_the_page_in_a_browser(open_page):
    """Charts, filter, sorting, slider, chips, keyboard and appearance; no message on the console."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    browser = open_page(1280, 900)

    def find(css):
        return browser.find_element(By.CSS_SELECTOR, css)

    def every(css):
        return browser.find_elements(By.CSS_SELECTOR, css)

    solvers, nfes = list(comparison.SOLVERS), list(comparison.NFES)
    # charts are drawn: a mark for every case, a front, and one curve per solver
    for chart, marks in (("by-nfe", 20), ("by-time", 20), ("by-step", 25), ("by-plane", 30)):
        assert len(every(f"#{chart} .point")) == marks, chart
        assert len(every(f"#{chart} .series")) == 5
    assert every("#by-nfe .front") and every("#by-time .front") and every("#by-plane .exact")
    assert [e.text for e in every("#cards .s")] == ["ipndm_v", "ipndm_v", "unipc", "unipc"]
    keep(browser, "report-light")

    # another measure redraws and re-ranks
    Select(find("#metric")).select_by_value("accuracy")
    assert "class read" in find("#by-nfe svg").get_attribute("aria-label")
    assert len(every("#by-nfe .rule")) == 1
    Select(find("#metric")).select_by_value("rmse")

    # chips take a solver away everywhere
    find("#chips button").click()
    assert find("#chips button").get_attribute("aria-pressed") == "false"
    assert len(every("#by-nfe .point")) == 16 and len(every("#table tbody tr")) == 16
    find("#none").click()
    assert "Nothing to show" in find("#by-nfe").text
    find("#all").click()
    assert len(every("#by-nfe .point")) == 20

    # the slider shows other pictures, by keyboard too
    def picture():
        return every("#strips img")[1].get_attribute("src")

    before, shown = picture(), find("#nfe-out").text
    assert shown == "5" and len(every("#strips .strip")) == 6
    find("#nfe").send_keys(Keys.ARROW_RIGHT)
    assert find("#nfe-out").text == "6" and picture() != before
    find("#nfe").send_keys(Keys.HOME)
    assert find("#nfe-out").text == str(nfes[0])
    whole = "return [...document.querySelectorAll('#strips img')].every(i => i.alt && i.naturalWidth == 320)"
    assert browser.execute_script(whole)

    # the table filters and sorts
    def column(i):
        return [e.text for e in every(f"#table tbody td:nth-child({i})")]

    find("#filter").send_keys("unipc 5")
    assert column(1) == ["unipc"] and column(3) == ["5"]
    find("#filter").clear()
    find("#filter").send_keys("karras" + Keys.SPACE)
    assert set(column(1)) == {s for j, s in enumerate(solvers) if j % 2}
    find("#filter").send_keys(Keys.CONTROL + "a" + Keys.DELETE)
    Select(find("#only")).select_by_value("4")
    assert len(column(1)) == 5 and set(column(3)) == {"4"}
    find("th[data-key=rmse] button").send_keys(Keys.ENTER)
    values = [float(v.split("±")[0]) for v in column(5)]
    assert values == sorted(values) and find("th[data-key=rmse]").get_attribute("aria-sort") == "ascending"
    find("th[data-key=rmse] button").click()
    values = [float(v.split("±")[0]) for v in column(5)]
    assert values == sorted(values, reverse=True)
    find("th[data-key=label] button").click()
    assert column(1) == sorted(solvers)

    # a chart is read with the arrow keys
    browser.execute_script("document.querySelector('#by-nfe svg').focus()")
    find("#by-nfe svg").send_keys(Keys.ARROW_RIGHT)
    assert re.search(r"3 evaluations", find("#tip").text) and find("#tip").get_attribute("aria-live") == "polite"
    find("#by-nfe svg").send_keys(Keys.ESCAPE)
    assert not find("#tip").is_displayed()

    # light and dark
    light = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    find("#theme").click()
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") != light
    keep(browser, "report-dark")

    # everything that acts has a name
    unnamed = browser.execute_script("""
      return [...document.querySelectorAll('button, select, input, [tabindex="0"]')]
        .filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || e.closest('label')?.textContent.trim()))
        .map(e => e.outerHTML.slice(0, 80))""")
    assert unnamed == []
    assert browser.execute_script("return document.querySelectorAll('h1').length") == 1
    assert errors(browser) == []


def test_the_page_on_a_phone(open_page):
    browser = open_page(390, 844)
    width, inner = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert width <= inner == 390  # the page does not scroll sideways, only the table in its own frame
    right = browser.execute_script("""
      return Math.max(...[...document.querySelectorAll('section, .chart svg, .controls, h2, p')]
        .map(e => e.getBoundingClientRect().right))""")
    assert right <= 390.5
    assert browser.execute_script("return document.querySelectorAll('#by-nfe .point').length") == 20
    keep(browser, "report-phone")
    assert errors(browser) == []
