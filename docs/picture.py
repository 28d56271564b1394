"""Writes docs/images/report.png, the first screen of the default run's report: `make picture`.

The run is made anew, in a temporary folder, with the code at hand, and drawn by headless Chromium; the variable
CHROMIUM names another browser.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PICTURE = Path(__file__).parent / "images" / "report.png"
WIDTH, HEIGHT = 1280, 1162  # ends in the gap below the layers' card
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def main() -> None:
    """Run, draw, replace the picture."""
    browser = find_browser()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "digits"  # the name stands on the picture
        subprocess.run([sys.executable, "-m", "bitsmith", "run", "--out", str(run)], check=True)
        draw(browser, run / "report.html", PICTURE)
    print(f"wrote {PICTURE}")


def find_browser() -> str:
    """The path of a Chromium."""
    wanted = os.environ.get("CHROMIUM")
    found = next((path for name in ([wanted] if wanted else NAMES) if (path := shutil.which(name))), None)
    if found is None:
        raise SystemExit(f"no browser found; looked for {wanted or ', '.join(NAMES)}. Set CHROMIUM=PATH")
    return found


def draw(browser: str, page: Path, picture: Path) -> None:
    """A picture of the top of ``page``, in the light colours."""
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
    size = (f"--window-size={WIDTH},{HEIGHT}", "--blink-settings=preferredColorScheme=1")
    output = f"--screenshot={picture}"
    subprocess.run([browser, *options, *size, output, page.resolve().as_uri()], check=True, timeout=120)


if __name__ == "__main__":
    main()
