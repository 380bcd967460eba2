"""Eight visitors at once through `gradio_client`: each gets what it would have got alone."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="needs gradio: pip install 'saert[demo]'")
gradio_client = pytest.importorskip("gradio_client")

from saert.demos.app import LAUNCH, QUEUE, build, open_default  # noqa: E402
from saert.demos.steer.setup import steps  # noqa: E402
from saert.demos.workbench import Workbench  # noqa: E402
from saert.hub import bundled  # noqa: E402
from saert.measure.steering import EditSpec, Sampling, Setup  # noqa: E402

SOURCE = "bundled:resid_post.2"
OTHER = "bundled:resid_post.1"
EDITS = [
    (EditSpec(SOURCE, 71, "add", 9.0),),
    (EditSpec(SOURCE, 546, "ablate"),),
    (EditSpec(SOURCE, 71, "clamp", 12.0), EditSpec(OTHER, 7, "add", 4.0)),
    (EditSpec(OTHER, 40, "add", 6.0, phase="generated"),),
]
SETUPS = [
    Setup(
        bundled.NAME, prompt, edits=edits, sampling=Sampling(10, temperature, 0.9, seed=seed)
    )
    for seed, (prompt, temperature, edits) in enumerate(
        (prompt, temperature, edits)
        for prompt, temperature in ((bundled.DEMO.prompt, 0.9), ("The dog ran to", 0.0))
        for edits in EDITS
    )
]  # fmt: skip
PUBLIC = {
    "/steer", "/snippet", "/look", "/search", "/card", "/ablation", "/ablation_effect",
    "/ablated_text", "/refinement",
}  # fmt: skip


@pytest.fixture(scope="module")
def url():
    app = build(open_default(None, [SOURCE, OTHER])).queue(**QUEUE)
    _, address, _ = app.launch(**LAUNCH)
    yield address
    app.close()


def visitor(url):
    return gradio_client.Client(url, verbose=False)


def steer(client, setup):
    """The whole answer but for the times."""
    answer = client.predict(setup.to_json(), api_name="/steer")
    return {name: value for name, value in answer.items() if not name.endswith("_ms")}


def mixed(client, setup):
    """What a busy visitor asks for: text between looks at latents."""
    source = setup.sources[0]
    return [
        steer(client, setup),
        client.predict(setup.prompt, source, api_name="/look"),
        client.predict(source, setup.prompt, -1, "kl", 2, "", api_name="/ablation")
        | {"seconds": None},
        steer(client, setup),
    ]


def differences(found, expected, where=""):
    """Every leaf that is not the same, with its path."""
    if isinstance(expected, dict) and isinstance(found, dict) and found.keys() == expected.keys():
        return [d for k in expected for d in differences(found[k], expected[k], f"{where}.{k}")]
    if isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}[{i}]")]
    return [] if found == expected else [f"{where}: {found} alone {expected}"]


def memory():
    """Resident, in MiB."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * 4 / 1024 if pages.exists() else 0.0


def test_what_programs_may_call(url):
    named = visitor(url).view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(named) == PUBLIC


def test_setups_differ_and_steer(url):
    """Otherwise the tests below would see nothing."""
    client = visitor(url)
    answers = [steer(client, setup) for setup in SETUPS]
    assert len({answer["steered"] for answer in answers}) >= len(SETUPS) - 1
    assert any(answer["steered"] != answer["default"] for answer in answers)


def test_two_streams_taken_in_turns():
    """Token by token for two visitors of one app: neither sees the other's edits."""
    bench = Workbench(open_default(None, [SOURCE, OTHER]))
    pair = SETUPS[0], SETUPS[1]  # one prompt, other edits

    def told(step):
        return (step.prompt, step.default, step.steered, step.live)

    alone = [[told(step) for step in steps(bench, setup)] for setup in pair]
    in_turns = zip_longest(*(steps(bench, setup) for setup in pair))
    together = zip(*([step and told(step) for step in turn] for turn in in_turns), strict=True)
    found = [[step for step in stream if step] for stream in together]
    assert found == alone
    assert alone[0] != alone[1]


@pytest.mark.slow
def test_eight_at_once_get_what_each_gets_alone(url):
    clients = [visitor(url) for _ in SETUPS]
    for source in (SOURCE, OTHER):  # waits for what the app reads in the background
        clients[0].predict("dog", source, api_name="/search")
    alone = [mixed(client, setup) for client, setup in zip(clients, SETUPS, strict=True)]
    at_once, used = threading.Barrier(len(SETUPS)), []

    def visit(client, setup):
        at_once.wait(60)
        return mixed(client, setup)

    with ThreadPoolExecutor(len(SETUPS)) as pool:
        for _ in range(2):
            assert differences(list(pool.map(visit, clients, SETUPS)), alone) == []
            used.append(memory())
    assert used[-1] - used[0] < 40, f"resident MiB after each round: {used}"
