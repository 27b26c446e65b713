"""Files by name, from a directory or from a repository of the Hugging Face Hub.

The Hub's own client does everything: its cache, its resumption, its HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    validate_repo_id,
)

from pose2id.io.checks import checked_flag

# Of the client's HTTP library: requests' errors are OSErrors too, those of httpx and httpx2 are not.
_HTTP_ERROR: Any = HfHubHTTPError.__bases__[0]


class MissingFilesError(FileNotFoundError):
    """A place that is there lacks files, or they are not in the cache."""


class Place:
    """A directory if there is one of this name, else a repository at one commit; neither is a FileNotFoundError.

    `argument` is the caller's name for it, and `known` what it may be, for errors; for the rest see
    `IdentityGenerator.from_pretrained`. `commit` is what `revision` resolved to, once a file was there; None for a
    directory.
    """

    def __init__(
        self,
        repo_or_dir: str | os.PathLike[str],
        argument: str,
        *,
        known: str = "",
        revision: str = "main",
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> None:
        self.name = os.fspath(repo_or_dir)
        self.commit: str | None = None
        self._argument = argument
        self._revision = revision
        self._cache_dir = None if cache_dir is None else Path(cache_dir)
        reasons = {
            "local_files_only=True": checked_flag(local_files_only, "local_files_only"),
            "HF_HUB_OFFLINE is set": constants.HF_HUB_OFFLINE,
        }
        self._cache_only = next((reason for reason, holds in reasons.items() if holds), "")
        self._token = token
        directory = Path(self.name).expanduser()
        self._directory = directory if self.name and directory.is_dir() else None
        if self._directory is None:
            with contextlib.suppress(HFValidationError):
                validate_repo_id(self.name)
                if "/" in self.name:  # without a user, a mistyped directory is likelier
                    return
            rule = "a directory or a repository such as 'user/name'"
            remedy = f" Known are {known}." if known else ""
            raise FileNotFoundError(f"{argument} must be {rule}; there is no directory {self.name!r}.{remedy}")

    def __str__(self) -> str:
        return f"directory {self.name}" if self._directory else f"repository {self.name} at {self._revision!r}"

    def source(self) -> dict[str, str]:
        """Repository to commit; empty for a directory: local paths are not recorded."""
        return {} if self.commit is None else {self.name: self.commit}

    def settle(self, names: Sequence[str]) -> None:
        """Let the first of these files that is in the cache decide the commit.

        The cache also knows what a commit lacks: without a connection, the client would try for half a minute.
        """
        for name in names:
            if self._directory is None and isinstance(self._cached(name, self._revision), str):
                with contextlib.suppress(MissingFilesError):
                    self._path(name)
                return

    def files(self, names: Sequence[str]) -> list[Path]:
        """Paths of all these files, of one commit; or one `MissingFilesError` that names all missing ones."""
        found, missing, reasons = [], [], []
        for name in names:
            try:
                found.append(self._path(name))
            except MissingFilesError as error:
                missing.append(name)
                reasons.append(str(error))
        if missing:
            raise MissingFilesError(f"{self} lacks {', '.join(missing)} ({'; '.join(dict.fromkeys(reasons))}).")
        return found

    def _path(self, name: str) -> Path:
        if self._directory is not None:
            path = self._directory / name
            if not path.is_file():
                raise MissingFilesError("no such file")
            return path
        if self.commit is not None and self._cached(name, self.commit) is _CACHED_NO_EXIST:
            raise MissingFilesError("no such file in the repository")
        path = self._download(name)
        # The first file decides the commit: a push in between must not mix files of two.
        self.commit = path.parents[name.count("/")].name
        return path

    def _download(self, name: str) -> Path:
        # Not snapshot_download of all files: it asks for a listing first, does not name the file whose download broke
        # off, and offline, in older clients, returns an incomplete folder of the cache without a word.
        try:
            path = hf_hub_download(
                self.name,
                name,
                revision=self.commit or self._revision,
                cache_dir=self._cache_dir,
                local_files_only=bool(self._cache_only),
                token=self._token,
            )
        except LocalEntryNotFoundError as error:
            if not self._cache_only:  # from here on: the client tried for half a minute, and would again for every file
                response = getattr(error.__cause__, "response", None)
                status = "cannot be reached" if response is None else f"answers {response.status_code}"
                self._cache_only = f"the Hub {status}"
            raise MissingFilesError(f"not in the cache, and {self._cache_only}") from error
        except EntryNotFoundError as error:
            raise MissingFilesError("no such file in the repository") from error
        except RevisionNotFoundError as error:
            rule = f"a branch, tag or commit of {self.name}"
            raise FileNotFoundError(f"revision must be {rule}, got {self._revision!r}.") from error
        except RepositoryNotFoundError as error:
            rule = f"{self._argument} must be a directory or a repository of the Hub"
            given = f"there is no directory {self.name!r} and no repository that you may read"
            remedy = "Check the name, log in with `hf auth login`, accept its terms"
            raise FileNotFoundError(f"{rule}; {given}. {remedy}.") from error
        except (OSError, _HTTP_ERROR) as error:
            if getattr(error, "errno", None) is not None:
                raise  # of the disk, not of the connection
            # Its kind alone: messages of HTTP libraries may quote the token.
            why = f"could not be downloaded ({type(error).__name__})"
            raise ConnectionError(f"{name} of {self} {why}. Try again: whole files are kept.") from error
        return Path(path)

    def _cached(self, name: str, revision: str) -> Any:
        return try_to_load_from_cache(self.name, name, cache_dir=self._cache_dir, revision=revision)
