"""`saert app` as the browser tests run it: it ends when the process that asked for it has ended.

python tests/app_server.py WATCHED_PID [OPTION]...
"""

from __future__ import annotations

import os
import sys
import threading
import time


def end_with(pid: int) -> None:
    """Leave as soon as `pid` is gone, however it went."""
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            os._exit(0)
        time.sleep(0.5)


if __name__ == "__main__":
    threading.Thread(target=end_with, args=(int(sys.argv[1]),), daemon=True).start()
    from saert.cli import app

    app(["app", "--no-open", *sys.argv[2:]])
