#!/usr/bin/env python3
"""Shows the coordinator's page a token, as a person would: in Chromium, over HTTPS.

    login.py URL --token TOKEN --screenshots DIR

First a wrong one, then the right one; then the page must be live, also after a reload. Exit status 1 when
anything is wrong.
"""

import argparse
import sys
import time
from pathlib import Path

from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By

from check import AXE, Failures, Page, axe_source, chromium, number


def show(driver, token, seconds=60):
    """Sends a token, and waits for the page that answers: the driver does not wait for what a click loads later."""
    field = driver.find_element(By.ID, "token")
    field.clear()
    field.send_keys(token)
    driver.execute_script("window.asks = true")
    driver.find_element(By.TAG_NAME, "button").click()
    end = time.monotonic() + seconds
    while not answered(driver):
        if time.monotonic() > end:
            sys.exit(f"FAILED: no page has come within {seconds} s after a token was shown")
        time.sleep(0.1)


def answered(driver):
    try:
        return driver.execute_script("return !window.asks && document.readyState === 'complete'")
    except WebDriverException:
        # Between two pages.
        return False


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--token", required=True)
    parser.add_argument("--screenshots", required=True)
    arguments = parser.parse_args()
    folder = Path(arguments.screenshots)
    folder.mkdir(parents=True, exist_ok=True)
    failures, driver = Failures(), chromium()
    try:
        page = Page(driver, arguments.url, failures)
        for width, scheme in ((1280, "light"), (360, "dark")):
            page.view(width, scheme)
            driver.get(arguments.url)
            driver.save_screenshot(str(folder / f"login-{width}-{scheme}.png"))
            driver.execute_script(f"{axe_source()}; window.axe = axe;")
            result = driver.execute_async_script(AXE)
            failures.check(not result, f"axe-core finds nothing, {width} {scheme}", "; ".join(result))
        failures.check(not driver.find_elements(By.CSS_SELECTOR, "[role=alert]"), "nobody is told off at first")
        show(driver, "a" * 64)
        alert = driver.find_elements(By.CSS_SELECTOR, "[role=alert]")
        failures.check(bool(alert) and "not known" in alert[0].text, "a wrong token is told so")
        show(driver, arguments.token)
        live = lambda shown: (number(shown["step"]) or 0) > 0 and shown["link"] == "live"
        failures.check(not driver.find_elements(By.ID, "token"), "the right token opens the page")
        if not driver.find_elements(By.ID, "token"):
            page.wait("the page shows a step", live, 60)
            driver.refresh()
            page.wait("and after a reload", live, 60)
            driver.save_screenshot(str(folder / "page-after-login.png"))
            kept = driver.execute_script("return document.cookie")
            failures.check(kept == "", "scripts do not see the cookie", kept)
            strange = [url for url in page.asked() if not url.startswith(arguments.url) and not url.startswith("data:")]
            failures.check(not strange, "it talks to nobody else", "; ".join(strange))
    finally:
        driver.quit()
    sys.exit(failures.count > 0)


if __name__ == "__main__":
    main()
