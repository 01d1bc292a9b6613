"""The Hugging Face hub: is it there, and a data set's file from it."""

import functools
import threading

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils import get_session

from support import UserError


@functools.cache
def silence(patience: float = 8.0) -> str:
    """Why the hub cannot be used; empty if it answers within `patience` seconds. Asked once."""
    # The hub's client alone tries a file five times for a minute each, and then says nothing of this.
    outcome: list[str] = []

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=patience).status_code
            outcome.append(f"status {status}" if status >= 500 else "")  # of a proxy, mostly
        except Exception as error:  # noqa: BLE001 - clients raise many kinds, all alike to the user
            outcome.append(type(error).__name__)

    # A thread, because looking up a name has no time limit; one that need not end for the program to end.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    reason = outcome[0] if outcome else f"nothing within {patience:g} s"
    return reason and f"the hub {constants.ENDPOINT} does not answer ({reason})"


def download(data: str, repository: str, file: str, advice: str, revision: str | None = None) -> str:
    """Fetch a data set's file, or find it among those fetched before; its path. Raises UserError."""
    silent = silence()
    try:
        return hf_hub_download(repository, file, repo_type="dataset", revision=revision,
                               local_files_only=bool(silent))
    except Exception as error:  # noqa: BLE001 - the client raises many kinds, all alike to the user
        reason = silent or f"the download failed: {type(error).__name__}"
        raise UserError(f"--data {data}: no \"{file}\" of {repository}; {reason}; {advice}") from None
