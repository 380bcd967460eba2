"""What may not leave this machine: paths are cut, secrets are refused, the rest stays as it is."""

from pathlib import Path

import pytest

from saert.hub.publishing.private import refuse_secrets, without_paths


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("see file:///home/alice/x/y.txt now", "see y.txt now"),
        ("json:/home/alice/data/x.json", "json:x.json"),
        ("user@host:/home/alice/x", "user@host:x"),
        ("sqlite:////home/alice/db/x", "sqlite:x"),
        ("PYTHONPATH=/a/b:/home/alice/lib", "PYTHONPATH=b:lib"),
        ("--out=~/runs and --data /home/alice", "--out=runs and --data ~"),
        ("cwd=/scratch", "cwd=scratch"),
        ("read ../../alice/data x", "read data x"),
        ("\\\\srv\\alice\\x", "x"),
        ("text at \\\\srv\\alice\\x", "text at x"),
        ("run in C:\\Users\\alice\\m ok", "run in m ok"),
        ("gcc -I/home/alice/include", "gcc -Iinclude"),
        ("$HOME/runs and ${HOME}/x", "runs and x"),
        ("/home/alice", "~"),
        ("C:\\Users\\alice", "~"),
        (f"x{Path.cwd()}/data y", "xdata y"),
        # what stays
        ("see https://a.b/home/c and hf://a/b/c", "see https://a.b/home/c and hf://a/b/c"),
        ("s3://bucket/x/y", "s3://bucket/x/y"),
        ("a/b/c, train/x/y and 1/2", "a/b/c, train/x/y and 1/2"),
        ("data/*/train/*.json", "data/*/train/*.json"),
        ("tokens /s, ~5 a", "tokens /s, ~5 a"),
        ("git@github.com:me/repo.git", "git@github.com:me/repo.git"),
    ],
)
def test_paths_are_cut_wherever_they_stand(text, public):
    assert without_paths(text) == public


def test_keys_that_become_equal_lose_nothing():
    found = without_paths({"/home/alice/x": 1, "/mnt/x": 2, "x": 3, "x (2)": 4})
    assert sorted(found.values()) == [1, 2, 3, 4] and found["x"] == 3 and found["x (2)"] == 4


@pytest.mark.parametrize(
    "secret",
    [
        {"cmd": "curl -H 'Authorization: Bearer abcdefghijklmnop'"},
        {"x": ["eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abc"]},
        {"wandb_key": "0123456789abcdef0123456789abcdef01234567"},
        {"keyOfMine": "0123456789abcdef0123456789abcdef01234567"},
        {"private_key": "abc"},
        {"privateKey": "abc"},
        {"access_tokens": ["a"]},
        {"password": 12345},
        {"secrets": {"a": 1}},
        {"url": "https://x/y?sv=1&sig=abc"},
        {"url": "https://x/y?X-Amz-Signature=abc&x=1"},
        {"cmd": "train --token abc"},
        {"cmd": "HF_TOKEN=abc train"},
        {"nested": [{"Authorization": "x"}]},
        {"hf_" + "aB3" * 10: 1},
    ],
)
def test_secrets_are_refused(secret):
    with pytest.raises(ValueError, match="x.json.*take it out") as error:
        refuse_secrets(secret, "x.json")
    assert "abc" not in str(error.value) and "aB3" not in str(error.value)


def test_what_is_no_secret_is_not_refused():
    harmless = {
        "secretary": "ok", "eos_token": "</s>", "tokens": 5, "dead_tokens": 5, "hf_token": None,
        "use_auth_token": False, "session_tokens": 7, "key": "resid_post.0", "monkey": 1,
        "revision": "0123456789abcdef0123456789abcdef01234567", "cmd": "train --tokens 5",
        "url": "https://x/y?download=true",
    }  # fmt: skip
    refuse_secrets(harmless, "x.json", ("", "another"))
