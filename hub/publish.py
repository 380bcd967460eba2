"""publish: SAEs and their card into a repo of the Hugging Face Hub, in one commit.

README.md                 the card; the owner's words outside of its marks stay
saes.json                 what the card says, for programs
measured.png density.png  where something was measured
resid_post.6/             cfg.json, weights, metrics.json, training.json
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, get_token

from saert.hub.publishing.merge import model_file
from saert.hub.publishing.names import MAIN, check_repo
from saert.hub.publishing.push import Pushed, Remote, natural, root_files
from saert.hub.publishing.stage import CARD, Saes, Settings, stage
from saert.hub.sources.http import HttpError, patiently, unreachable

QUERY = re.compile(r"(://[^\s?'\"<>]*)\?[^\s'\"<>)]*")  # may hold a signature, which is a secret
SIGNED = re.compile(r"(?i)[?&](?:x-amz-|x-goog-|sig(?:nature)?=|(?:key-pair-id|policy|token)=)")


@dataclass(frozen=True)
class Published:
    """Attributes:
    repo_id, saes: where, and by which paths `load` finds them.
    files: paths that were written: none if the repo held all of it already.
    removed: paths of an earlier publication that were deleted.
    stale: other SAEs of the repo whose weights somebody replaced; the card says no numbers of them.
    commit: the commit that holds them; None of a dry run.
    url: of that commit, or of the pull request; None of a dry run.
    unmeasured: the SAEs that no metrics were found for.
    card: the README.md, as it is now.
    """

    repo_id: str
    saes: tuple[str, ...]
    files: tuple[str, ...]
    removed: tuple[str, ...]
    stale: tuple[str, ...]
    commit: str | None
    url: str | None
    unmeasured: tuple[str, ...]
    card: str = field(repr=False)


def publish(
    saes: Saes,
    repo_id: str,
    *,
    format: str = "saelens",
    into: str = "",
    private: bool = False,
    revision: str | None = None,
    tags: Sequence[str] = (),
    message: str | None = None,
    base_model: str | None = None,
    model_type: str | None = None,
    license: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    dry_run: bool = False,
) -> Published:
    """Write SAEs, their measurements and a model card into a repo of the Hub, made if missing.

    What is there already is not sent again, so the call may be repeated after a broken connection;
    if all of it is there, nothing is committed. SAEs that were published before stay on the card.

    Args:
        saes: an SAE, {name: SAE}, a training run's folder, or any folder of SAEs that `load_all`
            reads. Metrics come from `eval.json` in the folder, `metrics.json` beside an SAE, or its
            metadata. Folders are named after hookpoints, or as the dict says.
        repo_id: "USER/NAME".
        format: "saelens", or "sparsify" (TopK and GroupMax; without metadata).
        into: a folder of the repo to publish below, for further SAEs at the same hookpoints.
        private: make a new repo private; refused if it is there and public.
        revision: a branch, made if missing.
        tags: names for the commit, such as "v1.0".
        base_model: the Hub id of the model, if the SAEs do not say it; it goes before what they
            say.
        model_type: the model's `config.model_type`, for sparsify, if the SAEs do not say it.
        license: as the Hub spells it, for the card.
        create_pr: open a pull request instead of committing to the branch.
        token: default: what `hf auth login` or HF_TOKEN left.
        dry_run: check everything, make the card as for a new repo, ask nothing of the network.

    Raises:
        ValueError: what is wrong with the SAEs, the names or the repo; nothing was sent.
        ConnectionError: the connection broke, the Hub was too busy, or others kept committing;
            repeat the call.
        OSError: storage refused an upload.
        huggingface_hub.errors.HfHubHTTPError: the Hub's own answers, unchanged.

    >>> from saert.hub import bundled
    >>> publish(bundled.SAES, "me/tiny-saes", dry_run=True).saes
    ('mlp_in.2', 'resid_post.0', 'resid_post.1', 'resid_post.2', 'resid_post.3')
    """
    check_repo(repo_id, revision, tags, create_pr)
    known = token or get_token()
    if known is None and not dry_run:
        raise ValueError("no token for the Hub: run `hf auth login`, or set HF_TOKEN")
    settings = Settings(repo_id, format, into, base_model, model_type, (known,) if known else ())
    branch = None if revision == MAIN else revision
    with TemporaryDirectory(prefix="saert-publish-") as folder:
        staged = stage(saes, Path(folder), settings)
        pushed: Pushed | None = None
        if dry_run:
            root = root_files(staged.entries, repo_id, license=license, revision=branch)
            root |= model_file(staged.entries, {}, None, repo_id)
            files, card = tuple(sorted({*staged.files, *root})), root[CARD].decode()
        else:
            api = HfApi(token=known)
            remote = Remote(api, repo_id, branch, tuple(tags), license, create_pr)
            said = message or f"Publish {', '.join(staged.entries)}"
            with _connection():
                pushed = patiently(lambda: remote.push(staged, said, private))
            files, card = pushed.files, pushed.card
        entries = staged.entries if pushed is None else pushed.entries
    return Published(
        repo_id=repo_id,
        saes=tuple(sorted(staged.entries, key=natural)),
        files=files,
        removed=() if pushed is None else pushed.removed,
        stale=() if pushed is None else pushed.stale,
        commit=None if pushed is None else pushed.commit,
        url=None if pushed is None else pushed.url,
        unmeasured=tuple(path for path in staged.entries if entries[path].metrics is None),
        card=card,
    )


@contextmanager
def _connection() -> Iterator[None]:
    """A connection that breaks, during an upload or another request, as one exception.

    No message has the query of an address: those that uploads go to are signed in it.
    """
    try:
        yield
    except (HttpError, RuntimeError) as error:  # uploads wrap theirs in a RuntimeError
        uploading = not isinstance(error, HttpError)
        why = error.__cause__ if uploading else error
        if (reason := unreachable(why)) is not None:
            said = f"{error} ({reason})" if uploading else reason
            again = ": what has arrived is not sent again" if uploading else ""
            raise ConnectionError(f"{_bare(said)}; publish again{again}") from None
        if isinstance(why, HttpError) and (uploading or SIGNED.search(str(why))):
            raise OSError(_bare(f"{error} ({why})" if uploading else str(why))) from None
        raise


def _bare(text: str) -> str:
    """Without the queries of addresses."""
    return QUERY.sub(r"\1", text)
