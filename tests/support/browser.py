"""A headless Chromium, spoken to over two pipes in its own DevTools protocol."""

import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
from base64 import b64decode
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = (
    *("--headless", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu"),
    *("--disable-background-networking", "--no-first-run", "--hide-scrollbars"),
)
# The browser reads commands at 3 and writes answers at 4.
LAUNCH = """
import os, sys
for end, number in zip(sys.argv[1:3], (3, 4)):
    os.dup2(int(end), number)
os.execv(sys.argv[3], sys.argv[3:])
"""
# Of a key: its code on Windows, and the text that it types.
KEYS = {
    "Tab": (9, ""),
    "Enter": (13, "\r"),
    " ": (32, " "),
    "ArrowRight": (39, ""),
    "Escape": (27, ""),
    "Home": (36, ""),
}


# Wider than the window, and in nothing that scrolls.
OVERFLOWING = """
[...document.body.querySelectorAll("*")]
  .filter((e) => !e.closest(".scroll") || e.matches(".scroll"))
  .filter((e) => e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 0.5)
  .map((e) => `${e.tagName}.${e.getAttribute("class")}: ${e.textContent}`)
"""


class Page:
    """One file in a browser of its own. `complaints` is what the console and the network said."""

    def __init__(self, path: Path, profile: Path) -> None:
        assert CHROMIUM is not None
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        # These may be 3 and 4 themselves, in the wrong order.
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, answers)]
        command = [CHROMIUM, *ARGUMENTS, f"--user-data-dir={profile}", "about:blank"]
        self._browser = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *map(str, high), *command],
            pass_fds=high,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (commands, answers, *high):
            os.close(end)
        self._left = b""
        self._count = 0
        self._session: str | None = None
        self._events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self._url = path.as_uri()

    def __enter__(self) -> "Page":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._commands)
        self._browser.terminate()
        self._browser.wait(timeout=20)
        os.close(self._answers)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What the browser answers to a command; its events until then are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self._events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._answers], [], [], 60)
            assert ready, "the browser is silent"
            part = os.read(self._answers, 1 << 16)
            assert part, "the browser has ended"
            self._left += part
        line, self._left = self._left.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def show(self, *, width: int, dark: bool, scripts: bool = True) -> None:
        """Loads the file anew at a width in pixels and a colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self._events.clear()
        self.call("Page.navigate", url=self._url)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._next())

    @property
    def complaints(self) -> list[str]:
        """Errors and messages of the console, and requests beside that for the file itself."""
        found = []
        for event in self._events:
            method, told = event["method"], event["params"]
            if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                found.append(json.dumps(told))
            if method == "Network.requestWillBeSent" and told["request"]["url"] != self._url:
                found.append(told["request"]["url"])
        return found

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        given = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in given, given
        return given["result"].get("value")

    def tap(self, selector: str, across: float = 0.5, down: float = 0.5) -> None:
        """Touches an element at these shares of its width and height, and lifts the finger."""
        self.call("Emulation.setTouchEmulationEnabled", enabled=True)
        at = self.value(f"""(() => {{
          const node = document.querySelector({json.dumps(selector)});
          node.scrollIntoView({{ block: "center" }});
          const box = node.getBoundingClientRect();
          return [box.left + {across} * box.width, box.top + {down} * box.height];
        }})()""")
        self.call(
            "Input.dispatchTouchEvent",
            type="touchStart",
            touchPoints=[dict(zip("xy", at, strict=True))],
        )
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def picture(self) -> bytes:
        """What the window shows, as a PNG file."""
        return b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def press(self, key: str, times: int = 1) -> None:
        """Presses a key."""
        code, text = KEYS[key]
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                typed = {"text": text} if text and kind == "keyDown" else {}
                self.call(
                    "Input.dispatchKeyEvent",
                    type=kind,
                    key=key,
                    code="Space" if key == " " else key,
                    windowsVirtualKeyCode=code,
                    **typed,
                )
