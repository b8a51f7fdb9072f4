"""Every page in a real browser: what it shows, keys, phone width, dark and light, accessibility, and hostile text."""

import signal
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, expect

from pointillist.base.jsonl import read_jsonl
from pointillist.runs.paths import RunPaths
from tests.helpers.made_run import HOSTILE, LINK, MadeRun
from tests.helpers.processes import Digits, wait_for
from tests.view.browser import Viewer

PAGES = {
    "overview": "/",
    "rollouts": "/runs/0/rollouts",
    "group": "/runs/0/group?id=1.0",
    "rollout": "/runs/0/rollout?id=2.0.0",
    "hostile": "/runs/0/rollout?id=1.3.3",
    "store": "/runs/0/store",
    "refusal": "/runs/0/rollout?id=9.9.9",
}


def test_the_overview_lays_runs_over_each_other(viewer: Viewer, made: MadeRun, page: Page, tmp_path: Path) -> None:
    other = MadeRun(tmp_path / "other", steps=2)
    page.goto(viewer(made.paths.output_dir, other.paths.output_dir))
    for title in ("Training reward", "Held-out accuracy", "Loss", "Entropy", "Mismatch", "Staleness", "Images"):
        chart = page.get_by_role("img", name=title, exact=True)
        expect(chart).to_be_visible()
        assert chart.locator("polyline").count() == 2
    expect(page.get_by_role("img", name="Phase times: trainer of other")).to_be_visible()
    page.get_by_text("as a table: Loss").click()
    expect(page.get_by_role("region", name="Loss, table").get_by_role("row")).to_have_count(4)
    page.get_by_role("link", name="rollouts of other").click()
    expect(page.get_by_text("1 to 36 of 36")).to_be_visible()


def test_rollouts_are_filtered_sorted_and_paged(viewer: Viewer, made: MadeRun, page: Page) -> None:
    page.goto(viewer(made.paths.output_dir) + "/runs/0/rollouts")
    expect(page.get_by_text("1 to 50 of 52")).to_be_visible()
    page.get_by_role("link", name="next").click()
    expect(page.get_by_text("51 to 52 of 52")).to_be_visible()
    page.get_by_label("outcome").select_option("failed")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_text("1 to 3 of 3")).to_be_visible()
    expect(page.get_by_role("cell", name="failed ValueError")).to_have_count(3)
    page.get_by_role("link", name="Clear").click()
    page.get_by_label("order").select_option("reward-low")
    page.get_by_label("step").fill("2")
    page.get_by_label("split").select_option("train")
    page.get_by_label("step").press("Enter")
    expect(page.get_by_text("1 to 16 of 16")).to_be_visible()
    rewards = [float(cell) for cell in page.locator("tbody td:nth-child(3)").all_inner_texts() if cell]
    assert rewards == sorted(rewards)


def test_a_rollout_has_its_pictures_tokens_and_fate(viewer: Viewer, made: MadeRun, page: Page) -> None:
    made.damage()
    address = viewer(made.paths.output_dir)
    page.goto(f"{address}/runs/0/rollout?id=2.0.0")
    expect(page.get_by_text("in step 2")).to_be_visible()
    expect(page.get_by_text("picture 2: tokens 20 to 23 (4)")).to_be_visible()
    page.goto(f"{address}/runs/0/rollout?id=1.0.1")
    expect(page.get_by_text("quarantined", exact=True)).to_be_visible()
    call = page.locator("details.call")
    assert call.get_attribute("open") is None  # folded
    page.keyboard.press("e")
    expect(call.get_by_text('"by": 2')).to_be_visible()
    page.get_by_text(" cat", exact=True).first.hover()
    tip = page.locator("#tip")
    expect(tip).to_contain_text('token 31 " cat": probability 0.8187, logprob -0.2000, advantage')
    page.goto(f"{address}/runs/0/rollout?id=1.0.0")
    page.locator(".tokens").last.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(tip).to_contain_text("token 31")
    expect(page.locator(".message img, .message .lost")).to_have_count(2)


