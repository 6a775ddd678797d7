#!/usr/bin/env python3
"""Looks at the coordinator's status page as a person would: in Chromium, while a run goes on.

    check.py URL --screenshots DIR [--expect FILE.json]
    check.py URL --gone [--screenshots DIR]

The first form compares the page with `/api/status`, waits for a step that comes without a reload,
and looks at it on a desktop and on a phone, dark and light: room, contrast, keyboard, what
axe-core finds, the console, and whom it talks to. FILE.json may hold `lost_worker`, a name that must be
told as lost, and `min_generation`, which the timeline must reach.

The second form says `ready`, waits for a line on its input while somebody stops the coordinator,
says `unreachable` when the page does, and waits for another line while it is started again.

Needs Chromium with its driver, and from pip: selenium, axe-core-python. Exit status 1 when
anything is wrong.
"""

import argparse
import collections
import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys

VIEWS = [(width, scheme) for width in (1280, 360) for scheme in ("light", "dark")]

# The page is drawn once a second, from a status that is as old at most.
LAG_SECONDS = 5.0

# What the page shows, as text.
READ = """
const text = (from, what) => from.querySelector(what)?.textContent ?? null;
const figure = name => text(document, `[data-figure="${name}"] .value`);
const all = (what, read) => [...document.querySelectorAll(what)].map(read);
return {
  link: document.getElementById("link").dataset.state,
  phase: text(document, "#phase"),
  step: figure("Step"),
  generation: figure("Generation"),
  goodput: figure("Goodput"),
  old: document.body.classList.contains("old"),
  gone: document.getElementById("gone").hidden ? null : document.getElementById("gone").textContent,
  workers: all("#workers tr[data-worker]", row => text(row, "th span")),
  generations: all("#generations li", row => [Number(row.dataset.generation), text(row, ".why")]),
  checkpoints: all("#checkpoints tr", row => [Number(row.dataset.step), text(row, ".state-of span:last-child")]),
  events: all("#events li", row => [text(row, ".what"), row.className]),
};
"""

# Contrast of every text that can be seen with what is painted below it (WCAG 2.1, 1.4.3).
CONTRAST = """
const pen = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
function rgba(color) {
  pen.clearRect(0, 0, 1, 1);
  pen.fillStyle = color;
  pen.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
  return [r, g, b, a / 255];
}
const over = (top, below) => [0, 1, 2].map(at => top[at] * top[3] + below[at] * (1 - top[3]));
const light = color => color.map(part => part / 255).map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
  .reduce((sum, part, at) => sum + part * [0.2126, 0.7152, 0.0722][at], 0);
const ratio = (one, two) => { const [a, b] = [light(one), light(two)].sort((x, y) => y - x); return (a + 0.05) / (b + 0.05); };
function opacity(node) {
  let all = 1;
  for (; node; node = node.parentElement) all *= Number(getComputedStyle(node).opacity);
  return all;
}
function paint(node) {
  const style = getComputedStyle(node);
  const color = node instanceof SVGElement && !(node instanceof SVGSVGElement) ? (style.fill === "none" || node.tagName === "text" || node.tagName === "g" ? "transparent" : style.fill) : style.backgroundColor;
  const [r, g, b, a] = rgba(color);
  return [r, g, b, a * opacity(node)];
}
function below(node, x, y) {
  const stack = document.elementsFromPoint(x, y), at = stack.indexOf(node);
  if (at >= 0) return stack.slice(at);
  // The middle of a letter's box may be beside its strokes; what is drawn there is below it all the same.
  if (node.ownerSVGElement && stack.includes(node.ownerSVGElement)) return stack;
  const parents = [];
  for (; node; node = node.parentElement) parents.push(node);
  return parents;
}
const found = [], seen = new Set();
let count = 0;
function look(node, range) {
  const style = getComputedStyle(node);
  if (!node.checkVisibility({ visibilityProperty: true }) || node.closest(".unseen, option")) return;
  const box = range.getBoundingClientRect();
  if (!box.width || !box.height) return;
  count++;
  let ground = rgba(getComputedStyle(document.body).backgroundColor).slice(0, 3);
  for (const layer of below(node, box.x + box.width / 2, box.y + box.height / 2).reverse()) ground = over(paint(layer), ground);
  const ink = rgba(node instanceof SVGElement ? style.fill : style.color);
  ink[3] *= opacity(node);
  const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
  const got = ratio(over(ink, ground), ground);
  const text = (node.textContent ?? "").trim().slice(0, 40), key = `${node.tagName}.${node.getAttribute("class")} ${got.toFixed(2)}`;
  if (got < (large ? 3 : 4.5) && !seen.has(key)) { seen.add(key); found.push(`${got.toFixed(2)}:1 for "${text}" (${key})`); }
}
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node = walker.nextNode(); node; node = walker.nextNode()) {
  if (!node.data.trim() || ["SCRIPT", "NOSCRIPT", "STYLE"].includes(node.parentElement.tagName)) continue;
  const range = document.createRange();
  range.selectNodeContents(node);
  look(node.parentElement, range);
}
document.querySelectorAll("select").forEach(node => look(node, node));
return { count, found };
"""

