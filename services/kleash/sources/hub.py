"""Models from the Hugging Face Hub, or from a mirror named by HF_ENDPOINT; token from HF_TOKEN.

The Hub's library names files and hashes; the bytes are received here, since the library begins a
file that was cut off again from its start, and leaves what a killed process had of it on the disk.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from kleash.base.errors import KleashError, UserError
from kleash.sources.errors import denied, not_found, unavailable
from kleash.sources.remote import RemoteFile
from kleash.sources.uri import Source
from kleash.sources.web import stream

_REMEDY = "set HF_TOKEN to a token that may, and accept the model's terms on its page"


class HubFolder:
    """A repository of the Hub at one commit."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.revision = ""

    def list_files(self) -> dict[str, RemoteFile]:
        """Of the top folder."""
        from huggingface_hub import HfApi

        source = self._source
        with _translated(source):
            found = HfApi().model_info(source.repo, revision=source.revision, files_metadata=True)
        self.revision = found.sha or ""
        if re.fullmatch("[0-9a-f]{40}", source.revision) and self.revision != source.revision:
            raise UserError(
                f"the Hub has commit {self.revision or 'none'} for {source}; write the 40 digits "
                "of a commit as the repository's history shows them."
            )
        files = {}
        for each in found.siblings or ():
            # Large files are known by the hash of their bytes, small ones by git's.
            digest = f"sha256:{each.lfs.sha256}" if each.lfs else f"git:{each.blob_id}"
            if "/" not in each.rfilename:
                files[each.rfilename] = RemoteFile(each.size, digest, digest)
        return files

    def pieces(self, name: str, file: RemoteFile, start: int) -> Iterator[bytes]:  # noqa: ARG002  its hash is checked when it is whole
        from huggingface_hub import get_token, hf_hub_url

        url = hf_hub_url(self._source.repo, name, revision=self.revision)
        return stream(url, start, token=get_token() or "", remedy=_REMEDY)


@contextlib.contextmanager
def _translated(source: Source) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except KleashError:
        raise
    except errors.GatedRepoError as error:
        raise denied(source.uri, _REMEDY, _first_line(error)) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"hf://{source.repo} has no revision {source.revision!r}; give a commit, branch or tag "
            "that the repository's page lists."
        ) from None
    except errors.RepositoryNotFoundError:
        raise not_found(source.uri, "or it is private: " + _REMEDY) from None
    except errors.OfflineModeIsEnabled:
        raise UserError(
            f"{source} cannot be fetched, as HF_HUB_OFFLINE is set; unset it, or give a folder "
            "that holds the model."
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise denied(source.uri, _REMEDY, _first_line(error)) from None
        if status == 404:
            raise not_found(source.uri, _first_line(error)) from None
        raise unavailable(source.uri, _first_line(error)) from None
    except Exception as error:  # those of the library's HTTP client among them
        raise unavailable(source.uri, _first_line(error)) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
