"""`saert serve` as a process of its own, under load: real clients, 64 streams at a time."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading

import httpx
import openai
import pytest

from saert.hub import bundled

AT, KEY, STREAMS = "resid_post.2", "k", 64
PROMPTS = (
    "Once upon a time",
    "The dog",
    "Lily and Tom went to the park. They saw a big",
    "Mom said",
)


@pytest.fixture(scope="module")
def server():
    """Address and process; ended by SIGTERM, as a service manager does."""
    code = "import sys; from saert.cli import app; app(sys.argv[1:])"
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--grace", "2"]
    environment = os.environ | {"SAERT_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if "running on" in line:
            break
    else:
        raise AssertionError("".join(lines))
    address = next(word for word in json.loads(line)["event"].split() if word.startswith("http"))
    reader = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
    reader.start()
    yield address, process
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) in (0, -signal.SIGTERM)
    reader.join(5)
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    assert all("error" not in line for line in logged)
    assert any(line["event"] == "stopped" for line in logged)
    assert not any(prompt in "".join(lines) for prompt in PROMPTS[1:])


def asks():
    r = random.Random(0)
    for i in range(STREAMS):
        edits = [
            {
                "sae": AT,
                "latent": r.randrange(1024),
                "op": r.choice(["add", "clamp", "scale", "ablate"]),
                "amount": r.uniform(0, 15),
                "phase": r.choice(["all", "prompt", "generated"]),
            }
            for _ in range(1 + i % 3)
        ]
        yield {
            "model": "bundled",
            "prompt": r.choice(PROMPTS),
            "max_tokens": r.randrange(8, 60),
            "temperature": r.choice([0, 1]),
            "seed": i,
            "extra_body": {"saert": {"edits": edits, "splice": i % 5 == 0}},
        }


async def text_of(client, ask, leave_after=None):
    parts = []
    stream = await client.completions.create(**ask, stream=True)
    async for chunk in stream:
        parts.append(chunk.choices[0].text)
        if leave_after is not None and len(parts) >= leave_after:
            await stream.close()
            return None
    return "".join(parts)


@pytest.mark.slow
def test_64_streams_at_once_equal_their_solo_runs(server):
    address, _ = server
    given = list(asks())
    assert bundled.sae(AT).num_latents >= 1024

    async def main():
        options = dict(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=300)
        async with openai.AsyncOpenAI(**options) as client:
            leavers = [dict(ask, max_tokens=200) for ask in given[:16]]
            together = await asyncio.gather(
                *(text_of(client, ask) for ask in given),
                *(text_of(client, ask, 3) for ask in leavers),  # some leave midway
            )
            alone = [await text_of(client, ask) for ask in given]
            return together[:STREAMS], alone

    together, alone = asyncio.run(main())
    assert [i for i in range(STREAMS) if together[i] != alone[i]] == []
    assert len(set(together)) > STREAMS // 2
    metrics = httpx.get(f"{address}/metrics", headers={"authorization": f"Bearer {KEY}"}).text
    assert "saert_requests_running 0.0" in metrics and "saert_requests_waiting 0.0" in metrics
    assert 'outcome="cancelled"' in metrics
