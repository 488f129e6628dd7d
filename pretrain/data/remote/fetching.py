"""One read of a remote file, tried again where it fails."""

from __future__ import annotations

import time
from collections.abc import Callable

from pretrain.config.remote import RemoteConfig
from pretrain.data.remote.addresses import Address
from pretrain.data.remote.opening import Opener
from pretrain.errors import UserError

MEND = "Look at the server and the network, or put the file back; the same command goes on from the last checkpoint."
Check = Callable[[bytes], str]  # what is wrong with the bytes; empty: nothing


class Missing(UserError):
    """What could not be had from where it lies."""


class Fetcher:
    """Reads ranges of remote files within a time limit. Safe for several threads at once."""

    def __init__(self, config: RemoteConfig) -> None:
        self.config, self._opener = config, Opener(config)

    def fetch(self, address: Address, start: int, size: int, check: Check, what: str) -> bytes:
        """At most `size` bytes from `start` on, of which `check` finds nothing wrong.

        Each try has an equal part of `timeout_seconds`, so that a connection that died silently is given up for a new one
        while there is time. Raises Missing, which names `what`, where no try succeeds, and UserError for what is not allowed.
        """
        config, tries, problem = self.config, 0, ""
        begun = time.monotonic()
        deadline, seconds = begun + config.timeout_seconds, config.timeout_seconds / (config.retries + 1)
        while tries <= config.retries and self._paused(tries, deadline):
            tries += 1
            limit = min(seconds, deadline - time.monotonic())
            try:
                data = self._opener.read(address, start, size, limit)
            except (FileNotFoundError, PermissionError) as error:  # it would only say so again
                raise Missing(f"{what}: {error.strerror or error}. {MEND}") from error
            except TimeoutError:
                problem = f"no answer in {limit:.3g} s"
            except OSError as error:
                problem = error.strerror or str(error)
            else:
                if not (problem := check(data)):
                    return data
        told = f"{tries} {'try' if tries == 1 else 'tries'}, {time.monotonic() - begun:.3g} s in all"
        raise Missing(f"{what}: {problem} ({told}). {MEND}")

    def _paused(self, tries: int, deadline: float) -> bool:
        """Wait before a further try. False, without a wait, where no time would be left for it."""
        pause = self.config.backoff_seconds * 2 ** (tries - 1) if tries else 0.0
        if time.monotonic() + pause >= deadline:
            return False
        time.sleep(pause)
        return True