def test_pictures_load_and_the_lost_are_said_to_be(viewer: Viewer, made: MadeRun, page: Page) -> None:
    made.damage()
    page.goto(viewer(made.paths.output_dir) + "/runs/0/group?id=1.0", wait_until="networkidle")
    assert page.locator(".card").count() == 4
    assert page.locator(".lost").count() > 0
    shown = page.locator(".message img")
    assert shown.count() > 0
    for index in range(shown.count()):
        shown.nth(index).scroll_into_view_if_needed()
        expect(shown.nth(index)).to_have_js_property("complete", value=True)
        assert shown.nth(index).evaluate("image => image.naturalWidth") > 0


def test_the_store_page(viewer: Viewer, made: MadeRun, page: Page) -> None:
    made.damage()
    page.goto(viewer(made.paths.output_dir) + "/runs/0/store")
    for _ in range(50):  # the store is being read
        if page.get_by_role("heading", name="Corrupt").count() and page.get_by_role("heading", name="Missing").count():
            break
        page.wait_for_timeout(100)
        page.reload()
    expect(page.get_by_role("region", name="Corrupt images")).to_contain_text(made.images[1].sha256)
    expect(page.get_by_role("region", name="Missing images")).to_contain_text(made.images[0].sha256)
    expect(page.get_by_text("saved by storing each once")).to_be_visible()


def test_everything_by_keyboard(viewer: Viewer, made: MadeRun, page: Page) -> None:
    address = viewer(made.paths.output_dir)
    page.goto(address)
    page.keyboard.press("r")
    page.wait_for_url("**/rollouts")
    for key in "jjk":
        page.keyboard.press(key)
    first = page.locator("a.row").first
    expect(first).to_be_focused()
    page.keyboard.press("Enter")
    page.wait_for_url("**/rollout?id=3.0.0")
    page.keyboard.press("j")
    page.wait_for_url("**/rollout?id=3.0.1")
    page.keyboard.press("k")
    page.wait_for_url("**/rollout?id=3.0.0")
    page.keyboard.press("g")
    page.wait_for_url("**/group?id=3.0")
    page.keyboard.press("u")
    page.wait_for_url("**/rollouts?split=train&step=3")
    page.keyboard.press("f")
    expect(page.get_by_label("split")).to_be_focused()
    page.keyboard.press("s")  # typed, not obeyed
    assert "/rollouts" in page.url
    page.goto(f"{address}/runs/0/rollouts")
    page.keyboard.press("n")
    page.wait_for_url("**page=2")
    page.keyboard.press("p")
    page.wait_for_url("**page=1")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.keyboard.press("s")
    page.wait_for_url("**/store")
    page.keyboard.press("o")
    page.wait_for_url(f"{address}/")
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_finding_of_axe_and_no_sideways_scrolling(
    viewer: Viewer, made: MadeRun, browser: Browser, scheme: str
) -> None:
    made.damage()
    address = viewer(made.paths.output_dir)
    for width in (1280, 375):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page = context.new_page()
        for name, path in PAGES.items():
            page.goto(address + path, wait_until="networkidle")
            for details in page.locator("details").all():
                details.evaluate("each => { each.open = true; }")
            found = Axe().run(page).response["violations"]
            serious = [each["id"] for each in found if each["impact"] in ("serious", "critical")]
            assert serious == [], f"{name}, {width}, {scheme}"
            wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, f"{name} is {wide} pixels too wide at {width}"
        context.close()


