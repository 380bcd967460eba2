"""A process that loads SAEs through the real client, step by step, and says how each step went.

    report = run_client(hub, home, {"name": "load('someone/saes', 'resid_post.0')", …})

A step is an expression. It may use `load`, `load_all`, `fresh()` (an empty cache from here on),
`offline(bool)`, `full_disk()` and `patch(name, value)` (until the step ends), `url` and `web` (the
server as the Hub, and as a stranger), and the modules below. The report of a step has `sae` or
`saes` or `value`, or `error` (class names), `text`; always `slept`, `log` (all that any logger
said) and `left` (files in the cache that look unfinished).
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hub_server import HubServer

CLIENT = """
import io, itertools, json, logging, os, pathlib, sys, time, traceback, urllib.request
from types import SimpleNamespace
from urllib.parse import quote

said = io.StringIO()
logging.basicConfig(stream=said, level=logging.DEBUG, force=True)

import huggingface_hub, torch
from huggingface_hub import constants, hf_hub_download, snapshot_download
from saert.hub.find import find
from saert.hub.load import load, load_all
from saert.sae import SAE

huggingface_hub.utils.logging.set_verbosity_debug()
huggingface_hub.utils.logging.enable_propagation()
url, steps = json.load(sys.stdin)
web = url.replace("127.0.0.1", "localhost")  # the same server, but not the Hub's name
home, number, slept, patched = pathlib.Path(constants.HF_HOME), itertools.count(), [], []
sleep = time.sleep
time.sleep = lambda seconds: (slept.append(seconds), sleep(min(seconds, 0.01)))[0]

def fresh():
    global home
    home = home.parent / f"{home.name}-{next(number)}"
    constants.HF_HOME, constants.HF_HUB_CACHE = str(home), str(home / "hub")
    return True

def offline(on):
    constants.HF_HUB_OFFLINE = on
    return True

def patch(name, value):
    module, _, attribute = name.rpartition(".")
    patched.append((sys.modules[module], attribute, getattr(sys.modules[module], attribute)))
    setattr(sys.modules[module], attribute, value)
    return True

def full_disk():
    return patch("shutil.disk_usage", lambda _: SimpleNamespace(free=999))

def describe(sae):
    return dict(hookpoint=str(sae.hookpoint), mark=sae.b_dec[0].item(), metadata=sae.metadata)

report = {}
for name, code in steps.items():
    try:
        urllib.request.urlopen(f"{url}/mark/{quote(name)}").read()
    except OSError:
        pass  # the server is down, and that is the point
    slept.clear(), said.seek(0), said.truncate()
    begin = time.perf_counter()
    try:
        found = eval(code)
        if isinstance(found, SAE):
            result = dict(sae=describe(found))
        elif isinstance(found, dict) and any(isinstance(one, SAE) for one in found.values()):
            result = dict(saes={key: describe(one) for key, one in found.items()})
        else:
            result = dict(value=found)
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        result = dict(error=kinds, text=str(error), trace=traceback.format_exc())
    for module, attribute, before in reversed(patched):
        setattr(module, attribute, before)
    patched.clear()
    files = [one for one in home.rglob("*") if one.is_file() or one.is_symlink()]
    left = [str(one) for one in files if one.name.endswith((".incomplete", ".partial", ".tmp"))]
    blobs = [str(one.relative_to(home)) for one in files]
    report[name] = result | dict(slept=list(slept), log=said.getvalue(), left=left, files=blobs,
                                 seconds=time.perf_counter() - begin)
print(json.dumps(report, default=str))
"""


def start_client(
    hub: HubServer, home: Path, token: str | None = None, **environment: str
) -> "subprocess.Popen[str]":
    """Give it its steps with `finish`."""
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT],
        env=hub.environment(home, token) | environment,
        cwd=home.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(
    client: "subprocess.Popen[str]", hub: HubServer, steps: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    out, err = client.communicate(json.dumps([hub.url, dict(steps)]), timeout=240)
    assert client.returncode == 0, err
    report: dict[str, dict[str, Any]] = json.loads(out.splitlines()[-1])
    return report


def run_client(
    hub: HubServer,
    home: Path,
    steps: Mapping[str, str],
    token: str | None = None,
    **environment: str,
) -> dict[str, dict[str, Any]]:
    return finish(start_client(hub, home, token, **environment), hub, steps)
