"""Open every page of the built site in Chromium, wide and as on a phone, light and dark.

    python docs/look.py [--shots FOLDER] [PAGE ...]

Fails if a page writes an error to the console, asks for anything from elsewhere, or is wider than its window.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import shutil
import sys
import threading
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

SITE = Path(__file__).parents[1] / "site"
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


def served() -> str:
    """Serve the site, and return its address."""
    handler = functools.partial(_Quiet, directory=SITE)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/"


def faults(page: Page, address: str, uri: str, shots: Path | None, name: str) -> list[str]:
    """Return what is wrong with a page."""
    found: list[str] = []
    page.on("console", lambda message: found.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith((address, "data:", "blob:")) else found.append(request.url),
    )
    page.goto(address + uri)
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    if wide > 1:
        found.append(f"{wide} px wider than the window")
    if shots is not None:
        shots.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=shots / f"{name}.png")
    return found


def main() -> None:
    """Look at all pages, or at those named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*")
    parser.add_argument("--shots", type=Path)
    a = parser.parse_args()
    executable = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if executable is None:
        sys.exit(f"no browser: install one of {', '.join(BROWSERS)}")
    uris = a.pages or sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
    bad, address = 0, served()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        for width, (w, h) in WIDTHS.items():
            for scheme in ("light", "dark"):
                context = browser.new_context(viewport={"width": w, "height": h}, color_scheme=scheme)
                for uri in uris:
                    page = context.new_page()
                    for fault in faults(page, address, uri, a.shots, f"{uri.replace('/', '-')}-{width}-{scheme}"):
                        bad += 1
                        print(f"{uri}, {width}, {scheme}: {fault}")
                    page.close()
                context.close()
        browser.close()
    print(f"{len(uris)} pages, {bad} faults")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
