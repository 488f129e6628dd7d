"""fsspec's file systems of object stores, held to what the configuration allows. How often and how long a read is tried is
not theirs to decide, but `pretrain.data.remote.fetching`'s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pretrain.config.remote import RemoteConfig
from pretrain.errors import UserError

NewSocket = Callable[[Any], Any] | None


def s3(config: RemoteConfig, new_socket: NewSocket) -> Any:
    """Amazon's S3, or a server that speaks as it does."""
    from s3fs import S3FileSystem

    options: dict[str, Any] = {
        "retries": {"total_max_attempts": 1},
        "connect_timeout": config.timeout_seconds,  # a try's own limit is shorter
        "read_timeout": config.timeout_seconds,
        "max_pool_connections": 2 * config.in_flight,
    }
    if new_socket is not None:
        options["connector_args"] = {"socket_factory": new_socket}
    system = S3FileSystem(
        anon=config.anonymous, endpoint_url=config.endpoint, config_kwargs=options, skip_instance_cache=True
    )
    system.retries = 1
    return system


def gcs(config: RemoteConfig, new_socket: NewSocket) -> Any:
    """Google's Cloud Storage."""
    import aiohttp
    from fsspec.asyn import get_loop, sync
    from gcsfs.core import GCSFileSystem  # not the experimental one, which asks another service about the bucket

    class Once(GCSFileSystem):  # type: ignore[misc]
        async def _request(self, *args: Any, **options: Any) -> Any:
            return await GCSFileSystem._request.__wrapped__(self, *args, **options)  # without its six tries

    async def connector() -> aiohttp.TCPConnector:  # made within the loop that it belongs to
        return aiohttp.TCPConnector(limit=2 * config.in_flight, socket_factory=new_socket)

    async def refuse(*_: Any) -> None:
        raise UserError("gs://: the server redirects, which Google's does not; look at STORAGE_EMULATOR_HOST.")

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(refuse)
    return Once(
        token="anon" if config.anonymous else "google_default",  # never gcsfs' own cache of tokens, which is a pickle
        session_kwargs={"connector": sync(get_loop(), connector), "trace_configs": [trace]},
        skip_instance_cache=True,
    )