# What leaves the page to the right, apart from what scrolls inside a frame of its own.
OVERFLOW = """
const wide = document.documentElement.scrollWidth, room = document.documentElement.clientWidth;
const guilty = [...document.querySelectorAll("body *")].filter(node => node.getBoundingClientRect().right > room + 1
  && !node.closest(".scroll *, .scroll, .scroll-y, .list, .unseen, svg")).slice(0, 5).map(node => `${node.tagName}#${node.id}.${node.className}`);
return { wide, room, guilty };
"""

# What axe-core finds, as sentences.
AXE = """
const done = arguments[arguments.length - 1];
axe.run(document, { runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"], resultTypes: ["violations"] })
  .then(result => done(result.violations.map(v => `${v.id} (${v.help}) at ${v.nodes.slice(0, 3).map(n => n.target.join(" ")).join(", ")}`)),
        error => done([String(error)]));
"""

FOCUSABLE = """
const all = [...document.querySelectorAll("a[href], button, select, input, summary, [tabindex='0']")]
  .filter(node => node.checkVisibility({ visibilityProperty: true }));
all.forEach((node, at) => { node.dataset.checkPlace = at; });
document.activeElement?.blur?.();
return all.map(node => `${node.tagName.toLowerCase()}#${node.id} ${node.getAttribute("aria-label") ?? node.textContent.trim().slice(0, 30)}`);
"""

FOCUSED = """
const node = document.activeElement;
if (!node || node === document.body) return null;
const style = getComputedStyle(node);
return { place: Number(node.dataset.checkPlace ?? -1), visible: node.matches(":focus-visible")
  && style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1 };
"""


class Failures:
    """What is wrong; told at once, counted at the end."""

    def __init__(self):
        self.count = 0

    def check(self, good, what, detail=""):
        print(f"{'ok' if good else 'FAILED'}: {what}{f': {detail}' if detail and not good else ''}", flush=True)
        self.count += not good
        return good


def chromium():
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not browser or not driver:
        sys.exit("Chromium and its driver are not installed (Debian: chromium, chromium-driver)")
    options = Options()
    options.binary_location = browser
    arguments = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")
    for argument in arguments:
        options.add_argument(argument)
    # Certificates of an authority that no browser knows.
    options.accept_insecure_certs = True
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    # A thousand workers are many texts for axe-core.
    browser.set_script_timeout(120)
    return browser


class Sampler(threading.Thread):
    """Asks for `/api/status` all the time, and keeps the answers of the last seconds."""

    def __init__(self, url):
        super().__init__(daemon=True)
        self.url = url
        self.kept = collections.deque()
        self.over = threading.Event()

    def run(self):
        while not self.over.wait(0.25):
            try:
                with urllib.request.urlopen(f"{self.url}api/status", timeout=5) as answer:
                    status = json.load(answer)
            except (OSError, ValueError):
                continue
            self.kept.append((time.monotonic(), status))
            while self.kept[0][0] < time.monotonic() - LAG_SECONDS:
                self.kept.popleft()

    def recent(self):
        return [status for _, status in list(self.kept)]


def number(text):
    try:
        return int((text or "").replace(",", ""))
    except ValueError:
        return None