def test_axe_would_find_what_is_wrong(page: Page) -> None:
    """The control: the same check on a page that is wrong."""
    page.set_content("<img src='data:,'><button></button>")
    assert {each["impact"] for each in Axe().run(page).response["violations"]} >= {"critical"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dark_and_light(viewer: Viewer, made: MadeRun, browser: Browser, scheme: str) -> None:
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto(viewer(made.paths.output_dir))
    background = "getComputedStyle(document.body).backgroundColor"
    by_system = page.evaluate(background)
    assert by_system == ("rgb(20, 23, 27)" if scheme == "dark" else "rgb(255, 255, 255)")
    page.get_by_role("button", name="Dark or light").click()
    assert page.evaluate(background) != by_system
    page.reload()  # it is remembered
    assert page.evaluate(background) != by_system
    context.close()


def test_hostile_text_runs_nothing(viewer: Viewer, made: MadeRun, context: BrowserContext) -> None:
    address, page = viewer(made.paths.output_dir), context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    hostile = ("rollout?id=1.3.3", "group?id=1.3", "rollouts?step=1", "rollout?id=1.1.1")
    asking = (f"rollouts?task={HOSTILE}", f"group?id={HOSTILE}", "store")
    for path in (*hostile, *asking):
        page.goto(f"{address}/runs/0/{path}", wait_until="networkidle")
        if path in hostile:
            assert "window.hacked=1" in page.inner_text("body")  # what was said is there
        page.keyboard.press("e")
        for token in page.locator(".t").all():
            token.hover()
        assert page.evaluate("window.hacked") is None, path
        assert page.locator("main script, main [onerror], main img[src=x], a[href^='javascript']").count() == 0
    page.goto(f"{address}/runs/0/rollout?id=1.3.3")
    assert LINK in page.inner_text("body")
    assert all(url.startswith(address) for url in asked)
    # The control: the same text as markup is stopped by the pages' policy alone, and does run where there is none.
    page.evaluate("text => { document.querySelector('main').innerHTML = text; }", HOSTILE)
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    bare = context.new_page()
    bare.set_content(HOSTILE)
    bare.wait_for_timeout(300)
    assert bare.evaluate("window.hacked") == 1


def test_a_token_is_asked_for_off_loopback(viewer: Viewer, made: MadeRun, page: Page, context: BrowserContext) -> None:
    address = viewer(made.paths.output_dir, "--host", "0.0.0.0", indexed=False)
    port, token = address.rpartition(":")[2].split("/?token=")
    here = f"http://127.0.0.1:{port}"
    assert page.goto(here).status == 401
    page.goto(f"{here}/?token={token}")
    assert page.url == f"{here}/"
    page.get_by_role("link", name="Store", exact=True).click()
    expect(page.get_by_role("heading", name="Image store")).to_be_visible()
    assert token not in str(context.cookies())


def test_new_data_is_announced(viewer: Viewer, made: MadeRun, page: Page) -> None:
    page.goto(viewer(made.paths.output_dir) + "/runs/0/rollouts")
    expect(page.get_by_text("of 52")).to_be_visible()
    made.add_step(4)
    page.get_by_role("link", name="new data: reload").click(timeout=20_000)
    expect(page.get_by_text("of 68")).to_be_visible()


def test_a_real_run_is_watched_while_it_goes(viewer: Viewer, digits_run: Digits, page: Page) -> None:
    process = digits_run.start("--max-steps", 500)
    paths = RunPaths(digits_run.output_dir)
    wait_for(lambda: read_jsonl(paths.metrics / "trainer.jsonl"), process)
    address = viewer(digits_run.output_dir, indexed=False)
    page.goto(address)
    expect(page.get_by_role("img", name="Training reward")).to_be_visible()
    page.goto(f"{address}/runs/0/rollouts?split=eval")
    expect(page.locator("a.row").first).to_be_visible()
    page.goto(f"{address}/runs/0/rollout?id=1.0.0", wait_until="networkidle")
    assert page.locator(".message img").evaluate("image => image.naturalWidth") > 0
    assert page.locator(".t").count() > 0
    page.get_by_role("link", name="new data: reload").click(timeout=60_000)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=900)
