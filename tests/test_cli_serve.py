"""What `saert serve` refuses before it listens, and what it hands to the server."""

import sys

import pytest
from serve_cases import TEMPLATE
from typer.testing import CliRunner

from saert.cli import app

runner = CliRunner()


@pytest.fixture
def served(monkeypatch):
    """The arguments of `run.serve`; nothing listens, and engines are closed."""
    calls = []
    monkeypatch.setattr("saert.engines.server.run.serve", lambda *args: calls.append(args))
    yield calls
    for service, *_ in calls:
        service.engine.close()


def ask(*options, env=None):
    return runner.invoke(app, ["serve", *options], env=env or {"SAERT_API_KEY": ""})


def test_other_machines_need_a_key(served):
    refused = ask("--host", "0.0.0.0", "-s", "bundled:resid_post.2")
    assert refused.exit_code == 2 and "SAERT_API_KEY" in refused.output
    for options, env in (("--no-key",), None), ((), {"SAERT_API_KEY": "a, b"}):
        found = ask("--host", "0.0.0.0", "-s", "bundled:resid_post.2", *options, env=env)
        assert found.exit_code == 0, found.output
    (*_, open_, _, _, _), (*_, keys, _, _, _) = served
    assert not open_ and keys.allow("Bearer a") and keys.allow("Bearer b")
    assert not keys.allow("Bearer a, b")


def test_options_reach_the_server(served, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    options = ["--streams", "3", "--waiting", "4", "--timeout", "5", "--max-tokens", "6"]
    options += ["--max-body", "7000", "--name", "story", "--chat-template", str(template)]
    found = ask("-s", "bundled:resid_post.2", "--port", "8123", "--slots", "2", *options)
    assert found.exit_code == 0, found.output
    ((service, _, host, port, _),) = served
    assert (host, port, service.name) == ("127.0.0.1", 8123, "story")
    limits = service.limits
    assert (limits.streams, limits.waiting, limits.seconds) == (3, 4, 5.0)
    assert (limits.max_tokens, limits.body) == (6, 7000)
    assert service.jobs.template == TEMPLATE and not service.log_text
    assert [one.slots for one in service.engine.attached.values()] == [2]


def test_two_saes_at_one_hookpoint_are_refused(served):
    refused = ask("-s", "bundled:resid_post.2", "-s", "bundled:resid_post.2")
    assert refused.exit_code == 2 and "two SAEs read resid_post.2" in refused.output


def test_without_the_extra(monkeypatch):
    import saert.engines.server.run  # noqa: F401

    package = sys.modules["saert.engines.server"]
    for name in ("run", "app", "service"):  # to be imported anew
        monkeypatch.delitem(sys.modules, f"saert.engines.server.{name}")
        monkeypatch.delattr(package, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    refused = ask()
    assert refused.exit_code == 2 and "pip install 'saert[serve]'" in refused.output