def differences(shown, status, steps):
    """Where the page differs from one answer of `/api/status`, as sentences."""
    wrong = []

    def same(what, page, api):
        if page != api:
            wrong.append(f"{what}: the page shows {page!r}, the API says {api!r}")

    step = number(shown["step"])
    if step is None or not min(steps) <= step <= max(steps):
        wrong.append(f"step: the page shows {shown['step']!r}, the API said {min(steps)} to {max(steps)}")
    same("generation", number(shown["generation"]), status["generation"])
    same("phase", (shown["phase"] or "").lstrip("✓✗ "), status["phase"])
    same("names of the workers", sorted(shown["workers"]), sorted(worker["name"] for worker in status["workers"]))
    generations = [[each["generation"], each["reason"]] for each in reversed(status.get("generations") or [])]
    same("newest generation and its reason", shown["generations"][:1], generations[:1])
    same("generations of the timeline", [each[0] for each in shown["generations"]], [each[0] for each in generations])
    checkpoints = [[each["step"], each["state"]] for each in reversed(status.get("checkpoints") or [])]
    same("checkpoints and their state", shown["checkpoints"], checkpoints)
    same("newest events", [event[0] for event in shown["events"]][:10], [event["text"] for event in status["events"]][:10])
    share = (status.get("goodput") or {}).get("share")
    page = (shown["goodput"] or "").removesuffix(" %")
    if share is None:
        same("goodput", page, "–")
    elif page == "–" or abs(float(page) - share * 100) > 0.2:
        wrong.append(f"goodput: the page shows {page!r}, the API says {share * 100:.1f} %")
    return wrong


class Page:
    def __init__(self, driver, url, failures):
        self.driver, self.url, self.failures = driver, url, failures
        self.requests = []

    def read(self):
        return self.driver.execute_script(READ)

    def view(self, width, scheme, height=900):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        time.sleep(0.5)

    def whole(self, width, scheme):
        """Makes the window as tall as the page is in that width."""
        self.view(width, scheme)
        self.view(width, scheme, self.driver.execute_script("return document.documentElement.scrollHeight"))

    def wait(self, what, condition, seconds):
        """The first thing that `condition` finds in what is shown; None when it never does."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            shown = self.read()
            if condition(shown):
                self.failures.check(True, what)
                return shown
            time.sleep(0.2)
        few = {key: value for key, value in shown.items() if not isinstance(value, list)}
        self.failures.check(False, what, f"not within {seconds} s; the page shows {few}")
        return None

    def asked(self):
        """Adds the requests since the last call to those that are known."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
        return self.requests

    def keys(self, key):
        webdriver.ActionChains(self.driver).send_keys(key).perform()


def compare(page, sampler):
    end, wrong = time.monotonic() + 30, ["the API does not answer"]
    while time.monotonic() < end:
        shown, answers = page.read(), sampler.recent()
        steps = [status["step"] for status in answers]
        found = [differences(shown, status, steps) for status in answers]
        if found:
            wrong = min(found, key=len)
            if not wrong:
                break
        time.sleep(0.3)
    page.failures.check(not wrong, "the page shows what /api/status says", "; ".join(wrong))


def updates(page):
    """A step comes by itself, over the stream, and leaves the reader's place alone."""
    driver = page.driver
    driver.execute_script("""
      window.checkMark = 1;
      const list = document.getElementById("events");
      list.focus();
      list.scrollTop = 60;
      const line = [...list.children].find(node => node.offsetTop - list.offsetTop >= list.scrollTop) ?? list.lastElementChild;
      if (line) {
        window.checkLine = line;
        getSelection().selectAllChildren(line.querySelector(".what"));
        window.checkPlace = line.getBoundingClientRect().top;
        window.checkText = String(getSelection());
      }""")
    before = number(page.read()["step"])
    polls = sum("/api/status" in url for url in page.asked())
    shown = page.wait("a new step appears", lambda shown: number(shown["step"]) > before, 60)
    if shown is None:
        return
    time.sleep(2.5)
    page.failures.check(page.read()["link"] == "live", "the page is live", f"it says {page.read()['link']}")
    page.failures.check(driver.execute_script("return window.checkMark === 1"), "without a reload")
    asked = page.asked()
    page.failures.check(any("/api/live" in url for url in asked), "over /api/live")
    more = sum("/api/status" in url for url in asked) - polls
    page.failures.check(more == 0, "and not by asking", f"{more} requests of /api/status meanwhile")
    kept = driver.execute_script("""
      if (!window.checkLine) return { focus: true, text: true, moved: 0 };
      return { focus: document.activeElement?.id === "events", text: String(getSelection()) === window.checkText,
        moved: Math.abs(window.checkLine.getBoundingClientRect().top - window.checkPlace) };""")
    page.failures.check(kept["focus"] and kept["text"] and kept["moved"] < 3,
                        "focus, selected text and scroll position of the events stay", str(kept))
    driver.execute_script("getSelection().removeAllRanges(); document.getElementById('events').scrollTop = 0;")


