"""The page as a reader meets it, in headless Chromium (Debian's packages; `make browser` installs them)."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from kvgraft.models.loading import load_tokenizer
from kvgraft.report.page import page_of_runs, write_page
from tests.report.page.made_runs import RECIPE, held_out_loss, make_evaluation, make_run

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
HTML = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
# Counts the pixels of a colour in all canvases of a figure; Bokeh keeps its own in shadow roots.
COUNT_PIXELS = """
const [figure, red, green, blue] = arguments;
function* canvases(node) {
  if (node.tagName === "CANVAS") yield node;
  for (const child of [...node.children, ...(node.shadowRoot ? node.shadowRoot.children : [])]) yield* canvases(child);
}
let count = 0;
for (const canvas of canvases(figure)) {
  if (!canvas.width || !canvas.height) continue;
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  for (let at = 0; at < pixels.length; at += 4)
    if (pixels[at] === red && pixels[at + 1] === green && pixels[at + 2] === blue && pixels[at + 3] === 255) count += 1;
}
return count;
"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM.is_file() and DRIVER.is_file()), reason="no /usr/bin/chromium and chromedriver: `make browser`"
    ),
]


@pytest.fixture(scope="module")
def page(tiny_teacher: Path, tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds, with two real tokenizers, heat maps, and samples that hold HTML."""
    folder = tmp_path_factory.mktemp("report")
    recipe = {**RECIPE, "teachers": [{"name": HTML, "model": str(tiny_teacher)}]}
    runs = [make_run(folder / str(seed), seed, teacher=HTML, recipe=recipe) for seed in range(3)]
    load_tokenizer(str(tiny_student)).save_pretrained(runs[0] / "baseline" / "student")
    make_evaluation(runs[0], {"baseline": "", "kv": HTML + "very" * 100}, prompt=HTML, teacher=HTML, problems=4)
    write_page(page_of_runs(runs), folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    profile = tmp_path_factory.mktemp("profile")
    options = Options()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    browser.set_page_load_timeout(120)
    yield browser
    browser.quit()
    shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture
def opened(chromium: Chrome, page: Path) -> Iterator[Callable[..., Chrome]]:
    """Opens the page in a window of ``width``, light or dark, and waits for the first chart."""

    def open_page(width: int = 1280, scheme: str = "light") -> Chrome:
        chromium.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        chromium.get_log("browser")
        chromium.get(page.as_uri())
        drawn(chromium, chart(chromium))
        return chromium

    yield open_page
    chromium.execute_script("localStorage.clear()")


def chart(browser: Chrome, index: int = 0) -> WebElement:
    return browser.find_elements(By.CSS_SELECTOR, "figure.chart")[index]


def drawn(browser: Chrome, figure: WebElement) -> WebElement:
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", figure)
    WebDriverWait(browser, 120).until(lambda _: figure.get_attribute("data-drawn") == "true")
    return figure


def chip_values(figure: WebElement) -> dict[str, str]:
    chips = figure.find_elements(By.CSS_SELECTOR, ".arm")
    parts = [[chip.find_element(By.CSS_SELECTOR, part).text for part in (".name", ".value")] for chip in chips]
    return dict(parts)


def band(arm_index: int, step: int) -> str:
    """What three seeds read at ``step``: mean (lowest to highest), four digits."""
    mean, low, high = (f"{held_out_loss(arm_index, seed, step):.4g}" for seed in (1, 0, 2))
    return f"{mean} ({low}–{high})"  # noqa: RUF001


def test_opens_without_errors_and_draws_every_chart(opened: Callable[..., Chrome]) -> None:
    browser = opened()
    browser.execute_script("document.querySelectorAll('details.more').forEach(part => part.open = true)")
    figures = browser.find_elements(By.CSS_SELECTOR, "figure.chart")
    for figure in figures:
        drawn(browser, figure)
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    # Blue is the first arm beside the baseline, grey the baseline, in every chart of a page.
    for colour in ((0x0F, 0x86, 0xC9), (0x7D, 0x84, 0x8C)):
        assert browser.execute_script(COUNT_PIXELS, figures[0], *colour) > 20
    heat_map = next(figure for figure in figures if "through the saved projector" in figure.text)
    assert browser.execute_script(COUNT_PIXELS, heat_map, 0xFD, 0xE7, 0x24) > 500  # the top of viridis: 1
    assert browser.execute_script("return window.hacked") is None


def test_hovering_reads_values(opened: Callable[..., Chrome]) -> None:
    browser = opened()
    figure = drawn(browser, chart(browser))
    assert chip_values(figure)["kv"] == band(1, 100)
    tooltip = figure.find_element(By.CSS_SELECTOR, ".tooltip")
    assert not tooltip.is_displayed()
    ActionChains(browser).move_to_element(figure.find_element(By.CSS_SELECTOR, ".drawing")).perform()
    WebDriverWait(browser, 60).until(lambda _: tooltip.is_displayed())
    step = int(figure.find_element(By.CSS_SELECTOR, "output.step").text)
    assert step in (40, 50, 60)
    assert f"step {step}" in tooltip.text
    assert all(band(index, step) in tooltip.text for index in range(3))
    assert chip_values(figure)["mismatched"] == band(2, step)


def test_keyboard_reads_values_and_hides_arms(opened: Callable[..., Chrome]) -> None:
    browser = opened()
    figure = drawn(browser, chart(browser))
    slider = figure.find_element(By.CSS_SELECTOR, "input[type=range]")
    slider.send_keys(Keys.HOME)
    assert chip_values(figure)["baseline"] == band(0, 0)
    for _ in range(6):
        slider.send_keys(Keys.ARROW_RIGHT)
    assert chip_values(figure)["baseline"] == band(0, 10)
    blue = (0x0F, 0x86, 0xC9)
    kv = figure.find_elements(By.CSS_SELECTOR, ".arm")[1]
    kv.send_keys(Keys.ENTER)
    assert kv.get_attribute("aria-pressed") == "false"
    WebDriverWait(browser, 60).until(lambda _: browser.execute_script(COUNT_PIXELS, figure, *blue) == 0)


def test_strip_shows_what_a_student_token_learns_from(opened: Callable[..., Chrome]) -> None:
    browser = opened()
    strip = browser.find_element(By.CSS_SELECTOR, ".strip")
    tokens = strip.find_elements(By.CSS_SELECTOR, ".token.student")
    tokens[0].send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element == tokens[1]
    partners = strip.find_elements(By.CSS_SELECTOR, ".partner")
    assert [token.get_attribute("data-index") for token in partners] == tokens[1].get_attribute("data-partners").split()
    assert strip.find_element(By.CSS_SELECTOR, ".chosen").text == f"{tokens[1].text} ← {partners[0].text}"


def test_language_and_theme_switch_and_are_kept(opened: Callable[..., Chrome]) -> None:
    browser = opened()
    heading = browser.find_element(By.CSS_SELECTOR, "#results h2")
    background = "return getComputedStyle(document.body).backgroundColor"
    light = browser.execute_script(background)
    assert heading.text == "Results"
    browser.find_element(By.ID, "language").click()
    browser.find_element(By.ID, "theme").click()
    assert heading.text == "结果"
    dark = browser.execute_script(background)
    assert dark != light
    browser.refresh()
    assert browser.find_element(By.CSS_SELECTOR, "#results h2").text == "结果"
    assert browser.execute_script(background) == dark
    browser.execute_script("localStorage.clear()")
    assert opened(scheme="dark").execute_script(background) == dark


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_nothing_runs_over_the_window(opened: Callable[..., Chrome], width: int, language: str, tmp_path: Path) -> None:
    browser = opened(width, scheme="dark" if language == "zh" else "light")
    if language == "zh":
        browser.find_element(By.ID, "language").click()
    browser.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")
    for figure in browser.find_elements(By.CSS_SELECTOR, "figure.chart"):
        drawn(browser, figure)
    wide = """return [...document.querySelectorAll("body *")]
      .filter(node => node.getBoundingClientRect().right > arguments[0] + 1 && !node.closest("nav, .scroll, .skip"))
      .map(node => node.outerHTML.slice(0, 80))"""
    assert browser.execute_script(wide, width) == []
    sides = "const page = document.documentElement; return [page.scrollWidth, page.clientWidth, innerWidth]"
    scrolled, visible, window = browser.execute_script(sides)
    assert scrolled == visible
    assert window == width
    picture = tmp_path / "page.png"
    assert browser.save_screenshot(str(picture))
    assert picture.stat().st_size > 10_000
