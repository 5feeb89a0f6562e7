"""A real browser for tests of pages: Chromium without a window and without a network."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: `make browser` as root installs it")

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
         "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr"]


@dataclass
class Visit:
    dom: str                                    # after the scripts have run
    console: list[str]                          # messages, errors above all


def chromium(page: Path, folder: Path, *flags: str) -> Visit:
    """Open a file; `folder` gets the browser's profile."""
    profile = folder / f"profile{len(list(folder.glob('profile*')))}"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, page.resolve().as_uri()]
    done = subprocess.run(
        command, capture_output=True, timeout=60, stdin=subprocess.DEVNULL, text=True, errors="replace",
        env=os.environ | {"HOME": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    return Visit(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])


def screenshot(page: Path, folder: Path, width: int, height: int, *flags: str) -> tuple[np.ndarray, Visit]:
    """Its pixels [H,W,3] uint8."""
    picture = folder / "screenshot.png"
    # The page's clock runs ahead until its pictures are decoded, and each is drawn before the screenshot.
    drawn = "--virtual-time-budget=10000", "--run-all-compositor-stages-before-draw"
    visit = chromium(page, folder, f"--window-size={width},{height}", f"--screenshot={picture}", *drawn, *flags)
    return np.asarray(Image.open(picture).convert("RGB")), visit