def controls(page):
    """The filter of the events, and a chart under the arrow keys."""
    driver, check = page.driver, page.failures.check
    tones = """return [...document.querySelectorAll("#events li")].filter(node => node.checkVisibility()).map(node => node.className);"""
    driver.find_element("id", "problems").click()
    check(all(tone == "bad" for tone in driver.execute_script(tones)), "`problems only` leaves the problems")
    driver.find_element("id", "problems").click()
    words = """return document.getElementById("loss-chart").getAttribute("aria-valuetext");"""
    driver.execute_script("""document.getElementById("loss-chart").focus();""")
    page.keys(Keys.HOME)
    first = driver.execute_script(words)
    page.keys(Keys.ARROW_RIGHT)
    check(first and first.startswith("Step") and driver.execute_script(words) != first,
          "arrow keys read the loss chart", f"it says {first!r}")
    driver.execute_script("document.activeElement.blur()")


def keyboard(page, width):
    """Tab reaches everything that can be used, and shows where it is."""
    driver = page.driver
    names = driver.execute_script(FOCUSABLE)
    reached, hidden = set(), set()
    for _ in range(len(names) + 3):
        page.keys(Keys.TAB)
        focused = driver.execute_script(FOCUSED)
        if focused and focused["place"] >= 0:
            reached.add(focused["place"])
            if not focused["visible"]:
                hidden.add(focused["place"])
    missed = [names[at] for at in range(len(names)) if at not in reached]
    page.failures.check(not missed, f"Tab reaches all {len(names)} controls at {width} px", "; ".join(missed))
    page.failures.check(not hidden, f"the focus is visible on each at {width} px", "; ".join(names[at] for at in hidden))
    driver.execute_script("document.activeElement?.blur?.()")


def axe_source():
    found = importlib.util.find_spec("axe_core_python")
    script = Path(found.submodule_search_locations[0]) / "axe.min.js" if found else None
    if script is None or not script.is_file():
        sys.exit("axe-core-python is not installed: pip install axe-core-python==0.1.0")
    return script.read_text(encoding="utf-8")


def accessibility(page, axe, view):
    found = page.driver.execute_script(CONTRAST)
    page.failures.check(found["count"] > 50 and not found["found"], f"contrast of {found['count']} texts, {view}",
                        "; ".join(found["found"]) or "hardly any text")
    page.driver.execute_script(f"{axe}; window.axe = axe;")
    result = page.driver.execute_async_script(AXE)
    page.failures.check(not result, f"axe-core finds nothing, {view}", "; ".join(result))


def expected(page, path):
    wanted = json.loads(Path(path).read_text(encoding="utf-8"))
    lost, least = wanted.get("lost_worker"), wanted.get("min_generation")
    if lost is not None:
        page.wait(f"the loss of {lost} is among the events", lambda shown: any(
            lost in text and "bad" in tone for text, tone in shown["events"]), 90)
    if least is not None:
        page.wait(f"generation {least} or a later one is in the timeline", lambda shown: any(
            generation >= least and reason for generation, reason in shown["generations"]), 90)


