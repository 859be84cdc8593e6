"""Publish a trained student on the Hub: weights, heads, image processor, code, numbers, figures and a card.

    python training/publish.py runs/digits_k3 --repo-id ORG/NAME --dry-run   # check everything, list what would go up
    python training/publish.py runs/digits_k3 --repo-id ORG/NAME             # and upload it, in one commit
    AutoModel.from_pretrained("ORG/NAME")      # with raptor_hf imported, or with trust_remote_code=True

A dry run needs neither a token nor the network: it checks what can be checked, writes the card into RUN_FOLDER as
README.md and says what is left. The token is that of `hf auth login` or of HF_TOKEN. Only the files of a fixed list go
up; paths that lead out of the working directory and the names of user and host are taken out of them, and a file that
still holds some is refused. The commit is the last request of all: before it the repository is what it was, after it
the new model is whole. An upload that was cut off goes on with the same command. It takes as long as the weights need
to go up.
"""

import sys

from raptor_settings.parse import parse_settings
from raptor_settings.publish import PublishSettings, with_folder_first

if __name__ == "__main__":
    # --help and mistakes are answered before the imports below, which take seconds
    parse_settings(PublishSettings, with_folder_first(sys.argv[1:]))

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token

# HTTPError is what the client raises where there is no answer; the package it comes from differs between its versions
from huggingface_hub.errors import (
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, hf_raise_for_status

from raptor_hf import RaptorConfig
from raptor_hf.hub.privacy import PrivateData, blot_tokens
from raptor_hf.hub.publication import Publication, is_published, make_publication
from raptor_hf.recipes.files import write_text_atomically
from raptor_hf.recipes.settings import user_errors

# what a repository may hold before the first model comes
WITHOUT_MODEL = {".gitattributes", ".gitignore", "README.md", "LICENSE", "LICENSE.md"}
NO_TOKEN = "there is no token for the Hub; run `hf auth login`, or set HF_TOKEN"


class Unreachable(ConnectionError):
    """The Hub gives no answer."""


@dataclass(frozen=True)
class Target:
    """The repository as it is before the upload; None where there is none."""

    head: str | None  # commit that the new one follows
    branch_exists: bool
    stale: list[str]  # files of an earlier publication that this one does not have


def main() -> None:
    settings = parse_settings(PublishSettings, with_folder_first(sys.argv[1:]))
    huggingface_hub.logging.set_verbosity_error()  # retries are logged with the signed addresses of uploads
    with user_errors():
        token = get_token()
        publication = make_publication(
            settings.run_folder,
            settings.repo_id,
            PrivateData.of_this_machine(settings.repo_id),
            revision=settings.revision,
            teacher_run=settings.teacher_run,
            base_model=settings.base_model,
            license=settings.license,
            needs_license=not settings.dry_run,
        )
        print_files(publication)
        if settings.dry_run:
            dry_run(settings, publication, token)
            return
        if token is None:
            raise ValueError(NO_TOKEN)
        api = HfApi(token=token)
        with hub_errors(token):
            target = check_hub(api, settings, publication)
        print_stale(target)
        with hub_errors(token):
            print(upload(api, settings, publication, target))


def dry_run(settings: PublishSettings, publication: Publication, token: str | None) -> None:
    """Checks the Hub as far as it can be reached, writes the card into the run's folder, and says what is left."""
    card = Path(settings.run_folder) / "README.md"
    write_text_atomically(card, publication.files["README.md"].decode())
    left = []
    if publication.card.data.license is None:
        left.append("the licence of the teacher is not known here; give --license, such as apache-2.0")
    if token is None:
        left.append(f"{NO_TOKEN}; its rights, the name on the Hub and the Hub's check of the card are not checked")
    else:
        try:
            with hub_errors(token):
                print_stale(check_hub(HfApi(token=token), settings, publication))
        except (Unreachable, OfflineModeIsEnabled) as error:
            left.append(f"{' '.join(str(error).split())}; token, name and the Hub's check of the card are not checked")
    for line in left:
        print(f"{'left':>15}  {line}")
    checked = "all checks passed" if not left else "all checks passed but for what is left"
    print(f"the card is {card}; nothing was uploaded to {settings.repo_id}: this was a dry run, and {checked}")


def print_stale(target: Target) -> None:
    """The files that the upload removes."""
    for path in target.stale:
        print(f"{'removed':>15}  {path}")


@contextlib.contextmanager
def hub_errors(token: str) -> Iterator[None]:
    """Turns what the client raises into an OSError of one line, without token, addresses of uploads or traceback.

    For requests only: a RuntimeError of work done here shows its traceback.
    """
    try:
        yield
    except OfflineModeIsEnabled:  # says how to turn it off
        raise
    except (HTTPError, RuntimeError, ConnectionError, TimeoutError) as error:
        # an upload in a thread fails with a RuntimeError around the reason; that of xet, the default way up, fails
        # with any of the last three, whose text may hold signed addresses
        reason = error if isinstance(error, HTTPError) else error.__cause__
        reason = reason if isinstance(reason, HTTPError) else error
        message = explain(reason).replace(token, "(token)")
        silent = isinstance(reason, HTTPError) and getattr(reason, "response", None) is None
        raise (Unreachable if silent else ConnectionError)(message) from None


def explain(error: Exception) -> str:
    """Says what went wrong with the Hub, and what to do."""
    again = "the model there is unchanged or whole; give the same command again"
    if not isinstance(error, HTTPError):
        return f"the exchange with the Hub broke off ({type(error).__name__}); {again}"
    response = getattr(error, "response", None)
    if response is None:
        return f"no answer from the Hub ({type(error).__name__}); {again}"
    said = getattr(error, "server_message", None) or response.headers.get("X-Error-Message")
    answer = f"the Hub answered {response.status_code} to {response.request.method} {response.request.url.path}"
    answer += f" ({' '.join(blot_tokens(said).split())})" if said else ""
    if response.status_code == 401:
        return f"{answer}: the token is not valid; run `hf auth login`"
    if response.status_code == 403:
        return f"{answer}: the token may not do that; it needs write access to that repository or organisation"
    return f"{answer}; {again}"


def print_files(publication: Publication) -> None:
    """The files with their sizes in bytes, and the sum."""
    sizes = publication.sizes()
    for path, size in sizes.items():
        print(f"{size:>15,}  {path}")
    print(f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files")


def check_hub(api: HfApi, settings: PublishSettings, publication: Publication) -> Target:
    """Finds out what the upload would fail at: token, rights, name and card.

    Raises:
        ValueError: what is wrong, and what would work.
        HTTPError: the Hub cannot be reached, or refuses the token.
    """
    user = api.whoami()
    repo_id, revision = settings.repo_id, settings.revision or "main"
    try:
        main = api.model_info(repo_id)
    except RepositoryNotFoundError:
        main = None
    if main is None or not settings.create_pr:  # anyone may propose a change
        check_rights(user, repo_id)
    validate_card(api, publication.card)
    if main is None:
        return Target(head=None, branch_exists=revision == "main", stale=[])
    if settings.private and not main.private:
        raise ValueError(f"{repo_id} is there and is public: --private would not hide it. Make it private on the Hub")
    try:
        branch = main if revision == "main" else api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        if settings.create_pr:
            raise ValueError(f"{repo_id} has no branch {revision!r} that a pull request could be made to") from None
        return Target(head=main.sha, branch_exists=False, stale=stale_files(api, repo_id, main, publication))
    return Target(head=branch.sha, branch_exists=True, stale=stale_files(api, repo_id, branch, publication))


def validate_card(api: HfApi, card: ModelCard) -> None:
    """Asks the Hub's own validator; in versions 1, ModelCard.validate ignores HF_ENDPOINT.

    Raises:
        ValueError: what is wrong with the card.
    """
    response = get_session().post(f"{api.endpoint}/api/validate-yaml", json={"repoType": "model", "content": str(card)})
    if response.status_code == 400:
        errors = "; ".join(str(error.get("message")) for error in response.json().get("errors", []))
        raise ValueError(f"the Hub refuses the card: {blot_tokens(errors or response.text)}")
    hf_raise_for_status(response)


def check_rights(user: dict[str, Any], repo_id: str) -> None:
    """Refuses a token that only reads, a namespace that is not the user's, and one that the token does not cover."""
    token = user.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise ValueError("the token may only read; make one that may write at https://huggingface.co/settings/tokens")
    organisations = [org["name"] for org in user.get("orgs", []) if org.get("roleInOrg") != "read"]
    namespace = repo_id.partition("/")[0]
    if namespace not in (user["name"], *organisations):
        names = ", ".join([user["name"], *organisations])
        raise ValueError(f"repo_id is {repo_id!r}, but the token may write to these only: {names}")
    if token.get("role") == "fineGrained" and not covers(token.get("fineGrained", {}), repo_id):
        raise ValueError(
            f"the token is a fine-grained one that may not write to {repo_id}; give it write access to "
            f"the repositories of {namespace} at https://huggingface.co/settings/tokens"
        )


def covers(scopes: dict[str, Any], repo_id: str) -> bool:
    """Whether a fine-grained token may write to a repository: everywhere, in its namespace, or in itself."""
    if "repo.write" in scopes.get("global", []):
        return True
    names = (repo_id.lower(), repo_id.partition("/")[0].lower())
    return any(
        "repo.write" in scope.get("permissions", []) and str(scope.get("entity", {}).get("name")).lower() in names
        for scope in scopes.get("scoped", [])
    )


def stale_files(api: HfApi, repo_id: str, info: huggingface_hub.ModelInfo, publication: Publication) -> list[str]:
    """Lists the files of an earlier model, which the upload removes; refuses a repository of anything but a Raptor."""
    there = [sibling.rfilename for sibling in info.siblings or []]
    if "config.json" in there:
        with tempfile.TemporaryDirectory() as folder:
            path = api.hf_hub_download(repo_id, "config.json", revision=info.sha, local_dir=folder)
            family = json.loads(Path(path).read_text(encoding="utf-8")).get("model_type")
        if family != RaptorConfig.model_type:
            raise ValueError(f"{repo_id} is taken: it holds a model of type {family!r}; choose another repo_id")
    elif foreign := set(there) - WITHOUT_MODEL:
        raise ValueError(
            f"{repo_id} is taken: it holds {', '.join(sorted(foreign)[:3])} and no Raptor; choose another repo_id"
        )
    return sorted(path for path in there if is_published(path) and path not in publication.files)


def upload(api: HfApi, settings: PublishSettings, publication: Publication, target: Target) -> str:
    """Makes repository and branch if need be, sends the files and commits them all at once; the commit's address."""
    repo_id, head = settings.repo_id, target.head
    if head is None:
        api.create_repo(repo_id, private=settings.private or None, exist_ok=True)
        head = api.model_info(repo_id).sha
    if not target.branch_exists:
        api.create_branch(repo_id, branch=settings.revision, revision=head, exist_ok=True)
    operations = [CommitOperationAdd(path, content) for path, content in publication.files.items()]
    operations += [CommitOperationDelete(path) for path in target.stale]
    commit = api.create_commit(
        repo_id,
        operations,
        commit_message=f"Publish {repo_id.partition('/')[2]} with raptor_hf",
        revision=settings.revision,
        create_pr=settings.create_pr,
        parent_commit=head,  # refused if someone else commits meanwhile
    )
    if commit.oid == head:
        return f"nothing has changed: {commit.commit_url}"
    return commit.pr_url or commit.commit_url


if __name__ == "__main__":
    main()
