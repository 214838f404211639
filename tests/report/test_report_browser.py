"""The page in a real browser: loads nothing, needs no mouse, is legible in light and dark, and stays small."""

import random

import pytest
from chromium import Page, find_chromium
from made_up_runs import rl_metrics, rl_samples, write_demo, write_run

from vold.report import write_report
from vold.report.plots import POINTS

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on the path; VOLD_CHROMIUM=PATH names one")
FOCUSED = "(e => e.tagName + ' ' + (e.name || e.textContent.trim().slice(0, 20)))(document.activeElement)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    page = Page(find_chromium(), tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = write_demo(tmp_path_factory.mktemp("runs") / "demo", problems=40)
    return write_report([root], root / "report.html", title="Made-up demo")


@pytest.fixture
def page(browser, demo):
    browser.scheme("light")
    browser.resize(1120, 800)
    browser.requested.clear()
    browser.open(demo)
    return browser


def test_only_the_file_itself_is_asked_for(page, demo):
    assert [url for url in page.requested if not url.startswith("data:image/")] == [demo.as_uri()]
    assert page.js("document.scripts.length") == 0
    assert page.js("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


def test_tab_goes_through_the_page_in_its_order_and_out_again(page):
    page.js("window.seen = []")
    stops = page.js("document.querySelectorAll('a, summary, [tabindex=\"0\"], input').length")
    around = (
        "document.activeElement === document.body || (e => seen.includes(e) || !seen.push(e))(document.activeElement)"
    )
    for _ in range(stops + 20):
        page.press("Tab")
        if page.js(around):
            break
    else:
        pytest.fail(f"Tab never left the page; it is at {page.js(FOCUSED)}")
    assert page.js("seen[0].tagName") == "A", "the sections come first"
    assert page.js("seen.length") > 15 and page.js("seen.filter(e => e.tagName === 'SUMMARY').length") > 5
    ordered = "seen.every((e, i) => !i || seen[i - 1].compareDocumentPosition(e) & Node.DOCUMENT_POSITION_FOLLOWING)"
    assert page.js(ordered)


def test_arrow_keys_go_from_sample_to_sample(page):
    page.js("[...document.querySelectorAll('details.wide')].find(e => e.textContent.includes('VOLD')).id = 'vold'")
    page.js("document.querySelectorAll('details.wide').forEach(e => { e.open = e.id === 'vold' })")
    box = "document.querySelector('#vold .browser')"
    panes = f"[...{box}.querySelectorAll('.panes > *')]"
    visible_panes = f"{panes}.flatMap((e, i) => getComputedStyle(e).display === 'none' ? [] : [i])"
    assert page.js(visible_panes) == [0]
    page.js(f"{box}.querySelector('.pick input').focus()")
    for key, index in (("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1)):
        page.press(key)
        assert page.js(visible_panes) == [index]
    page.js(f"{box}.querySelector('[value=wrong]').focus()")
    page.press(" ")
    page.js(f"{box}.querySelector('.pick .is-wrong input').focus()")
    for _ in range(3):
        page.press("ArrowDown")
        assert page.js(f"{box}.querySelector('.pick label:has(:checked)').className") == "is-wrong"
    assert page.js(f"document.activeElement.closest('.browser') === {box}")
    page.press("Tab")
    assert page.js("document.activeElement.type") != "radio", "one Tab leaves the list"


def test_tokens_that_the_teacher_would_not_have_said_are_coloured(page):
    assert page.js("[...document.querySelectorAll('pre .u4')].length") > 0
    assert page.js("getComputedStyle(document.querySelector('pre .u4')).backgroundColor") != "rgba(0, 0, 0, 0)"


# WCAG's contrast ratio of two colours
CONTRAST = """(([a, b]) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05))([%s].map(c => c.match(/[\\d.]+/g)
  .slice(0, 3).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0)))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_light_and_in_dark(page, scheme):
    page.scheme(scheme)
    paper = "getComputedStyle(document.body).backgroundColor"
    bright = page.js(f"{paper}.match(/\\d+/g).reduce((sum, v) => sum + +v, 0)")
    assert (bright > 600) == (scheme == "light")
    for selector, least in (("body", 7), (".soft", 4.5), (".ok", 4.5), (".no", 4.5), (".flag", 4.5)):
        text = f"getComputedStyle(document.querySelector('{selector}')).color"
        assert page.js(CONTRAST % f"{text}, {paper}") >= least, selector


def test_a_table_that_goes_on_has_a_shadow_and_keeps_its_names(page):
    """On a phone: some table scrolls, its first column stays, and a shadow lies at the side where it goes on."""
    page.resize(390, 800)
    box = "[...document.querySelectorAll('.scroll')].find(e => e.scrollWidth > e.clientWidth + 8)"
    assert page.js(f"!!{box}"), "no table of the made-up demo is wide enough to tell"
    page.js(f"({box}).scrollLeft = 60")
    style = f"getComputedStyle({box})"
    assert page.js(f"{style}.overflowX") == "auto" and page.js(f"{style}.backgroundImage").count("gradient") == 4
    first = f"({box}).querySelector('tbody th')"
    assert page.js(f"{first} ? {first}.getBoundingClientRect().left - ({box}).getBoundingClientRect().left : 0") == 0


@pytest.mark.parametrize("width", [390, 1120])
def test_every_label_of_a_figure_is_inside_it(page, width):
    page.resize(width, 800)
    page.js("document.querySelectorAll('details').forEach(e => { e.open = true })")
    outside = "a.left < b.left - 2 || a.right > b.right + 2 || a.top < b.top - 2 || a.bottom > b.bottom + 2"
    boxes = "const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect()"
    drawn = "[...document.querySelectorAll('figure svg text')].filter(t => t.textContent.trim())"
    assert page.js(f"{drawn}.length") > 50
    clipped = f"{drawn}.filter(t => {{ {boxes}; return a.width && ({outside}) }}).map(t => t.textContent.trim())"
    assert page.js(clipped) == []


@pytest.mark.parametrize("width", [390, 1120])
def test_nothing_is_wider_than_the_window(page, width):
    page.resize(width, 800)
    assert page.js("document.documentElement.scrollWidth") <= width


def test_ten_thousand_steps_make_a_page_of_the_same_size(browser, tmp_path):
    sizes = []
    for steps in (10 * POINTS, 10_000):
        rows = rl_metrics(random.Random(0), teacher=True, steps=steps)
        config = {"verb": "rl", "steps": steps}
        run = write_run(
            tmp_path / f"run{steps}", config=config, metrics=rows, samples=rl_samples(random.Random(0), 400)
        )
        out = write_report([run], tmp_path / f"{steps}.html", title="Long")
        browser.open(out)
        sizes.append((out.stat().st_size, browser.js("document.querySelectorAll('*').length")))
    (small, few), (large, many) = sizes
    assert large < 1.2 * small < 1_000_000 and many < 1.2 * few < 6_000