def look(page, arguments):
    folder = Path(arguments.screenshots)
    folder.mkdir(parents=True, exist_ok=True)
    axe = axe_source()
    sampler = Sampler(page.url)
    sampler.start()
    page.view(1280, "light")
    page.driver.get(page.url)
    if page.wait("the page shows a step", lambda shown: (number(shown["step"]) or 0) > 0 and shown["link"] == "live", 60) is None:
        return
    if arguments.expect:
        expected(page, arguments.expect)
    page.driver.execute_script("""const all = document.getElementById("all-workers"); if (!all.hidden) all.click();""")
    compare(page, sampler)
    sampler.over.set()
    updates(page)
    controls(page)
    for width, scheme in VIEWS:
        view = f"{width} px {scheme}"
        page.whole(width, scheme)
        room = page.driver.execute_script(OVERFLOW)
        page.failures.check(room["wide"] <= room["room"] and not room["guilty"], f"fits without scrolling sideways, {view}", str(room))
        accessibility(page, axe, view)
        page.whole(width, scheme)
        page.driver.save_screenshot(str(folder / f"page-{width}-{scheme}.png"))
        if scheme == "light":
            page.view(width, scheme)
            keyboard(page, width)
    # What is open has text of its own.
    page.driver.execute_script("document.querySelectorAll('details').forEach(node => { node.open = true; });")
    page.whole(360, "light")
    room = page.driver.execute_script(OVERFLOW)
    page.failures.check(room["wide"] <= room["room"], "fits with all tables open, 360 px", str(room))
    accessibility(page, axe, "all tables open")

    host = urlsplit(page.url).netloc
    strangers = sorted({url for url in page.asked() if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).netloc != host})
    page.failures.check(not strangers, "asks no other host", ", ".join(strangers))
    errors = [entry["message"] for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"]
    page.failures.check(not errors, "nothing is wrong in the console", "; ".join(errors))


def turn(word):
    """Says a word and waits until the other side has done its part."""
    print(word, flush=True)
    if not sys.stdin.readline():
        sys.exit(f"FAILED: the input ended after `{word}`")


def gone(page, arguments):
    page.view(1280, "light")
    page.driver.get(page.url)
    before = page.wait("the page shows a step", lambda shown: (number(shown["step"]) or 0) > 0 and shown["link"] == "live", 60)
    if before is None:
        return
    # What comes first may be a little newer than what comes next.
    page.wait("and a later one", lambda shown: (number(shown["step"]) or 0) > number(before["step"]), 60)
    page.driver.execute_script("window.checkMark = 1;")
    turn("ready")
    shown = page.wait("the page says that the coordinator is unreachable", lambda shown: shown["link"] == "unreachable"
                      and "unreachable" in (shown["gone"] or "") and "unreachable" in (shown["phase"] or ""), 60)
    if shown is None:
        return
    kept = (number(shown["step"]) or 0) >= number(before["step"]) and shown["workers"] and shown["events"]
    page.failures.check(kept, "its last values are still there", f"step {shown['step']}, {len(shown['workers'])} workers")
    page.failures.check(shown["old"], "marked as old")
    if arguments.screenshots:
        Path(arguments.screenshots).mkdir(parents=True, exist_ok=True)
        page.whole(1280, "light")
        page.driver.save_screenshot(str(Path(arguments.screenshots) / "gone.png"))
    turn("unreachable")
    page.wait("the page recovers by itself", lambda shown: shown["link"] == "live" and shown["gone"] is None
              and not shown["old"] and number(shown["step"]) is not None and "unreachable" not in shown["phase"], 120)
    page.failures.check(page.driver.execute_script("return window.checkMark === 1"), "without a reload")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--screenshots", metavar="DIR")
    parser.add_argument("--expect", metavar="FILE")
    parser.add_argument("--gone", action="store_true")
    arguments = parser.parse_args()
    if not arguments.gone and not arguments.screenshots:
        parser.error("--screenshots says where the pictures go")
    failures = Failures()
    # Who is told to stop takes the browser along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("FAILED: told to stop"))
    driver = chromium()
    try:
        page = Page(driver, arguments.url.rstrip("/") + "/", failures)
        (gone if arguments.gone else look)(page, arguments)
    except WebDriverException as error:
        failures.check(False, "the browser", error.msg)
    finally:
        driver.quit()
    print(f"status page: {failures.count} failed" if failures.count else "status page: all is well")
    return 1 if failures.count else 0


if __name__ == "__main__":
    sys.exit(main())
